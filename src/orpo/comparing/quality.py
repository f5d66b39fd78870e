"""What test pairs say of each method: means over seeds, and differences to a baseline, with their intervals.

Every arm scores the same pairs, so a difference is taken pair by pair and seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orpo.comparing.arms import Maker
from orpo.comparing.methods import without_objective
from orpo.engine.metrics import metric_named
from orpo.evaluation.per_pair import PairResults, matched, pair_values, read_results, write_results
from orpo.evaluation.preferences import evaluate
from orpo.evaluation.statistics import Estimate, mean_over_runs
from orpo.run.checkpoints import run_recipe
from orpo.run.directory import RunDirectory, read_run
from orpo.settings.config import Objective, inherited_by_evaluation

METRICS = ("accuracy", "log_odds_ratio", "odds_ratio_loss", "chosen_logprob", "rejected_logprob")
"""What is compared; the odds-ratio loss is that of plain ORPO, whatever an arm was trained with."""
JUDGED = ("accuracy", "log_odds_ratio", "chosen_logprob")
"""What the sentences are about."""
_YARDSTICK = Objective()

Kind = Literal["better", "worse", "within noise", "unknown"]


def saved_results(folder: Path, pairs: Path) -> PairResults:
    """What a run's model says of each pair of a split; scored once, then read from its directory."""
    name = f"comparison-{pairs.stem}"  # what `orpo eval` writes there is called otherwise
    path = RunDirectory(folder).evaluated_pairs(name)
    if not path.exists():
        evaluate(str(folder), pairs, name=name, quiet=True)
    return read_results(path)[name]


def validation_results(folder: Path, pairs: Path) -> PairResults:
    """The same of the validation pairs, which a run has scored itself while training."""
    step = read_run(folder).model_step
    kept = {} if step is None else read_results(RunDirectory(folder).step_results(step))
    return next(iter(kept.values())) if len(kept) == 1 else saved_results(folder, pairs)


def base_results(folder: Path, maker: Maker, split: str) -> PairResults:
    """What the base says of validation or test pairs, kept in the folder of the comparison.

    Nothing is written into the folder of the base. Pairs are read as a run of the comparison has read them.
    """
    kept = folder / f"base-{split}.jsonl"
    known = read_results(kept)
    if not known:
        runs = (path for path in sorted(maker.folder.glob("*")) if RunDirectory(path).is_run())
        reading = without_objective(inherited_by_evaluation(run_recipe(str(next(runs)))))
        model = str(maker.recipe["model_name_or_path"])
        found = evaluate(model, maker.splits.path(split), quiet=True, save=False, **reading)
        write_results(kept, {split: found.evaluation.results})
        known = read_results(kept)
    return known[split]


def estimates(results: Sequence[PairResults], before: Sequence[PairResults] = ()) -> dict[str, Estimate]:
    """Means over pairs and seeds of each metric, or of its changes.

    Args:
        results: Of each seed, the same pairs in all.
        before: Of each seed, the model that these are compared with; none: no comparison.
    """
    aligned = [matched(results[0], one)[1] for one in results]
    value = _values(aligned)
    if before:
        other = _values([matched(results[0], one)[1] for one in before])
        value = {name: (here - other[name][0], weight) for name, (here, weight) in value.items()}
    found = {
        name: mean_over_runs(value_RP, weight_P, aligned[0].prompt_P)
        for name, (value_RP, weight_P) in value.items()
    }
    return {name: one for name, one in found.items() if one is not None}


def _values(results: Sequence[PairResults]) -> dict[str, tuple[Tensor, Tensor]]:
    each = [pair_values(one.scores, _YARDSTICK) for one in results]
    weights = each[0][1]
    return {name: (torch.stack([values[name] for values, _ in each]), weights[name]) for name in METRICS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What the test pairs say of a method.

    Attributes:
        means: By metric.
        by_seed: Mean of each metric for each seed.
        change: From the baseline, pair by pair; empty for the baseline itself.
        looks: Comparisons whose intervals are to hold together.
    """

    means: Mapping[str, Estimate]
    by_seed: Sequence[Mapping[str, float]]
    change: Mapping[str, Estimate]
    looks: int

    def kind(self, metric: str) -> Kind:
        """Whether it is better or worse than the baseline, or whether chance may have made the difference."""
        change = self.change.get(metric)
        bounds = change and change.interval(self.looks)
        if change is None or bounds is None:
            return "unknown"
        if bounds[0] <= 0 <= bounds[1]:
            return "within noise"
        return "better" if change.mean * metric_named(metric).better > 0 else "worse"

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the bounds of each interval."""
        return {
            "means": {name: _json(one, 1) for name, one in self.means.items()},
            "by_seed": [dict(one) for one in self.by_seed],
            "change": {
                name: _json(one, self.looks) | {"verdict": self.kind(name)}
                for name, one in self.change.items()
            },
        }


def _json(one: Estimate, looks: int) -> dict[str, Any]:
    bounds = one.interval(looks)
    return {
        "mean": one.mean,
        "se": one.se,
        "df": one.df,
        "interval": None if bounds is None else list(bounds),
    }


def quality_of(results: Sequence[PairResults], baseline: Sequence[PairResults], *, looks: int) -> Quality:
    """The quality of a method from the results of its seeds.

    Args:
        results: Of each seed.
        baseline: Of each seed, the baseline; empty for the baseline itself.
        looks: Methods that are compared with it.
    """
    each = [estimates([one]) for one in results]
    return Quality(
        means=estimates(results),
        by_seed=[{name: one.mean for name, one in seed.items()} for seed in each],
        change=estimates(results, baseline) if baseline else {},
        looks=max(looks, 1),
    )
