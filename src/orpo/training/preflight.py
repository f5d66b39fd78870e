"""Whether a run is finished already, and a summary of what is about to be trained."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from orpo.console import say
from orpo.data.dataset import TokenizedDataset
from orpo.engine.precision import bfloat16_gain
from orpo.errors import ConfigError, raised_as
from orpo.run.directory import RunDirectory
from orpo.run.finished import unfinished_because
from orpo.settings.config import is_in_use, settings_where
from orpo.training.arguments import ORPOConfig
from orpo.training.cadence import number_of_steps
from orpo.training.interruptible import changed
from orpo.training.resuming import check_changes
from orpo.training.trainer import ORPOTrainer

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_STEPS = 10
"""Steps of a schedule that are tried."""
WORTH_SAYING = 2.0
"""How many times as fast bfloat16 products must be: what autocast converts costs time too."""


def is_finished(config: ORPOConfig) -> bool:
    """Whether the run directory holds the result of this very recipe.

    Raises:
        RunError: It holds the result of another recipe.
    """
    run = RunDirectory(Path(str(config.output_dir)))
    problem = unfinished_because(run)
    if config.force or problem is not None:
        if run.finished.exists() and not config.force:
            say(f"{run.path}: {problem}, so the run is not taken for finished")
        return False
    now = config.plain_settings()
    defaults = ORPOConfig(output_dir=config.output_dir).plain_settings()
    before = defaults | run.read_recipe()
    free = settings_where(lambda facts: facts.resume == "free")
    left_open = {name for name in now if now[name] is None and defaults[name] is None}
    compared = {name for name in now.keys() - free - left_open if is_in_use(name, now)}
    check_changes(run.path, {name: before[name] for name in compared}, {name: now[name] for name in compared})
    return True


def check_optimization(trainer: ORPOTrainer) -> list[str]:
    """Make the optimizer and the schedule of a single number, so that what they refuse is refused now.

    Returns:
        A line for each setting of Adam that is not at its default, where another optimizer reads none.

    Raises:
        ConfigError: A package is missing, or a setting of either cannot be used.
    """
    config: Any = trainer.args
    number = torch.nn.Parameter(torch.zeros(1, 1))
    optim = f"optim: {_text(config.optim)}" + (
        f", optim_args: {config.optim_args}" if config.optim_args else ""
    )
    with raised_as(ConfigError, f"{optim} cannot be used"):
        kind, arguments = trainer.get_optimizer_cls_and_kwargs(config, trainer.model)
        by_group = {"params", "optimizer_dict"} & arguments.keys()
        by_name = by_group or "model" in arguments
        made = torch.optim.SGD([number]) if by_name else kind([number], **arguments)
    if config.optim_target_modules and not by_group:
        raise ConfigError(f"optim_target_modules: optim: {_text(config.optim)} takes none; leave it out")
    if not by_name:
        _check_optimizer_arguments(trainer)
    more = config.lr_scheduler_kwargs or {}
    schedule = f"lr_scheduler_type: {_text(config.lr_scheduler_type)}"
    blamed = (
        f"lr_scheduler_kwargs: {more} cannot be used with {schedule}"
        if more
        else f"{schedule} cannot be used"
    )
    with raised_as(
        ConfigError, blamed, "what a schedule takes is written lr_scheduler_kwargs: {name: value}"
    ):
        _try(get_scheduler(config.lr_scheduler_type, made, 1, _STEPS, dict(more)))
    defaults = {f.name: f.default for f in fields(config)}
    changes = [{name: defaults[name]} for name in _ADAM if getattr(config, name) != defaults[name]]
    idle = [change for change in changes if not _is_read(trainer, {}, change)]
    return [f"{name}: no effect with optim: {_text(config.optim)}" for (name,) in idle]


def _try(schedule: Any) -> None:
    """Take the steps of a schedule, which reads its arguments only then."""
    asks_for_a_loss = "metrics" in inspect.signature(schedule.step).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer takes no step
        for _ in range(_STEPS):
            schedule.step(*([1.0] if asks_for_a_loss else []))


def _text(value: Any) -> Any:
    """A setting as it is written, where transformers holds it as one of an enumeration."""
    return getattr(value, "value", value)


def _check_optimizer_arguments(trainer: ORPOTrainer) -> None:
    """Refuse what `optim_args` has and the optimizer never reads: what no value of it changes."""
    config: Any = trainer.args
    for part in config.optim_args.split(",") if config.optim_args else ():
        name = part.partition("=")[0].strip()
        if not _is_read(trainer, {"optim_args": None}, {"optim_args": f"{name}=?"}):
            raise ConfigError(f"optim_args: {name}: optim: {_text(config.optim)} takes none; leave it out")


def _is_read(trainer: ORPOTrainer, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the optimizer is made in another way with the one settings than with the other."""
    made = []
    for settings in (one, other):
        with changed(trainer.args, **settings):
            try:
                made.append(trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model))
            except Exception:  # it is read, and is nothing that the optimizer can be given
                return True
    return made[0] != made[1]


def summary(trainer: ORPOTrainer) -> list[str]:
    """What is about to be trained, on what, and for how long; a line each."""
    config: Any = trainer.args
    return [
        f"model      {_model_summary(trainer)}",
        *_data_summary(trainer),
        *_objective_summary(trainer),
        f"steps      {_steps_summary(trainer)}",
        f"machine    {config.world_size} x {config.device.type}, {precision_summary(config)}",
        f"output     {config.output_dir}",
    ]


def precision_summary(config: Any, gain: float | None = None) -> str:
    """What is computed in, and whether a CPU would be faster in bfloat16.

    Args:
        config: Of the run.
        gain: How many times as fast bfloat16 is here; None: it is measured, on a CPU.
    """
    if config.bf16 or config.fp16:
        return "bfloat16 autocast" if config.bf16 else "float16 autocast"
    if gain is None:
        gain = bfloat16_gain() if config.device.type == "cpu" else 0.0
    if gain < WORTH_SAYING:
        return "float32"
    return f"float32; this processor multiplies bfloat16 {gain:.1f}x as fast: bf16: true"


def _objective_summary(trainer: ORPOTrainer) -> Iterator[str]:
    for number, (name, objective, _) in enumerate(trainer.schedule.stages):
        of_stage = f", from step {trainer.schedule.starts[number] + 1:,}" if trainer.args.stages else ""
        values = ", ".join(f"{key} {value}" for key, value in asdict(objective).items())
        yield f"objective  {name}{of_stage}: {values}"


def _model_summary(trainer: ORPOTrainer) -> str:
    total = trainer.model.num_parameters()
    trained = trainer.model.num_parameters(only_trainable=True)
    share = "all" if trained == total else f"{trained:,} of them, {trained / total:.2%},"
    return f"{trainer.args.model_name_or_path}: {total:,} weights, {share} trained"


def _data_summary(trainer: ORPOTrainer) -> Iterator[str]:
    pairs: Any = trainer.train_dataset
    if isinstance(pairs, TokenizedDataset):
        tokens = pairs.lengths.sum(1)
        yield (
            f"data       {len(pairs):,} pairs: {tokens.sum():,} tokens an epoch, "
            f"{tokens.mean():.0f} a pair on average, {tokens.max():,} at most"
        )
    held_out: Any = trainer.eval_dataset
    sets = held_out if isinstance(held_out, dict) else {"": held_out} if held_out is not None else {}
    sizes = ", ".join(f"{len(rows):,} pairs{f' ({name})' if name else ''}" for name, rows in sets.items())
    yield f"held out   {sizes or 'nothing'}"


def _steps_summary(trainer: ORPOTrainer) -> str:
    config: Any = trainer.args
    if not isinstance(trainer.train_dataset, TokenizedDataset):
        return f"{config.max_steps:,} of {trainer.pairs_per_step} pairs, streamed"
    in_epoch = len(trainer.get_train_dataloader())
    steps = number_of_steps(config, trainer.train_dataset, trainer.pairs_per_step)
    number = round(steps / in_epoch, 2)
    epochs = f"{number:g} epoch{'' if number == 1 else 's'} of {in_epoch:,} steps"
    return f"{steps:,} of {trainer.pairs_per_step} pairs: {epochs}"
