"""What there is to judge a run by: each set of pairs, with what it says of every model of the page.

The strongest comes first: sets that did not choose the checkpoint before those that did, sets that compare
the run with its base before those that do not, large ones before small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orpo.errors import DataError
from orpo.evaluation.verdict import Change, Verdict, chooses
from orpo.run.directory import Run, RunDirectory
from orpo.run.log import Figures, figures_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One set of pairs.

    Attributes:
        title: What it is.
        columns: Figures by model: the base, other runs, this run last.
        about: What else there is to say, in sentences.
        num_pairs: Pairs scored; None where that is not known.
        change: From the first column to the last, pair by pair; None where nothing is compared.
        chose: Whether it also chose the checkpoint.
        has_before: Whether the first column is the base.
        one_objective: Whether all models minimise the same, so that their losses may be compared.
    """

    title: str
    columns: Sequence[tuple[str, Figures]]
    about: str
    num_pairs: int | None
    change: Change | None = None
    chose: bool = False
    has_before: bool = True
    one_objective: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the page was asked to show.

    Attributes:
        run_dir: Of the run.
        run: What it holds.
        verdict: On it.
        others: Other runs of which the held-out figures may stand beside it.
        test: What test pairs say, by model: before training, others, this run.
        test_change: The same of the first and the last model, pair by pair.
    """

    run_dir: Path
    run: Run
    verdict: Verdict
    others: Sequence[Run] = ()
    test: Mapping[str, Figures] = field(default_factory=dict)
    test_change: Change | None = None


def collect(shown: Shown) -> list[Evidence]:
    """All there is, the strongest first."""
    found = [*_test(shown), *_held_out(shown), *_saved(shown)]
    return sorted(found, key=lambda one: (one.chose, not one.has_before, -(one.num_pairs or 10**12)))


def _test(shown: Shown) -> Iterator[Evidence]:
    if shown.test:
        change = shown.test_change
        yield Evidence(
            title="Test pairs",
            columns=list(shown.test.items()),
            about="No training and no choice of settings has seen them.",
            num_pairs=change.num_pairs if change else None,
            change=change,
            one_objective=False,
        )


def _held_out(shown: Shown) -> Iterator[Evidence]:
    run, verdict = shown.run, shown.verdict
    for name in run.evaluation_sets():
        change = verdict.sets.get(name)
        first = run.first_evaluation(name)
        last = run.evaluation_at(name, verdict.step) if change else run.final_evaluation(name)
        if first is None or last is None:
            continue
        others = [
            (other.name, line.metrics) for other in shown.others if (line := other.final_evaluation(name))
        ]
        chose = chooses(run, name)
        flatters = " They also chose the checkpoint, which flatters it a little." if chose else ""
        yield Evidence(
            title=name or ("Validation pairs" if shown.test else "Held-out pairs"),
            columns=[
                ("Before", first.metrics),
                *others,
                (run.name if others else "After", last.metrics),
            ],
            about=f"Evaluated at step {first.step:,} and step {last.step:,}.{flatters}",
            num_pairs=last.num_pairs,
            change=change,
            chose=chose,
            one_objective=not others,
        )


def _saved(shown: Shown) -> Iterator[Evidence]:
    """What `orpo eval` has saved in the run directory."""
    for name, result in shown.run.saved_evaluations.items():
        where = RunDirectory(shown.run_dir).evaluation(name)
        if not isinstance(result.get("num_pairs"), int) or "data" not in result:
            raise DataError(f"{where}: damaged; delete the file and evaluate again")
        compared = result.get("compared_with") or {}
        change = Change.from_json(compared.get("change"), where) if compared else None
        others = [one for one in shown.others if _is_of(one.saved_evaluations.get(name), result)]
        columns = [(one.name, _figures(one, name)) for one in [*others, shown.run]]
        if change is not None:
            columns.insert(0, (Path(str(compared.get("model"))).name, change.before))
        yield Evidence(
            title=f"Evaluation: {name}",
            columns=columns,
            about=f"{result['num_pairs']:,} pairs of {Path(str(result['data'])).name}, scored by orpo eval.",
            num_pairs=result["num_pairs"],
            change=change,
            has_before=change is not None,
            one_objective=len(columns) == 1 + (change is not None),
        )


def _is_of(other: Mapping[str, object] | None, result: Mapping[str, object]) -> bool:
    """Whether another run has a result on the same data."""
    return other is not None and all(other.get(key) == result[key] for key in ("data", "num_pairs"))


def _figures(run: Run, name: str) -> Figures:
    return figures_from_json(run.saved_evaluations[name].get("metrics"), f"{run.name}: evaluation {name!r}")
