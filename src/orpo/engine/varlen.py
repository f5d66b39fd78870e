"""Attention of a micro-batch in one call of torch's variable-length kernel.

The kernel reads flat lists of queries and keys, cut into sequences, and aligns the last query of a sequence
with its last key. The queries of a micro-batch are already stored in the order of its segments (segments.py);
one gather puts a prompt's keys before those of its rejected answer too. What gather and kernel need is laid
out once per micro-batch, so no layer waits for the device. When the kernel is taken: attention.py.

Shape suffixes: H = heads, N = tokens of a micro-batch, K = gathered keys, M = prompt tokens that two segments
read, D = size of a head.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from orpo.engine.packing import Run
from orpo.engine.precision import HALF


@dataclass(frozen=True, slots=True, eq=False)
class KernelLayout:
    """The segments of a micro-batch as the kernel reads them, on its device.

    Attributes:
        query_starts: int32 [segments + 1], cumulative queries.
        key_starts: int32 [segments + 1], cumulative gathered keys.
        max_queries: Queries of the longest segment.
        max_keys: Keys of the longest segment.
        gather_K: Index of the token behind each gathered key, or None where that is the identity.
        first_N: Index of each token among the gathered keys, where it is read first.
        prompt_M: Prompt tokens that a second segment reads.
        again_M: Index of these among the gathered keys, where they are read again.
    """

    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
    gather_K: Tensor | None
    first_N: Tensor
    prompt_M: Tensor
    again_M: Tensor


class Case(NamedTuple):
    """What decides whether the kernel can serve a layer."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_size: int
    value_size: int
    windowed: bool = False
    softcap: bool = False
    dropout: bool = False


def kernel_layout(runs: Sequence[Run], device: torch.device | str) -> KernelLayout:
    """Lay out the attention of a micro-batch of `runs`, which together have at least one token."""
    queries, keys, gather, first, prompt, again = [], [], [], [], [], []
    token = key = 0
    for run in runs:
        own = run.prompt + run.chosen
        queries.append(own)
        keys.append(own)
        gather.append(np.arange(token, token + own))
        first.append(np.arange(key, key + own))
        key += own
        if run.rejected:
            queries.append(run.rejected)
            keys.append(run.prompt + run.rejected)
            prompt.append(np.arange(token, token + run.prompt))
            again.append(np.arange(key, key + run.prompt))
            gather += [prompt[-1], np.arange(token + own, token + own + run.rejected)]
            first.append(np.arange(key + run.prompt, key + run.prompt + run.rejected))
            key += run.prompt + run.rejected
        token += own + run.rejected
    starts = [np.cumsum([0, *queries]), np.cumsum([0, *keys])]
    indices = [np.concatenate([np.arange(0), *parts]) for parts in (gather, first, prompt, again)]
    query_starts, key_starts, gather_K, first_N, prompt_M, again_M = _to_device([*starts, *indices], device)
    return KernelLayout(
        query_starts.int(), key_starts.int(), max(queries), max(keys),
        gather_K if prompt else None, first_N, prompt_M, again_M,
    )  # fmt: skip


def _to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> tuple[Tensor, ...]:
    """Move int64 arrays in one copy that does not wait for the device."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    parts: tuple[Tensor, ...] = flat.to(device, non_blocking=True).split([len(array) for array in arrays])
    return parts


class _Gather(torch.autograd.Function):
    """Keys as stored [N, H, D] -> gathered keys [K, H, D]; backward adds up the two readings of a prompt.

    The gradient of index_select would do so with atomic additions, slow in half precision.
    """

    @staticmethod
    def forward(ctx: Any, stored_NHD: Tensor, layout: KernelLayout) -> Tensor:
        ctx.layout = layout
        assert layout.gather_K is not None
        return stored_NHD.index_select(0, layout.gather_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KHD: Tensor) -> tuple[Tensor, None]:
        layout: KernelLayout = ctx.layout
        grad_NHD = grad_KHD.index_select(0, layout.first_N)
        both_MHD = grad_NHD.index_select(0, layout.prompt_M) + grad_KHD.index_select(0, layout.again_M)
        return grad_NHD.index_copy_(0, layout.prompt_M, both_MHD), None


def gather_keys(stored_NHD: Tensor, layout: KernelLayout) -> Tensor:
    """Keys or values in the order of the segments. [N, H, D] -> [K, H, D]."""
    if layout.gather_K is None:
        return stored_NHD
    gathered: Tensor = _Gather.apply(stored_NHD, layout)
    return gathered


class VarlenKernel:
    """Torch's `varlen_attn`: one call for a whole micro-batch.

    Its `window_size` of (-1, 0) means causal. Torch 2.11 takes fewer key heads than query heads as they are,
    2.12 and later ask for `enable_gqa` with them.

    Source: https://docs.pytorch.org/docs/2.12/nn.attention.varlen.html.
    """

    def __init__(self, function: Callable[..., Any] = varlen_attn, *, anywhere: bool = False) -> None:
        """Wrap `function`; `anywhere`: one that takes any device, precision and head size."""
        self.function = function
        self.anywhere = anywhere
        self.names_groups = "enable_gqa" in inspect.signature(function).parameters

    @property
    def description(self) -> str:
        """What to print, with the version."""
        return f"torch {torch.__version__} varlen_attn"

    def refusal(self, case: Case) -> str | None:
        """Why the kernel cannot serve the case, or None."""
        size = case.head_size
        reasons = {"it knows no softcap": case.softcap, "it knows no dropout": case.dropout}
        if not self.anywhere:
            reasons |= {
                "it needs a CUDA device": case.device.type != "cuda",
                f"it needs half precision, not {case.dtype}": case.dtype not in HALF,
                f"head size {size} is not a multiple of 8 up to 256": size % 8 != 0 or size > 256,
                "keys and values differ in size": size != case.value_size,
            }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def __call__(
        self,
        query_NHD: Tensor,
        key_NHD: Tensor,
        value_NHD: Tensor,
        layout: KernelLayout,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attend; key and value may have fewer heads. [N, H, D] -> [N, H, D].

        Args:
            query_NHD: Queries in the order in which they are stored.
            key_NHD: Keys in the same order.
            value_NHD: Like `key_NHD`.
            layout: Of the micro-batch.
            scale: Factor on the scores; None for 1 / sqrt(D).
            window: Sliding window in tokens, a query's own included; None for none.
        """
        grouped = query_NHD.shape[1] != key_NHD.shape[1]
        attended: Tensor = self.function(
            query_NHD, gather_keys(key_NHD, layout), gather_keys(value_NHD, layout),
            layout.query_starts, layout.key_starts, layout.max_queries, layout.max_keys,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            **({"enable_gqa": grouped} if self.names_groups else {}),
        )  # fmt: skip
        return attended
