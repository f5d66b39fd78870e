"""How far reading and tokenizing are: reported here, and shown by whoever asks for it.

Nothing is printed in here. `with following(show):` has `show` called while data is read in the block, in the
process that reads it; without that, reports go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Follower = Callable[[str, int, int | None], None]
"""Gets what is being done, rows done so far, and all rows where their number is known."""

EVERY = 256
"""Rows between two reports."""

_follower: ContextVar[Follower | None] = ContextVar("follower", default=None)


def report(what: str, done: int, total: int | None = None) -> None:
    """Say how far a stage is.

    Args:
        what: The stage, `tokenizing`; a new one begins with `done` 0.
        done: Rows so far.
        total: All of them; None where nobody knows.
    """
    follower = _follower.get()
    if follower is not None:
        follower(what, done, total)


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Have the reports of a block."""
    token = _follower.set(follower)
    try:
        yield
    finally:
        _follower.reset(token)
