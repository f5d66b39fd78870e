"""Attention of a packed row through flex_attention: the segments as a block mask.

It serves what variable-length kernels do not: float32, soft-capped scores, keys and values of different
sizes. The block mask is computed from the lengths of the runs; the dense [N, N] mask never exists.

Shape suffixes: H = heads, N = tokens in the row, D = size of a head, L = N padded to whole blocks, J =
blocks.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo.engine.packing import Run
from orpo.engine.varlen import HALF, Case, Options, Plan, to_device

BLOCK = 128
"""Tokens in a block of the mask."""

MAX_KERNELS = 64
"""Compiled kernels kept, one per padded length and kind of layer; past the limit torch would go dense."""


class FlexKernel:
    """flex_attention under the mask of a row's segments."""

    name = "flex"

    def __init__(self, *, compiled: bool = True) -> None:
        """Wrap flex_attention; uncompiled it runs anywhere, forward only, with dense scores."""
        self.description = f"torch {torch.__version__} flex_attention"
        self.compiled = compiled

    def refusal(self, case: Case) -> str | None:
        """Why flex_attention cannot serve the case, or None."""
        reasons = {"it knows no dropout": case.dropout}
        if self.compiled:
            reasons |= {
                "it needs a CUDA device": case.device.type != "cuda",
                "it needs Triton": importlib.util.find_spec("triton") is None,
                f"it knows no {case.dtype}": case.dtype not in (*HALF, torch.float32),
            }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def __call__(
        self, query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, plan: Plan, options: Options
    ) -> Tensor:
        """Attend; key and value may have fewer heads. [N, H, D] -> [N, H, D]."""
        num_tokens = len(query_NHD)
        padding = (0, 0, 0, padded_length(num_tokens) - num_tokens)
        query, key, value = (F.pad(x.transpose(0, 1)[None], padding) for x in (query_NHD, key_NHD, value_NHD))
        output: Tensor = _flex_attention(self.compiled)(
            query, key, value,
            score_mod=None if options.softcap is None else _softcap_mod(options.softcap),
            block_mask=_block_mask_of(plan, options.window),
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        return output[0, :, :num_tokens].transpose(0, 1)


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_KERNELS)
    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def padded_length(num_tokens: int) -> int:
    """Whole blocks that hold a row; two lengths per doubling, so that few kernels are compiled."""
    step = max(BLOCK, 1 << max(0, (num_tokens - 1).bit_length() - 2))
    return -(-num_tokens // step) * step


def _block_mask_of(plan: Plan, window: int | None) -> Any:
    """The block mask of a plan, shared by its layers."""
    if window not in plan.block_masks:
        plan.block_masks[window] = block_mask(plan.runs, window, plan.query_starts.device)
    return plan.block_masks[window]


def block_mask(runs: Sequence[Run], window: int | None, device: torch.device | str) -> Any:
    """The segments of a row as a `BlockMask` over its padded length.

    A query sees two stretches of keys: of its prompt, if it belongs to a rejected answer, and of its own
    segment up to itself. How many keys of a block they cover says whether the block is skipped, masked or
    taken whole.
    """
    from torch.nn.attention.flex_attention import BlockMask

    prompt_start_L, prompt_stop_L, own_start_L = to_device(_visible(runs, window), device)
    length = len(own_start_L)
    token_L = torch.arange(length, device=own_start_L.device)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= prompt_start_L[query]) & (key < prompt_stop_L[query])
        return in_prompt | ((key >= own_start_L[query]) & (key <= query))

    block_J = token_L[::BLOCK]

    def covered(start_L: Tensor, stop_L: Tensor) -> Tensor:
        first_LJ = torch.maximum(start_L[:, None], block_J)
        return (torch.minimum(stop_L[:, None], block_J + BLOCK) - first_LJ).clamp_min(0)

    covered_LJ = covered(prompt_start_L, prompt_stop_L) + covered(own_start_L, token_L + 1)
    by_block = covered_LJ.view(len(block_J), BLOCK, len(block_J))
    whole = by_block.amin(1) == BLOCK
    masked = (by_block.amax(1) > 0) & ~whole
    return BlockMask.from_kv_blocks(
        *_ordered(masked), *_ordered(whole), BLOCK, mask_mod, seq_lengths=(length, length)
    )


def _ordered(marked: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked blocks in each line, and the blocks with the marked ones first."""
    order = marked.int().argsort(dim=1, descending=True, stable=True).int()
    return marked.sum(1, dtype=torch.int32)[None, None], order[None, None]


def _visible(runs: Sequence[Run], window: int | None) -> list[np.ndarray]:
    """The prompt keys [start, stop) and the first own key that each query sees; padding sees itself."""
    length = padded_length(sum(sum(run) for run in runs))
    reach = length if window is None else window
    token_L = np.arange(length)
    prompt_start_L, prompt_stop_L, own_start_L = (
        np.zeros_like(token_L),
        np.zeros_like(token_L),
        token_L.copy(),
    )
    token = 0
    for run in runs:
        rejected = token + run.prompt + run.chosen
        stop = rejected + run.rejected
        for start, end in ((token, rejected), (rejected, stop)):
            own_start_L[start:end] = np.maximum(start, token_L[start:end] - reach + 1)
        # A rejected answer continues the positions of its prompt, so its window skips the chosen one.
        seen_until = token_L[rejected:stop] - run.chosen
        prompt_start_L[rejected:stop] = np.maximum(token, seen_until - reach + 1)
        prompt_stop_L[rejected:stop] = token + run.prompt
        token = stop
    return [prompt_start_L, prompt_stop_L, own_start_L]
