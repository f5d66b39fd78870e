"""Held-out preference pairs by several scores that need no reference model.

`accuracy` goes by the mean log-prob of a token, which is what ORPO trains; odds rise with it, so the odds
ratio prefers the same answers, and `log odds ratio` says by how much. `accuracy by sum` goes by the log-prob
of the whole answer, which favours short ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orpo.suites.measured import Measured, by_group

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "pairs"
ABOUT = "held-out preference pairs: accuracy by mean and by sum of log-probs, log odds ratio"
TAKES = "FILE"
_FEWEST = 2
"""Pairs of a group that has a row of its own."""


def check(about: str | None, options: Options) -> None:
    """Pairs are checked as they are read."""


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Score the pairs of a file."""
    from orpo.suites.scored_pairs import preference_columns, scored_pairs

    assert about is not None
    pairs, notices = scored_pairs(subject, NAME, about, options)
    groups = [pair.group for pair in pairs]
    columns = preference_columns(pairs)
    if len(set(groups)) > 1:
        columns |= by_group("accuracy", columns["accuracy"], groups, fewest=_FEWEST)
    return Measured(
        items=[pair.item for pair in pairs],
        columns=columns,
        clusters=[str(pair.prompt) for pair in pairs],
        notices=notices,
    )
