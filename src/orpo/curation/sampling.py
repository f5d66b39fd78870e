"""Fewer pairs: so many that keep the shares of sources and lengths, or so many that length tells nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from orpo.curation.measuring import Lengths
from orpo.curation.steps import Sieve, Step
from orpo.pairs import PreferencePair

_BINS = 10


def take_shares(strata: Sequence[Hashable], number: int, seed: int) -> list[int]:
    """Choose so many of a whole that each stratum keeps its share, as nearly as whole numbers can.

    Args:
        strata: The stratum of each.
        number: How many to choose.
        seed: Of the choice.

    Returns:
        Indices, in order.
    """
    if number >= len(strata):
        return list(range(len(strata)))
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    random = np.random.default_rng(seed)
    shares = {stratum: number * len(found) / len(strata) for stratum, found in members.items()}
    counts = {stratum: int(share) for stratum, share in shares.items()}
    missing = number - sum(counts.values())
    # The rest goes to the largest remainders; equal ones are drawn, so that no stratum is preferred.
    order = random.permutation(len(shares))
    ranked = sorted(zip(shares, order, strict=True), key=lambda item: (-(shares[item[0]] % 1), item[1]))
    for stratum, _ in ranked[:missing]:
        counts[stratum] += 1
    taken = [random.choice(found, counts[stratum], replace=False) for stratum, found in members.items()]
    return sorted(int(index) for index in np.concatenate(taken))


def limit(
    pairs: Sequence[PreferencePair], lengths: Lengths, number: int, *, seed: int
) -> tuple[list[int], Step]:
    """Keep so many pairs, with the shares of sources, of lengths, and of longer chosen answers."""
    bins = _bins(lengths.whole.astype(np.float64), _BINS // 2)
    longer = np.sign(lengths.chosen - lengths.rejected)
    strata = [(pair.group, bins[index], longer[index]) for index, pair in enumerate(pairs)]
    kept = take_shares(strata, number, seed)
    sieve = Sieve("limit", pairs)
    for index in sorted(set(range(len(pairs))) - set(kept)):
        sieve.remove(index, f"more than {number:,}")
    groups = len({pair.group for pair in pairs})
    return kept, sieve.step(
        f"sources ({groups:,}) and lengths keep their shares" if len(kept) < len(pairs) else ""
    )


def balance_length(pairs: Sequence[PreferencePair], lengths: Lengths, *, seed: int) -> tuple[list[int], Step]:
    """Keep as many pairs whose chosen answer is longer as pairs whose rejected answer is, by any difference.

    Pairs are sorted into bins by how much longer the longer answer is, relative to the other; in each bin
    the larger half is cut to the size of the smaller one. Pairs with equal lengths, or one answer, stay.

    Args:
        pairs: To balance.
        lengths: Of their answers.
        seed: Of the choice.
    """
    both = np.array([pair.rejected is not None for pair in pairs], dtype=bool)
    difference = np.where(both, lengths.chosen - lengths.rejected, 0)
    ratio = np.abs(np.log1p(lengths.chosen) - np.log1p(lengths.rejected))
    uneven = np.flatnonzero(difference)
    bins = np.full(len(pairs), -1)
    bins[uneven] = _bins(ratio[uneven], _BINS)
    random = np.random.default_rng(seed)
    sieve = Sieve("balance", pairs)
    for number in range(_BINS):
        halves = [np.flatnonzero((bins == number) & (np.sign(difference) == sign)) for sign in (1, -1)]
        small, large = sorted(halves, key=len)
        for index in sorted(random.choice(large, len(large) - len(small), replace=False).tolist()):
            which = "chosen" if difference[index] > 0 else "rejected"
            sieve.remove(index, f"the {which} answer is the longer one more often")
    kept = sieve.kept
    step = sieve.step()
    before, after = _share(difference[both]), _share(difference[kept][both[kept]])
    remark = f"the longer answer was the chosen one in {before:.0%} of the pairs, now in {after:.0%}"
    return kept, replace(step, remark=remark)


def _share(difference: np.ndarray) -> float:
    """How often the longer answer is the chosen one; equal lengths count half."""
    return float((np.sign(difference) + 1).mean() / 2) if len(difference) else 0.5


def _bins(values: np.ndarray, number: int) -> np.ndarray:
    """The bin of each value, from 0 on; bins are equally full where values are distinct."""
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    edges = np.quantile(values, np.linspace(0, 1, number + 1)[1:-1])
    return np.searchsorted(edges, values, side="right")
