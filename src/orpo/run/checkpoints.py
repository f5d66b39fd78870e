"""Checkpoints that are whole or absent, and which of them a run resumes from or is used by.

A checkpoint is written into a folder next to the others, flushed to disk, and renamed: a folder named
`checkpoint-30` is always complete, even after a crash. Each holds a manifest of its files with their sizes,
so a damaged copy is noticed before it is resumed from, or used.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orpo.console import say
from orpo.errors import DataError, ModelError, RunError, first_line
from orpo.run.directory import RunDirectory, adapter_base, gguf_file, holds_model, read_json

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
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")


def checkpoint_step(folder: Path) -> int:
    """Step of a folder named `checkpoint-<step>`; -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def last_checkpoint(output_dir: str | Path, *, resumable: bool = True) -> Path | None:
    """The newest whole checkpoint of a run directory; a damaged one is skipped, in a printed line.

    Args:
        output_dir: The run directory.
        resumable: Whether training is to resume from it; a model to be used needs its weights alone.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if checkpoint_step(path) >= 0]
    for folder in sorted(folders, key=checkpoint_step, reverse=True):
        problem = checkpoint_problem(folder) if resumable else _damage(folder)
        if problem is None:
            return folder
        say(f"{folder} is skipped: {problem}")
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """Why training cannot be resumed from `folder`; None where it can."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    return _damage(folder) or _missing_state(folder)


def _missing_state(folder: Path) -> str | None:
    """What training needs beyond the weights, and a checkpoint lacks."""
    for pattern, what in _NEEDED.items():
        if not any(folder.glob(pattern)):
            return f"{pattern} is missing ({what}); was it saved with save_only_model?"
    if not any(any(folder.glob(pattern)) for pattern in _OPTIMIZER):
        return "the optimizer's state is missing"
    return None


def _damage(folder: Path) -> str | None:
    """What a checkpoint lacks of the files it was written with, or of a model; None where it is whole."""
    try:
        manifest: Mapping[str, int] = read_state(folder).get("files", {})
    except DataError:
        return f"{STATE_FILE} is damaged"
    for name, size in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
    return _model_damage(folder) or _first_unreadable(folder.iterdir())


def _model_damage(folder: Path) -> str | None:
    """What is wrong with the weights of a folder; None where nothing is."""
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    return _first_unreadable(folder.glob("*.safetensors"))


def model_folder(name: str) -> str:
    """Where the model of a run directory is; any other name is returned as it is, a GGUF file too.

    An unfinished run has its model in its newest whole checkpoint, the one that training would resume from;
    so has a run whose own weights are missing or damaged, for instance by an interrupted save.

    Raises:
        ModelError: A folder that holds no model, or a name that can only be a folder's and there is none.
    """
    folder = Path(name).expanduser()
    if (path := gguf_file(folder)) is not None:
        return str(path)
    if not folder.is_dir() and _must_be_a_folder(name):
        raise ModelError(f"{name}: there is no such folder")
    if not folder.is_dir():
        return name
    problem = _model_damage(folder) if holds_model(folder) else "there is no model"
    checkpoint = last_checkpoint(folder, resumable=False) if problem else None
    if problem is None or (checkpoint is None and holds_model(folder)):
        return str(folder)
    if checkpoint is None:
        raise ModelError(f"{name}: this folder holds no model, no adapter and no whole checkpoint")
    if holds_model(folder):
        say(f"{name}: {problem}; using {checkpoint}")
    return str(checkpoint)


def _must_be_a_folder(name: str) -> bool:
    """Whether this is no hub name: else a typing error in `runs/first` would be looked for on the hub."""
    parent = Path(name).parent
    has_runs = parent != Path(".") and any(
        RunDirectory(path).is_run() for path in (parent, *parent.glob("*"))
    )
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or has_runs


def run_recipe(name: str) -> dict[str, Any]:
    """The recipe of a run, or of the run that a checkpoint or an export is of; else empty."""
    folder = Path(name)
    run = RunDirectory(folder.parent if checkpoint_step(folder) >= 0 else folder)
    recipe: dict[str, Any] = run.read_recipe() or read_state(folder).get("recipe", {})
    return recipe or dict(read_json(run.export_record, {}).get("recipe", {}))


def base_model_name(name: str) -> str | None:
    """What the model of a run was trained from, as its recipe or adapter says; None where neither does."""
    return run_recipe(name).get("model_name_or_path") or adapter_base(name)


def _first_unreadable(paths: Iterable[Path]) -> str | None:
    return next((problem for path in sorted(paths) if (problem := _unreadable(path))), None)


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
            "Make room and run again: training resumes from the checkpoint before."
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
    """Our part of a checkpoint; empty for one that plain transformers has written.

    Raises:
        DataError: The file is damaged.
    """
    state: dict[str, Any] = read_json(Path(folder) / STATE_FILE, {})
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
