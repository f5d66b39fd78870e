"""`orpo train RECIPE`: from a recipe to a run directory; the same command again goes on where it was."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import ConfigError

if TYPE_CHECKING:
    from orpo.training.trainer import ORPOConfig, ORPOTrainer

_USAGE = "orpo train [RECIPE] [--KEY VALUE ...] [KEY=VALUE ...]"
_EPILOG = """examples:
  orpo train recipe.yaml --learning_rate 1e-5 --bf16
  orpo train --model_name_or_path M --dataset_name pairs.jsonl --output_dir runs/first
  orpo train recipe.yaml --dry_run          check recipe, data and model, print the plan, stop
  orpo train runs/first                     go on with a run, with the recipe it was started with
  torchrun --nproc_per_node 8 -m orpo train recipe.yaml

`orpo config --all` lists the keys. The command line beats the recipe.
"""
_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab")


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo train` to the command line."""
    parser = words.add_parser(
        "train",
        help="train a model on preference pairs",
        description="Train a causal language model on preference pairs, as a recipe says.",
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Check all that can be checked at once, then train."""
    from orpo.commands.config import check_recipe
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    settings = recipe.settings
    check_recipe(settings)
    check_needs(settings)
    model = Path(settings["model_name_or_path"]).expanduser()
    if model.is_dir():
        # The recipe and an adapter remember the name, and are read from other folders.
        settings["model_name_or_path"] = str(model.resolve())
    settings.setdefault("output_dir", f"runs/{recipe.name or 'orpo'}")
    os.environ.update(recipe.environment)
    if _speaks():
        for notice in recipe.notices:
            print(notice, flush=True)

    from transformers.utils import logging

    from orpo.training.trainer import ORPOConfig, ORPOTrainer

    # `gradient_checkpointing`, which everybody writes, will not have that name for ever.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    config = ORPOConfig(**settings)
    if _is_finished(config):
        _say(f"{config.output_dir} holds the finished run of this recipe; a new one needs another output_dir")
        return 0
    is_new = not _run_dir(config).exists()
    trainer = ORPOTrainer(args=config)
    for line in plan_lines(trainer):
        _say(line)
    if config.dry_run:
        if is_new and _speaks():
            _run_dir(config).rmdir()  # the Trainer has made it
        _say("dry run: nothing was trained or written")
        return 0
    return _train(trainer, config)


def check_needs(settings: dict[str, Any]) -> None:
    """Stop before anything heavy where something a run needs is missing.

    Raises:
        ConfigError: No model, no data, a package that is not installed, or no credentials for the hub.
    """
    for key, example in (
        ("model_name_or_path", "a hub name or folder"),
        ("dataset_name", "a hub name or file"),
    ):
        if not settings.get(key):
            raise ConfigError(f"{key} is not set; add it to the recipe or write --{key} with {example}")
    for package, reason in _packages(settings):
        if find_spec(package) is None:
            raise ConfigError(f"{reason} needs {package}, which is not installed; pip install {package}")
    if settings.get("push_to_hub") and not _has_hub_token(settings):
        raise ConfigError(
            "push_to_hub: no Hugging Face token was found, so the upload at the end would fail; "
            "run `hf auth login`, set HF_TOKEN, or set push_to_hub: false"
        )
    if settings.get("push_to_hub") and os.environ.get("HF_HUB_OFFLINE", "0").lower() not in (
        "",
        "0",
        "false",
    ):
        raise ConfigError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or set push_to_hub: false")


def _packages(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Optional packages the settings need, each with the setting."""
    needed = []
    trackers = settings.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker in _TRACKERS:
            needed.append((tracker, f"report_to: {tracker}"))
    optimizer = str(settings.get("optim", ""))
    if (
        "bnb" in optimizer
        or "paged" in optimizer
        or optimizer.endswith(("adamw_8bit", "lion_8bit", "ademamix_8bit"))
    ):
        needed.append(("bitsandbytes", f"optim: {optimizer}"))
    for key, package in (
        ("load_in_4bit", "bitsandbytes"),
        ("load_in_8bit", "bitsandbytes"),
        ("deepspeed", "deepspeed"),
    ):
        if settings.get(key):
            needed.append((package, key))
    return needed


def _has_hub_token(settings: dict[str, Any]) -> bool:
    from huggingface_hub import get_token

    return bool(settings.get("hub_token") or get_token())


def plan_lines(trainer: ORPOTrainer) -> list[str]:
    """What is about to be trained, on what, and for how long."""
    from orpo.data.dataset import TokenizedDataset

    config: Any = trainer.args
    model: Any = trainer.model
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    share = "all" if trained == total else f"{trained:,} of them, {trained / total:.2%},"
    lines = [f"model      {config.model_name_or_path}: {total:,} weights, {share} trained"]
    pairs: Any = trainer.train_dataset
    if isinstance(pairs, TokenizedDataset):
        tokens = pairs.lengths.sum(1)
        lines.append(
            f"data       {len(pairs):,} pairs: {tokens.sum():,} tokens an epoch, "
            f"{tokens.mean():.0f} a pair on average, {tokens.max():,} at most"
        )
    held_out: Any = trainer.eval_dataset
    sets = held_out if isinstance(held_out, dict) else {"": held_out} if held_out is not None else {}
    sizes = ", ".join(f"{len(rows):,} pairs{f' ({name})' if name else ''}" for name, rows in sets.items())
    lines.append(f"held out   {sizes or 'nothing'}")
    objective = asdict(config.objective_settings)
    lines.append("objective  " + ", ".join(f"{name} {value}" for name, value in objective.items()))
    loader = trainer.get_train_dataloader()
    if isinstance(pairs, TokenizedDataset):
        steps = config.max_steps if config.max_steps > 0 else round(len(loader) * config.num_train_epochs)
        number = round(steps / len(loader), 2)
        epochs = f"{number:g} epoch{'' if number == 1 else 's'} of {len(loader):,} steps"
        lines.append(f"steps      {steps:,} of {trainer.pairs_per_step} pairs: {epochs}")
    else:
        lines.append(f"steps      {config.max_steps:,} of {trainer.pairs_per_step} pairs, streamed")
    precision = "bfloat16 autocast" if config.bf16 else "float16 autocast" if config.fp16 else "float32"
    lines.append(f"machine    {config.world_size} x {config.device.type}, {precision}")
    lines.append(f"output     {config.output_dir}")
    return lines


def _train(trainer: ORPOTrainer, config: ORPOConfig) -> int:
    """Train from where the run is, save, and say what came of it."""
    checkpoint = _checkpoint(config)
    if checkpoint:
        _say(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by is not None:
        kept = _run_dir(config) / f"checkpoint-{trainer.state.global_step}"
        _say(f"stopped by {trainer.stopped_by}: {kept} is saved, and the same command goes on from it")
        return 128 + int(getattr(signal, trainer.stopped_by, signal.SIGTERM))
    if trainer.eval_dataset is not None and not _is_evaluated(trainer):
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        _conclude(_run_dir(config))
    return 0


def _checkpoint(config: ORPOConfig) -> str | None:
    """Where to go on from: as the settings say, else the newest whole checkpoint of the run directory."""
    from orpo.run.checkpoints import last_checkpoint

    asked = config.resume_from_checkpoint
    if asked and asked.lower() not in ("true", "false"):
        return asked
    newest = None if asked and asked.lower() == "false" else last_checkpoint(_run_dir(config))
    return str(newest) if newest else None


_MAKE_ANOTHER_MODEL = {
    "model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split",
    "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip
"""Settings that a checkpoint answers for in other ways (resuming.py), and a finished run cannot."""


def _is_finished(config: ORPOConfig) -> bool:
    """Whether the run directory holds the result of this very recipe; the model card is what is written last.

    Raises:
        RunError: It holds the result of another recipe.
    """
    from orpo.run.directory import holds_model, read_recipe
    from orpo.training.resuming import refuse_changes, run_identity

    run_dir = _run_dir(config)
    before = read_recipe(run_dir / "recipe.yaml")
    if config.force or not (before and holds_model(run_dir) and (run_dir / "README.md").is_file()):
        return False
    now = config.recipe()
    names = (run_identity(config, None).keys() | _MAKE_ANOTHER_MODEL) & before.keys() & now.keys()
    refuse_changes(run_dir, {name: before[name] for name in names}, {name: now[name] for name in names})
    return True


def _run_dir(config: ORPOConfig) -> Path:
    return Path(str(config.output_dir))


def _is_evaluated(trainer: ORPOTrainer) -> bool:
    """Whether the weights in memory, the best or the last ones, have been evaluated."""
    final = trainer.state.global_step
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step is not None:
        final = trainer.state.best_global_step
    history = trainer.state.log_history
    return any(
        line.get("step") == final and any(name.startswith("eval_") for name in line) for line in history
    )


def _conclude(run_dir: Path) -> None:
    """Write the report, print held-out numbers before and after, and say where the model is."""
    from orpo.report.page import METRICS, shown_number, write_report
    from orpo.run.directory import read_run

    run = read_run(run_dir)
    run = run.of_set(run.evaluation_sets()[0])
    first, last = run.first_evaluation(), run.final_evaluation()
    if first is not None and last is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="Held-out pairs", title_justify="left")
        table.add_column("")
        for name, line in (("before", first), ("after", last)):
            table.add_column(f"{name} (step {line['step']})", justify="right")
        for metric in METRICS:
            if f"eval_{metric.name}" in last:
                table.add_row(metric.title, *(shown_number(metric, line) for line in (first, last)))
        Console().print(table)
    report = write_report(run_dir)
    print(f"model      {run_dir}")
    print(f"report     {report}")
    print(f"next       orpo chat {run_dir} --beside")


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str) -> None:
    if _speaks():
        print(line, flush=True)
