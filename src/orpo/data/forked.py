"""Worker processes that are forked, so that they have what this process has read without being sent it.

A fork inherits signal handlers too. Workers leave signals to the process that forked them: a worker that they
end would take its task with it, for which its pool waits for ever. But SIGTERM, by which the pool itself ends
workers, has to end them, though this process may only note that it is to stop.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

_LEFT = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def forked(number: int) -> Iterator[Pool]:
    """So many workers, which end with the block."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until workers have their handlers
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            pool = multiprocessing.get_context("fork").Pool(number, _leave_signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with pool:
        yield pool


def _leave_signals() -> None:
    for one in _LEFT:
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
