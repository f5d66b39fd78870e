"""What a user sees while a run goes on: one bar on a terminal, one line per log elsewhere."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class Stopwatch:
    """Time spent training: evaluations and checkpoints pause it."""

    def __init__(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start, pauses left out."""
        return max(time.perf_counter() - self._started, 1e-9)

    def restart(self, already: float = 0.0) -> float:
        """Start anew, as if `already` seconds had passed; returns the seconds since the last start."""
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
        bar: Whether a bar may be drawn; it is where the output is a terminal.
    """

    def __init__(self, *, bar: bool) -> None:
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
        """Show the numbers, in the bar or on a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        numbers = described(logs)
        if self._bar is None:
            left = "" if "loss" not in logs else f"  left {self._left(state)}"
            print(f"step {state.global_step}/{state.max_steps}  {numbers}{left}", flush=True)
        elif "loss" in logs:
            # The margin would push the count and the time left off a terminal of 80 columns.
            brief = {name: value for name, value in logs.items() if name != "margin"}
            self._bar.update(self._task, numbers=described(brief))
        else:
            self._bar.console.print(f"step {state.global_step}  {numbers}")

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


def described(logs: Mapping[str, float]) -> str:
    """The numbers of a log line that are worth a glance; those of evaluations with their prefix."""
    shown = []
    for name, value in logs.items():
        prefix, _, last = name.rpartition("_") if name.startswith("eval_") else ("", "", name)
        if last in ("loss", "accuracy", "margin") and "odds" not in prefix and "nll" not in prefix:
            shown.append(f"{name.replace('_', ' ')} {value:.4f}")
        elif name == "tokens_per_second":
            shown.append(f"{value:,.0f} tokens/s")
    return "  ".join(shown)
