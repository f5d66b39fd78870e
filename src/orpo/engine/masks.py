"""Which windows and chunks a model's masks have that its attention is not told of.

Packed training has no masks: attention sees segments, and hears of a window as an argument. So a window that
a layer has in its mask alone would be lost. transformers makes masks from functions of two positions. A
forward pass of a few tokens shows them, each with the layers under its mask, and they are asked about
positions as far apart as training will have.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

RECORDER = "orpo_recorder"
FARTHEST = 2**17
"""Positions that are asked about where nobody knows how long the data is."""

Limit = tuple[str, int]
"""What a mask has, and from which distance on."""


class _Record:
    """What has been seen in the pass being run."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.masks: dict[int, tuple[Tensor, Limit | None]] = {}
        self.untold: set[Limit] = set()


_record = _Record(0)
"""Masks and layers have no other way to learn it."""


@torch.no_grad()
def untold_limits(
    configs: list[Any],
    forward: Callable[..., Any],
    ids_BN: Tensor,
    longest: int | None,
) -> list[Limit]:
    """Limits below `longest` that masks have and that the attention of a layer under them is not told of.

    Args:
        configs: Those that the layers of a model read the name of their attention from.
        forward: Its plain forward, in evaluation mode.
        ids_BN: A few tokens.
        longest: Longest side there will be, in tokens; None: any.
    """
    global _record
    _record = record = _Record(longest or FARTHEST)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = RECORDER
        forward(input_ids=ids_BN, use_cache=False)
    except Exception:  # a model that does not take it has attention of its own, which the probe tries
        pass
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _record = _Record(0)
    return sorted(record.untold)


def limit_of(visible: Callable[..., Tensor], longest: int) -> Limit | None:
    """What a mask function hides of the positions before, within `longest` of them; None: nothing.

    Args:
        visible: Of batch, head, query position and key position.
        longest: At least 1.
    """
    zero = torch.tensor(0)
    position_N = torch.arange(longest)
    neighbours = visible(zero, zero, position_N[1:], position_N[:-1]).expand(longest - 1)
    if not neighbours.all():
        return "attention in chunks", int((~neighbours).nonzero()[0]) + 1
    seen_N = visible(zero, zero, position_N[-1], position_N.flip(0)).expand(longest)
    return None if seen_N.all() else ("sliding window", int((~seen_N).nonzero()[0]))


def _mask(
    batch_size: int, q_length: int, kv_length: int, mask_function: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    """A mask that the layers under it can be told by."""
    mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool).tril()
    _record.masks[id(mask)] = mask, limit_of(mask_function, _record.longest)
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Notes what a layer is told; what comes out has the right shape, and nothing else."""
    known = _record.masks.get(id(attention_mask))
    limit = None if known is None else known[1]
    if limit is not None and limit != ("sliding window", sliding_window):
        _record.untold.add(limit)
    batch, heads, length = query.shape[:3]
    return value.new_zeros(batch, length, heads, value.shape[-1]), None


AttentionInterface.register(RECORDER, _attention)
AttentionMaskInterface.register(RECORDER, _mask)
