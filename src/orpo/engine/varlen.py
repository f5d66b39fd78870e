"""Attention of a packed row in one variable-length kernel call.

A kernel of the flash-attention family reads flat lists of queries and keys, cut into sequences, and aligns
the last query of a sequence with its last key. A row's queries already stand in the order of its segments
(attention.py); one gather puts a prompt's keys before those of its rejected answer too. What gather and
kernel need is planned once per row, so no layer waits for the device. Which kernel is taken: backends.py.

Shape suffixes: H = heads, N = tokens in the row, K = gathered keys, M = prompt tokens that two segments read,
D = size of a head, Q = queries of one sequence.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orpo.engine.packing import Run

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A row's segments as kernels read them, on the row's device.

    Attributes:
        runs: The runs of the row, in order.
        query_starts: int32 [segments + 1], cumulative queries.
        key_starts: int32 [segments + 1], cumulative gathered keys.
        max_queries: Queries of the longest segment.
        max_keys: Keys of the longest segment.
        gather_K: Token of the row behind each gathered key, or None where that is the identity.
        place_N: First place of each token among the gathered keys.
        prompt_M: Prompt tokens that a second segment reads.
        again_M: Their second place among the gathered keys.
        block_masks: Masks of flex_attention by sliding window, made when first asked for.
    """

    runs: tuple[Run, ...]
    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
    gather_K: Tensor | None
    place_N: Tensor
    prompt_M: Tensor
    again_M: Tensor
    block_masks: dict[int | None, Any] = field(default_factory=dict)


class Options(NamedTuple):
    """What a layer asks of its attention besides query, key and value.

    Attributes:
        scale: Factor on the scores; None for 1 / sqrt(D).
        window: Sliding window in tokens, a query's own included; None for none.
        softcap: Scores become softcap * tanh(score / softcap); None for none.
        dropout: Probability of dropping an attention weight.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


class Case(NamedTuple):
    """What decides whether a backend can serve a layer."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_size: int
    value_size: int
    windowed: bool = False
    softcap: float | None = None
    dropout: bool = False


def plan_row(runs: Sequence[Run], device: torch.device | str) -> Plan:
    """Plan the attention of a row of `runs`, which together have at least one token."""
    queries, keys, gather, place, prompt, again = [], [], [], [], [], []
    token = key = 0
    for run in runs:
        own = run.prompt + run.chosen
        queries.append(own)
        keys.append(own)
        gather.append(np.arange(token, token + own))
        place.append(np.arange(key, key + own))
        key += own
        if run.rejected:
            queries.append(run.rejected)
            keys.append(run.prompt + run.rejected)
            prompt.append(np.arange(token, token + run.prompt))
            again.append(np.arange(key, key + run.prompt))
            gather += [prompt[-1], np.arange(token + own, token + own + run.rejected)]
            place.append(np.arange(key + run.prompt, key + run.prompt + run.rejected))
            key += run.prompt + run.rejected
        token += own + run.rejected
    starts = [np.cumsum([0, *queries]), np.cumsum([0, *keys])]
    places = [np.concatenate([np.arange(0), *parts]) for parts in (gather, place, prompt, again)]
    query_starts, key_starts, gather_K, place_N, prompt_M, again_M = to_device([*starts, *places], device)
    return Plan(
        tuple(runs), query_starts.int(), key_starts.int(), max(queries), max(keys),
        gather_K if prompt else None, place_N, prompt_M, again_M,
    )  # fmt: skip


def to_device(arrays: Sequence[np.ndarray], device: torch.device | str) -> tuple[Tensor, ...]:
    """Move int64 arrays in one copy that does not wait for the device."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    parts: tuple[Tensor, ...] = flat.to(device, non_blocking=True).split([len(array) for array in arrays])
    return parts


class _Gather(torch.autograd.Function):
    """Row order [N, H, D] -> gathered keys [K, H, D]; backward adds up the two readings of a prompt.

    The gradient of index_select would do so with atomic additions, slow in half precision.
    """

    @staticmethod
    def forward(ctx: Any, row_NHD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        assert plan.gather_K is not None
        return row_NHD.index_select(0, plan.gather_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KHD: Tensor) -> tuple[Tensor, None]:
        plan: Plan = ctx.plan
        grad_NHD = grad_KHD.index_select(0, plan.place_N)
        both_MHD = grad_NHD.index_select(0, plan.prompt_M) + grad_KHD.index_select(0, plan.again_M)
        return grad_NHD.index_copy_(0, plan.prompt_M, both_MHD), None


def gather_keys(row_NHD: Tensor, plan: Plan) -> Tensor:
    """Keys or values of a row in the order of its segments. [N, H, D] -> [K, H, D]."""
    if plan.gather_K is None:
        return row_NHD
    gathered: Tensor = _Gather.apply(row_NHD, plan)
    return gathered


class VarlenKernel:
    """A function of the flash-attention family, called by the argument names that its signature has.

    All take query, key, value, cumulative queries, cumulative keys and the two maxima first. Beyond these,
    torch 2.10's `varlen_attn` has `is_causal` alone; 2.11 has `scale` and `window_size` instead, whose
    (-1, 0) means causal; 2.12 adds `enable_gqa` and refuses fewer key heads without it. flash-attn has
    `softmax_scale`, `causal`, `window_size`, `softcap` and, up to its version 2, `dropout_p`.

    Source: https://docs.pytorch.org/docs/2.12/nn.attention.varlen.html,
    https://github.com/Dao-AILab/flash-attention/blob/main/flash_attn/flash_attn_interface.py.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        description: str = "",
        repeat_heads: bool = False,
        anywhere: bool = False,
    ) -> None:
        """Wrap `function`.

        Args:
            name: Short name.
            function: The kernel.
            description: What to print, with the version.
            repeat_heads: Repeat the key heads up to the query heads, for a kernel that does not share them.
            anywhere: Whether the function takes any device, dtype and head size.
        """
        self.name = name
        self.description = description or name
        self.function = function
        self.repeat_heads = repeat_heads
        self.anywhere = anywhere
        self.accepts = frozenset(inspect.signature(function).parameters)

    def refusal(self, case: Case) -> str | None:
        """Why the kernel cannot serve the case, or None."""
        size = case.head_size
        reasons = {
            "it knows no sliding window": case.windowed and "window_size" not in self.accepts,
            "it knows no softcap": case.softcap is not None and "softcap" not in self.accepts,
            "it knows no dropout": case.dropout and "dropout_p" not in self.accepts,
            "every query head has a key head of its own": self.repeat_heads and case.heads == case.key_heads,
        }
        if not self.anywhere:
            reasons |= {
                "it needs a CUDA device": case.device.type != "cuda",
                f"it needs half precision, not {case.dtype}": case.dtype not in HALF,
                f"head size {size} is not a multiple of 8 up to 256": size % 8 != 0 or size > 256,
                "keys and values differ in size": size != case.value_size,
            }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def __call__(
        self, query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, plan: Plan, options: Options
    ) -> Tensor:
        """Attend; key and value may have fewer heads. [N, H, D] -> [N, H, D]."""
        groups = query_NHD.shape[1] // key_NHD.shape[1]
        key_KHD, value_KHD = gather_keys(key_NHD, plan), gather_keys(value_NHD, plan)
        if self.repeat_heads:
            key_KHD, value_KHD = (x.repeat_interleave(groups, 1) for x in (key_KHD, value_KHD))
        scale, window, softcap, dropout = options
        if scale is not None and not self.accepts & {"scale", "softmax_scale"}:
            query_NHD, scale = query_NHD * (scale * query_NHD.shape[-1] ** 0.5), None
        named = {
            "scale": scale,
            "softmax_scale": scale,
            "causal": True,
            "is_causal": True,
            "window_size": (-1 if window is None else window - 1, 0),
            "enable_gqa": groups > 1 and not self.repeat_heads,
            "softcap": softcap or 0.0,
            "dropout_p": dropout,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        output = self.function(
            query_NHD, key_KHD, value_KHD,
            plan.query_starts, plan.key_starts, plan.max_queries, plan.max_keys,
            **{name: value for name, value in named.items() if name in self.accepts},
        )  # fmt: skip
        attended: Tensor = output[0] if isinstance(output, tuple) else output
        return attended


def varlen_reference(  # noqa: PLR0913 - the signature of the kernels it stands for
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` spelled out: any device and dtype, differentiable, slow.

    Args:
        query: [queries, H, D].
        key: [keys, H or fewer, D].
        value: Like `key`.
        cu_seq_q: [sequences + 1], cumulative queries.
        cu_seq_k: [sequences + 1], cumulative keys.
        max_q: Most queries of a sequence.
        max_k: Most keys of a sequence.
        scale: Factor on the scores; 1 / sqrt(D) by default.
        window_size: Keys seen left and right of a query's own, -1 for all; (-1, 0) is causal. The last query
            of a sequence is aligned with its last key.
        enable_gqa: Whether there may be fewer key heads than query heads.
        softcap: Scores become softcap * tanh(score / softcap); 0 for none.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        [queries, H, D] in the query's dtype.

    Raises:
        ValueError: Heads or lengths do not fit the other arguments.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not enable_gqa:
        raise ValueError(f"{query.shape[1]} query heads over {key.shape[1]} key heads need enable_gqa")
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    if (max(queries), max(keys)) != (max_q, max_k):
        raise ValueError(f"the longest sequences are {max(queries)} and {max(keys)}, not {max_q} and {max_k}")
    precise = torch.promote_types(query.dtype, torch.float32)
    left, right = (float("inf") if side < 0 else side for side in window_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        q_HQD = q.to(precise).transpose(0, 1)
        k_HKD, v_HKD = (x.to(precise).transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        score_HQK = q_HQD @ k_HKD.transpose(1, 2) * scale
        if softcap:
            score_HQK = softcap * torch.tanh(score_HQK / softcap)
        own_Q = torch.arange(len(q), device=query.device) + len(k) - len(q)
        ahead_QK = torch.arange(len(k), device=query.device) - own_Q[:, None]
        score_HQK = score_HQK.masked_fill((ahead_QK > right) | (ahead_QK < -left), float("-inf"))
        weight_HQK = F.dropout(score_HQK.softmax(-1), dropout_p)
        outputs.append((weight_HQK @ v_HKD).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs)
