"""Stopping between two steps: signals set a flag, and all ranks act on it at the end of the same step."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 into a flag; a second Ctrl-C interrupts immediately.

    Attributes:
        name: Name of the signal received, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals; only the main thread can, in others nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.name = None
        before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        # os.write, because print may be what the signal has interrupted
        os.write(
            sys.stderr.fileno() if _has_fileno() else 2, b"\nstopping after this step, with a checkpoint\n"
        )


def _has_fileno() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False
