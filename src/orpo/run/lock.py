"""One training in a run directory at a time, and only in a folder that can be one."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orpo.console import say
from orpo.errors import ConfigError, RunError
from orpo.run.directory import RunDirectory
from orpo.run.disk import cannot_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file that is locked."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[Path] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep others from training in a folder, which is made where it is not there; again is no second lock.

    The lock goes when this process ends, however it ends. It is a record lock, which workers of a data loader
    do not inherit: they may live a moment longer than a trainer that was killed.

    Raises:
        RunError: Another process trains there, or the folder cannot be written.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(folder, error) from error
    _held.add(path)
    try:
        _lock(handle, folder)
        yield
    finally:
        _held.discard(path)
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    if fcntl is None:
        say(f"{folder}: files cannot be locked on this system: a second training here would not be noticed")
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            say(f"{folder} lies where files cannot be locked: a second training in it would not be noticed")
            return
        who = os.read(handle, 1000).decode("utf-8", "replace").strip() or "another process"
        raise RunError(
            f"{folder}: {who} is training there; wait until it has ended, or set another output_dir"
        ) from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise cannot_write(folder, error) from error


def check_output_dir(name: str, models: Iterable[str | None], data: Iterable[str] = ()) -> None:
    """Check that a run may write into a folder, before anything is loaded.

    Args:
        name: `output_dir`.
        models: Names of the models and adapters that the run starts from.
        data: Names of the data sets it reads.

    Raises:
        ConfigError: It is no folder, or writing there would overwrite what the run reads.
    """
    if not name.strip() or "\0" in name:
        raise ConfigError(f"output_dir: {name!r} is no folder; name one, for instance runs/first")
    folder = Path(name).expanduser()
    _check_is_folder(folder)
    here = folder.resolve()
    for model in filter(None, models):
        lies = Path(model).expanduser().resolve()
        if lies == here:
            raise ConfigError(f"output_dir: {name} holds the model to start from, which would be overwritten")
        if lies.parent == here and RunDirectory(here).is_checkpoint(lies):
            raise ConfigError(f"output_dir: {model}, the model to start from, is a checkpoint in that folder")
    for one in data:
        if os.path.isdir(Path(one).expanduser()) and Path(one).expanduser().resolve() == here:
            raise ConfigError(f"output_dir: {name} is the folder of the data; name another one")


def _check_is_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if os.path.lexists(path):
            if not os.path.isdir(path):
                raise ConfigError(f"output_dir: {path} is no folder; name another one")
            break
    for path in RunDirectory(folder).files_written():
        if os.path.isdir(path):
            raise ConfigError(
                f"output_dir: {path} is a folder, where the run writes a file; name another one"
            )
