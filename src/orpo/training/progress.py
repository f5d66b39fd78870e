"""What a user sees while a model trains: one bar on a terminal, one line per log elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Pace:
    """How long what is left of a run takes, from what its steps, evaluations and checkpoints have taken.

    Args:
        clock: Seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._seconds: dict[str, list[float]] = {}

    def begin(self) -> None:
        """What is timed next begins now."""
        self._began = self._clock()

    def end(self, kind: str, *, of_same: bool = False) -> None:
        """A `kind` of work ends now, or with `of_same` another part of the last one; the next begins."""
        now = self._clock()
        taken = self._seconds.setdefault(kind, [])
        if of_same and taken:
            taken[-1] += now - self._began
        else:
            taken.append(now - self._began)
        self._began = now

    def left(self, remaining: Mapping[str, int]) -> float:
        """Seconds for so much work of each kind; kinds that were not yet timed count as nothing."""
        return sum(number * self._mean(kind) for kind, number in remaining.items())

    def _mean(self, kind: str) -> float:
        taken = self._seconds.get(kind, [])
        usual = taken[1:] if kind == "step" and len(taken) > 1 else taken  # the first step also warms up
        return sum(usual) / len(usual) if usual else 0.0


class Progress(TrainerCallback):
    """Shows loss, accuracy, tokens per second and the time left, with what evaluations will take.

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
        self._scoring: Any = None
        self._num_scored = 0
        self._pace = Pace()
        self._last = {"evaluation": -1, "checkpoint": -1}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the bar, where it may be."""
        self._pace = Pace()
        self._last = {"evaluation": -1, "checkpoint": -1}
        if state.is_world_process_zero and self._wants_bar and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("{task.fields[left]}", style="progress.remaining"),
            )
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, numbers="", left=""
            )
            self._scoring = self._bar.add_task("scoring", numbers="held-out pairs", left="", visible=False)
            self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step."""
        self._pace.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._pace.end("step")
        self._move(args, state)

    def scored(self, num_pairs: int, total: int) -> None:
        """So many more of the `total` pairs of an evaluation are scored."""
        self._num_scored += num_pairs
        if self._bar is not None:
            done = min(self._num_scored, total)
            self._bar.update(self._scoring, completed=done, total=total, visible=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what an evaluation took, of all sets together."""
        self._num_scored = 0
        self._count("evaluation", args, state)
        if self._bar is not None:
            self._bar.update(self._scoring, visible=False)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what a checkpoint took."""
        self._count("checkpoint", args, state)

    def _count(self, kind: str, args: Any, state: Any) -> None:
        self._pace.end(kind, of_same=self._last[kind] == state.global_step)
        self._last[kind] = state.global_step
        self._move(args, state)

    def _move(self, args: Any, state: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, left=f"left {self._left(args, state)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest record, in the bar or on a line."""
        record = self._recorder.newest
        if not state.is_world_process_zero or record is None or record is self._shown:
            return
        self._shown = record
        if self._bar is None:
            left = f"  left {self._left(args, state)}" if record.kind == "train" else ""
            print(f"step {record.step}/{state.max_steps}  {glance(record, _GLANCE)}{left}", flush=True)
        elif record.kind == "train":
            # More would push the count and the time left off a terminal of 80 columns.
            speed = ["tokens_per_second"] if self._bar.console.width >= _WIDE else []
            names = ["loss", "accuracy", "odds_share", *speed]
            self._bar.update(self._task, numbers=glance(record, names))
        else:
            self._bar.console.print(f"step {record.step}  {glance(record, _GLANCE)}")

    def close(self) -> None:
        """Leave the terminal as it was, however training has ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, args: Any, state: Any) -> str:
        remaining = {"step": state.max_steps - state.global_step}
        for kind, strategy, every in (
            ("evaluation", args.eval_strategy, state.eval_steps),
            ("checkpoint", args.save_strategy, state.save_steps),
        ):
            done = self._last[kind] == state.global_step
            remaining[kind] = times_left(state, args, str(strategy.value), every, done=done)
        seconds = int(self._pace.left(remaining))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}" if seconds >= 3600 else (
            f"{seconds // 60}:{seconds % 60:02}")  # fmt: skip


def times_left(state: Any, args: Any, strategy: str, every: float | None, *, done: bool) -> int:
    """How often something is still due that is done every so many steps, or epochs, and at the end.

    Args:
        state: `global_step` and `max_steps`, at least 1, of the Trainer.
        args: `num_train_epochs`.
        strategy: `steps`, `epoch` or another, for which nothing is known.
        every: Steps.
        done: Whether it was done at this step already.
    """
    step, last = state.global_step, state.max_steps
    if strategy == "epoch":
        every = math.ceil(last / max(args.num_train_epochs, 1e-9))
    elif strategy != "steps":
        return 0
    every = max(int(every or last), 1)
    due = {last, *range(every, last, every)}
    return sum(1 for moment in due if moment > step or (moment == step and not done))


_GLANCE = ("loss", "accuracy", "margin", "odds_share", "prompt_share", "tokens_per_second")
_WIDE = 100
"""Columns of a terminal whose bar has room for the speed."""


def glance(record: Record, names: Sequence[str]) -> str:
    """The metrics `names` of a record on one line, with the name of the set that was evaluated."""
    head = [] if record.kind == "train" else [f"evaluation {record.set}".rstrip()]
    known = [(metric_named(name).short or metric_named(name).title,
              write_figure(name, record.metrics[name]).value)
             for name in names if name in record.metrics]  # fmt: skip
    return "  ".join([*head, *(f"{title} {value}" for title, value in known)])
