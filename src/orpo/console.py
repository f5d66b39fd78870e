"""What a run says on the terminal: one line, once, however many processes run."""

from __future__ import annotations

import os
import sys


def say(line: str, *, error: bool = False) -> None:
    """Print a line, on stdout or as an error on stderr, from the first process of a run only."""
    if _rank() == 0:
        print(_printable(line), file=sys.stderr if error else sys.stdout, flush=True)


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


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
