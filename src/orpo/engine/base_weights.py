"""What the base model of an adapter was: a few entries of its weights, kept beside the adapter.

An adapter folder names its base and holds none of it. Other weights under the same name load without a word,
and everything that is scored, written or merged with them is of another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orpo.run.directory import BASE_WEIGHTS, read_json, write_json

_ENTRIES, _MOST = 4, 256
"""Entries of a weight, and weights, that are kept."""
_SHARE = 0.01
"""Largest share of entries that may differ, where rounding to two precisions may."""


def save_base_weights(folder: Path, model: nn.Module) -> None:
    """Write entries of the weights under an adapter; nothing where this process has only parts of them."""
    kept = {
        name: {"dtype": str(weight.dtype).removeprefix("torch."), "entries": _entries(weight).tolist()}
        for name, weight in _base(model)
    }
    if kept:
        write_json(folder / BASE_WEIGHTS, kept)


def other_base(folder: Path, model: nn.Module) -> str | None:
    """What to say where the weights under a loaded adapter are not those it was trained on; None otherwise.

    Precisions may differ: values are compared in the coarser one.
    """
    kept: dict[str, Any] = read_json(folder / BASE_WEIGHTS, {})
    differing = compared = 0
    for name, weight in _base(model):
        if name not in kept:
            continue
        dtype = getattr(torch, kept[name]["dtype"])
        coarser = max(dtype, weight.dtype, key=lambda one: torch.finfo(one).eps)
        before, now = torch.tensor(kept[name]["entries"]).to(coarser), _entries(weight).to(coarser)
        limit = 0.0 if dtype == weight.dtype else 2 * torch.finfo(coarser).eps
        differing += int((~torch.isclose(before.float(), now.float(), rtol=limit, atol=0.0)).sum())
        compared += len(before)
    if differing <= _SHARE * compared:
        return None
    return (
        f"{folder}: its base model has other weights than the one that the adapter was trained on"
        f" ({differing} of {compared} entries that were compared); what it says is of neither"
    )


def _base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Some of the weights under an adapter, by name: those that are not trained, and here as a whole."""
    frozen = [
        (name, weight)
        for name, weight in model.named_parameters()
        if not weight.requires_grad and weight.is_floating_point() and weight.numel()
    ]
    if any(one.is_meta or hasattr(one, "ds_tensor") or isinstance(one, DTensor) for _, one in frozen):
        return
    yield from frozen[:: -(-len(frozen) // _MOST) or 1]


def _entries(weight: Tensor) -> Tensor:
    """A few entries, from the first to the last, in float32 on the CPU. Shape [entries]."""
    flat = weight.detach().flatten()
    where = torch.linspace(0, len(flat) - 1, min(_ENTRIES, len(flat)), dtype=torch.float64).long()
    return flat[where.to(flat.device)].float().cpu()
