"""Pack preference pairs into micro-batches in which what they share is stored, and attended to, once.

A micro-batch is what goes through the model in one forward and backward pass. Its tokens form trees: a
segment continues the beginning of an earlier one, sees that and itself, and nothing else (attention.py). Both
sides of a pair continue one prompt; pairs share the answers that they have in common, as the pairs of a
ranked list do, and long beginnings of their prompts, as a system prompt is. Nothing is padded. What the loss
reads is an explicit list of scored tokens, because the last prompt token predicts the first token of each
response, which a label aligned with the input could not say. Sharing the prefix of a pair follows
https://arxiv.org/abs/2410.20305.

Two slower layouts serve models that cannot share: `packed` (each side its own segment) and `padded` (each
side its own sequence, for models without a replaceable attention function).

Shape suffixes: B = sequences (1 unless padded), N = tokens in a sequence, T = scored tokens, U = distinct
ones, P = pairs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from orpo.engine.planning import Sharing
from orpo.pairs import TokenizedPair
from orpo.settings.config import LayoutName, Objective


class Role(IntEnum):
    """What a scored token stands for: earlier turns, or one of the two responses."""

    CONTEXT = 0
    CHOSEN = 1
    REJECTED = 2


SHARE_FROM = 16
"""Fewest tokens of a beginning that pairs share: a segment more costs attention some time (LOG.md)."""


class Segment(NamedTuple):
    """Consecutive tokens, which continue the path of an earlier segment.

    A path is all that the last token of a segment sees: the first `shared` tokens of its trunk's path, then
    its own. Each of its own tokens sees the path as far as itself.

    Attributes:
        tokens: Its own tokens; at least 1.
        trunk: Index of the segment whose path it continues; -1: none.
        shared: Tokens of that path it continues; 0 without a trunk.
    """

    tokens: int
    trunk: int = -1
    shared: int = 0


def pair_segments(lengths: Iterable[tuple[int, int, int]]) -> tuple[Segment, ...]:
    """The segments of pairs that share nothing with each other, from tokens of prompt, chosen, rejected."""
    tree: list[Segment] = []
    for prompt, chosen, rejected in lengths:
        tree.append(Segment(prompt + chosen))
        if rejected:
            tree.append(Segment(rejected, len(tree) - 1, prompt))
    return tuple(tree)


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
        tree: Its segments, in the order of their tokens; empty for the padded layout.
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
        distinct: Which scored tokens are the same one; None where pairs share none.
    """

    input_ids_BN: Tensor
    position_ids_BN: Tensor
    attention_mask_BN: Tensor | None
    tree: tuple[Segment, ...]
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
    distinct: "Distinct | None" = None

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
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the micro-batch in page-locked memory; the DataLoader calls this."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            name: change(value) for name in _TENSORS if (value := getattr(self, name)) is not None
        }
        distinct = self.distinct
        if distinct is not None:
            distinct = replace(distinct, first_U=change(distinct.first_U), of_T=change(distinct.of_T))
        return replace(self, **changed, distinct=distinct)


_TENSORS = (
    "input_ids_BN", "position_ids_BN", "attention_mask_BN",
    "source_T", "target_T", "pair_T", "role_T", "nll_weight_T", "reference_PS",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Distinct:
    """The distinct predictions behind scored tokens, in the order in which these first name them.

    Attributes:
        first_U: Index of a scored token that is this prediction.
        of_T: Index of the prediction behind each scored token.
        clusters: Consecutive pairs whose answers share predictions: how many scored tokens their answers
            have, and how many distinct ones.
    """

    first_U: Tensor
    of_T: Tensor
    clusters: tuple[tuple[int, int], ...]


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
    share_from: int | None = SHARE_FROM,
    index: Sequence[int] | None = None,
    empty: bool = False,
    score_rejected: bool | None = None,
) -> PackedBatch:
    """Lay `pairs` out in one micro-batch, in the order given.

    Args:
        pairs: At least one pair; every response has at least one token, every prompt too. In layout `shared`
            a pair shares its beginning with the pair before it, and sides with any before it.
        objective: What is minimised.
        layout: `shared`, `packed` or `padded`.
        share_from: Fewest tokens that the beginnings of two pairs share; None: each pair is for itself.
        index: The pairs' indices in the data set; their order here by default.
        empty: Build a micro-batch that is computed but weighs nothing.
        score_rejected: Whether the rejected sides are run; by default, where the objective compares.
    """
    with_rejected = not empty and runs_rejected(objective, score_rejected)
    sides = _lay_out(pairs, layout, with_rejected, share_from)
    scored = _ScoredTokens(objective, empty)
    for number, (pair, (chosen, rejected)) in enumerate(zip(pairs, sides.of_pair, strict=True)):
        scored.add(number, pair, chosen, rejected)
    return PackedBatch(
        input_ids_BN=torch.from_numpy(sides.input_ids_BN),
        position_ids_BN=torch.from_numpy(sides.position_ids_BN),
        attention_mask_BN=None if sides.mask_BN is None else torch.from_numpy(sides.mask_BN),
        tree=sides.tree,
        **scored.tensors(),
        response_lengths=tuple(scored.lengths),
        index=tuple(range(len(pairs)) if index is None else index),
        nll_weight=scored.nll_weight,
        objective=objective,
        empty=empty,
        distinct=scored.distinct() if sides.pairs_share else None,
    )


class _Layout(NamedTuple):
    input_ids_BN: np.ndarray
    position_ids_BN: np.ndarray
    mask_BN: np.ndarray | None
    tree: tuple[Segment, ...]
    of_pair: list[tuple[_Side, _Side | None]]
    pairs_share: bool = False


def _lay_out(
    pairs: Sequence[TokenizedPair], layout: LayoutName, with_rejected: bool, share_from: int | None
) -> _Layout:
    tree = _Tree(share_from if layout == "shared" else None)
    of_pair: list[tuple[_Side, _Side | None]] = []
    for pair in pairs:
        prompt, chosen = np.asarray(pair.prompt, np.int64), np.asarray(pair.chosen, np.int64)
        rejected = np.asarray(pair.rejected if with_rejected else (), np.int64)
        p = len(prompt)
        first_ids = np.concatenate([prompt, chosen])
        first = tree.place_chosen(first_ids, p)
        second = None
        if len(rejected):
            ids = np.concatenate([prompt, rejected])
            place = tree.place_rejected(ids, p, first) if layout == "shared" else tree.add(ids)
            second = _Side(ids, tree.paths[place], p + pair.rejected_context)
        of_pair.append((_Side(first_ids, tree.paths[first], p + pair.chosen_context), second))
    if layout == "padded":
        return _pad(tree.ids, of_pair)
    positions = [np.arange(segment.shared, segment.shared + segment.tokens) for segment in tree.segments]
    return _Layout(
        np.concatenate(tree.ids)[None], np.concatenate(positions)[None], None, tuple(tree.segments), of_pair,
        tree.pairs_share,
    )  # fmt: skip


class _Tree:
    """Sides laid out one after the other, with what they share stored once.

    Attributes:
        segments: The segments so far.
        ids: The own tokens of each.
        paths: For each, the index of every token of its path among all tokens.
        size: All tokens.
        pairs_share: Whether two pairs share something.
    """

    def __init__(self, share_from: int | None) -> None:
        self.segments: list[Segment] = []
        self.ids: list[np.ndarray] = []
        self.paths: list[np.ndarray] = []
        self.pairs_share = False
        self._share_from = share_from
        self.size = 0
        self._known: dict[tuple[int, bytes], int] = {}
        self._last: tuple[int, np.ndarray] | None = None

    def place_chosen(self, ids: np.ndarray, prompt: int) -> int:
        """The segment at whose end the chosen side `ids` ends, its first `prompt` tokens the prompt."""
        place = self._find(ids, prompt)
        if place is None:
            trunk, shared = -1, 0
            if self._share_from is not None and self._last is not None:
                trunk, before = self._last
                shared = min(shared_beginning(ids, before), prompt)
                shared = shared if shared >= max(self._share_from, 1) else 0
                self.pairs_share |= shared > 0
            place = self._keep(ids, prompt, self.add(ids, trunk, shared))
        self._last = place, ids
        return place

    def place_rejected(self, ids: np.ndarray, prompt: int, chosen: int) -> int:
        """The same of the rejected side of the pair whose chosen side ends at `chosen`."""
        place = self._find(ids, prompt)
        return self._keep(ids, prompt, self.add(ids, chosen, prompt)) if place is None else place

    def add(self, ids: np.ndarray, trunk: int = -1, shared: int = 0) -> int:
        """Add a segment with the path `ids`, of which the first `shared` are those of the trunk's."""
        while trunk >= 0 and shared <= self.segments[trunk].shared:
            trunk = self.segments[trunk].trunk
        own = np.arange(self.size, self.size + len(ids) - shared)
        self.size += len(own)
        self.segments.append(Segment(len(own), trunk, shared))
        self.ids.append(ids[shared:])
        self.paths.append(np.concatenate([self.paths[trunk][:shared], own]) if shared else own)
        return len(self.segments) - 1

    def _find(self, ids: np.ndarray, prompt: int) -> int | None:
        """Where the same side stands already."""
        place = None if self._share_from is None else self._known.get((prompt, ids.tobytes()))
        self.pairs_share |= place is not None
        return place

    def _keep(self, ids: np.ndarray, prompt: int, place: int) -> int:
        if self._share_from is not None:
            self._known[prompt, ids.tobytes()] = place
        return place


def shared_beginning(ids: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with that are the same."""
    length = min(len(ids), len(other))
    differ = np.flatnonzero(ids[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def find_sharing(pairs: Sequence[TokenizedPair], share_from: int, *, with_rejected: bool = True) -> Sharing:
    """The order in which `pairs` share the most when they are laid out in it, and what they share.

    In the order of their chosen sides as sequences of numbers, no earlier side has more in common with a
    side than the one before it.

    Args:
        pairs: Those of a step.
        share_from: Fewest tokens of a beginning that pairs share.
        with_rejected: Whether rejected sides are run.
    """
    chosen = [np.concatenate([pair.prompt, pair.chosen]).astype(">i8") for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: chosen[i].tobytes())
    numbers: dict[tuple[int, bytes], int] = {}

    def number_of(ids: np.ndarray, prompt: int) -> int:
        return numbers.setdefault((prompt, ids.tobytes()), len(numbers))

    beginnings, sides = [], []
    for place, number in enumerate(order):
        pair, prompt = pairs[number], len(pairs[number].prompt)
        shared = 0
        if place:
            shared = min(shared_beginning(chosen[number], chosen[order[place - 1]]), prompt)
        beginnings.append(shared if shared >= share_from else 0)
        second = -1 - place  # what is not run is not shared
        if with_rejected:
            second = number_of(np.concatenate([pair.prompt, pair.rejected]).astype(">i8"), prompt)
        sides.append((number_of(chosen[number], prompt), second))
    return Sharing(order, beginnings, sides)


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
    return _Layout(input_ids_BN, positions_BN, mask_BN, (), padded)


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
            side.flat_index[targets],
        )

    def tensors(self) -> dict[str, Tensor]:
        columns = zip(*self._responses, *self._context, strict=True)
        names = ("source_T", "target_T", "pair_T", "role_T", "nll_weight_T")
        return {
            name: torch.from_numpy(np.concatenate(column))
            for name, column in zip(names, columns, strict=False)
        }

    def distinct(self) -> Distinct:
        """Scored tokens are the same prediction where their targets are the same token of the micro-batch."""
        places = np.concatenate([columns[-1] for columns in (*self._responses, *self._context)])
        _, first, of_T = np.unique(places, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        of_T = number[of_T]
        clusters: list[tuple[int, int]] = []  # where the scored and the distinct tokens of each begin
        start = seen = 0
        for lengths in self.lengths:
            mine = of_T[start : start + sum(lengths)]
            clusters.append((start, seen))
            while clusters[-1][1] > mine.min():
                clusters.pop()
            start, seen = start + sum(lengths), max(seen, int(mine.max()) + 1)
        bounds = np.diff([*clusters, (start, seen)], axis=0).tolist()
        return Distinct(
            torch.from_numpy(first[order]), torch.from_numpy(of_T), tuple((t, u) for t, u in bounds)
        )
