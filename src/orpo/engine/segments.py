"""The attention segments of a micro-batch, and attention one segment at a time: exact on any device.

The queries of a segment attend to the keys of its path: of a pair, prompt and chosen to themselves, rejected
to prompt and itself. Each is causal with the last query aligned to the last key, so no [N, N] mask exists,
and no floating-point operation is spent on tokens that may not see each other. Where a GPU has a kernel for
whole micro-batches, attention.py takes that.

Shape suffixes: H = heads, N = tokens of a micro-batch, S = those of one segment, Q/K = its queries/keys,
D = size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo.engine.packing import Segment
from orpo.engine.varlen import KernelLayout, kernel_layout

SEGMENTS = "segments"
"""Name of attention by segments, as a run prints it."""


@dataclass(slots=True)
class Segments:
    """The segments of one micro-batch, and what its layers share: masks, a layout, a count of their calls.

    Attributes:
        tree: The segments, in order.
        num_calls: Attention layers that have used these segments; a model that attends some other way leaves
            it 0.
        windows: Sliding windows that these layers asked for; None for none.
        backend: What served the last of these layers.
    """

    tree: Sequence[Segment]
    num_calls: int = 0
    windows: set[int | None] = field(default_factory=set)
    backend: str = SEGMENTS
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    _layout: KernelLayout | None = None

    def lengths(self) -> list[int]:
        """Queries of each segment, in order; they add up to N."""
        return [segment.tokens for segment in self.tree]

    def longest(self) -> int:
        """Keys of the longest segment."""
        return max(segment.shared + segment.tokens for segment in self.tree)

    def for_kernel(self, device: torch.device) -> KernelLayout:
        """What a kernel for whole micro-batches reads."""
        if self._layout is None or self._layout.query_starts.device != device:
            self._layout = kernel_layout(self.tree, device)
        return self._layout

    def mask(self, num_queries: int, num_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [Q, K] of a causal segment, or None where plain causal attention is the same.

        Args:
            num_queries: Q; the last query is aligned to the last key.
            num_keys: K, at least Q.
            window: A query sees the `window` last keys, its own included; None for all.
            like: Gives the dtype and the device.
        """
        if window is not None and window >= num_keys:
            window = None
        if num_queries == num_keys and window is None:
            return None
        key = (num_queries, num_keys, window, like.dtype, like.device)
        if key not in self._masks:
            offset = num_keys - num_queries
            allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=like.device).tril_(offset)
            if window is not None:
                allowed = allowed.triu_(offset - window + 1)
            mask = torch.zeros(num_queries, num_keys, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(~allowed, float("-inf"))
        return self._masks[key]


class Options(NamedTuple):
    """What a layer asks of its attention besides query, key and value.

    Attributes:
        scale: Factor on the scores; None for 1 / sqrt(D).
        window: Sliding window in tokens, a query's own included; None for none.
        softcap: Scores become softcap * tanh(score / softcap); None for none.
        dropout: Probability of dropping an attention weight.
        sinks_H: A score for each head that takes its share of the weights and adds nothing to the output;
            None for none.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks_H: Tensor | None = None


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options
) -> Tensor:
    """Attention, one call per segment. [1, H, N, D] over [1, H / groups, N, D] -> [1, N, H, D]."""
    lengths = segments.lengths()
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    paths: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for (_, trunk, shared), (query_S, key_S, value_S) in zip(segments.tree, parts, strict=True):
        if shared:
            key_S = torch.cat([paths[trunk][0][:, :, :shared], key_S], dim=2)
            value_S = torch.cat([paths[trunk][1][:, :, :shared], value_S], dim=2)
        paths.append((key_S, value_S))
        mask = segments.mask(query_S.shape[2], key_S.shape[2], options.window, query)
        outputs.append(_attend_segment(query_S, key_S, value_S, mask, options))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)


def _attend_segment(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options
) -> Tensor:
    """One causal segment. [1, H, Q, D] over [1, H / groups, K, D] -> [1, H, Q, D]."""
    scale, _, softcap, dropout, sinks_H = options
    if softcap is None and sinks_H is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if mask is None:
        mask = torch.full(score.shape[2:], float("-inf"), dtype=score.dtype, device=score.device).triu_(1)
    score = score + mask
    precise = torch.promote_types(query.dtype, torch.float32)
    if sinks_H is not None:
        sink = sinks_H.to(precise).view(1, -1, 1, 1).expand(-1, -1, score.shape[2], -1)
        score = torch.cat([score.to(precise), sink], -1)
    weight = score.softmax(-1, dtype=precise)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weight, dropout) @ value
