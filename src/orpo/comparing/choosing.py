"""The choice of settings: each method tries equally many, and validation pairs decide by one rule for all.

The rule: the lowest odds-ratio loss (that of plain ORPO, which rewards telling the answers of a pair apart
and punishes being sure of the wrong one), among the settings that keep the chosen answers as likely as they
were before training, but for `ALLOWED` nats a token. A model that no longer writes such answers cannot win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo.comparing.methods import Choice
from orpo.comparing.quality import estimates
from orpo.evaluation.per_pair import PairResults
from orpo.evaluation.statistics import Estimate

ALLOWED = 0.2
"""Nats a token by which the chosen answers may become less likely than before training."""
DECIDES, GUARDS = "odds_ratio_loss", "chosen_logprob"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting that was tried.

    Attributes:
        choice: The setting.
        means: What validation pairs say of it; empty where its training failed.
        to_chosen: How it differs from the chosen setting, pair by pair; empty for that one.
        failure: Why its training failed.
        keeps: Whether the chosen answers stayed as likely as the rule asks.
        looks: Settings that are compared with the chosen one.
    """

    choice: Choice
    means: Mapping[str, Estimate]
    to_chosen: Mapping[str, Estimate]
    failure: str = ""
    keeps: bool = True
    looks: int = 1

    @property
    def is_told_apart(self) -> bool:
        """Whether it is measurably worse than the chosen setting, or ruled out."""
        bounds = self.to_chosen[DECIDES].interval(self.looks) if self.to_chosen else None
        return bool(self.failure) or not self.keeps or (bounds is not None and bounds[0] > 0)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "settings": dict(self.choice),
            "means": {name: one.figure.to_json() for name, one in self.means.items()},
            "difference_to_chosen": {name: one.figure.to_json() for name, one in self.to_chosen.items()},
            "failure": self.failure,
            "keeps_chosen_answers": self.keeps,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What was chosen for a method.

    Attributes:
        choice: The setting.
        trials: All that were tried, in order; the first is that of the recipe.
        number: Of the chosen one among them.
    """

    choice: Choice
    trials: Sequence[Trial]
    number: int

    @property
    def indistinct(self) -> int:
        """Other settings that cannot be told apart from it."""
        others = [trial for trial in self.trials if trial is not self.trials[self.number]]
        return sum(not trial.is_told_apart for trial in others)

    @property
    def at_the_edge(self) -> list[str]:
        """Settings that left the recipe's value for the largest or the smallest one that was tried."""
        found = []
        for name, value in self.choice.items():
            tried = [trial.choice[name] for trial in self.trials]
            if value != tried[0] and value in (min(tried), max(tried)):
                found.append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"chosen": dict(self.choice), "trials": [trial.to_json() for trial in self.trials]}


def value_of(result: PairResults | None, before: PairResults) -> tuple[float, float] | None:
    """What the rule makes small in a setting, and how far it is beyond what the rule allows.

    Args:
        result: What validation pairs say of it; None where its training failed.
        before: The same of the base.
    """
    if result is None:
        return None
    means = estimates([result])
    return means[DECIDES].mean, _floor(before) - means[GUARDS].mean


def _floor(before: PairResults) -> float:
    """How likely the chosen answers have to stay: a mean log-probability."""
    return estimates([before])[GUARDS].mean - ALLOWED


def choose(
    choices: Sequence[Choice],
    results: Sequence[PairResults | None],
    before: PairResults,
    failures: Sequence[str],
) -> Chosen | None:
    """Choose among settings.

    Args:
        choices: What was tried, in order.
        results: What validation pairs say of each; None where its training failed.
        before: The same of the base.
        failures: Why a training failed, or "".

    Returns:
        The choice; None where all have failed.
    """
    means: list[dict[str, Estimate]] = [{} if one is None else estimates([one]) for one in results]
    floor = _floor(before)
    keeps = [bool(one) and one[GUARDS].mean >= floor for one in means]
    trained = [number for number, one in enumerate(means) if one]
    if not trained:
        return None
    allowed = [number for number in trained if keeps[number]]
    if allowed:
        best = min(allowed, key=lambda number: means[number][DECIDES].mean)
    else:
        best = max(trained, key=lambda number: means[number][GUARDS].mean)
    reference = results[best]
    assert reference is not None
    trials = [
        Trial(
            choice=choice,
            means=means[number],
            to_chosen=estimates([one], [reference]) if one is not None and number != best else {},
            failure=failures[number],
            keeps=keeps[number],
            looks=max(len(trained) - 1, 1),
        )
        for number, (choice, one) in enumerate(zip(choices, results, strict=True))
    ]
    return Chosen(choice=choices[best], trials=trials, number=best)
