"""What a run says on the terminal: one line, once, however many processes run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(line: str, *, error: bool = False) -> None:
    """Print a line, on stdout or as an error on stderr, from the first process of a run only."""
    if _rank() == 0:
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def say_error(error: BaseException, *, everywhere: bool = False) -> None:
    """Print an error as one line on stderr, once for each machine.

    Args:
        error: What a user can fix.
        everywhere: Whether it may differ between processes; then each prints it, with its rank.
    """
    if everywhere or int(os.environ.get("LOCAL_RANK", "0")) == 0:
        who = f" (rank {_rank()})" if everywhere and "RANK" in os.environ else ""
        print(f"orpo: error{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


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
