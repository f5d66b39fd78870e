"""`orpo probe` as a function: learning rate and strength from short trainings on a small share of the tokens.

Several settings around those of the recipe are trained for a few steps each, on the same pairs, and scored on
the same held-out pairs. The tokens of all of it, held-out ones included, stay within a share of what the run
itself would read. What cannot be told apart from the recipe's own setting is not suggested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.arms import Arm, Maker
from orpo.comparing.budget import Budget, budget_of, tokens_of
from orpo.comparing.choosing import DECIDES, Chosen, choose, value_of
from orpo.comparing.cost import cost_of
from orpo.comparing.methods import FACTOR, Choice, method_of, recipe_choice
from orpo.comparing.plan import DATA, RUNS, absolute, has_begun, settle_plan, usable
from orpo.comparing.pool import Watcher, run_all
from orpo.comparing.quality import base_results, validation_results
from orpo.comparing.search import Value, search
from orpo.comparing.splits import VALIDATION, SplitOptions, settle_splits
from orpo.engine.metrics import write_change
from orpo.errors import ConfigError, RunError
from orpo.evaluation.per_pair import PairResults
from orpo.evaluation.statistics import pairs_needed
from orpo.run.directory import write_json
from orpo.run.lock import held
from orpo.settings.config import check_recipe
from orpo.settings.needs import check_needs
from orpo.settings.schema import known_settings

SHARE = 0.02
"""Most of the run's tokens that a probe reads, where nobody says otherwise."""
_SHORT = {
    "eval_strategy": "steps", "eval_on_start": False, "save_strategy": "no", "logging_steps": 1,
    "load_best_model_at_end": False, "early_stopping_patience": None, "warmup_steps": 0.1,
}  # fmt: skip
"""A probe's trainings are scored once, at their end, and have a schedule of their own length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe found.

    Attributes:
        folder: Where it lies.
        method: The method of the recipe.
        chosen: The settings that were tried, the recipe's first, and the best of them.
        budget: What it was allowed.
        tokens: That it read, held-out ones included.
        num_pairs: Held-out pairs with both answers.
        sampler: What has chosen the settings: `grid`, or `optuna` with its version.
    """

    folder: Path
    method: str
    chosen: Chosen
    budget: Budget
    tokens: float
    num_pairs: int
    sampler: str = "grid"

    @property
    def path(self) -> Path:
        """The file of the result."""
        return self.folder / "probe.json"

    @property
    def is_told_apart(self) -> bool:
        """Whether another setting is measurably better than that of the recipe."""
        return self.chosen.number != 0 and self.chosen.trials[0].is_told_apart

    @property
    def suggestion(self) -> Choice:
        """The setting to train with: the best one where it can be told apart, else that of the recipe."""
        return self.chosen.choice if self.is_told_apart else self.chosen.trials[0].choice

    def sentences(self) -> list[str]:
        """What it comes to."""
        share = self.tokens / self.budget.run_tokens
        return [
            f"It read {self.tokens:,.0f} tokens, {share:.1%} of the {self.budget.run_tokens:,.0f} that the"
            f" run reads: {self.budget.steps} steps for each of {len(self.chosen.trials)} settings,"
            f" {self.num_pairs} held-out pairs.",
            *self._verdict(),
            "A probe sees first steps alone: it finds settings that are far off, and favours large steps.",
        ]

    def _verdict(self) -> list[str]:
        first = self.chosen.trials[0]
        if not self.is_told_apart:
            if self.chosen.number == 0:
                return [f"The recipe's own setting is the best that was tried.{self._also()}"]
            return [f"No setting can be told apart from the recipe's; keep it.{self._needed()}"]
        lines = [f"The recipe's own setting failed: {first.failure}."] if first.failure else []
        best = f"Best: {', '.join(f'{name}: {value:g}' for name, value in self.suggestion.items())}."
        if DECIDES in first.to_chosen:
            written = write_change(DECIDES, first.to_chosen[DECIDES].figure)
            best += f" The odds-ratio loss of the recipe's own setting is {written} to that."
        edges = [
            f"{name} ended at the edge of what was tried; probe again from there."
            for name in self.chosen.at_the_edge
        ]
        return [*lines, best + self._also(), *edges]

    def _also(self) -> str:
        number = self.chosen.indistinct
        return "" if not number else f" {number} of the others cannot be told apart from it."

    def _needed(self) -> str:
        difference = self.chosen.trials[0].to_chosen.get(DECIDES)
        if difference is None or not difference.se or not difference.mean:
            return ""
        needed = pairs_needed(difference.mean, difference.se * self.num_pairs**0.5)
        return (
            f" To tell the best one apart by its {abs(difference.mean):.3f} takes about {needed:,} held-out"
            " pairs."
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "suggestion": dict(self.suggestion),
            "told_apart": self.is_told_apart,
            "method": self.method,
            "tokens": round(self.tokens),
            "run_tokens": round(self.budget.run_tokens),
            "steps": self.budget.steps,
            "held_out_pairs": self.num_pairs,
            "sampler": self.sampler,
            "sentences": self.sentences(),
        } | self.chosen.to_json()


def probe(
    recipe: Mapping[str, Any],
    out: str | Path,
    *,
    share: float = SHARE,
    trials: int = 7,
    factor: float = FACTOR,
    jobs: int = 1,
    watcher: Watcher | None = None,
) -> Probe:
    """Try settings around those of a recipe, each for a few steps.

    Args:
        recipe: Settings by key; `model_name_or_path` and `dataset_name` are needed.
        out: Folder to write, or to go on with.
        share: Of the run's tokens that may be read, in (0, 1].
        trials: Settings that are tried, at least 2; the recipe's own is one of them. Of more than 7, Optuna
            chooses the later ones where it is installed.
        factor: Between neighbouring values, above 1.
        jobs: Trainings at a time, each a process of its own; 0: one after the other in this process.
        watcher: Is told how trainings go.

    Raises:
        OrpoError: Recipe or data cannot be used, or the share is too small to learn anything from.
    """
    for name, value, holds, expected in (
        ("share", share, 0 < share <= 1, "above 0 and at most 1"),
        ("trials", trials, trials >= 2, "at least 2"),
        ("factor", factor, factor > 1, "above 1"),
        ("jobs", jobs, jobs >= 0, "at least 0"),
    ):
        if not holds:
            raise ConfigError(f"{name}: {value} is out of range; expected {expected}")
    check_recipe(recipe)
    check_needs(recipe)
    folder = usable(out)
    with held(folder):
        recipe = absolute(recipe)
        settle_plan(folder, recipe, command="probe", share=share, trials=trials, factor=factor)
        budget = budget_of(recipe, share, trials)
        options = SplitOptions(test_share=0.0, most_validation=budget.held_out)
        splits, reading = settle_splits(recipe, folder / DATA, [], options, is_fixed=has_begun(folder))
        short = dict(recipe) | _SHORT | {"max_steps": budget.steps, "eval_steps": budget.steps}
        maker = Maker(short, splits, reading, folder / RUNS)
        method = method_of(recipe)
        rate = float(known_settings()["learning_rate"].default)
        seed = int(recipe.get("seed") or 0)
        arms: list[Arm] = []
        failures: dict[Path, str] = {}

        def values(choices: Sequence[Choice]) -> list[Value | None]:
            made = [maker.arm(method, choice, splits.sizes[-1], seed) for choice in choices]
            arms.extend(made)
            failures.update(run_all(made, at_once=jobs, watcher=watcher))
            before = base_results(folder, maker, VALIDATION)
            return [value_of(one, before) for one in _results(made, failures, maker)]

        start = recipe_choice(recipe, method, rate=rate)
        sampler = search(start, trials, factor, values, at_once=jobs, seed=seed)
        return _result(method, arms, failures, budget, maker, sampler)


def _results(arms: Sequence[Arm], failures: Mapping[Path, str], maker: Maker) -> list[PairResults | None]:
    pairs = maker.splits.path(VALIDATION)
    return [None if arm.folder in failures else validation_results(arm.folder, pairs) for arm in arms]


def _result(
    method: str, arms: Sequence[Arm], failures: Mapping[Path, str], budget: Budget, maker: Maker, sampler: str
) -> Probe:
    folder, pairs = maker.folder.parent, maker.splits.path(VALIDATION)
    before = base_results(folder, maker, VALIDATION)
    results = _results(arms, failures, maker)
    reasons = [failures.get(arm.folder, "") for arm in arms]
    chosen = choose([arm.choice for arm in arms], results, before, reasons)
    if chosen is None:
        raise RunError(f"every setting failed; the first: {failures[arms[0].folder]}")
    made = [arm for arm in arms if arm.folder not in failures]
    held_out = tokens_of(pairs, maker.common()) * (len(made) + 1)
    found = Probe(
        folder=folder,
        method=method,
        chosen=chosen,
        budget=budget,
        tokens=sum(cost_of(arm).tokens for arm in made) + held_out,
        num_pairs=before.num_preferences,
        sampler=sampler,
    )
    write_json(found.path, found.to_json())
    return found
