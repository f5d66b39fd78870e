"""What a run says on the terminal: one line, once, however many processes run; and how far long work is."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

_aside: ContextVar[bool] = ContextVar("aside", default=False)


@contextmanager
def speaking_aside() -> Iterator[None]:
    """Have every line of the block on stderr: stdout is for a result that a program reads."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def say(line: str, *, error: bool = False) -> None:
    """Print a line, on stdout or as an error on stderr, from the first process of a run only."""
    if _rank() == 0:
        print(_printable(line), file=sys.stderr if error or _aside.get() else sys.stdout, flush=True)


def say_item(name: str, text: str) -> None:
    """Print a short name and a text beside it, broken between words on a terminal, on one line elsewhere."""
    indent = 11
    line = f"{name:<{indent}}{text}"
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 40)
        line = textwrap.fill(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    say(line)


def say_error(error: BaseException, *, everywhere: bool = False) -> None:
    """Print an error as one line on stderr, once for each machine.

    Args:
        error: What a user can fix.
        everywhere: Whether it may differ between processes; then each prints it, with its rank.
    """
    if everywhere or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        who = f" (rank {_rank()})" if everywhere and "RANK" in os.environ else ""
        line = f"orpo: error{who}: {' '.join(str(error).split())}"
        print(_printable(line), file=sys.stderr, flush=True)


def is_text(words: str) -> bool:
    """Whether words can be written as UTF-8: Python keeps a byte that is not as half of a character."""
    if words.isascii():
        return True
    try:
        words.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(line: str) -> str:
    """A line that any terminal can encode: names from data may hold half of a character."""
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


class LongWork:
    """Shows on stderr how far work over rows is, once it takes long: a bar on a terminal, lines elsewhere.

    It is called with the stage, the rows done and all rows (None where nobody knows); a context that closes.

    Args:
        bar: Whether a bar may be drawn.
    """

    PATIENCE, PAUSE = 3.0, 30.0
    """Seconds before a stage is shown, and between two lines."""

    def __init__(self, *, bar: bool = True) -> None:
        self._draws = bar and sys.stderr.isatty()
        self._stage = ""
        self._began = self._said = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Show the stage, where it is time to."""
        now = time.monotonic()
        if stage != self._stage or done == 0:
            self._close()
            self._stage, self._began, self._said = stage, now, now - self.PAUSE + self.PATIENCE
        seconds = max(now - self._began, 1e-9)
        if total is not None and done >= total:
            self._close()
        elif seconds < self.PATIENCE or _rank() != 0:
            return
        elif self._draws:
            self._draw(done, total, done / seconds)
        elif now - self._said >= self.PAUSE:
            self._said = now
            say(f"{stage}: {_how_far(done, total, done / seconds)}", error=True)

    def _draw(self, done: int, total: int | None, rate: float) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[far]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._stage, total=total, far="")
            self._bar.start()
        self._bar.update(self._task, completed=done, far=_how_far(done, total, rate))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _how_far(done: int, total: int | None, rate: float) -> str:
    """`51,200 of 200,000 rows, 3,400 a second, 0:44 left`."""
    if total is None:
        return f"{done:,} rows, {rate:,.0f} a second"
    left = round((total - done) / max(rate, 1e-9))
    speed = f" rows, {rate:,.0f} a second" if rate >= 1 else ""
    return f"{done:,} of {total:,}{speed}, {left // 60}:{left % 60:02} left"


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
