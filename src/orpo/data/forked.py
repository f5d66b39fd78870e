"""Worker processes that are forked, so that they have what this process has read without being sent it.

A fork inherits signal handlers too. One that only notes that a run is to stop would keep a worker alive when
its pool ends it, and the pool would wait for ever: workers leave signals to the process that forked them.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def forked(number: int) -> Iterator[Pool]:
    """So many workers, which end with the block."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # until workers have handlers of their own
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
            pool = multiprocessing.get_context("fork").Pool(number, _leave_signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with pool:
        yield pool


def _leave_signals() -> None:
    """Leave Ctrl-C to the process that waits; it ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for one in _ENDING:
        signal.signal(one, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
