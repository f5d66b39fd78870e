"""How often a run is evaluated and saved where nobody says so: so that it takes a tenth of the run at most.

Everything is counted in tokens of training. The count depends on the data and the settings alone, never on a
clock, so that the same run has the same checkpoints on every machine.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from orpo.data.dataset import TokenizedDataset
from orpo.data.source import TrainingData
from orpo.errors import ConfigError
from orpo.settings.config import Schedule, resolve_stages
from orpo.settings.inherited import INHERITED

MOST = 10
"""Evaluations, each with a checkpoint, of a run that is long enough."""
SHARE = 0.1
"""Largest share of the run that they take, with the evaluation before the first step."""
SCORING = 1 / 3
"""Cost of a token that is scored, to one that is trained: a forward pass without a backward one."""
CHECKPOINT_ON_CPU, CHECKPOINT_ON_GPU = 400, 800_000
"""Tokens that could be trained while all of a model's weights and moments are written: 12 bytes a weight at
0.5 GB/s, against 6 operations a weight and token at 1e11 (2e14) a second. A larger model changes nothing."""


def settle_cadence(args: Any, data: TrainingData, model: nn.Module | None) -> None:
    """Set how often to evaluate and save, where the settings leave it open and the run has a known length.

    A line among the notices of `args` says so, where it is less often than a tenth of the run.
    """
    default = INHERITED["save_steps"].default
    steps = number_of_steps(args, data.train_pairs, args.pairs_per_step)
    if args.saving_follows and steps:
        args.save_steps = _with_evaluations(args.eval_steps, steps)
    is_open = args.save_strategy == SaveStrategy.STEPS and args.save_steps == default
    evaluates = args.eval_strategy != IntervalStrategy.NO
    if evaluates:
        is_open &= args.evaluation_is_open and args.eval_steps == default
    if not (is_open and steps and isinstance(data.train_pairs, TokenizedDataset)):
        return
    trained = float(data.train_pairs.lengths.sum(1).mean()) * args.pairs_per_step * steps
    sets = [read.pairs for read in data.evals.values()] if evaluates else []
    scored = float(sum(pairs.lengths.sum() for pairs in sets))
    evaluation, checkpoint = (
        scored * SCORING,
        checkpoint_cost(_trained_share(model), args.world_size, on_cpu=args.device.type == "cpu"),
    )
    number = evaluations(trained, evaluation, checkpoint, on_start=bool(sets))
    if number < MOST:
        args.save_steps = math.ceil(steps / number)
        if evaluates:
            args.eval_steps = args.save_steps
        share = (number + bool(sets)) * (evaluation + checkpoint) / trained
        args.notices.append(_notice(args.save_steps, evaluates=evaluates, is_end=number == 1, share=share))


def _with_evaluations(every: float, steps: int) -> int:
    """Steps between checkpoints that are each evaluated, about as many as where nobody says how often.

    Args:
        every: Steps between evaluations, or the share of the run, as the settings have it.
        steps: Of the run.
    """
    between = math.ceil(every * steps) if every < 1 else int(every)
    return between * max(1, round(steps / MOST / between))


def _notice(steps: int, *, evaluates: bool, is_end: bool, share: float) -> str:
    what, key = ("evaluated and saved", "eval_steps and save_steps") if evaluates else ("saved", "save_steps")
    when = "at the end only" if is_end else f"every {steps:,} steps"
    cost = f", and so it takes about {share:.0%}" if share > SHARE else ""
    return f"{what} {when}: more often would take over a tenth of the run{cost}; {key} change that"


def evaluations(trained: float, evaluation: float, checkpoint: float, *, on_start: bool) -> int:
    """How many evaluations and checkpoints a run has after its first step, the last one included.

    Args:
        trained: Tokens trained in all.
        evaluation: Cost of an evaluation, in such tokens.
        checkpoint: Cost of a checkpoint.
        on_start: Whether there is an evaluation, with a checkpoint, before the first step.

    Returns:
        1 to `MOST`; 1 also where that takes more than `SHARE`, since a run is judged by its ends.
    """
    cost = max(evaluation + checkpoint, 1e-9)
    return max(1, min(MOST, math.floor(SHARE * trained / cost) - on_start))


def number_of_steps(args: Any, pairs: Any, pairs_per_step: int) -> int:
    """Optimizer steps of a run; 0 where that is not known.

    Raises:
        ConfigError: As `steps_in_epoch`.
    """
    if not isinstance(pairs, TokenizedDataset):
        return max(0, int(args.max_steps))
    in_epoch = steps_in_epoch(len(pairs), pairs_per_step, drop_last=args.dataloader_drop_last)
    return steps_of_run(in_epoch, args.max_steps, args.num_train_epochs)


def schedule_of(args: Any, pairs: Any, pairs_per_step: int) -> Schedule:
    """What is minimised in each step of a run; one that may train nothing has a single stage at most."""
    steps = number_of_steps(args, pairs, pairs_per_step)
    return Schedule(resolve_stages(args), steps if args.stages else max(steps, 1))


def steps_in_epoch(num_pairs: int, pairs_per_step: int, *, drop_last: bool) -> int:
    """Optimizer steps of an epoch, at least 1.

    Raises:
        ConfigError: All pairs together are too few for a step, and would be dropped.
    """
    if drop_last and num_pairs < pairs_per_step:
        raise ConfigError(
            f"dataloader_drop_last: {num_pairs:,} pairs are too few for a step of {pairs_per_step:,}, so none"
            " would be trained on; set it to false, or lower per_device_train_batch_size or"
            " gradient_accumulation_steps"
        )
    in_epoch = num_pairs / pairs_per_step
    return max(1, math.floor(in_epoch) if drop_last else math.ceil(in_epoch))


def steps_of_run(in_epoch: int, max_steps: int, num_train_epochs: float) -> int:
    """Optimizer steps of a run with so many steps in an epoch, as transformers' Trainer counts them."""
    return int(max_steps) if max_steps > 0 else math.ceil(in_epoch * float(num_train_epochs))


def _trained_share(model: nn.Module | None) -> float:
    """Part of a model's weights that is trained."""
    if model is None:
        return 1.0
    weights = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(number for number, trains in weights if trains) / max(sum(n for n, _ in weights), 1)


def checkpoint_cost(trained_share: float, ranks: int, *, on_cpu: bool) -> float:
    """Tokens that could be trained while a checkpoint is written, of trained weights alone."""
    return trained_share * (CHECKPOINT_ON_CPU if on_cpu else CHECKPOINT_ON_GPU * ranks)
