"""Held-out pairs -> what a model prefers: accuracy, margins, log odds, log-probs, NLL, each with its error.

Pairs are packed and scored as in training, without gradients, and averaged at the end; errors are clustered
by prompt (statistics.py). `evaluate` does all of it by name, for `orpo eval` and for Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from orpo.console import say
from orpo.data.dataset import TokenizedDataset
from orpo.data.source import ReadPairs, read_pairs
from orpo.data.token_ids import check_token_ids
from orpo.engine.head import PairScores
from orpo.engine.lengths import check_length
from orpo.engine.loading import load_tokenizer
from orpo.engine.memory import default_tokens_per_micro_batch
from orpo.engine.model import prepare_model
from orpo.engine.score import score
from orpo.engine.scorer import base_model, num_embeddings
from orpo.engine.steps import EVALUATION_BLOCK, BatchSettings, StepDataset
from orpo.engine.stop_tokens import saved_stop_token_ids
from orpo.errors import ConfigError
from orpo.evaluation.generation import load_trained
from orpo.evaluation.per_pair import PairResults, write_results
from orpo.pairs import TokenizedPair
from orpo.run.checkpoints import model_folder, run_recipe
from orpo.run.directory import RunDirectory, write_json
from orpo.run.finished import unfinished_because
from orpo.run.log import Figures, figures_to_json
from orpo.settings.config import (
    Objective,
    OrpoSettings,
    check_recipe,
    inherited_by_evaluation,
    resolve_objective,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a model was found to prefer.

    Attributes:
        num_pairs: Pairs scored.
        num_preferences: Pairs with both sides; accuracy, margin and odds are over these.
        figures: By metric.
        results: Pair by pair.
        groups: The same for each group of pairs, where the data names groups.
    """

    num_pairs: int
    num_preferences: int
    figures: Figures
    results: PairResults
    groups: dict[str, Evaluation] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "num_pairs": self.num_pairs,
            "num_preferences": self.num_preferences,
            "metrics": figures_to_json(self.figures),
        } | (
            {"groups": {name: group.to_json() for name, group in self.groups.items()}} if self.groups else {}
        )


def evaluate_pairs(
    model: nn.Module,
    pairs: TokenizedDataset | Sequence[TokenizedPair],
    settings: BatchSettings,
    *,
    batch_size: int = EVALUATION_BLOCK,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score pairs with a prepared model and average over them.

    Args:
        model: As `prepare_model` leaves it.
        pairs: At least one.
        settings: Objective, layout and token budget; every rejected side is scored, whatever the objective.
        batch_size: Pairs that are packed together; only the speed depends on it.
        progress: Called with the number of pairs of each micro-batch scored.
    """
    dataset = pairs if isinstance(pairs, TokenizedDataset) else TokenizedDataset.from_pairs(pairs)
    scores = score_pairs(model, dataset, settings, batch_size=batch_size, progress=progress)
    return evaluation_of(PairResults.of(scores, dataset), settings.objective)


def evaluation_of(results: PairResults, objective: Objective) -> Evaluation:
    """Averages over pairs, over all and over each group."""
    groups = results.by_group()
    return Evaluation(
        num_pairs=len(results),
        num_preferences=results.num_preferences,
        figures=results.figures(objective),
        groups={
            name: evaluation_of(replace(of, groups=[None] * len(of)), objective)
            for name, of in groups.items()
        },
        results=results,
    )


def score_pairs(
    model: nn.Module,
    pairs: TokenizedDataset,
    settings: BatchSettings,
    *,
    batch_size: int = EVALUATION_BLOCK,
    progress: Callable[[int], None] | None = None,
) -> PairScores:
    """The scores of every pair, in the order of `pairs`, on the CPU. Arguments as for `evaluate_pairs`."""
    both_sides = replace(settings, score_rejected=True)
    steps = StepDataset(pairs, both_sides, pairs_per_step=batch_size, shuffle=False)  # type: ignore[arg-type]
    training = model.training
    scores = score(
        model,
        (steps[number] for number in range(len(steps))),
        len(pairs),
        device=next(model.parameters()).device,
        progress=progress,
    )
    model.train(training)
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An evaluation, and of what.

    Attributes:
        model: As given.
        data: As given, or what kind of object it was.
        evaluation: What was found.
        settings: Those of the recipe that decided it.
        rows: What became of the rows.
        path: Where it was saved; None where the model is in no run directory.
    """

    model: str
    data: str
    evaluation: Evaluation
    settings: dict[str, Any]
    rows: dict[str, Any]
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        about = {"model": self.model, "data": self.data}
        return about | self.evaluation.to_json() | {"settings": self.settings, "rows": self.rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyToScore:
    """A model and held-out pairs that it can score.

    Attributes:
        model: Prepared, on its device.
        read: The pairs.
        batches: How they become its micro-batches.
        settings: Those of the recipe that decided it.
    """

    model: nn.Module
    read: ReadPairs
    batches: BatchSettings
    settings: dict[str, Any]


def ready_to_score(
    model: str, data: Any, *, split: str | None = None, quiet: bool = False, **settings: Any
) -> ReadyToScore:
    """Read pairs, load a model, and prepare it to score them. Arguments as for `evaluate`.

    Raises:
        OrpoError: Model, data or settings cannot be used.
    """
    folder = model_folder(model)
    _say_all([] if quiet else _unfinished(RunDirectory(Path(model)), folder))
    recipe = inherited_by_evaluation(run_recipe(str(model)), settings) | settings
    check_recipe(recipe)
    resolved = OrpoSettings.from_recipe(recipe)
    tokenizer = load_tokenizer(folder, trust_remote_code=resolved.trust_remote_code)
    source = data if isinstance(data, str | Path) else type(data).__name__
    stops = saved_stop_token_ids(folder)
    split = split or _default_split(source, resolved)
    read = read_pairs(data, resolved, tokenizer, split=split, stop_tokens=stops)
    _say_all([] if quiet else read.lines())
    loaded = load_trained(folder, resolved)
    check_token_ids(read.pairs, num_embeddings(loaded), tokenizer)
    batches, notices = _batch_settings(loaded, resolved, read.pairs.longest)
    if batches.objective.needs_reference:
        notices = [*notices, _NO_REFERENCE]
    _say_all([] if quiet else notices)
    return ReadyToScore(model=loaded, read=read, batches=batches, settings=recipe)


def evaluate(
    model: str,
    data: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    batch_size: int = EVALUATION_BLOCK,
    quiet: bool = False,
    save: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Result:
    """Score preference pairs with the model of a run directory, or with any model or adapter.

    Says how the data was read and what was dropped. In the directory of a run the result is saved, for the
    page, with the scores of every pair next to it; nothing is written into any other folder.

    Args:
        model: Run directory, model or adapter folder, or hub name.
        data: File, hub name, `Dataset` or rows.
        split: Split of a hub data set; None: what the settings name, else `test`.
        name: The result is saved under this name; None: the name of the data.
        batch_size: Pairs packed together, at least 1; only the speed depends on it.
        quiet: Say nothing.
        save: Whether the result is saved where it can be.
        progress: Called with the pairs scored so far and their number.
        settings: Of a recipe (`max_length=1024`, ...); they beat those that the run was trained with.

    Raises:
        OrpoError: Model, data or settings cannot be used.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: {batch_size} is out of range; expected at least 1")
    if name is not None and not re.fullmatch(r"[\w.=+ -]{1,100}", name):
        raise ConfigError(f"name: {name!r} cannot be part of a file name; use letters, digits, - and _")
    ready = ready_to_score(model, data, split=split, quiet=quiet, **settings)
    pairs, counts = ready.read.pairs, ready.read.counts
    found = evaluate_pairs(
        ready.model, pairs, ready.batches, batch_size=batch_size, progress=_counting(progress, len(pairs))
    )
    result = Result(
        model=str(model),
        data=str(data if isinstance(data, str | Path) else type(data).__name__),
        evaluation=found,
        settings=ready.settings,
        rows={} if counts is None else counts.to_dict(),
    )
    return save_result(result, name) if save else result


_NO_REFERENCE = (
    "objective dpo: loss and rewards are left out, since they need the scores of a reference, the model"
    " before training; `orpo eval BASE RUN` has them"
)


def save_result(result: Result, name: str | None = None, **further: Any) -> Result:
    """Save a result in its run directory; one of a model that is in none is returned as it is.

    Args:
        result: Of an evaluation.
        name: It is saved under this name; None: the name of its data.
        further: Further values of the file.
    """
    run = RunDirectory(Path(result.model))
    if not run.log.is_file():
        return result
    name = name or Path(result.data).name.split(".")[0] or "data"
    write_results(run.evaluated_pairs(name), {name: result.evaluation.results})
    path = run.evaluation(name)
    write_json(path, result.to_json() | further)
    return replace(result, path=path)


def _unfinished(run: RunDirectory, folder: str) -> list[str]:
    """A line where the model is that of a run that has not ended."""
    why = unfinished_because(run) if run.log.is_file() else None
    if why is None:
        return []
    return [f"{run.path}: {why}; this is the model of {Path(folder).name}"]


def _default_split(source: str | Path, settings: OrpoSettings) -> str | None:
    """A single file is evaluated whole; elsewhere it is the recipe's test split, or `test`."""
    return None if Path(source).is_file() else settings.dataset_test_split or "test"


def _batch_settings(
    model: nn.Module, settings: OrpoSettings, longest: int
) -> tuple[BatchSettings, Sequence[str]]:
    """Prepare a model; returns how pairs become its micro-batches, and lines to print."""
    objective, _ = resolve_objective(settings)
    memory = settings.logits_memory_mib
    lines = check_length(base_model(model), longest)
    prepared = prepare_model(
        model, layout=settings.layout, logits_memory_mib=memory, longest=settings.max_length, trains=False
    )
    device = next(model.parameters()).device
    budget = settings.tokens_per_micro_batch or default_tokens_per_micro_batch(model, device, trains=False)
    return prepared.batches(objective, budget), [*lines, *prepared.notices]


def _counting(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    """`progress`, called with the number of pairs of each micro-batch."""
    if progress is None:
        return None
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        progress(done, total)

    return advance


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        say(line)
