"""What a training takes: measured around it, in whatever process it runs, and kept next to its log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.arms import Arm
from orpo.comparing.methods import answers_read, needs_reference
from orpo.run.directory import RunDirectory, read_json, read_run, write_json
from orpo.training.job import Outcome, train
from orpo.training.recorder import peak_resident


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a training took.

    Attributes:
        seconds: From the first line of `train` to its end, loading, evaluations and saving included.
        cpu_seconds: Of all threads of its process meanwhile.
        step_seconds: Of `seconds`, those spent in optimizer steps.
        peak_gib: Most memory: on the GPU where there is one, else of the process, its libraries included.
        steps: Optimizer steps.
        tokens: Tokens trained on, and those of a reference.
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

    A comparison makes many: checkpoints of a training that has come to its end are deleted, since the model
    lies in the run directory itself, and its report is left to `orpo report`.

    Raises:
        OrpoError: As `train`.
    """
    run = RunDirectory(Path(str(settings["output_dir"])))
    run.path.mkdir(parents=True, exist_ok=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        with run.trainer_output.open("a", encoding="utf-8") as log, redirect_stdout(log):
            outcome = train(settings, page=False)
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


def cost_of(arm: Arm, reference_tokens: float = 0.0) -> Cost:
    """What an arm took; the time and memory of its process are known where `measured` has run it.

    Args:
        arm: A finished one.
        reference_tokens: Tokens that a reference reads to be asked about the training set.
    """
    run = read_run(arm.folder)
    sessions: Sequence[Mapping[str, float]] = read_json(RunDirectory(arm.folder).cost, [])
    lines = [record for record in run.records if record.kind == "train"]
    is_on_cpu = run.environment.get("device", "cpu") == "cpu"
    on_device = [line.metrics["peak_memory"].mean for line in lines if "peak_memory" in line.metrics]
    peaks = [one["peak_gib"] for one in sessions] if is_on_cpu and sessions else on_device
    tokens = [line.metrics["tokens"].mean for line in lines]
    rates = [line.metrics["tokens_per_second"].mean for line in lines]
    pairs = int(run.data.get("train", {}).get("rows", {}).get("kept", 0))
    passes = max((record.epoch for record in run.records), default=0.0)
    return Cost(
        seconds=sum(one["seconds"] for one in sessions),
        cpu_seconds=sum(one["cpu_seconds"] for one in sessions),
        step_seconds=sum(number / rate for number, rate in zip(tokens, rates, strict=True) if rate > 0),
        peak_gib=max(peaks, default=0.0),
        steps=run.last_step,
        tokens=sum(tokens) + (reference_tokens if needs_reference(arm.method) else 0.0),
        answers=answers_read(arm.method, pairs * passes, pairs),
        sessions=len(sessions),
    )
