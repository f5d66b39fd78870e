"""The result of a comparison, as plain values too (sentences.py has it in words)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo.comparing.asking import Answers
from orpo.comparing.choosing import Chosen
from orpo.comparing.cost import Cost
from orpo.comparing.methods import MODELS_HELD, stages_of
from orpo.comparing.quality import Quality
from orpo.run.public import public


@dataclass(frozen=True, slots=True)
class Entry:
    """A method at one size of the training set.

    Attributes:
        method: Its name.
        size: Pairs it was trained on.
        quality: What test pairs say, over the seeds.
        costs: Of each seed.
        folders: The run directory of each seed.
    """

    method: str
    size: int
    quality: Quality
    costs: Sequence[Cost]
    folders: Sequence[Path]

    def cost(self, value: Callable[[Cost], float]) -> float:
        """The mean of a cost over the seeds."""
        return fmean(map(value, self.costs))


COSTS: Mapping[str, Callable[[Cost], float]] = {
    "seconds": lambda cost: cost.seconds,
    "cpu_seconds": lambda cost: cost.cpu_seconds,
    "step_seconds": lambda cost: cost.step_seconds,
    "peak_gib": lambda cost: cost.peak_gib,
    "steps": lambda cost: cost.steps,
    "tokens": lambda cost: cost.tokens,
    "answers": lambda cost: cost.answers,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        folder: Where it lies.
        recipe: What all arms have in common.
        baseline: The method that the others are compared with.
        counts: Pairs of each split.
        sizes: Sizes of the training set; the last is all of it.
        seeds: Asked for.
        trials: Settings that each method tried.
        chosen: The settings of each method.
        base: What test pairs say of the base.
        num_prompts: Different prompts of the test pairs.
        entries: By size and method.
        answers: Of the base and of each method, where they were asked.
        failures: A line for each arm that failed.
        seconds: This call took; less where arms were there already.
    """

    folder: Path
    recipe: Mapping[str, Any]
    baseline: str
    counts: Mapping[str, int]
    sizes: Sequence[int]
    seeds: int
    trials: int
    chosen: Mapping[str, Chosen]
    base: Quality
    num_prompts: int
    entries: Sequence[Entry]
    answers: Mapping[str, Answers]
    failures: Sequence[str]
    seconds: float

    @property
    def first_seed(self) -> int:
        """Of the trainings that chose; the others count on from it."""
        return int(self.recipe.get("seed") or 0)

    @property
    def json_path(self) -> Path:
        """Where the result is written."""
        return self.folder / "compare.json"

    @property
    def page_path(self) -> Path:
        """Where its page is."""
        return self.folder / "compare.html"

    def at(self, size: int) -> list[Entry]:
        """The methods at one size."""
        return [entry for entry in self.entries if entry.size == size]

    @property
    def whole(self) -> list[Entry]:
        """The methods on the whole training set."""
        return self.at(self.sizes[-1])

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what belongs to this machine."""
        return {
            "baseline": self.baseline,
            "pairs": dict(self.counts),
            "test_prompts": self.num_prompts,
            "sizes": list(self.sizes),
            "seeds": self.seeds,
            "trials": self.trials,
            "seconds": round(self.seconds, 1),
            "chosen": {method: one.to_json() for method, one in self.chosen.items()},
            "base": self.base.to_json(),
            "entries": [
                {
                    "method": entry.method,
                    "stages": stages_of(entry.method),
                    "size": entry.size,
                    "runs": [folder.name for folder in entry.folders],
                    "models_held": MODELS_HELD,
                    "quality": entry.quality.to_json(),
                    "cost": {name: round(entry.cost(value), 4) for name, value in COSTS.items()},
                    "cost_by_seed": [cost.to_json() for cost in entry.costs],
                }
                for entry in self.entries
            ],
            "answers": {name: one.to_json() for name, one in self.answers.items()},
            "failures": list(self.failures),
            "recipe": public(self.recipe),
        }
