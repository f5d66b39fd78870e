"""Ranked lists as pairs: which of several answers to a prompt are set against each other.

A row with several answers is read as its best answer against each worse one. From those pairs and their
scores the other ways to pair follow, for rows that have scores.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from orpo.curation.steps import Step
from orpo.data.sides import Sides, part
from orpo.pairs import PreferencePair

Pairing = Literal["best-each", "best-worst", "best-random", "all"]
PAIRINGS: tuple[Pairing, ...] = ("best-each", "best-worst", "best-random", "all")


def pair_answers(
    pairs: Sequence[PreferencePair], way: Pairing, *, seed: int
) -> tuple[list[PreferencePair], Step]:
    """Pair the answers of each row in another way; rows with one pair stay as they are.

    Args:
        pairs: As read; those of one row follow each other and have its source.
        way: `best-each` the best answer against each worse one, as read; `best-worst`; `best-random` the best
            against one of the others; `all` every two answers of unequal score.
        seed: Of the random choice.
    """
    draw = random.Random(seed)
    result: list[PreferencePair] = []
    added, removed, examples, unranked = 0, 0, list[str](), 0
    for source, group in itertools.groupby(pairs, key=lambda pair: pair.source):
        row = list(group)
        if len(row) > 1 and way in ("best-worst", "all") and any(pair.scores is None for pair in row):
            unranked += 1
        elif len(row) > 1 and way != "best-each":
            found = _paired(row, way, draw)
            added += max(0, len(found) - len(row))
            if len(found) < len(row):
                removed += len(row) - len(found)
                examples.append(source)
            row = found
        result += row
    reason = f"another pair of the row is taken ({way})"
    remark = f"{unranked:,} rows with several answers have no scores: paired as read" if unranked else ""
    step = Step(
        name="pairs",
        before=len(pairs),
        added=added,
        removed={reason: removed} if removed else {},
        examples={reason: examples[:3]},
        remark=remark,
    )
    return result, step


def _paired(row: list[PreferencePair], way: Pairing, draw: random.Random) -> list[PreferencePair]:
    if way == "best-random":
        return [draw.choice(row)]
    if way == "best-worst":
        return [max(row, key=lambda pair: pair.margin or 0.0)]
    others = [
        _against(better, worse)
        for better, worse in itertools.permutations(row, 2)
        if better.scores and worse.scores and better.scores[1] > worse.scores[1]
    ]
    return [*row, *others]


def _against(better: PreferencePair, worse: PreferencePair) -> PreferencePair:
    """The rejected answers of two pairs with the same chosen one, against each other."""
    assert better.scores is not None
    assert worse.scores is not None
    scores = (better.scores[1], worse.scores[1])
    if isinstance(better.prompt, str):
        sides = Sides(better.prompt, better.rejected or "", worse.rejected)
    else:
        whole = [[*pair.prompt, *(pair.rejected or ())] for pair in (better, worse)]
        sides = part(*whole)  # type: ignore[arg-type]
    return replace(better, prompt=sides.prompt, chosen=sides.chosen, rejected=sides.rejected, scores=scores)
