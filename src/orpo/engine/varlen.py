"""Attention of a micro-batch in one call of torch's variable-length kernel.

The kernel reads flat lists of queries and keys, cut into sequences, and aligns the last query of a sequence
with its last key. The queries of a micro-batch are already stored in the order of its segments (segments.py);
one gather puts the keys of each segment's path one after the other. What gather and kernel need is laid out
once per micro-batch, so no layer waits for the device. When the kernel is taken: attention.py.

Shape suffixes: H = heads, N = tokens of a micro-batch, K = gathered keys, M = tokens that several segments
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

from orpo.engine.packing import Segment
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
        first_N: Index of each token among the gathered keys, where its own segment reads it.
        shared_M: Tokens that other segments read too.
        again: For each further reading, which of `shared_M` are read, no token twice, and where these are
            among the gathered keys.
    """

    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
    gather_K: Tensor | None
    first_N: Tensor
    shared_M: Tensor
    again: tuple[tuple[Tensor, Tensor], ...]


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


def kernel_layout(tree: Sequence[Segment], device: torch.device | str) -> KernelLayout:
    """Lay out the attention of a micro-batch with these segments, which together have at least one token."""
    paths: list[np.ndarray] = []
    token = 0
    for own, trunk, shared in tree:
        path = np.arange(token, token + own)
        paths.append(np.concatenate([paths[trunk][:shared], path]) if shared else path)
        token += own
    gather = np.concatenate(paths)
    shared = np.array([segment.shared for segment in tree])
    keys = np.array([len(path) for path in paths])
    is_own = np.arange(len(gather)) - np.repeat(np.cumsum(keys) - keys, keys) >= np.repeat(shared, keys)
    again = np.flatnonzero(~is_own)
    again = again[np.argsort(gather[again], kind="stable")]
    shared_tokens, number, count = np.unique(gather[again], return_inverse=True, return_counts=True)
    reading = np.arange(len(again)) - np.repeat(np.cumsum(count) - count, count)
    further = [reading == n for n in range(max(count, default=0))]
    starts = [np.cumsum([0, *(segment.tokens for segment in tree)]), np.cumsum([0, *keys])]
    indices = [gather, np.flatnonzero(is_own), shared_tokens]
    indices += [part[at] for at in further for part in (number, again)]
    query_starts, key_starts, gather_K, first_N, shared_M, *pairs = _to_device([*starts, *indices], device)
    return KernelLayout(
        query_starts.int(), key_starts.int(), max(segment.tokens for segment in tree), int(keys.max()),
        gather_K if len(again) else None, first_N, shared_M, tuple(zip(pairs[::2], pairs[1::2], strict=True)),
    )  # fmt: skip


def _to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> tuple[Tensor, ...]:
    """Move int64 arrays in one copy that does not wait for the device."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    parts: tuple[Tensor, ...] = flat.to(device, non_blocking=True).split([len(array) for array in arrays])
    return parts


class _Gather(torch.autograd.Function):
    """Keys as stored [N, H, D] -> gathered keys [K, H, D]; backward adds up all readings of a token.

    The gradient of index_select would do so with atomic additions, slow in half precision, in any order.
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
        precise = torch.promote_types(grad_KHD.dtype, torch.float32)
        sum_MHD = grad_NHD.index_select(0, layout.shared_M).to(precise)
        for number, again in layout.again:
            sum_MHD.index_add_(0, number, grad_KHD.index_select(0, again).to(precise))
        return grad_NHD.index_copy_(0, layout.shared_M, sum_MHD.to(grad_KHD.dtype)), None


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
