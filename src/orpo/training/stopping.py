"""Signals that ask a run to stop: they set a flag, and all ranks act on it together."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_warned: list[str] = []


def note_warnings() -> None:
    """Keep SIGUSR1, with which schedulers warn, from ending this process before or after training.

    One that arrives before training is acted on after the first step.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: _warned.append(signal.Signals(number).name))


class StopSignal:
    """Turns signals that ask for an end into a flag; a second Ctrl-C interrupts immediately.

    Attributes:
        name: Name of the signal received, or None.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals, but for those that are ignored, as `nohup` does with SIGHUP.

        Only the main thread can; in others nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.name = _warned.pop() if _warned else None
        wanted = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in wanted}
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
        os.write(sys.stderr.fileno() if _has_fileno() else 2, b"\nstopping, with a checkpoint\n")


def _has_fileno() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False
