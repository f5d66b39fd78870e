"""What a training takes: measured around it, in whatever process it runs, and kept next to its log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.arms import Arm, answers_read
from orpo.run.directory import Run, RunDirectory, read_json, read_run, write_json
from orpo.training.job import Outcome, train
from orpo.training.recorder import peak_resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a training took, or several together.

    Attributes:
        seconds: From the first line of `train` to its end, loading, evaluations and saving included.
        cpu_seconds: Of all threads of its process meanwhile.
        step_seconds: Of `seconds`, those spent in optimizer steps.
        peak_gib: Most memory: on the GPU where there is one, else of the process, its libraries included.
        steps: Optimizer steps.
        tokens: Tokens trained on.
        answers: Answers that went through the model forward for it.
        sessions: How often it was started; above 1 where it was interrupted, and work may have been lost.
    """

    seconds: float
    cpu_seconds: float
    step_seconds: float
    peak_gib: float
    steps: int
    tokens: float
    answers: float
    sessions: int = 1

    def to_json(self) -> dict[str, float]:
        """As plain values."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measured(settings: Mapping[str, Any]) -> Outcome:
    """Train as `orpo.train` does, with what is printed in a file of the run directory, and note what it took.

    The checkpoints of a training that has come to its end are deleted: a comparison makes many, and the
    model lies in the run directory itself.

    Raises:
        OrpoError: As `train`.
    """
    run = RunDirectory(Path(str(settings["output_dir"])))
    run.path.mkdir(parents=True, exist_ok=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        with run.trainer_output.open("a", encoding="utf-8") as log, redirect_stdout(log):
            outcome = train(settings)
        if outcome.ending == "trained":
            for checkpoint in filter(run.is_checkpoint, list(run.path.iterdir())):
                shutil.rmtree(checkpoint, ignore_errors=True)
        return outcome
    finally:
        session = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu_began,
            "peak_gib": peak_resident() / 2**30,
        }
        write_json(run.cost, [*read_json(run.cost, []), session])


def cost_of(folder: Path, run: Run | None = None) -> Cost:
    """What the training in a run directory took; its process is known where `measured` has run it."""
    run = run or read_run(folder)
    sessions: Sequence[Mapping[str, float]] = read_json(RunDirectory(folder).cost, [])
    lines = [record for record in run.records if record.kind == "train"]
    device = str(run.environment.get("device", "cpu"))
    on_device = [line.metrics["peak_memory"].mean for line in lines if "peak_memory" in line.metrics]
    peaks = [one["peak_gib"] for one in sessions] if device == "cpu" and sessions else on_device
    tokens = [line.metrics["tokens"].mean for line in lines]
    rates = [line.metrics["tokens_per_second"].mean for line in lines]
    return Cost(
        seconds=sum(one["seconds"] for one in sessions),
        cpu_seconds=sum(one["cpu_seconds"] for one in sessions),
        step_seconds=sum(number / rate for number, rate in zip(tokens, rates, strict=True) if rate > 0),
        peak_gib=max(peaks, default=0.0),
        steps=run.last_step,
        tokens=sum(tokens),
        answers=0.0,
        sessions=len(sessions),
    )


def cost_of_arm(arm: Arm) -> Cost:
    """What an arm took: times, tokens and answers of its stages added up, memory of the largest."""
    runs = [read_run(job.folder) for job in arm.jobs]
    costs = [cost_of(job.folder, run) for job, run in zip(arm.jobs, runs, strict=True)]
    pairs = sum(_pairs_seen(run) for run in runs)
    return Cost(
        seconds=sum(one.seconds for one in costs),
        cpu_seconds=sum(one.cpu_seconds for one in costs),
        step_seconds=sum(one.step_seconds for one in costs),
        peak_gib=max(one.peak_gib for one in costs),
        steps=sum(one.steps for one in costs),
        tokens=sum(one.tokens for one in costs),
        answers=answers_read(arm.method, pairs),
        sessions=max(one.sessions for one in costs),
    )


def _pairs_seen(run: Run) -> float:
    """Pairs that were trained on, each as often as it was."""
    kept = run.data.get("train", {}).get("rows", {}).get("kept", 0)
    return float(kept) * max((record.epoch for record in run.records), default=0.0)
