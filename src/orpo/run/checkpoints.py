"""Checkpoints that are whole or absent, and stopping between two steps.

A checkpoint is written into a folder beside the others, brought to the disk, and renamed: whoever finds
`checkpoint-30` finds all of it, however the run ended. Each holds a manifest of its files with their sizes,
so a damaged copy is noticed before it is resumed from. Signals only set a flag; the trainer acts on it at the
end of a step, when all ranks agree.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError, safe_open

from orpo.errors import RunError, first_line

STATE_FILE = "orpo_state.json"
"""What this package adds to a checkpoint: manifest, settings, sums of the open log window."""

_UNFINISHED = ".saving-"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEEDED = {
    "trainer_state.json": "the position in the run",
    "scheduler.pt": "the learning-rate schedule",
    "rng_state*.pth": "the random number generators",
}
_OPTIMIZER = ("optimizer*", "global_step*")
_WEIGHTS = ("*.safetensors", "pytorch_model*", "global_step*")


def checkpoint_step(folder: Path) -> int:
    """Step of a folder named `checkpoint-<step>`; -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run directory; a damaged one is passed over, in a printed line."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if checkpoint_step(path) >= 0]
    for folder in sorted(folders, key=checkpoint_step, reverse=True):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        print(f"{folder} is passed over: {problem}", flush=True)
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """Why training cannot be resumed from `folder`; None where it can."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest: Mapping[str, int] = read_state(folder).get("files", {})
    except ValueError:
        return f"{STATE_FILE} is damaged"
    for name, size in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    for pattern, what in _NEEDED.items():
        if not any(folder.glob(pattern)):
            return f"{pattern} is missing ({what}); was it saved with save_only_model?"
    if not any(any(folder.glob(pattern)) for pattern in _OPTIMIZER):
        return "the optimizer's state is missing"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    return next((problem for path in sorted(folder.iterdir()) if (problem := _unreadable(path))), None)


def _unreadable(path: Path) -> str | None:
    """What is wrong with a file as far as its own structure tells, without reading all of it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        return f"{path.name} is damaged ({first_line(error)})"
    return None


@contextmanager
def written_whole(target: Path, *, is_writer: bool, wait: Any) -> Iterator[Path]:
    """Give a folder to write a checkpoint into, and rename it to `target` when all of it is on the disk.

    Args:
        target: Where the checkpoint is to be; one that is there already is replaced.
        is_writer: Whether this process brings it to the disk; one process on each file system.
        wait: Called to wait for the other ranks.

    Yields:
        A folder of the same name, inside an unfinished one.

    Raises:
        RunError: The checkpoint could not be written; what was there before is untouched.
    """
    unfinished = target.parent / f"{_UNFINISHED}{checkpoint_step(target)}"
    folder = unfinished / target.name
    try:
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        wait()
        yield folder
        wait()
        if is_writer and folder.is_dir():
            _to_disk(folder)
            if target.exists():
                os.rename(target, unfinished / "replaced")
            os.rename(folder, target)
            _sync(target.parent)
            shutil.rmtree(unfinished, ignore_errors=True)
        wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as RuntimeError and SafetensorError
        if isinstance(error, RunError):
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunError(
            f"{target} could not be written ({first_line(error)}); {_free(target.parent)}. "
            "Make room and run again: training goes on from the checkpoint before."
        ) from error


def remove_unfinished(output_dir: str | Path) -> None:
    """Delete what an interrupted save has left."""
    for folder in Path(output_dir).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write our part of a checkpoint, last: it lists the files that are there."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    files.pop(STATE_FILE, None)
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": files}, indent=1), encoding="utf-8")


def read_state(folder: str | Path) -> dict[str, Any]:
    """Our part of a checkpoint; empty for one that plain transformers has written."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        return {}
    state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return state


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _to_disk(folder: Path) -> None:
    for path in [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free in {folder}"


class StopSignal:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 into a flag; a second Ctrl-C interrupts at once.

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
