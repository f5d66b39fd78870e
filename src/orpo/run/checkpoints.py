"""Checkpoints that are whole or absent, and which of them a run resumes from or is used by.

A checkpoint is written into a folder next to the others, flushed to disk, and renamed: a folder named
`checkpoint-30` is always complete, even after a crash. Each holds a manifest of its files with their sizes
and checksums, so a damaged one is noticed before it is resumed from, or used.
"""

import itertools
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
from orpo.errors import DataError, ModelError, OrpoError, first_line
from orpo.run.directory import (
    ADAPTER_CONFIG,
    MODEL_CONFIG,
    RunDirectory,
    adapter_base,
    gguf_file,
    holds_model,
    read_json,
)
from orpo.run.disk import (
    Described,
    cannot_write,
    difference,
    files_in,
    flush,
    flush_and_describe,
    flush_folder,
    replace_text,
    text_checksum,
)
from orpo.run.finished import unfinished_because, weight_files

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
_EARLIER = "earlier-{}"


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
    for folder in _checkpoints(Path(output_dir)):
        problem = checkpoint_problem(folder, resumable=resumable)
        if problem is None:
            return folder
        say(f"{folder} is skipped: {problem}")
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """Everything named like a checkpoint, the newest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted(folders, key=checkpoint_step, reverse=True)


def checkpoint_problem(folder: str | Path, *, resumable: bool = True) -> str | None:
    """Why training cannot be resumed from `folder`, or its model not be used; None where it can."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    return _damage(folder) or (_missing_state(folder) if resumable else None)


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
        manifest = _manifest(folder)
    except DataError:
        return f"{STATE_FILE} is damaged"
    for name, described in manifest.items():
        if (problem := difference(folder / name, described)) is not None:
            return problem
    others = (path for path in folder.iterdir() if path.name not in manifest)
    return _model_damage(folder) or _first_unreadable(others)


def _manifest(folder: Path) -> dict[str, Described]:
    """The files of a checkpoint as they were written; empty for one of plain transformers."""
    files = read_state(folder).get("files", {})
    # Before there were checksums, a manifest had sizes alone: such files are checked by their structure.
    return {name: described for name, described in files.items() if isinstance(described, Mapping)}


def _model_damage(folder: Path) -> str | None:
    """What is wrong with the weights of a folder; None where nothing is."""
    weights = weight_files(folder)
    if not weights and not any(folder.glob("global_step*")):
        return "the weights are missing"
    try:
        manifest = _manifest(folder)
    except DataError:
        manifest = {}
    known = [path for path in weights if path.name in manifest]
    problems = (difference(path, manifest[path.name]) for path in known)
    problem = next((problem for problem in problems if problem is not None), None)
    return problem or _first_unreadable(path for path in weights if path not in known)


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
    if checkpoint_step(folder) >= 0 and holds_model(folder) and (damage := _model_damage(folder)):
        raise ModelError(f"{name}: {damage}; take another checkpoint")
    problem = _own_model_problem(folder)
    checkpoint = last_checkpoint(folder, resumable=False) if problem else None
    if problem is None or (checkpoint is None and holds_model(folder)):
        return str(folder)
    if checkpoint is None:
        raise ModelError(f"{name}: this folder holds no model, no adapter and no whole checkpoint")
    if holds_model(folder):
        say(f"{name}: {problem}; using {checkpoint}")
    return str(checkpoint)


def _own_model_problem(folder: Path) -> str | None:
    """Why the weights in a folder itself are not those to use; None where they are."""
    if not holds_model(folder):
        return "there is no model"
    run = RunDirectory(folder)
    return _model_damage(folder) or (unfinished_because(run) if run.is_run() else None)


def earlier_recipe(output_dir: Path) -> dict[str, Any]:
    """The recipe of the run in a directory; of a checkpoint, where recipe.yaml cannot be read; else empty."""
    try:
        recipe = RunDirectory(output_dir).read_recipe()
    except DataError:
        recipe = {}
    for folder in _checkpoints(output_dir):
        if recipe:
            break
        try:
            recipe = read_state(folder).get("recipe", {})
        except DataError:
            continue
    return recipe


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
    """What is wrong with a file as far as its own structure tells."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(path) as parts:
                if not any(part.CRC for part in parts.infolist()):  # saved by us
                    return f"{STATE_FILE} is missing, which holds the checksum of {path.name}"
                if (bad := parts.testzip()) is not None:
                    return f"{path.name} is damaged ({bad})"
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
    with _saving(folder, unfinished, target, is_writer=is_writer, wait=wait):
        yield folder
        wait()
        if is_writer and folder.is_dir():
            flush_folder(folder)
            if os.path.lexists(target):
                os.rename(target, unfinished / "replaced")
            os.rename(folder, target)
            flush(target.parent)
        wait()


@contextmanager
def written_into(target: Path, *, is_writer: bool, wait: Any) -> Iterator[Path]:
    """Give a folder to write a model into, and move its files to `target` when all are on the disk.

    Arguments, what is yielded and raised are as for `written_whole`. The file that makes a folder a model
    comes last.
    """
    unfinished = target / f"{_UNFINISHED}model"
    with _saving(unfinished, unfinished, target, is_writer=is_writer, wait=wait):
        yield unfinished
        wait()
        if is_writer:
            flush_folder(unfinished)
            _move_into(unfinished, target)
            flush(target)
        wait()


def _move_into(folder: Path, target: Path) -> None:
    new = files_in(folder)
    names = {path.name for path in new}
    if weight_files(folder):
        for old in (*target.glob("*-of-*.safetensors"), *target.glob("*.safetensors.index.json")):
            if old.name not in names:  # parts of a model that was there before
                old.unlink()
    for path in sorted(new, key=lambda path: path.name in (MODEL_CONFIG, ADAPTER_CONFIG)):
        place = target / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


@contextmanager
def _saving(folder: Path, unfinished: Path, target: Path, *, is_writer: bool, wait: Any) -> Iterator[None]:
    """Make `folder` for a save; whatever happens, `unfinished` is gone afterwards."""
    try:
        if is_writer:
            _remove(unfinished)
            folder.mkdir(parents=True)
        wait()
        yield
    except BaseException as error:
        _remove(unfinished)
        # torch, safetensors and tokenizers report a full disk as these
        failed = isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception
        if not failed or isinstance(error, OrpoError):
            raise
        then = "training resumes from the checkpoint before"
        raise cannot_write(target, error, then) from error
    if is_writer:
        _remove(unfinished)


def _remove(path: Path) -> None:
    """Delete what is there, of whatever kind."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(output_dir: str | Path) -> None:
    """Delete what an interrupted save has left."""
    for path in (*Path(output_dir).glob(f"{_UNFINISHED}*"), *Path(output_dir).glob(".*.writing")):
        _remove(path)


def begin_at(output_dir: str | Path, step: int) -> None:
    """Make a run directory one in which training goes on from `step`; it is not finished any more.

    What an earlier attempt has left beyond that step (checkpoints, at step 0 a model too) would be taken for
    this run's. It is moved into a folder of its own, in a printed line.

    Raises:
        RunError: It cannot be moved.
    """
    run = RunDirectory(Path(output_dir))
    beyond = [path for path in _checkpoints(run.path) if checkpoint_step(path) > step]
    replaced = (
        run.of_the_run() if step == 0 and (beyond or holds_model(run.path) or run.card.exists()) else []
    )
    try:
        run.finished.unlink(missing_ok=True)
        if beyond or replaced:
            number = next(n for n in itertools.count(1) if not (run.path / _EARLIER.format(n)).exists())
            aside = run.path / _EARLIER.format(number)
            aside.mkdir()
            moved = [path for path in (*beyond, *replaced) if os.path.lexists(path)]
            for path in moved:
                os.rename(path, aside / path.name)
            say(f"what an earlier run left in {run.path} ({_names(moved)}) is now in {aside}")
    except OSError as error:
        raise cannot_write(run.path, error) from error


def _names(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write our part of a checkpoint, last: it lists the files that are there."""
    paths = files_in(folder)
    described = zip(paths, flush_and_describe(paths), strict=True)
    files = {str(path.relative_to(folder)): dict(one) for path, one in described}
    files.pop(STATE_FILE, None)
    plain = json.loads(json.dumps({**state, "files": files}))
    replace_text(folder / STATE_FILE, json.dumps({**plain, "checksum": _checksum(plain)}, indent=1))


def read_state(folder: str | Path) -> dict[str, Any]:
    """Our part of a checkpoint; empty for one that plain transformers has written.

    Raises:
        DataError: The file is damaged.
    """
    path = Path(folder) / STATE_FILE
    state: dict[str, Any] = read_json(path, {})
    expected = state.pop("checksum", None)
    if expected is not None and expected != _checksum(state):
        raise DataError(f"{path}: damaged (its checksum differs)")
    return state


def _checksum(state: Mapping[str, Any]) -> str:
    return text_checksum(json.dumps(state, sort_keys=True))
