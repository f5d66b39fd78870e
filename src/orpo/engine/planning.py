"""Which pairs make up each optimizer step, and how a step's pairs are spread over ranks and micro-batches.

A step is a fixed number of pairs; a micro-batch has a token budget. Every rank computes the same plan from
the pairs alone, without communication: a permutation per epoch, cut into steps, each step balanced over the
ranks by cost and filled into micro-batches, the same number on every rank. Pairs of one prompt come one after
the other, and those of a step that share tokens in one micro-batch, where they fit. Since the loss is divided
by the counts of the whole step, nothing within a step can change the gradient.
"""

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ATTENTION_COST = 1 / 4096
"""Cost of attending to one token more, relative to the cost of the token itself."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One micro-batch: the indices of its pairs in the step; `empty` if its rank has no pairs left."""

    pairs: tuple[int, ...]
    empty: bool = False


StepPlan = tuple[tuple[BatchPlan, ...], ...]
"""The micro-batches of one optimizer step, by rank; every rank has the same number."""


class Sharing(NamedTuple):
    """What the pairs of a step share with each other.

    Attributes:
        order: The pairs, those that share one after the other.
        beginnings: Tokens that each of them begins with and shares with the one before it in that order.
        sides: Numbers of the chosen and of the rejected side of each, the same for equal sides.
    """

    order: Sequence[int]
    beginnings: Sequence[int]
    sides: Sequence[tuple[int, int]]


def plan_epoch(
    num_pairs: int,
    pairs_per_step: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = False,
    prompts: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cut one epoch into optimizer steps.

    Args:
        num_pairs: Pairs of the data set.
        pairs_per_step: Pairs of a step.
        seed: Of the order.
        epoch: Counted from 0; each has an order of its own.
        shuffle: Whether to take another order than the data's.
        drop_last: Leave out what is too little for a step.
        prompts: The same number, from 0 on, for pairs of the same prompt: shuffled, these stay together,
            `pairs_per_step` of them at most. Shape [num_pairs].

    Returns:
        For each step, the data-set indices of its pairs, `pairs_per_step` of them; the last step may have
        fewer unless `drop_last`. A function of the arguments alone.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_pairs) if shuffle else np.arange(num_pairs)
    if shuffle and prompts is not None:
        order = _together(order, prompts, pairs_per_step)
    steps = [order[start : start + pairs_per_step] for start in range(0, num_pairs, pairs_per_step)]
    if drop_last and steps and len(steps[-1]) < pairs_per_step:
        steps.pop()
    return steps


def _together(order: np.ndarray, prompts: np.ndarray, most: int) -> np.ndarray:
    """Bring the pairs of a prompt to where the first of them stands, as the first of each `most` of them."""
    of_prompt = np.argsort(prompts[order], kind="stable")  # places in `order`, prompt by prompt
    counts = np.bincount(prompts)
    number = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.maximum.accumulate(np.where(number % most == 0, np.arange(len(order)), 0))
    together: np.ndarray = order[of_prompt[np.argsort(of_prompt[first], kind="stable")]]
    return together


def pair_sizes(lengths: np.ndarray, layout: str = "shared") -> np.ndarray:
    """Lines that each pair takes in a micro-batch, and their width. Shape [n, 3] -> [n, 2].

    A micro-batch takes all its lines times the largest width. With padding it has a line for each side, as
    wide as the longest side; without, its lines are counted as one token each.
    """
    prompt, chosen, rejected = lengths.T
    sides = 1 + (rejected > 0)
    if layout == "padded":
        return np.stack([sides, prompt + np.maximum(chosen, rejected)], 1)
    tokens = prompt * (sides if layout == "packed" else 1) + chosen + rejected
    return np.stack([tokens, np.ones_like(tokens)], 1)


def pair_tokens(lengths: np.ndarray, layout: str = "shared") -> np.ndarray:
    """Tokens each pair takes in a micro-batch of its own, padding included. Shape [n, 3] -> [n]."""
    sizes = pair_sizes(lengths, layout)
    tokens: np.ndarray = sizes[:, 0] * sizes[:, 1]
    return tokens


def pair_cost(lengths: np.ndarray, layout: str = "shared") -> np.ndarray:
    """Relative cost of each pair: its tokens, and the tokens these attend to. Shape [n, 3] -> [n]."""
    prompt, chosen, rejected = lengths.T.astype(float)
    attended = (prompt + chosen) ** 2 / 2 + rejected * (prompt + rejected / 2)
    cost: np.ndarray = pair_tokens(lengths, layout) + ATTENTION_COST * attended
    return cost


def plan_step(
    lengths: np.ndarray,
    *,
    num_ranks: int,
    tokens_per_micro_batch: int,
    layout: str = "shared",
    sharing: Sharing | None = None,
) -> StepPlan:
    """Spread the pairs of one step over ranks and micro-batches.

    Args:
        lengths: (prompt, chosen, rejected) tokens of every pair of the step, at least one. Shape [n, 3].
        num_ranks: Processes that share the step.
        tokens_per_micro_batch: Most tokens in one, padding included; a longer pair has one to itself.
        layout: Decides how many tokens a pair takes.
        sharing: What the pairs share with each other.
    """
    tokens = pair_tokens(lengths, layout).tolist()
    cost = pair_cost(lengths, layout).tolist()
    units = [_Unit((pair,), size) for pair, size in enumerate(tokens)]
    if sharing is not None:
        units = _units(lengths.tolist(), sharing, num_ranks, tokens_per_micro_batch)
    lines = pair_sizes(lengths, layout).tolist()
    sizes = [lines[unit.pairs[0]] if len(unit.pairs) == 1 else [unit.tokens, 1] for unit in units]
    costs = [sum(cost[i] - tokens[i] for i in unit.pairs) + unit.tokens for unit in units]
    shares = _balance(costs, num_ranks)
    ranks = [_fill_batches(share, sizes, tokens_per_micro_batch) for share in shares]
    num_batches = max(map(len, ranks))
    even = [_even_out(batches, num_batches, sizes, tokens_per_micro_batch) for batches in ranks]
    spare = BatchPlan((tokens.index(min(tokens)),), empty=True)

    def planned(batch: list[int]) -> BatchPlan:
        return BatchPlan(tuple(pair for unit in batch for pair in units[unit].pairs)) if batch else spare

    return tuple(tuple(map(planned, batches)) for batches in even)


class _Unit(NamedTuple):
    """Pairs that stay in one micro-batch, and the tokens that they take there, padding included."""

    pairs: tuple[int, ...]
    tokens: int


def _units(lengths: list[list[int]], sharing: Sharing, num_ranks: int, most: int) -> list[_Unit]:
    """Pairs that share stay together, as far as ranks have equal work and `most` tokens hold them."""
    whole = _cut(range(len(lengths)), lengths, sharing)
    fair = sum(unit.tokens for unit in whole) / num_ranks
    units: list[_Unit] = []
    start = 0
    for unit in whole:
        places = range(start, start + len(unit.pairs))
        start = places.stop
        parts = min(max(1, round(unit.tokens / fair)), len(places))

        def suffices(limit: int, places: range = places, parts: int = parts) -> bool:
            return len(_cut(places, lengths, sharing, limit)) <= parts

        even = bisect.bisect_left(range(unit.tokens), True, key=suffices) if parts > 1 else unit.tokens
        units += _cut(places, lengths, sharing, min(even, most))
    return sorted(units)


def stored_tokens(lengths: np.ndarray, sharing: Sharing) -> int:
    """Tokens that the pairs of a step take in one micro-batch, what they share once. `lengths` is [n, 3]."""
    return sum(unit.tokens for unit in _cut(range(len(lengths)), lengths.tolist(), sharing))


def _cut(
    places: range, lengths: list[list[int]], sharing: Sharing, most: float = float("inf")
) -> list[_Unit]:
    """Cut pairs at these places of the order into units that share, of at most `most` tokens if not one."""
    units: list[_Unit] = []
    sides: set[int] = set()  # of the last unit
    for place in places:
        pair, of_pair = sharing.order[place], sharing.sides[place]
        prompt, chosen, rejected = lengths[pair]
        alone = prompt + chosen + rejected
        more = rejected if of_pair[1] not in sides else 0
        if of_pair[0] not in sides:
            more += prompt + chosen - sharing.beginnings[place]
        if units and more < alone and units[-1].tokens + more <= most:
            before = units.pop()
            units.append(_Unit((*before.pairs, pair), before.tokens + more))
        else:
            units.append(_Unit((pair,), alone))
            sides = set()
        sides.update(of_pair)
    return units


def _balance(cost: list[float], num_shares: int) -> list[list[int]]:
    """Deal units, costliest first, each to the share that has the least so far."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0.0, share) for share in range(num_shares)]
    for unit in sorted(range(len(cost)), key=lambda i: -cost[i]):
        load, share = heapq.heappop(loads)
        shares[share].append(unit)
        heapq.heappush(loads, (load + cost[unit], share))
    return shares


def _fill_batches(units: list[int], sizes: list[list[int]], tokens_per_micro_batch: int) -> list[list[int]]:
    """First fit, widest and then longest first."""
    batches: list[list[int]] = []
    free_lines: list[int] = []
    for unit in sorted(units, key=lambda i: (-sizes[i][1], -sizes[i][0], i)):
        lines, width = sizes[unit]
        number = next((number for number, free in enumerate(free_lines) if free >= lines), None)
        if number is None:
            batches.append([])
            free_lines.append(tokens_per_micro_batch // width)  # no later unit of this one is wider
            number = len(batches) - 1
        batches[number].append(unit)
        free_lines[number] -= lines
    return batches


def _even_out(
    batches: list[list[int]], num_batches: int, sizes: list[list[int]], tokens_per_micro_batch: int
) -> list[list[int]]:
    """Bring a rank to `num_batches` micro-batches, as equal as can be: the longest one decides the memory.

    Padded lines stay with others of their width: there the fullest are split, and empty ones added.
    """
    units = [unit for batch in batches for unit in batch]
    tokens = {unit: sizes[unit][0] * sizes[unit][1] for unit in units}

    def longest(of: list[list[int]]) -> int:
        return max(sum(tokens[unit] for unit in batch) for batch in of)

    if all(sizes[unit][1] == 1 for unit in units):
        dealt = [[units[i] for i in share] for share in _balance(list(tokens.values()), num_batches)]
        fits = all(len(b) == 1 or sum(tokens[i] for i in b) <= tokens_per_micro_batch for b in dealt)
        if fits and (len(batches) < num_batches or longest(dealt) <= longest(batches)):
            return [sorted(batch) for batch in dealt]
    batches = [list(batch) for batch in batches]
    while len(batches) < num_batches and any(len(batch) > 1 for batch in batches):
        fullest = max((batch for batch in batches if len(batch) > 1), key=lambda b: sum(tokens[i] for i in b))
        batches.append(fullest[1::2])
        del fullest[1::2]
    return [sorted(batch) for batch in batches] + [[]] * (num_batches - len(batches))
