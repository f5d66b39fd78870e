"""What a run leaves in its directory besides weights: recipe, environment, data report, and its log."""

import platform
import resource
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import orpo
from orpo.run.checkpoints import begin_at
from orpo.run.directory import RunDirectory, write_json
from orpo.run.log import Figures, Record, append_record, read_records, write_records

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy")


class Recorder(TrainerCallback):
    """Writes the files, on the first rank; metrics.jsonl record by record.

    Attributes:
        newest: The last record made in this process, on every rank; None at first.
    """

    def __init__(
        self, output_dir: str, recipe: Mapping[str, Any], data_report: Mapping[str, Any], *, writes: bool
    ) -> None:
        """Keep what there is to write.

        Args:
            output_dir: The run directory.
            recipe: The resolved settings.
            data_report: What became of the rows.
            writes: Whether this process writes.
        """
        self.run = RunDirectory(Path(output_dir))
        self.recipe = recipe
        self.data_report = data_report
        self.newest: Record | None = None
        self._writes = writes
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Describe the run; of an earlier attempt's log keep what the checkpoint already includes."""
        if not self._writes:
            return
        begin_at(self.run.path, state.global_step)
        earlier = read_records(self.run.log) if state.global_step > 0 else []
        # What a run saved that was killed afterwards is not its result: this run saves again.
        kept = [record for record in earlier if record.step <= state.global_step and record.kind != "saved"]
        if kept or self.run.log.exists():
            write_records(self.run.log, kept)
        self.run.write_recipe(self.recipe)
        write_json(self.run.data_report, self.data_report)
        write_json(self.run.environment, environment(args) | {"steps": state.max_steps})
        if state.global_step == 0:
            self.run.forget_results()
        self._started = time.perf_counter() - (kept[-1].seconds if kept else 0.0)

    def trained(self, step: int, epoch: float, metrics: Figures) -> None:
        """Record the window of training steps that ends at `step`."""
        self._append(Record(step=step, kind="train", epoch=epoch, seconds=self._seconds, metrics=metrics))

    def evaluated(self, step: int, epoch: float, set_name: str, num_pairs: int, metrics: Figures) -> None:
        """Record an evaluation of one set."""
        self._append(
            Record(
                step=step,
                kind="eval",
                epoch=epoch,
                seconds=self._seconds,
                set=set_name,
                num_pairs=num_pairs,
                metrics=metrics,
            )
        )

    def stage_began(self, step: int, epoch: float, stage: str) -> None:
        """Record which objective begins after a step, once, however often the run stops there."""
        if self._writes and not any(
            record.kind == "stage" and record.step == step for record in read_records(self.run.log)
        ):
            record = Record(step=step, kind="stage", epoch=epoch, seconds=self._seconds, stage=stage)
            append_record(self.run.log, record)

    def saved(self, step: int, epoch: float, model_step: int) -> None:
        """Record that the run directory holds the weights of `model_step`."""
        self._append(
            Record(step=step, kind="saved", epoch=epoch, seconds=self._seconds, model_step=model_step)
        )

    def take_back_evaluations(self, step: int) -> None:
        """Forget the evaluations recorded at a step, which will be made again."""
        if self._writes:
            records = read_records(self.run.log)
            kept = [record for record in records if (record.kind, record.step) != ("eval", step)]
            write_records(self.run.log, kept)

    def evaluations(self, step: int) -> list[Record]:
        """The evaluations recorded at a step."""
        return [
            record for record in read_records(self.run.log) if record.kind == "eval" and record.step == step
        ]

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _append(self, record: Record) -> None:
        self.newest = record
        if self._writes:
            append_record(self.run.log, record)


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held so far, in GiB: on its GPU where it has one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident() / 2**30


def peak_resident() -> int:
    """Most bytes that this process has had in memory so far.

    Linux starts the count of `getrusage` at the peak of the process that started this one, so its own is read
    from /proc.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(args: Any) -> dict[str, Any]:
    """What the run was made with."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {"orpo": orpo.__version__} | {name: version(name) for name in _LIBRARIES},
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device),
        "num_processes": args.world_size,
        "threads": torch.get_num_threads(),
        "mixed_precision": args.mixed_precision,
    }
