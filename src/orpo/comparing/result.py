"""The result of a comparison, and what it says in plain sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo.comparing.choosing import ALLOWED, Chosen
from orpo.comparing.cost import Cost
from orpo.comparing.methods import MODELS_HELD, stages_of
from orpo.comparing.quality import JUDGED, Quality
from orpo.comparing.splits import TEST, TRAIN, VALIDATION
from orpo.engine.metrics import metric_named, write_change
from orpo.evaluation.statistics import critical, visible
from orpo.run.log import Figure, Figures, figures_to_json
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
        stages: The run directories of the first seed, stage by stage.
    """

    method: str
    size: int
    quality: Quality
    costs: Sequence[Cost]
    folders: Sequence[Path]
    stages: Sequence[Path]

    def cost(self, value: Callable[[Cost], float]) -> float:
        """The mean of a cost over the seeds."""
        return fmean(map(value, self.costs))


@dataclass(frozen=True, slots=True)
class Answers:
    """What answers of a model look like.

    Attributes:
        number: Of the prompts.
        figures: How many ended, and how much they repeat.
        change: From the baseline's answers, prompt by prompt; empty where that has none.
    """

    number: int
    figures: Figures
    change: Figures

    def differs(self, name: str) -> int:
        """+1 or -1 where a figure is measurably above or below the baseline's, else 0."""
        change = self.change.get(name)
        if change is None or not change.se or self.number < 2:
            return 0
        return int(abs(change.mean) > critical(self.number) * change.se) * (1 if change.mean > 0 else -1)


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

    def sentences(self) -> list[str]:
        """What it comes to: each method against the baseline in quality, then in cost."""
        baseline = next((entry for entry in self.whole if entry.method == self.baseline), None)
        lines = []
        for entry in self.whole:
            if entry.method == self.baseline or baseline is None:
                continue
            lines.append(self._quality(entry))
            lines.append(_cost(entry, baseline))
            if entry.method in self.answers:
                lines.append(self._answering(entry.method))
        return [*lines, *self._cautions()]

    def _quality(self, entry: Entry) -> str:
        parts = [self._difference(entry, name) for name in JUDGED if name in entry.quality.change]
        return f"{entry.method} against {self.baseline}: {'; '.join(parts)}."

    def _difference(self, entry: Entry, name: str) -> str:
        change, kind = entry.quality.change[name], entry.quality.kind(name)
        said = f"{metric_named(name).title} {write_change(name, Figure(change.mean))}"
        bounds = change.interval(entry.quality.looks)
        if bounds is None:
            return f"{said}, of unknown error"
        low, high = (write_change(name, Figure(bound)).value for bound in bounds)
        interval = f"{said} ({low} to {high})"
        if kind != "within noise":
            return f"{interval}, {kind}"
        seen = visible(change.figure, change.df + 1, looks=entry.quality.looks)
        shown = "" if seen is None else f", where {write_change(name, Figure(seen))} would have shown"
        return f"{interval}, a difference within noise{shown}"

    def _answering(self, method: str) -> str:
        """Whether a method repeats itself or fails to end more than the baseline does."""
        answers = self.answers[method]
        parts = []
        for name, words in (
            ("repetition", ("repeat themselves less", "repeat themselves more")),
            ("ended", ("end less often", "end more often")),
        ):
            differs = answers.differs(name)
            said = words[differs > 0] if differs else f"{metric_named(name).title}: a difference within noise"
            parts.append(f"{said} ({write_change(name, answers.change.get(name))})")
        number = f"{answers.number} answer{'' if answers.number == 1 else 's'}"
        return f"{method}'s {number} against {self.baseline}'s: {'; '.join(parts)}."

    def _cautions(self) -> list[str]:
        lines = []
        for method, chosen in self.chosen.items():
            if chosen.at_the_edge:
                names = " and ".join(chosen.at_the_edge)
                lines.append(
                    f"{method}: {names} ended at the edge of what was tried; more --trials may do better."
                )
            if not chosen.trials[chosen.number].keeps:
                lines.append(
                    f"{method}: every setting made the chosen answers less likely than before by more than"
                    f" {ALLOWED} a token; the one that did so least was taken."
                )
        if self.seeds == 1:
            lines.append("One seed: the intervals know how prompts vary, and not how trainings do.")
        interrupted = {entry.method for entry in self.entries if any(one.sessions > 1 for one in entry.costs)}
        if interrupted:
            lines.append(
                f"Interrupted on the way, so costs have work done twice: {', '.join(sorted(interrupted))}."
            )
        return [*lines, *(f"Failed: {line}." for line in self.failures)]

    def rules(self) -> list[str]:
        """How it was made, in sentences."""
        counts = self.counts
        looks = max(len(self.chosen) - 1, 1)
        together = f" for all {looks} comparisons together" if looks > 1 else ""
        return [
            f"All methods have the same base, pairs, batch size and number of optimizer steps; stages of a"
            f" method share the steps equally. {counts[TRAIN]:,} pairs train, {counts[VALIDATION]:,} choose,"
            f" {counts[TEST]:,} of {self.num_prompts:,} prompts judge; no prompt is in two of these.",
            f"Each method tried {self.trials} settings on the whole training set, seed"
            f" {int(self.recipe.get('seed') or 0)}; the lowest odds-ratio loss on validation pairs chose,"
            f" among those that keep the chosen answers as likely as before but for {ALLOWED} nats a token. Test"
            " pairs were scored after that.",
            f"Means over {self.seeds} seed{'' if self.seeds == 1 else 's'}; intervals hold with 95 %"
            f"{together}, over prompts and seeds. A seed changes the order of the pairs"
            " (and an adapter's first weights).",
            "Costs are of one training with the chosen settings; trying settings took as many trainings for"
            f" each method. Models in memory while training: {MODELS_HELD} in every method here.",
        ]

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
            "answers": {
                name: {
                    "number": one.number,
                    "figures": figures_to_json(one.figures),
                    "change": figures_to_json(one.change),
                }
                for name, one in self.answers.items()
            },
            "sentences": self.sentences(),
            "rules": self.rules(),
            "failures": list(self.failures),
            "recipe": public(self.recipe),
        }


def _cost(entry: Entry, baseline: Entry) -> str:
    def times(name: str) -> str:
        before = baseline.cost(COSTS[name])
        return f"{entry.cost(COSTS[name]) / before:.2f} times" if before else "an unknown multiple of"

    return (
        f"{entry.method} took {times('cpu_seconds')} the CPU time of {baseline.method}, {times('tokens')} its"
        f" tokens and {times('peak_gib')} its peak memory."
    )
