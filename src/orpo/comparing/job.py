"""`orpo compare` as a function: split, choose settings on validation pairs, train, then judge on test pairs.

The folder of a comparison holds everything: `data` (the pairs), `runs` (each training, an ordinary run
directory), the result and its page. The same call again goes on where an earlier one was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.arms import Arm, Maker
from orpo.comparing.asking import Answers, ask_models
from orpo.comparing.budget import tokens_of
from orpo.comparing.choosing import Chosen, choose
from orpo.comparing.cost import cost_of
from orpo.comparing.methods import candidates, needs_reference, recipe_choice
from orpo.comparing.options import Options
from orpo.comparing.page import write_page
from orpo.comparing.plan import DATA, RUNS, absolute, has_begun, settle_plan, usable
from orpo.comparing.pool import Watcher, run_all
from orpo.comparing.quality import base_results, quality_of, saved_results, validation_results
from orpo.comparing.result import Comparison, Entry
from orpo.comparing.sentences import rules, sentences
from orpo.comparing.splits import TEST, VALIDATION, Splits, settle_splits
from orpo.console import say
from orpo.errors import DataError, RunError
from orpo.evaluation.per_pair import PairResults
from orpo.run.directory import write_json
from orpo.run.lock import held
from orpo.settings.config import OrpoSettings, check_recipe
from orpo.settings.needs import check_needs
from orpo.settings.schema import known_settings


def compare(
    recipe: Mapping[str, Any],
    out: str | Path,
    options: Options | None = None,
    *,
    watcher: Watcher | None = None,
    **given: Any,
) -> Comparison:
    """Compare methods on the same base, pairs and budget, and write the result and its page into a folder.

    Args:
        recipe: Settings by key, as `load_recipe("recipe.yaml").settings`; `model_name_or_path` and
            `dataset_name` are needed.
        out: Folder to write, or to go on with.
        options: What is compared.
        watcher: Is told how trainings go.
        given: Fields of `Options`, instead of `options`.

    Raises:
        OrpoError: Recipe, data or options cannot be used, or the folder holds another comparison.
        KeyboardInterrupt: A signal asked for an end; the same call goes on.
    """
    options = options or Options(**given)
    options.check()
    check_recipe(recipe)
    check_needs(recipe)
    folder = usable(out)
    with held(folder):
        recipe = absolute(recipe)
        settle_plan(folder, recipe, command="compare", trials=options.trials)
        splits, reading = settle_splits(
            recipe, folder / DATA, options.sizes, options.split, is_fixed=has_begun(folder)
        )
        study = _Study(
            recipe=recipe,
            options=options,
            folder=folder,
            splits=splits,
            maker=Maker(recipe, splits, reading, folder / RUNS),
            watcher=watcher,
        )
        return study.run()


@dataclass(frozen=True, kw_only=True)
class _Study:
    recipe: Mapping[str, Any]
    options: Options
    folder: Path
    splits: Splits
    maker: Maker
    watcher: Watcher | None

    def run(self) -> Comparison:
        """Everything, in order."""
        began = time.perf_counter()
        chosen = self._choose_all()
        arms, failures = self._train_all(chosen)
        entries = self._judge(arms)
        answers = self._ask(arms)
        result = Comparison(
            folder=self.folder,
            recipe=self.recipe,
            baseline=self.options.reference,
            counts=self.splits.counts,
            sizes=self.splits.sizes,
            seeds=self.options.seeds,
            trials=self.options.trials,
            chosen=chosen,
            base=quality_of([self._base(TEST)], [], looks=1),
            num_prompts=self._base(TEST).num_prompts,
            entries=entries,
            answers=answers,
            failures=failures,
            seconds=time.perf_counter() - began,
        )
        said = {"sentences": sentences(result), "rules": rules(result)}
        write_json(result.json_path, result.to_json() | said)
        write_page(result)
        return result

    def _train(self, arms: Sequence[Arm]) -> dict[Path, str]:
        return run_all(arms, at_once=self.options.jobs, watcher=self.watcher)

    # ------------------------------------------------------------------------------ the choice

    def _choose_all(self) -> dict[str, Chosen]:
        """The settings of each method."""
        tried = {method: self._trials(method) for method in self.options.methods}
        failures = self._train([arm for arms in tried.values() for arm in arms])
        return {method: self._choose(method, arms, failures) for method, arms in tried.items()}

    def _trials(self, method: str) -> list[Arm]:
        usual = float(known_settings()["learning_rate"].default)
        start = recipe_choice(self.recipe, method, rate=usual)
        return [
            self.maker.arm(method, choice, self.splits.sizes[-1], self._seed(0))
            for choice in candidates(start, self.options.trials)
        ]

    def _choose(self, method: str, arms: Sequence[Arm], failures: Mapping[Path, str]) -> Chosen:
        pairs = self.splits.path(VALIDATION)
        found = choose(
            [arm.choice for arm in arms],
            [None if arm.folder in failures else validation_results(arm.folder, pairs) for arm in arms],
            self._base(VALIDATION),
            [failures.get(arm.folder, "") for arm in arms],
        )
        if found is None:
            raise RunError(f"{method}: every setting failed; the first: {failures[arms[0].folder]}")
        return found

    def _seed(self, number: int) -> int:
        return int(self.recipe.get("seed") or 0) + number

    def _base(self, split: str) -> PairResults:
        return base_results(self.folder, self.maker, split)

    # ------------------------------------------------------------------------------ the arms

    def _train_all(self, chosen: Mapping[str, Chosen]) -> tuple[dict[tuple[str, int], list[Arm]], list[str]]:
        """The arms of each method and size that have been trained, and a line for each that failed."""
        arms = {
            (method, size): [
                self.maker.arm(method, chosen[method].choice, size, self._seed(number))
                for number in range(self.options.seeds)
            ]
            for method in chosen
            for size in self.splits.sizes
        }
        failures = self._train([arm for some in arms.values() for arm in some])
        lines = [
            f"{arm.label}: {failures[arm.folder]}"
            for some in arms.values()
            for arm in some
            if arm.folder in failures
        ]
        kept = {key: [arm for arm in some if arm.folder not in failures] for key, some in arms.items()}
        return {key: some for key, some in kept.items() if some}, lines

    def _judge(self, arms: Mapping[tuple[str, int], Sequence[Arm]]) -> list[Entry]:
        """Score the test pairs with each arm, and compare."""
        pairs = self.splits.path(TEST)
        say(f"scoring {self.splits.counts[TEST]:,} test pairs, once, with the settings chosen before")
        scored = {
            key: {arm.seed: saved_results(arm.folder, pairs) for arm in some} for key, some in arms.items()
        }
        baseline = self.options.reference
        looks = len(self.options.methods) - 1
        entries = []
        for (method, size), some in scored.items():
            against = scored.get((baseline, size), {}) if method != baseline else {}
            seeds = [seed for seed in some if not against or seed in against]
            if not seeds:
                raise DataError(f"{method}: no seed was trained together with {baseline}")
            asked = self._reference_tokens(method, size)
            costs = [cost_of(arm, asked) for arm in arms[method, size]]
            quality = quality_of(
                [some[seed] for seed in seeds],
                [against[seed] for seed in seeds] if against else [],
                looks=looks,
            )
            folders = [arm.folder for arm in arms[method, size]]
            entries.append(Entry(method, size, quality, costs, folders))
        return entries

    def _reference_tokens(self, method: str, size: int) -> float:
        if not needs_reference(method):
            return 0.0
        return tokens_of(self.splits.training(size), self.maker.common())

    def _ask(self, arms: Mapping[tuple[str, int], Sequence[Arm]]) -> dict[str, Answers]:
        """What the base, and the first seed of each method on all pairs, answer to test prompts."""
        if not self.options.answers:
            return {}
        whole = {method: some[0] for (method, size), some in arms.items() if size == self.splits.sizes[-1]}
        return ask_models(
            {"base": str(self.recipe["model_name_or_path"])}
            | {method: str(arm.folder) for method, arm in whole.items()},
            self.splits.path(TEST),
            OrpoSettings.from_recipe(self.maker.common()),
            self.folder / "answers",
            baseline=self.options.reference,
            number=min(self.options.answers, self._base(TEST).num_prompts),
            longest=self.options.answer_tokens,
        )
