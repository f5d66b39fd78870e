"""Trainings in processes of their own, so many at once; what is finished is not trained again.

A process that is asked to stop is a training that is asked to stop: it saves a checkpoint, and the next call
goes on from there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from orpo.comparing.arms import Arm
from orpo.comparing.cost import measured
from orpo.comparing.worker import CANNOT_CONTINUE
from orpo.errors import RunError
from orpo.run.directory import RunDirectory
from orpo.run.finished import unfinished_because
from orpo.run.log import Record, readable_records

_PAUSE = 0.2
"""Seconds between two looks at what runs."""
_STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)} | {
    -number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
}
"""Exit statuses of a training that was asked to stop."""


class Watcher:
    """Is told how trainings go; this one keeps it to itself."""

    def begin(self, to_make: int, there: int) -> None:
        """So many trainings come next, and so many are finished already."""

    def record(self, arm: Arm, record: Record) -> None:
        """The log of a training has a new record."""

    def end(self, arm: Arm) -> None:
        """A training has ended, or failed."""


def run_all(arms: Sequence[Arm], *, at_once: int = 1, watcher: Watcher | None = None) -> dict[Path, str]:
    """Train everything that is not finished.

    Args:
        arms: Those that share a run directory are one.
        at_once: Processes at a time, which share the cores; 0: one after the other in this process.
        watcher: Is kept informed.

    Returns:
        Run directory -> why its training has failed on the way (a loss that is no number, say).

    Raises:
        RunError: Settings, data or model of a training cannot be used.
        KeyboardInterrupt: A signal asked for an end; trainings have saved checkpoints.
    """
    watcher = watcher or Watcher()
    all_arms = {arm.folder: arm for arm in arms}
    waiting = [arm for folder, arm in all_arms.items() if unfinished_because(RunDirectory(folder))]
    watcher.begin(len(waiting), len(all_arms) - len(waiting))
    failed: dict[Path, str] = {}
    running: list[_Running] = []
    with _stopping(running):
        while waiting or running:
            while waiting and len(running) < max(at_once, 1):
                arm = waiting.pop(0)
                if at_once:
                    running.append(_start(arm, at_once))
                else:
                    _run_here(arm, failed)
                    watcher.end(arm)
            if running:
                time.sleep(_PAUSE)
            for one in list(running):
                ended = one.process.poll() is not None  # before the log is read, so that nothing is missed
                for record in one.log.new():
                    watcher.record(one.arm, record)
                if ended:
                    running.remove(one)
                    _note_end(one, failed)
                    watcher.end(one.arm)
    return failed


@dataclass
class _Log:
    """The records that a run's log gains; one that begins again is followed from its start."""

    path: Path
    _seen: int = field(default=0, init=False)
    _size: int = field(default=-1, init=False)

    def new(self) -> Iterator[Record]:
        """Those since the last call."""
        with suppress(OSError):
            size = self.path.stat().st_size
            if size == self._size:
                return
            records, _ = readable_records(self.path)
            self._size = size
            yield from records[self._seen if len(records) >= self._seen else 0 :]
            self._seen = len(records)


@dataclass
class _Running:
    arm: Arm
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    log: _Log


def _run_here(arm: Arm, failed: dict[Path, str]) -> None:
    try:
        outcome = measured(arm.settings)
    except RunError as error:
        failed[arm.folder] = str(error)
        return
    if outcome.ending == "stopped":
        raise KeyboardInterrupt


def _start(arm: Arm, at_once: int) -> _Running:
    arm.folder.mkdir(parents=True, exist_ok=True)
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process has ended
    process = subprocess.Popen(
        [sys.executable, "-m", "orpo.comparing.worker"],
        stdin=subprocess.PIPE, stdout=errors, stderr=errors, env=_environment(at_once),
    )  # fmt: skip
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, and says why
        process.stdin.write(json.dumps(dict(arm.settings)).encode() + b"\n")
        process.stdin.flush()
    return _Running(arm, process, errors, _Log(RunDirectory(arm.folder).log))


def _environment(at_once: int) -> dict[str, str]:
    """That of this process, with an equal share of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    shared = {} if at_once == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    return os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)} | shared


def _note_end(one: _Running, failed: dict[Path, str]) -> None:
    status = one.process.returncode
    one.errors.seek(0)
    said = one.errors.read().decode("utf-8", "replace").strip()
    one.errors.close()
    if status == 0:
        return
    if status in _STOPPED:
        raise KeyboardInterrupt
    line = said.splitlines()[-1].removeprefix("orpo: error: ") if said else f"status {status}"
    if status == CANNOT_CONTINUE:
        failed[one.arm.folder] = line
        return
    raise RunError(f"{one.arm.folder.name}: {line}")


@contextmanager
def _stopping(running: list[_Running]) -> Iterator[None]:
    """End what runs, with checkpoints, however the block ends; SIGTERM ends it as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handlers: Mapping[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread
        handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one in running:
            one.process.send_signal(signal.SIGTERM)
        for one in running:
            one.process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
