"""Prepare a model to score packed pairs, in the fastest layout that is exact for it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from orpo.engine.memory import default_logits_memory_mib
from orpo.engine.probe import layout_problem
from orpo.engine.scorer import Scorer, base_model
from orpo.engine.segments import SEGMENTS
from orpo.errors import ModelError
from orpo.settings.config import LayoutName, Objective


@dataclass(frozen=True, slots=True)
class Preparation:
    """How a model was prepared: its layout of micro-batches, lines to print, and what attends, by name."""

    layout: LayoutName
    notices: tuple[str, ...]
    attention: str = SEGMENTS


def prepare_model(
    model: nn.Module,
    objective: Objective,
    *,
    layout: LayoutName | None = None,
    logits_memory_mib: int | None = None,
    probe: bool = True,
) -> Preparation:
    """Make `model(batch=..., denominators=...)` score a micro-batch; the model is changed in place.

    Args:
        model: A causal language model of transformers, or a PEFT model around one, on its device.
        objective: What is minimised.
        layout: Take this layout; by default the fastest that the probe finds exact.
        logits_memory_mib: Largest chunk of logits alive, in MiB; None: as the device likes it.
        probe: Whether to compare with the plain model; without it the first layout allowed is trusted.

    Raises:
        ModelError: The model is no causal language model, or no layout reproduces its own log-probabilities.
    """
    inner = base_model(model)
    if inner.get_output_embeddings() is None:
        raise ModelError(f"{type(inner).__name__} has no language-model head to score tokens with")
    memory = logits_memory_mib or default_logits_memory_mib(next(model.parameters()).device)
    scorer = Scorer(inner, objective, memory)
    scorer.install()
    candidates: list[LayoutName] = [layout] if layout else ["shared", "packed", "padded"]
    if not probe:
        scorer.use_layout(candidates[0])
        return Preparation(candidates[0], ())
    problems: list[str] = []
    for candidate in candidates:
        scorer.use_layout(candidate)
        problem = layout_problem(model, scorer, candidate)
        if problem is None:
            return Preparation(
                candidate, tuple(_fallback_notice(inner, candidate, problems)), scorer.attention
            )
        problems.append(problem)
    raise ModelError(
        f"{type(inner).__name__}: layout `{candidates[-1]}` does not reproduce the model's own loss "
        f"({problems[-1]}); it does something to its hidden states or logits that this package does not know"
    )


def _fallback_notice(model: PreTrainedModel, layout: LayoutName, problems: list[str]) -> Iterator[str]:
    if problems:
        means = {"packed": "prompts are not shared", "padded": "pairs are padded and prompts not shared"}[
            layout
        ]
        yield f"{type(model).__name__}: layout `{layout}`, {means}: {problems[0]}"
