"""What a user sees while a model trains: one bar on a terminal, one line per log elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from orpo.engine.metrics import metric_named, write_figure
from orpo.run.log import Record
from orpo.training.recorder import Recorder


class Stopwatch:
    """Time spent training: evaluations and checkpoints pause it."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start, pauses left out."""
        return max(time.perf_counter() - self._started, 1e-9)

    def restart(self, already: float = 0.0) -> float:
        """Start again, as if `already` seconds had passed; returns the seconds since the last start."""
        seconds = self.seconds
        self._started = time.perf_counter() - already
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time within."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began


class Progress(TrainerCallback):
    """Shows loss, accuracy, tokens per second and the time left.

    Args:
        recorder: Has the numbers.
        bar: Whether a bar may be drawn; it is where the output is a terminal.
    """

    def __init__(self, recorder: Recorder, *, bar: bool) -> None:
        self._recorder = recorder
        self._shown: Record | None = None
        self._wants_bar = bar
        self._bar: Any = None
        self._task: Any = None
        self._began = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar, where it may be."""
        self._began = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero and self._wants_bar and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, numbers=""
            )
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest record, in the bar or on a line."""
        record = self._recorder.newest
        if not state.is_world_process_zero or record is None or record is self._shown:
            return
        self._shown = record
        if self._bar is None:
            left = f"  left {self._left(state)}" if record.kind == "train" else ""
            print(f"step {record.step}/{state.max_steps}  {glance(record, _GLANCE)}{left}", flush=True)
        elif record.kind == "train":
            # The margin would push the count and the time left off a terminal of 80 columns.
            names = [name for name in _GLANCE if name != "margin"]
            self._bar.update(self._task, numbers=glance(record, names))
        else:
            self._bar.console.print(f"step {record.step}  {glance(record, _GLANCE)}")

    def close(self) -> None:
        """Leave the terminal as it was, however training has ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, state: Any) -> str:
        began, first = self._began
        done = max(state.global_step - first, 1)
        seconds = int((time.perf_counter() - began) / done * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}" if seconds >= 3600 else (
            f"{seconds // 60}:{seconds % 60:02}")  # fmt: skip


_GLANCE = ("loss", "accuracy", "margin", "tokens_per_second")


def glance(record: Record, names: Sequence[str]) -> str:
    """The metrics `names` of a record on one line, with the name of the set that was evaluated."""
    head = [] if record.kind == "train" else [f"evaluation {record.set}".rstrip()]
    known = [(metric_named(name).title, write_figure(name, record.metrics[name]).value)
             for name in names if name in record.metrics]  # fmt: skip
    return "  ".join([*head, *(f"{title} {value}" for title, value in known)])
