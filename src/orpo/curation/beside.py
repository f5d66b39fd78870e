"""A second process, for a look at a few texts while this one goes through them all.

The process is forked before the data is read, so that it stays small, and is sent what it looks at. Where a
fork is not safe, or there is one core, the same work is done here, when its result is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from orpo.data.forked import forked

T = TypeVar("T")
Start = Callable[..., Callable[[], Any]]
"""Takes a function and its arguments; what it returns waits for the result, or raises what was raised."""


@contextmanager
def second_process() -> Iterator[Start]:
    """Have a function that starts work beside this process; the work ends with the block."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        yield lambda work, *given: lambda: work(*given)
        return
    with forked(1) as pool:
        yield lambda work, *given: pool.apply_async(work, given).get
