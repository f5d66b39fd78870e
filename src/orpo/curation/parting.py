"""Training, validation and test pairs, with prompts that nearly repeat each other on one side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from orpo.curation.similar import similar_groups
from orpo.curation.texts import asked
from orpo.data.near_duplicates import SIMILARITY
from orpo.errors import DataError
from orpo.pairs import PreferencePair

TRAIN = "train"
_SIMILARITY = SIMILARITY - 0.1
"""Estimates err; a pair too many on one side costs nothing, a leak does."""


def part_pairs(
    pairs: Sequence[PreferencePair],
    shares: Mapping[str, float],
    *,
    seed: int,
) -> tuple[dict[str, list[int]], str]:
    """Split pairs by their prompts.

    Args:
        pairs: To split.
        shares: Name of each held-out split -> its share of the pairs, in [0, 1).
        seed: Of the choice.

    Returns:
        Split -> indices in order, training first; and a line about it.

    Raises:
        DataError: There are too few prompts.
    """
    wanted = {name: share for name, share in shares.items() if share > 0}
    if not wanted:
        return {TRAIN: list(range(len(pairs)))}, f"split: train {len(pairs):,}; nothing is held out"
    prompts = len({pair.prompt_key() for pair in pairs})
    near = similar_groups(map(asked, pairs), len(pairs), similarity=_SIMILARITY, what="comparing prompts")
    groups = _members(near)
    together = f"{prompts - len(groups):,} prompts that nearly repeat another stay on its side"
    parts = _draw(groups, wanted, len(pairs), seed)
    if any(len(parts[name]) < share * len(pairs) / 2 for name, share in wanted.items()):
        groups = _members(_numbers([pair.prompt_key() for pair in pairs]))
        together = "too many prompts nearly repeat each other: only equal prompts stay on one side"
        parts = _draw(groups, wanted, len(pairs), seed)
    if not all(parts.values()):
        raise DataError(
            f"there are too few prompts ({prompts:,}) to hold some out; give more data or set test: 0"
        )
    counts = ", ".join(f"{name} {len(indices):,}" for name, indices in parts.items())
    return parts, f"split: {counts} of {len(pairs):,} pairs; {together}"


def _numbers(keys: Sequence[str]) -> list[int]:
    seen: dict[str, int] = {}
    return [seen.setdefault(key, len(seen)) for key in keys]


def _members(numbers: Sequence[int]) -> list[list[int]]:
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, number in enumerate(numbers):
        members[number].append(index)
    return list(members.values())


def _draw(
    groups: Sequence[list[int]], shares: Mapping[str, float], total: int, seed: int
) -> dict[str, list[int]]:
    """Whole groups, drawn until each share is full; groups that would not fit stay in training."""
    drawn = [groups[number] for number in np.random.default_rng(seed).permutation(len(groups))]
    parts: dict[str, list[list[int]]] = {TRAIN: [], **{name: [] for name in shares}}
    room = {name: max(1, round(share * total)) for name, share in shares.items()}
    for group in drawn:
        name = next((name for name in shares if len(group) <= room[name]), TRAIN)
        parts[name].append(group)
        room[name] = room.get(name, 0) - len(group)
    for name in shares:
        if not parts[name] and len(parts[TRAIN]) > 1:  # no group was small enough
            parts[name].append(min(parts[TRAIN], key=len))
            parts[TRAIN].remove(parts[name][0])
    return {name: sorted(index for group in found for index in group) for name, found in parts.items()}
