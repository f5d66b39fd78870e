"""From the settings of a recipe to a finished run directory: what `orpo train` does, for Python too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging

from orpo.console import say
from orpo.evaluation.verdict import Verdict, judge_run
from orpo.report.page import write_report
from orpo.run.card import data_names
from orpo.run.checkpoints import last_checkpoint
from orpo.run.directory import Run, RunDirectory, gguf_file, read_run
from orpo.run.lock import check_output_dir, held
from orpo.run.repair import put_damaged_aside
from orpo.settings.config import check_recipe
from orpo.settings.needs import check_needs
from orpo.training.arguments import ORPOConfig
from orpo.training.cautions import cautions
from orpo.training.preflight import check_optimization, is_finished, summary
from orpo.training.resuming import first_rank_decides
from orpo.training.samples import FEW, SHORT, SampleWriter
from orpo.training.trainer import ORPOTrainer

WORSE = 3
"""Exit status where the result is worse than its base."""

Ending = Literal["trained", "stopped", "was finished", "dry run"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `train` ended.

    Attributes:
        ending: `trained` to the end; `stopped` by a signal, with a checkpoint; `was finished` before; or a
            `dry run`.
        folder: The run directory.
        exit_status: For a shell: 0; 3 where the result is worse than its base; 128 and the number of the
            signal.
        run: What the directory holds now, where training has ended, on the first rank.
        page: The report, where it was written.
        verdict: Whether training worked, where it has ended, on the first rank.
    """

    ending: Ending
    folder: Path
    exit_status: int = 0
    run: Run | None = None
    page: Path | None = None
    verdict: Verdict | None = None


def train(settings: Mapping[str, Any], *, page: bool = True) -> Outcome:
    """Check all that can be checked, then train; the same call again resumes an interrupted run.

    Args:
        settings: Of a recipe, by key (`load_recipe("recipe.yaml").settings`); `model_name_or_path` and
            `dataset_name` are needed, `output_dir` is `runs/orpo` by default.
        page: Whether to write the report; `orpo report` can do it later.

    Raises:
        OrpoError: Settings, model or data cannot be trained with, or the run cannot continue.
    """
    settings = {"output_dir": "runs/orpo"} | dict(settings)
    check_recipe(settings)
    check_needs(settings)
    model = Path(settings["model_name_or_path"]).expanduser()
    if model.is_dir() or gguf_file(model) is not None:
        # The recipe and an adapter remember the name, and are read from other folders.
        settings["model_name_or_path"] = str(model.resolve())
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    models = [settings.get("model_name_or_path"), settings.get("adapter_name_or_path")]
    check_output_dir(str(settings["output_dir"]), models, data_names(settings))
    if settings.get("dry_run") and settings.get("fsdp") and "RANK" not in os.environ:
        say(f"dry run in one process: fsdp ({settings.pop('fsdp')}) is left out")
    config = ORPOConfig(**settings)
    config.notices += config.idle(on_the_hub=True)  # nothing but the run itself can push
    folder = Path(str(config.output_dir))
    if first_rank_decides(config, lambda: is_finished(config)):
        say(f"{folder} already holds a finished run of this recipe; set another output_dir to train again")
        has_page = RunDirectory(folder).page.exists() or not page
        if config.process_index == 0 and not (config.dry_run or has_page):
            write_report(folder)
        return _outcome("was finished", config)
    if config.dry_run:
        return _dry_run(config, folder)
    with ExitStack() as stack:
        checkpoint = first_rank_decides(config, lambda: _take_directory(stack, config))
        return _train(_checked_trainer(config), folder, checkpoint, page)


def _checked_trainer(config: ORPOConfig) -> ORPOTrainer:
    trainer = ORPOTrainer(args=config)
    notices = check_optimization(trainer)
    _ask_for_samples(trainer)
    for line in [*notices, *summary(trainer), *cautions(trainer)]:
        say(line)
    return trainer


def _dry_run(config: ORPOConfig, folder: Path) -> Outcome:
    """Load and check everything, and leave nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    trainer = _checked_trainer(config)
    if trainer.is_world_process_zero():
        for path in made:  # the Trainer has made them
            with suppress(OSError):  # gone already, or in use: another process is at work here
                path.rmdir()
    say("dry run: nothing was trained or written")
    return Outcome("dry run", folder)


def _take_directory(stack: ExitStack, config: ORPOConfig) -> str | None:
    """Keep others out of the run directory, put damaged files aside, and find where to resume from."""
    run = RunDirectory(Path(str(config.output_dir)))
    stack.enter_context(held(run.path))
    put_damaged_aside(run)
    return _checkpoint(config)


def _train(trainer: ORPOTrainer, folder: Path, checkpoint: str | None, page: bool) -> Outcome:
    """Train from where the run is, save, and write the page."""
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by is not None:
        kept = RunDirectory(folder).checkpoint(trainer.state.global_step)
        saved = f"saved {kept}" if kept.is_dir() else "no step was made, so nothing is saved"
        say(f"stopped by {trainer.stopped_by}: {saved}; run the same command to resume")
        number = int(getattr(signal, trainer.stopped_by, signal.SIGTERM))
        return Outcome("stopped", folder, 128 + number)
    if trainer.eval_dataset is not None and not trainer.is_evaluated():
        trainer.evaluate()
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return Outcome("trained", folder)
    return replace(_outcome("trained", trainer.args), page=write_report(folder) if page else None)


def _outcome(ending: Ending, config: ORPOConfig) -> Outcome:
    """What a finished run directory holds, and what is to be thought of it."""
    folder = Path(str(config.output_dir))
    run = read_run(folder)
    verdict = judge_run(folder, run)
    failed = verdict.kind == "worse" and config.fail_if_worse
    return Outcome(ending, folder, WORSE if failed else 0, run=run, verdict=verdict)


def finished_status(settings: Mapping[str, Any]) -> int:
    """Exit status of a finished run as its folder tells, for a launcher whose processes have ended."""
    run = RunDirectory(Path(str(settings["output_dir"])))
    if not run.finished.exists() or settings.get("fail_if_worse") is False:
        return 0
    return WORSE if judge_run(run.path, read_run(run.path)).kind == "worse" else 0


def _ask_for_samples(trainer: ORPOTrainer) -> None:
    """Have a few prompts answered before and after, where the recipe says nothing of samples."""
    if trainer.args.num_samples is None and trainer.args.eval_on_start:
        trainer.add_callback(SampleWriter(trainer, FEW, longest=SHORT, at_ends=True))


def _checkpoint(config: ORPOConfig) -> str | None:
    """Where to resume from: as the settings say, else the newest whole checkpoint of the run directory."""
    asked = config.resume_from_checkpoint
    if asked and asked.lower() not in ("true", "false"):
        return asked
    newest = None if asked and asked.lower() == "false" else last_checkpoint(str(config.output_dir))
    return str(newest) if newest else None
