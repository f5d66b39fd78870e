"""Pack preference pairs into micro-batches in which each prompt is stored, and attended to, once.

A micro-batch is what goes through the model in one forward and backward pass. A pair becomes one run of
tokens, `prompt ++ chosen ++ rejected`, and a micro-batch is a list of such runs without padding. Both sides
continue the same prompt: they share its positions and its attention, and never see each other
(attention.py). What the loss reads is an explicit list of scored tokens, because the last prompt token
predicts two targets, the first of each response, which a label aligned with the input could not say. Sharing
the prefix follows https://arxiv.org/abs/2410.20305.

Two slower layouts serve models that cannot share: `packed` (each side its own run) and `padded` (each side
its own sequence, for models without a replaceable attention function).

Shape suffixes: B = sequences (1 unless padded), N = tokens in a sequence, T = scored tokens, P = pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from orpo.pairs import TokenizedPair
from orpo.settings.config import LayoutName, Objective


class Role(IntEnum):
    """What a scored token stands for: earlier turns, or one of the two responses."""

    CONTEXT = 0
    CHOSEN = 1
    REJECTED = 2


class Run(NamedTuple):
    """Tokens of one run: `prompt ++ chosen` is causal, `rejected` follows `prompt` unaware of `chosen`."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: what the model reads in a forward pass, and which predictions the loss scores.

    Scored tokens come in two blocks: first the responses, pair by pair (chosen, then rejected), so that a
    chunk of them can hold whole pairs; then the context tokens, whose weight in the loss needs no pair to be
    complete.

    Attributes:
        input_ids_BN: Token ids.
        position_ids_BN: Positions; both sides of a pair continue their prompt's.
        attention_mask_BN: 1 for tokens, 0 for padding; None where nothing is padded.
        runs: Its runs, in order; empty for the padded layout.
        source_T: Index into the flattened [B * N] hidden states that predicts the target.
        target_T: Token id predicted.
        pair_T: Pair within this micro-batch, in [0, P).
        role_T: A `Role`.
        nll_weight_T: Weight of the token in the sum of the NLL; 0 for rejected tokens.
        response_lengths: For each pair, its (chosen, rejected) scored tokens; rejected is 0 for an NLL-only
            pair.
        index: For each pair, its index in the data set.
        nll_weight: Sum of the weights of its NLL tokens.
        objective: What it was packed for, and what is minimised.
        empty: Whether it only keeps a rank in step with the others: it is computed and weighs nothing.
        reference_PS: For each pair, the mean log-probability of its (chosen, rejected) response by the
            reference model, where the objective has one.
    """

    input_ids_BN: Tensor
    position_ids_BN: Tensor
    attention_mask_BN: Tensor | None
    runs: tuple[Run, ...]
    source_T: Tensor
    target_T: Tensor
    pair_T: Tensor
    role_T: Tensor
    nll_weight_T: Tensor
    response_lengths: tuple[tuple[int, int], ...]
    index: tuple[int, ...]
    nll_weight: float
    objective: Objective
    empty: bool = False
    reference_PS: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """Its pairs, NLL-only ones included; 0 if it is empty."""
        return 0 if self.empty else len(self.response_lengths)

    @property
    def num_preferences(self) -> int:
        """Pairs with both sides: its part of the odds term's denominator."""
        return 0 if self.empty else sum(rejected > 0 for _, rejected in self.response_lengths)

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the NLL is over and that come before the answer: the prompt's, for most."""
        return len(self.target_T) - sum(map(sum, self.response_lengths))

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads, padding included."""
        return self.input_ids_BN.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the micro-batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in _TENSORS
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Return the micro-batch in page-locked memory; the DataLoader calls this."""
        pinned = {n: value.pin_memory() for n in _TENSORS if (value := getattr(self, n)) is not None}
        return replace(self, **pinned)


_TENSORS = (
    "input_ids_BN", "position_ids_BN", "attention_mask_BN",
    "source_T", "target_T", "pair_T", "role_T", "nll_weight_T", "reference_PS",
)  # fmt: skip


def nll_ranges(pair: TokenizedPair, objective: Objective) -> list[tuple[int, int]]:
    """Ranges [start, stop) of `prompt ++ chosen` that the NLL is over: of the context, then the response."""
    response = len(pair.prompt) + pair.chosen_context
    context: list[tuple[int, int]] = []
    if objective.nll_on != "response" and objective.nll_weight > 0:
        spans = [(0, response)] if objective.nll_on == "full" else pair.assistant_spans
        context = [(max(start, 1), stop) for start, stop in spans]  # nothing predicts the first token
    return [*context, (response, len(pair.prompt) + len(pair.chosen))]


def num_nll_tokens(pair: TokenizedPair, objective: Objective) -> int:
    """Tokens of a pair that the NLL is over."""
    return sum(stop - start for start, stop in nll_ranges(pair, objective))


def runs_rejected(objective: Objective, score_rejected: bool | None) -> bool:
    """Whether rejected sides are run: as asked, or by default where the objective compares."""
    return objective.preference_weight > 0 if score_rejected is None else score_rejected


class _Side(NamedTuple):
    """One side of a pair as laid out: its ids, and the index of each in the flattened [B * N] tokens."""

    ids: np.ndarray
    flat_index: np.ndarray
    response_start: int


def pack(
    pairs: Sequence[TokenizedPair],
    objective: Objective,
    *,
    layout: LayoutName = "shared",
    index: Sequence[int] | None = None,
    empty: bool = False,
    score_rejected: bool | None = None,
) -> PackedBatch:
    """Lay `pairs` out in one micro-batch, in the order given.

    Args:
        pairs: At least one pair; every response has at least one token, every prompt too.
        objective: What is minimised.
        layout: `shared`, `packed` or `padded`.
        index: The pairs' indices in the data set; their order here by default.
        empty: Build a micro-batch that is computed but weighs nothing.
        score_rejected: Whether the rejected sides are run; by default, where the objective compares.
    """
    sides = _lay_out(pairs, layout, not empty and runs_rejected(objective, score_rejected))
    scored = _ScoredTokens(objective, empty)
    for number, (pair, (chosen, rejected)) in enumerate(zip(pairs, sides.of_pair, strict=True)):
        scored.add(number, pair, chosen, rejected)
    return PackedBatch(
        input_ids_BN=torch.from_numpy(sides.input_ids_BN),
        position_ids_BN=torch.from_numpy(sides.position_ids_BN),
        attention_mask_BN=None if sides.mask_BN is None else torch.from_numpy(sides.mask_BN),
        runs=tuple(sides.runs),
        **scored.tensors(),
        response_lengths=tuple(scored.lengths),
        index=tuple(range(len(pairs)) if index is None else index),
        nll_weight=scored.nll_weight,
        objective=objective,
        empty=empty,
    )


class _Layout(NamedTuple):
    input_ids_BN: np.ndarray
    position_ids_BN: np.ndarray
    mask_BN: np.ndarray | None
    runs: list[Run]
    of_pair: list[tuple[_Side, _Side | None]]


def _lay_out(pairs: Sequence[TokenizedPair], layout: LayoutName, with_rejected: bool) -> _Layout:
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    runs: list[Run] = []
    of_pair: list[tuple[_Side, _Side | None]] = []
    offset = 0
    for pair in pairs:
        prompt, chosen = np.asarray(pair.prompt, np.int64), np.asarray(pair.chosen, np.int64)
        rejected = np.asarray(pair.rejected if with_rejected else (), np.int64)
        p, c, r = len(prompt), len(chosen), len(rejected)
        side_ids = np.concatenate([prompt, chosen])
        flat_index = np.arange(offset, offset + p + c)
        first = _Side(side_ids, flat_index, p + pair.chosen_context)
        second = None
        ids.append(side_ids)
        positions.append(np.arange(p + c))
        if layout == "shared":
            runs.append(Run(p, c, r))
            offset += p + c
            if r:
                flat_index = np.concatenate([flat_index[:p], np.arange(offset, offset + r)])
                ids.append(rejected)
                positions.append(np.arange(p, p + r))
                offset += r
        else:
            runs.append(Run(p, c, 0))
            offset += p + c
            if r:
                flat_index = np.arange(offset, offset + p + r)
                ids.append(np.concatenate([prompt, rejected]))
                positions.append(np.arange(p + r))
                runs.append(Run(p, r, 0))
                offset += p + r
        if r:
            second = _Side(np.concatenate([prompt, rejected]), flat_index, p + pair.rejected_context)
        of_pair.append((first, second))
    if layout == "padded":
        return _pad(ids, of_pair)
    return _Layout(np.concatenate(ids)[None], np.concatenate(positions)[None], None, runs, of_pair)


def _pad(ids: list[np.ndarray], of_pair: list[tuple[_Side, _Side | None]]) -> _Layout:
    """Give each sequence a line of its own, padded on the right (with id 0, which the mask hides)."""
    width = max(len(sequence) for sequence in ids)
    input_ids_BN = np.zeros((len(ids), width), np.int64)
    mask_BN = np.zeros((len(ids), width), np.int64)
    for line, sequence in enumerate(ids):
        input_ids_BN[line, : len(sequence)] = sequence
        mask_BN[line, : len(sequence)] = 1
    line = 0
    padded: list[tuple[_Side, _Side | None]] = []
    for first, second in of_pair:
        sides = []
        for side in (first, second):
            if side is not None:
                sides.append(side._replace(flat_index=line * width + np.arange(len(side.ids))))
                line += 1
        padded.append((sides[0], sides[1] if len(sides) > 1 else None))
    positions_BN = np.broadcast_to(np.arange(width), input_ids_BN.shape).copy()
    return _Layout(input_ids_BN, positions_BN, mask_BN, [], padded)


class _ScoredTokens:
    """Collects the scored tokens of a micro-batch, responses and context apart."""

    def __init__(self, objective: Objective, empty: bool) -> None:
        self.objective = objective
        self.empty = empty
        self.lengths: list[tuple[int, int]] = []
        self.nll_weight = 0.0
        self._responses: list[tuple[np.ndarray, ...]] = []
        self._context: list[tuple[np.ndarray, ...]] = []

    def add(self, number: int, pair: TokenizedPair, chosen: _Side, rejected: _Side | None) -> None:
        *spans, response = (np.arange(*span) for span in nll_ranges(pair, self.objective))
        context = np.concatenate([np.arange(0), *spans])
        weight = self._token_weight(len(context) + len(response))
        self.nll_weight += weight * (len(context) + len(response))
        self._responses.append(self._score(chosen, response, number, Role.CHOSEN, weight))
        num_rejected = 0
        if rejected is not None:
            targets = np.arange(rejected.response_start, len(rejected.ids))
            self._responses.append(self._score(rejected, targets, number, Role.REJECTED, 0.0))
            num_rejected = len(targets)
        if len(context):
            self._context.append(self._score(chosen, context, number, Role.CONTEXT, weight))
        self.lengths.append((len(response), num_rejected))

    def _token_weight(self, num_tokens: int) -> float:
        if self.empty:
            return 0.0
        return 1.0 if self.objective.nll_reduction == "token" else 1.0 / num_tokens

    @staticmethod
    def _score(
        side: _Side, targets: np.ndarray, number: int, role: Role, weight: float
    ) -> tuple[np.ndarray, ...]:
        n = len(targets)
        return (
            side.flat_index[targets - 1],
            side.ids[targets],
            np.full(n, number),
            np.full(n, int(role)),
            np.full(n, weight, np.float32),
        )

    def tensors(self) -> dict[str, Tensor]:
        columns = zip(*self._responses, *self._context, strict=True)
        names = ("source_T", "target_T", "pair_T", "role_T", "nll_weight_T")
        return {
            name: torch.from_numpy(np.concatenate(column))
            for name, column in zip(names, columns, strict=True)
        }
