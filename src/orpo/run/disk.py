"""Files that are whole or absent, with a checksum that tells a damaged copy.

A file is written next to its place, flushed to the disk and renamed: whoever reads it, after a crash too,
finds all of the old one or all of the new one. A disk that is full or read-only is one line that says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from orpo.errors import RunError, first_line

_BLOCK = 2**20
_UNFINISHED = ".{}.writing"


def replace_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; a link is replaced, not followed.

    Raises:
        RunError: It cannot be written; what was there before is untouched.
    """
    beside = path.with_name(_UNFINISHED.format(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        remove_file(beside)
        raise cannot_write(path, error) from error


def remove_file(path: Path) -> None:
    """Delete a file where there is one and it can be deleted."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def cannot_write(path: Path, error: BaseException, then: str = "") -> RunError:
    """The line for a file or folder that could not be written; `then` says what follows from it."""
    space = "" if _has_other_reason(error) else f"; {_free(path.parent)}. Make room and run again"
    return RunError(f"{path} could not be written ({_reason(error)}){space}{then and f': {then}'}")


def _reason(error: BaseException) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else first_line(error)


def _has_other_reason(error: BaseException) -> bool:
    """Whether a failed write has nothing to do with room: a missing right, a folder in the way."""
    others = (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, FileNotFoundError)
    return isinstance(error, others) or "Read-only" in _reason(error)


def _free(folder: Path) -> str:
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    return f"{shutil.disk_usage(there).free / 2**30:.1f} GiB are free in {folder}"


def text_checksum(text: str) -> str:
    """The xxh3 checksum of a text: 16 hexadecimal digits."""
    return xxhash.xxh3_64(text.encode("utf-8", "backslashreplace")).hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files of a folder and of those within it, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flush_folder(folder: Path) -> None:
    """Bring a folder that this process has made to the disk, every file as readable as its folder is.

    Some libraries write files that only their owner can read, whatever the user's umask says.
    """
    mode = folder.stat().st_mode & 0o666
    for path in files_in(folder):
        path.chmod(mode)
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


Described = Mapping[str, Any]
"""A file in a manifest: `{"bytes": 1024, "xxh3": "..."}`."""


def describe(path: Path) -> Described:
    """A file's size and checksum, for a manifest."""
    return {"bytes": path.stat().st_size, "xxh3": _checksum(path)}


def flush_and_describe(paths: Sequence[Path]) -> list[Described]:
    """Bring files to the disk, and take their checksums while the disk is waited for."""
    with ThreadPoolExecutor(1) as beside:
        flushed = beside.map(flush, paths)
        described = [describe(path) for path in paths]
        list(flushed)  # raises what went wrong
    return described


def difference(path: Path, described: Described) -> str | None:
    """What is wrong with a file that a manifest describes; None where it is as it was written."""
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != described.get("bytes"):
        return f"{path.name} has {path.stat().st_size} bytes instead of {described.get('bytes')}"
    try:
        same = _checksum(path) == described.get("xxh3")
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if same else f"{path.name} is damaged (its checksum differs)"


def _checksum(path: Path) -> str:
    """The checksum of a file, which is read once as long as it does not change."""
    now = path.stat()
    return _checksum_of(path, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4096)
def _checksum_of(path: Path, size: int, changed: int) -> str:
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while number := file.readinto(block):
            digest.update(block[:number])
    return digest.hexdigest()
