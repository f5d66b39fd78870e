"""Whether a run may resume from a checkpoint: only with the settings and the data that made it.

A resumed run equals an uninterrupted one, so a change that could move a weight is refused, with the list of
differences. `force` lets those pass that take effect from there on; what is built into the weights or the
optimizer's state of a checkpoint cannot be changed.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import Tensor, nn

from orpo.console import say
from orpo.data.dataset import TokenizedDataset, prompt_index
from orpo.engine.scorer import base_model
from orpo.engine.steps import Step
from orpo.errors import OrpoError, RunError
from orpo.settings.config import FACTS, Objective, is_in_use
from orpo.settings.facts import Facts
from orpo.training.arguments import ORPOConfig

Result = TypeVar("Result")
_NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Of a model's configuration: what does not change the numbers, or is compared elsewhere."""
_NOT_OF_ADAPTERS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
}  # fmt: skip
"""Of an adapter's configuration: the same."""
_TRAINED, _BASE, _DTYPE = "trained_weights", "base_weights", "weights_dtype"
_ORDER, _ANY_ORDER = "order", "each pair for itself"
"""How pairs follow each other; version 0.2.0 wrote nothing about it, and had this order alone."""
_WITH_STATE = ("reduce_lr_on_plateau", "greedy")
"""Schedules that remember more than the step, so that a checkpoint's cannot be exchanged for another."""


def run_identity(
    args: ORPOConfig, pairs: Any, model: Any = None, first: Objective | None = None
) -> dict[str, Any]:
    """Everything that decides where a run goes, as values JSON can hold; no secret is in it.

    Args:
        args: Of the run.
        pairs: It trains on.
        model: It trains, as loaded: on one process at least with all its weights, to name those that no
            checkpoint holds.
        first: Its first objective, whose reference may be the model as loaded.
    """
    settings = args.plain_settings()
    fixed = {name: value for name, value in settings.items() if _is_fixed(name, settings)}
    identity = fixed | {"pairs_per_step": args.pairs_per_step}
    if isinstance(pairs, TokenizedDataset):
        repeated = args.pairs_per_step > 1 and int(prompt_index(pairs).max(initial=-1)) + 1 < len(pairs)
        identity |= {
            "num_pairs": len(pairs),
            _ORDER: "pairs of a prompt together" if repeated else _ANY_ORDER,
            "pairs_checksum": zlib.crc32(np.ascontiguousarray(pairs.tokens).data),
            "pairs_parts": _parts_checksum(pairs),
        }
    if model is not None:
        sizes = [weight.numel() for weight in model.parameters() if weight.requires_grad]
        identity[_TRAINED] = f"{sum(sizes):,} in {len(sizes)} tensors"
        identity |= _architecture(model)
        identity |= {} if args.use_peft else _adapters(model)
        identity[_DTYPE] = ", ".join(sorted({str(weight.dtype)[6:] for weight in model.parameters()}))
        is_reference = first is not None and first.needs_reference
        if args.process_index == 0 and (base := _base_weights(model, is_reference)) is not None:
            identity[_BASE] = base
    return identity


def _architecture(model: nn.Module) -> dict[str, Any]:
    """What the model's configuration says of how it computes: a checkpoint's weights are of that alone."""
    config = base_model(model).config.get_text_config()
    settings = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return {
        f"config.{name}": value
        for name, value in settings.items()
        if not name.endswith("_token_id") and name not in _NOT_COMPUTED
    }


def _parts_checksum(pairs: TokenizedDataset) -> int:
    """Of where the parts of pairs begin and end: prompt, answers, earlier turns and assistant spans."""
    checksum = 0
    for bounds in (pairs.offsets, pairs.contexts, pairs.spans, pairs.span_offsets):
        checksum = zlib.crc32(np.ascontiguousarray(bounds, np.int64).data, checksum)
    return checksum


def _adapters(model: nn.Module) -> dict[str, Any]:
    """What adapters that no setting describes say of themselves: those of a folder, or of a script."""
    found = {}
    for adapter, config in getattr(model, "peft_config", {}).items():
        for name, value in config.to_dict().items():
            if name not in _NOT_OF_ADAPTERS:
                value = sorted(value) if isinstance(value, set) else value
                found[f"adapter.{adapter}.{name}"] = json.loads(json.dumps(value, default=str))
    return found


def _base_weights(model: nn.Module, is_reference: bool) -> str | None:
    """A name made from the weights that no checkpoint holds, those under an adapter or of a reference.

    None where there are none, or where this process has only a part of them.
    """
    weights = list(model.named_parameters())
    frozen = [(name, weight) for name, weight in weights if not weight.requires_grad]
    digest = xxhash.xxh3_64()
    for name, weight in frozen or (weights if is_reference else []):
        if weight.is_meta or hasattr(weight, "ds_tensor"):
            return None
        add_weight(digest, name, weight)
    return digest.hexdigest() if frozen or is_reference else None


def add_weight(digest: Any, name: str, weight: Tensor) -> None:
    """Have a checksum of xxhash take in a weight: its name, type, shape and bytes."""
    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _is_fixed(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether another value of a setting would make another model."""
    return is_in_use(name, settings) and FACTS.get(name, Facts()).resume in ("fixed", "built in")


def check_changes(
    made: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], *, force: bool = False
) -> list[str]:
    """Stop where the run that made `made` was another one; one that names no settings may pass.

    Args:
        made: A checkpoint or a run directory.
        before: What decided where that run went.
        now: The same of this run.
        force: Let changes pass that take effect from there on.

    Returns:
        Names of what has changed, where that is allowed.

    Raises:
        RunError: With the list of differences.
    """
    before = before or {}
    if "num_pairs" in before:
        before = {_ORDER: _ANY_ORDER, **before}
    changed = [name for name in sorted(now.keys() & before.keys()) if before[name] != now[name]]
    if not changed:
        return []
    differences = "; ".join(f"{name}: {before[name]} -> {now[name]}" for name in changed)
    if not force:
        raise RunError(
            f"{made} was made with other settings ({differences}); set them back, name another"
            " output_dir for a fresh run, or set force: true"
        )
    built_in = [name for name in changed if not _takes_effect(name, before, now)]
    if built_in:
        raise RunError(
            f"{made} was made with another {', '.join(built_in)} ({differences}), which force: true cannot"
            " change; set it back, or train a fresh run with resume_from_checkpoint: false"
        )
    say(f"force: {made} was made with other settings, which change from here on: {differences}")
    return changed


def _takes_effect(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name in ("learning_rate", "lr_scheduler_type"):
        return not {before.get("lr_scheduler_type"), now.get("lr_scheduler_type")} & {*_WITH_STATE}
    return name != _TRAINED and FACTS.get(name, Facts()).resume != "built in"


class StreamCheck:
    """That a resumed run reads what its checkpoint was trained on, of a stream, which is not known before."""

    def __init__(self, read: int | None) -> None:
        """Expect what a checkpoint has read, as its `read` was; None: anything, as before the first step."""
        self._expected, self.read = read, read or 0

    def check(self, step: Step, *, force: bool) -> None:
        """Look at a step that is about to be trained on.

        Raises:
            RunError: It comes after other pairs than those of the checkpoint.
        """
        expected, self._expected, self.read = self._expected, None, step.read
        if expected in (None, step.read_before):
            return
        problem = "the stream did not give the pairs that the checkpoint was trained on"
        if not force:
            raise RunError(
                f"{problem}; set the data, its settings and its template back, name another output_dir for a"
                " fresh run, or set force: true"
            )
        say(f"force: {problem}; those that follow are trained on")


def first_rank_decides(args: ORPOConfig, decide: Callable[[], Result]) -> Result:
    """What the first rank finds in the run directory, for all ranks: they must not find different things.

    Raises:
        OrpoError: What `decide` has raised, on every rank.
    """
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [decide()]
        except OrpoError as error:
            found = [error]
    if args.world_size > 1:
        broadcast_object_list(found)
    if isinstance(found[0], OrpoError):
        raise found[0]
    return found[0]  # type: ignore[no-any-return]
