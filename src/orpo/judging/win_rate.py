"""Verdicts on pairs of answers -> how often the second model wins, with what that number hides.

The error and the interval treat prompts as what was drawn: several answers to one prompt count as one piece
of evidence. A length-controlled rate stands next to it, because judges like long answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orpo.errors import DataError
from orpo.evaluation.statistics import bootstrap_interval, clustered_mean
from orpo.judging.length_control import LengthControlled
from orpo.run.log import Figure


@dataclass(frozen=True, slots=True)
class Ruling:
    """What a judge says of two answers to one prompt.

    Attributes:
        prompt: Equal for verdicts on the same prompt.
        score: In [0, 1]; 1: the second answer is better, 0.5: neither.
        lengths: Characters of the two answers.
    """

    prompt: str
    score: float
    lengths: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """How often the second answer is the better one.

    Attributes:
        rate: Mean score, in [0, 1]; a tie counts half.
        interval: Bounds of the rate that hold with 95 % (bootstrap over prompts); None of one prompt alone.
        discrete: The same where every score counts as a win, a tie or a loss.
        wins: Scores above 0.5.
        ties: Scores of 0.5.
        losses: Scores below 0.5.
        mean_lengths: Characters of the first and of the second answer.
        length_controlled: The rate if both were of the same length; None where it cannot be told.
    """

    rate: Figure
    interval: tuple[float, float] | None
    discrete: float
    wins: int
    ties: int
    losses: int
    mean_lengths: tuple[float, float]
    length_controlled: LengthControlled | None = None

    @property
    def number(self) -> int:
        """Of the verdicts."""
        return self.wins + self.ties + self.losses

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        controlled = self.length_controlled
        return {
            "win_rate": {"mean": self.rate.mean, "se": self.rate.se, "n": self.number},
            "interval_95": self.interval,
            "discrete_win_rate": self.discrete,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "mean_characters": self.mean_lengths,
            "length_controlled": None if controlled is None else controlled.to_json(),
        }


def win_rate(verdicts: Sequence[Ruling], length_controlled: LengthControlled | None = None) -> WinRate:
    """Count verdicts.

    Args:
        verdicts: At least one.
        length_controlled: The length-controlled rate of the same verdicts.

    Raises:
        DataError: There are none.
    """
    if not verdicts:
        raise DataError("there is no verdict to count")
    numbers: dict[str, int] = {}
    prompt_P = torch.tensor([numbers.setdefault(one.prompt, len(numbers)) for one in verdicts])
    score_P = torch.tensor([one.score for one in verdicts], dtype=torch.float64)
    one_P = torch.ones_like(score_P)
    rate = clustered_mean(score_P, one_P, prompt_P)
    assert rate is not None
    wins, ties = int((score_P > 0.5).sum()), int((score_P == 0.5).sum())
    number = len(verdicts)
    first, second = (sum(one.lengths[side] for one in verdicts) / number for side in (0, 1))
    return WinRate(
        rate=rate,
        interval=bootstrap_interval(score_P, one_P, prompt_P),
        discrete=(wins + ties / 2) / number,
        wins=wins,
        ties=ties,
        losses=number - wins - ties,
        mean_lengths=(first, second),
        length_controlled=length_controlled,
    )
