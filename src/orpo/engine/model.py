"""Prepare a model to score packed pairs, in the fastest layout that is exact for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from orpo.engine.adapters import refuse_adapters
from orpo.engine.memory import default_logits_memory_mib
from orpo.engine.packing import SHARE_FROM
from orpo.engine.probe import layout_problem, measure
from orpo.engine.router import router_loss_of
from orpo.engine.scorer import Scorer, base_model
from orpo.engine.segments import SEGMENTS
from orpo.engine.steps import BatchSettings
from orpo.errors import ModelError
from orpo.settings.config import LayoutName, Objective


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a model was prepared.

    Attributes:
        layout: Of its micro-batches.
        notices: Lines to print.
        attention: What attends, by name.
        logit_scale: The factor that the model has on its logits.
        has_transform: Whether layers stand between its backbone and its vocabulary matrix.
        router_loss: Whether training adds a router loss.
        share_from: Fewest tokens that the beginnings of two pairs share; None: each pair is for itself.
    """

    layout: LayoutName
    notices: tuple[str, ...]
    attention: str = SEGMENTS
    logit_scale: float = 1.0
    has_transform: bool = False
    router_loss: bool = False
    share_from: int | None = SHARE_FROM

    def batches(self, objective: Objective, tokens_per_micro_batch: int, **more: Any) -> BatchSettings:
        """How pairs become micro-batches of this model; `more` are further fields of `BatchSettings`."""
        return BatchSettings(
            objective, self.layout, tokens_per_micro_batch, share_from=self.share_from, **more
        )


LAYER_DROPS = ("layerdrop", "layer_drop")
"""Names under which models keep what share of their layers they leave out in training."""


def prepare_model(
    model: nn.Module,
    *,
    layout: LayoutName | None = None,
    logits_memory_mib: int | None = None,
    probe: bool = True,
    longest: int | None = None,
    found: Preparation | None = None,
    trains: bool = True,
) -> Preparation:
    """Make `model(batch=..., denominators=...)` score a micro-batch; the model is changed in place.

    Args:
        model: A causal language model of transformers, or a PEFT model around one, on its device.
        layout: Take this layout; by default the fastest that the probe finds exact.
        logits_memory_mib: Largest chunk of logits alive, in MiB; None: as the device likes it.
        probe: Whether to compare with the plain model; without it the first layout allowed is trusted.
        longest: Longest side there will be, in tokens; None: any. A window that it cannot reach does not
            matter.
        found: What another rank has found out about this model; nothing is run.
        trains: Whether layers may be left out at random, as in training alone.

    Raises:
        ModelError: The model is no causal language model, its adapter cannot be trained here, or no layout
            reproduces its own log-probabilities.
    """
    inner = base_model(model)
    if inner.get_output_embeddings() is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head to score tokens with")
    refuse_adapters(model, inner)
    for name, module in inner.named_modules():
        if isinstance(module, _BatchNorm):
            raise ModelError(
                f"{type(inner).__name__}: {name} is a batch normalisation, which mixes all texts of a"
                " micro-batch while it trains; its loss depends on what is packed together"
            )
    memory = logits_memory_mib or default_logits_memory_mib(
        on_cpu=next(model.parameters()).device.type != "cuda"
    )
    scorer = Scorer(inner, memory)
    scorer.install()
    if found is not None:
        scorer.use_layout(found.layout, longest)
        scorer.logit_scale, scorer.has_transform = found.logit_scale, found.has_transform
        scorer.router_loss = router_loss_of(inner) if found.router_loss else None
        return found
    notices = measure(model, scorer, longest)
    candidates: list[LayoutName] = [layout] if layout else ["shared", "packed", "padded"]
    problems: list[str] = []
    for candidate in candidates:
        scorer.use_layout(candidate, longest)
        problem = _left_out(inner) if trains and candidate != "padded" else None
        if problem is None and probe:
            problem = layout_problem(model, scorer, candidate)
        if problem is None:
            notices += _fallback_notice(inner, candidate, problems)
            return Preparation(
                candidate,
                tuple(notices),
                scorer.attention,
                scorer.logit_scale,
                scorer.has_transform,
                scorer.router_loss is not None,
                scorer.share_from,
            )
        problems.append(problem)
    raise ModelError(
        f"{type(inner).__name__}: layout `{candidates[-1]}` does not reproduce the model's own loss "
        f"({problems[-1]}); it does something to its hidden states or logits that this package does not know"
    )


def _left_out(model: nn.Module) -> str | None:
    """Why attention cannot be followed from layer to layer: some are left out, others in each pass."""
    for name, module in model.named_modules():
        for key in LAYER_DROPS:
            share = getattr(module, key, None)
            if isinstance(share, float) and share > 0:
                return f"{name} leaves layers out at random ({key}: {share}); disable_dropout turns that off"
    return None


def _fallback_notice(model: PreTrainedModel, layout: LayoutName, problems: list[str]) -> Iterator[str]:
    if problems:
        means = {"packed": "prompts are not shared", "padded": "pairs are padded and prompts not shared"}[
            layout
        ]
        yield f"{type(model).__name__}: layout `{layout}`, {means}: {problems[0]}"
