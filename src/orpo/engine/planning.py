"""Which pairs make up each optimizer step, and how a step's pairs are spread over ranks and micro-batches.

A step is a fixed number of pairs; a micro-batch has a token budget. Every rank computes the same plan from
the lengths alone, without communication: a permutation per epoch, cut into steps, each step balanced over the
ranks by cost and filled into micro-batches, the same number on every rank. Since the loss is divided by the
counts of the whole step, nothing here can change the gradient.
"""

import heapq
from dataclasses import dataclass

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


def plan_epoch(
    num_pairs: int,
    pairs_per_step: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    drop_last: bool = False,
) -> list[np.ndarray]:
    """Cut one epoch into optimizer steps.

    Returns:
        For each step, the data-set indices of its pairs, `pairs_per_step` of them; the last step may have
        fewer unless `drop_last`. A function of the arguments alone.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_pairs) if shuffle else np.arange(num_pairs)
    steps = [order[start : start + pairs_per_step] for start in range(0, num_pairs, pairs_per_step)]
    if drop_last and steps and len(steps[-1]) < pairs_per_step:
        steps.pop()
    return steps


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
) -> StepPlan:
    """Spread the pairs of one step over ranks and micro-batches.

    Args:
        lengths: (prompt, chosen, rejected) tokens of every pair of the step, at least one. Shape [n, 3].
        num_ranks: Processes that share the step.
        tokens_per_micro_batch: Most tokens in one, padding included; a longer pair has one to itself.
        layout: Decides how many tokens a pair takes.
    """
    tokens = pair_tokens(lengths, layout).tolist()
    sizes = pair_sizes(lengths, layout).tolist()
    shares = _balance(pair_cost(lengths, layout).tolist(), num_ranks)
    ranks = [_fill_batches(share, sizes, tokens_per_micro_batch) for share in shares]
    num_batches = max(map(len, ranks))
    spare = tokens.index(min(tokens))
    return tuple(tuple(_even_out(batches, num_batches, tokens, spare)) for batches in ranks)


def _balance(cost: list[float], num_shares: int) -> list[list[int]]:
    """Deal pairs, costliest first, each to the share that has the least so far."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [(0.0, share) for share in range(num_shares)]
    for pair in sorted(range(len(cost)), key=lambda i: -cost[i]):
        load, share = heapq.heappop(loads)
        shares[share].append(pair)
        heapq.heappush(loads, (load + cost[pair], share))
    return shares


def _fill_batches(pairs: list[int], sizes: list[list[int]], tokens_per_micro_batch: int) -> list[list[int]]:
    """First fit, widest and then longest first."""
    batches: list[list[int]] = []
    free_lines: list[int] = []
    for pair in sorted(pairs, key=lambda i: (-sizes[i][1], -sizes[i][0], i)):
        lines, width = sizes[pair]
        number = next((number for number, free in enumerate(free_lines) if free >= lines), None)
        if number is None:
            batches.append([])
            free_lines.append(tokens_per_micro_batch // width)  # no later pair of this one is wider
            number = len(batches) - 1
        batches[number].append(pair)
        free_lines[number] -= lines
    return batches


def _even_out(batches: list[list[int]], num_batches: int, tokens: list[int], spare: int) -> list[BatchPlan]:
    """Bring a rank to `num_batches` micro-batches: split its fullest ones, then add empty ones."""
    batches = [list(batch) for batch in batches]
    while len(batches) < num_batches and any(len(batch) > 1 for batch in batches):
        fullest = max((batch for batch in batches if len(batch) > 1), key=lambda b: sum(tokens[i] for i in b))
        batches.append(fullest[1::2])
        del fullest[1::2]
    empty = [BatchPlan((spare,), empty=True)] * (num_batches - len(batches))
    return [BatchPlan(tuple(sorted(batch))) for batch in batches] + empty
