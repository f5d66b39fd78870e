"""Two models on the same pairs, pair by pair: what `orpo eval A B` does, for Python too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.engine.steps import EVALUATION_BLOCK
from orpo.errors import DataError
from orpo.evaluation.preferences import Result, evaluate, save_result
from orpo.evaluation.verdict import Change, Words, compare, judge, run_objective, sentence
from orpo.run.checkpoints import run_recipe
from orpo.settings.config import inherited_by_evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What pairs say of two models.

    Attributes:
        first: The model that the other one is compared with.
        second: The other one.
        change: From the first to the second, pair by pair.
        sentence: Which is better, in plain words.
    """

    first: Result
    second: Result
    change: Change
    sentence: str

    @property
    def path(self) -> Path | None:
        """Where it was saved; None where the second model is in no run directory."""
        return self.second.path

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        models = {"first": self.first.to_json(), "second": self.second.to_json()}
        return models | {"change": self.change.to_json(), "sentence": self.sentence}


def compare_models(
    first: str,
    second: str,
    data: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    batch_size: int = EVALUATION_BLOCK,
    quiet: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Score the same pairs with two models, both with the settings of the second.

    The result is saved in the directory of the second, where that is a run; nothing is written into that of
    the first. Arguments as for `evaluate`.

    Raises:
        OrpoError: A model, the data or the settings cannot be used, or the models have no pair in common.
    """
    shared = inherited_by_evaluation(run_recipe(second), settings) | settings
    options: dict[str, Any] = {"split": split, "batch_size": batch_size, "progress": progress, "save": False}
    before = evaluate(first, data, quiet=quiet, **options, **shared)
    after = evaluate(second, data, quiet=quiet, **options, **shared)
    results = before.evaluation.results, after.evaluation.results
    if not set(results[0].sources) & set(results[1].sources):
        raise DataError(f"{data}: {first} and {second} can score no pair in common; look at the dropped rows")
    change = compare(*results, run_objective(shared))
    scored = max(len(one) for one in results)
    if change.num_pairs < scored and not quiet:
        say(f"{change.num_pairs} of {scored} pairs are scored by both models; only these are compared")
    if run_objective(shared).needs_reference and not quiet:
        say(f"its loss and rewards have {first} as the reference: objective dpo compares with a model")
    by_preference = change.num_preferences > 0
    words = Words(
        f"{second} is better than {first}",
        f"{second} is worse than {first}",
        f"{second} is no better and no worse than {first}",
        pairs="pair",
    )
    said = sentence(judge(change, by_preference=by_preference), change, words, by_preference=by_preference)
    against = {"compared_with": {"model": Path(first).name or first, "change": change.to_json()}}
    saved = save_result(after, name, **against)
    return Comparison(first=before, second=replace(after, path=saved.path), change=change, sentence=said)
