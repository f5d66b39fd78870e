"""What a run says on the terminal: one line, once, however many processes run."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(line: str, *, error: bool = False) -> None:
    """Print a line, on stdout or as an error on stderr, from the first process of a run only."""
    if _rank() == 0:
        print(_printable(line), file=sys.stderr if error else sys.stdout, flush=True)


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


def _printable(line: str) -> str:
    """A line that any terminal can encode: names from data may hold half of a character."""
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def watching() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for long steps, where that is a terminal: told what is done, how far, of how much."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Lines that are printed meanwhile go above the bar, unless they go to a file.
    lines_too = sys.stdout.isatty()
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=lines_too) as progress:
        task = progress.add_task("")
        yield lambda what, done, total: progress.update(
            task, description=what, completed=done, total=total or None
        )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
