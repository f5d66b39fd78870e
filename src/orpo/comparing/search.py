"""Which settings a probe tries: a grid around those of the recipe; of many, the later ones by Optuna.

The first settings are always those of the grid. Where Optuna is installed, its sampler chooses each of the
others from what the ones before have given; it is seeded, so that a probe that goes on asks for what it has
trained already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from orpo.comparing.methods import Choice, candidates
from orpo.console import say

GRID = 7
"""Settings of the grid, where more are asked for."""
REACH = 4
"""How many factors from the recipe's value Optuna may go."""
_TRIES = 50
"""Settings in a row that have been tried before, after which no new one is expected."""

Value = tuple[float, float]
"""What a setting gave: what is to be small, and how far it is beyond what is allowed (above 0: beyond)."""
Values = Callable[[Sequence[Choice]], Sequence[Value | None]]
"""Trains settings, in any order; None for one whose training failed."""


def search(start: Choice, trials: int, factor: float, values: Values, *, at_once: int, seed: int) -> str:
    """Have settings tried.

    Args:
        start: The recipe's own, which is the first.
        trials: How many, at least 1.
        factor: Between neighbouring values of the grid.
        values: Trains them.
        at_once: Settings that are asked for together, once the grid is known.
        seed: Of the sampler.

    Returns:
        What has chosen them: `grid`, or `optuna` with its version.
    """
    if trials > GRID and find_spec("optuna") is not None:
        return _search_with_optuna(start, trials, factor, values, at_once=at_once, seed=seed)
    if trials > GRID:
        say(
            f"trials: all {trials} settings are those of a grid; pip install optuna to have those after the"
            f" first {GRID} chosen from what these have given"
        )
    values(candidates(start, trials, factor))
    return "grid"


def _search_with_optuna(
    start: Choice, trials: int, factor: float, values: Values, *, at_once: int, seed: int
) -> str:
    study = _Study(start, factor, seed)
    asked = study.first(candidates(start, GRID, factor))
    while asked:
        for (choice, trial), value in zip(asked, values([choice for choice, _ in asked]), strict=True):
            study.tell(choice, trial, value)
        asked = study.ask(min(max(at_once, 1), trials - len(study.known)))
    return study.name


class _Study:
    """Optuna's record of what was tried."""

    def __init__(self, start: Choice, factor: float, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = f"optuna {optuna.__version__}"
        self.known: dict[tuple[float, ...], Value | None] = {}
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=GRID, multivariate=True)
        )
        self._ranges: dict[str, Any] = {
            name: optuna.distributions.FloatDistribution(
                value / factor**REACH, value * factor**REACH, log=True
            )
            for name, value in start.items()
        }

    def first(self, choices: Sequence[Choice]) -> list[tuple[Choice, Any]]:
        """Settings that are tried whatever Optuna thinks of them."""
        for choice in choices:
            self._study.enqueue_trial(dict(choice))
        return [(choice, self._study.ask(self._ranges)) for choice in choices]

    def ask(self, number: int) -> list[tuple[Choice, Any]]:
        """So many settings that were not tried before; fewer where there are none left."""
        found: dict[tuple[float, ...], tuple[Choice, Any]] = {}
        for _ in range(_TRIES):
            if len(found) == number:
                break
            trial = self._study.ask(self._ranges)
            choice = {name: float(f"{trial.params[name]:.3g}") for name in self._ranges}
            place = tuple(choice.values())
            if place in self.known:
                self.tell(choice, trial, self.known[place])
            else:
                found.setdefault(place, (choice, trial))
        return list(found.values())

    def tell(self, choice: Choice, trial: Any, value: Value | None) -> None:
        """Say what a setting gave."""
        self.known[tuple(choice.values())] = value
        if value is None:
            self._study.tell(trial, state=self._failed)
        else:
            trial.set_constraint("beyond what is allowed", value[1])
            self._study.tell(trial, value[0])
