"""A second process, for a look at a few texts while this one goes through them all.

The process is forked before the data is read, so that it stays small, and is sent what it looks at. Where a
fork is not safe, or there is one core, the same work is done here, when its result is asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
Start = Callable[..., Callable[[], Any]]
"""Takes a function and its arguments; what it returns waits for the result, or raises what was raised."""


@contextmanager
def second_process() -> Iterator[Start]:
    """Have a function that starts work beside this process; the work ends with the block."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        yield lambda work, *given: lambda: work(*given)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        pool = multiprocessing.get_context("fork").Pool(1, _leave_signals)
    with pool:
        yield lambda work, *given: pool.apply_async(work, given).get


def _leave_signals() -> None:
    """Leave Ctrl-C to the process that waits; it ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
