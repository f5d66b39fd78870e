"""A folder of pairs: one parquet file for each split, and a manifest that says how it came about.

The folder is written beside its place and renamed when it is whole. The same pairs and manifest give the same
bytes. `dataset_name` takes the folder; its rows are of the format `prepared`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

from orpo import __version__
from orpo.curation.steps import Step
from orpo.data.rows import ORIGIN, data_files
from orpo.data.splits import MANIFEST
from orpo.errors import ConfigError, RunError
from orpo.pairs import PreferencePair

_PACKAGES = ("pyarrow", "numpy", "rensa", "ftfy", "py3langid", "scikit-learn")
_AT_ONCE = 5000
"""Rows that are turned into a table together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """A written folder.

    Attributes:
        folder: Where it is.
        splits: Split -> number of pairs.
        steps: What each step did.
        manifest: As written.
    """

    folder: Path
    splits: Mapping[str, int]
    steps: tuple[Step, ...]
    manifest: Mapping[str, Any]

    def lines(self) -> list[str]:
        """One line for each file, and what to do with the folder."""
        files = [
            f"{self.folder / f'{name}.parquet'}: {number:,} pairs" for name, number in self.splits.items()
        ]
        return [*files, f"train on it: orpo train --dataset_name {self.folder} --model_name_or_path M"]


def check_out(out: str | Path, data: object, *, force: bool) -> Path:
    """Stop before any work where the folder cannot be written.

    Args:
        out: Where to write.
        data: What is read.
        force: Whether a folder of ours that is there already is to be replaced.

    Raises:
        ConfigError: Something else is there.
    """
    folder = Path(out).expanduser()
    for name in data if isinstance(data, list | tuple) else [data]:
        if isinstance(name, str | Path) and _overlap(folder, Path(name).expanduser()):
            raise ConfigError(f"--out {out}: the data is read from there; name another folder")
    if folder.is_dir() and not any(folder.iterdir()):
        return folder
    if not folder.exists() and not folder.is_symlink():
        return folder
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"--out {out}: something else is there already; name another folder")
    if not force:
        raise ConfigError(f"--out {out}: prepared data is there already; name another folder, or add --force")
    return folder


def _overlap(folder: Path, data: Path) -> bool:
    one, other = folder.resolve(), data.resolve()
    return data.exists() and (one == other or one in other.parents)


def write_folder(
    folder: Path,
    splits: Mapping[str, Sequence[PreferencePair]],
    steps: Iterable[Step],
    about: Mapping[str, Any],
) -> PreparedData:
    """Write the folder, all or nothing; one that `check_out` has passed is replaced.

    Args:
        folder: Where to write.
        splits: Their pairs.
        steps: What was done, for the manifest.
        about: What else the manifest says: command, options, inputs.

    Raises:
        RunError: The disk is full, or the folder cannot be written.
    """
    steps = tuple(steps)
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.writing-", dir=folder.parent))
        scratch.chmod(0o777 & ~_umask())
        files = _write_splits(scratch, splits)
        manifest = {
            **about,
            "steps": [step.to_json() for step in steps],
            "splits": files,
            "versions": _versions(),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False, default=str)
        (scratch / MANIFEST).write_text(text + "\n", encoding="utf-8")
        for file in scratch.iterdir():
            _flush(file)
        _replace(scratch, folder)
    except OSError as error:
        raise RunError(f"--out {folder}: cannot be written ({error.strerror or error})") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    counts = {name: len(pairs) for name, pairs in splits.items()}
    return PreparedData(folder=folder, splits=counts, steps=steps, manifest=manifest)


def describe_input(data: object, split: str | None, config: str | None) -> list[dict[str, Any]]:
    """Names, sizes and hashes of the local files that are read; hub names and objects by name alone."""
    described: list[dict[str, Any]] = []
    for name in data if isinstance(data, list | tuple) else [data]:
        if not isinstance(name, str | Path):
            described = [{"name": type(data).__name__}]
            break
        files = [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in data_files(name, split, config)
        ]
        described.append({"name": str(name), "split": split, "files": files})
    return described


def _replace(scratch: Path, folder: Path) -> None:
    """Put the new folder in its place; an old one goes only when the new one stands."""
    old = None
    if folder.is_dir() and any(folder.iterdir()):
        old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
        os.rename(folder, old)
    try:
        os.rename(scratch, folder)
    except OSError:
        if old is not None:
            os.rename(old, folder)
        raise
    if old is not None:
        shutil.rmtree(old)


def _write_splits(folder: Path, splits: Mapping[str, Sequence[PreferencePair]]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, as_json = _schema(list(chain.from_iterable(splits.values())))
    written = {}
    for name, pairs in splits.items():
        path = folder / f"{name}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(0, len(pairs), _AT_ONCE):
                rows = [_row(pair, schema.names, as_json) for pair in pairs[start : start + _AT_ONCE]]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        written[name] = {"file": path.name, "pairs": len(pairs), "sha256": _sha256(path)}
    return written


def _schema(pairs: Sequence[PreferencePair]) -> tuple[Any, bool]:
    """The columns that the pairs need, and whether conversations are written as JSON text.

    Texts and plain turns have columns of their own types. Turns with more than a role and a content (tool
    calls, names) differ from row to row as no column can, and so do texts next to conversations.
    """
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    has_texts = any(pair.is_text for pair in pairs)
    as_json = (has_texts and not all(pair.is_text for pair in pairs)) or any(
        len(turn) > 2
        for pair in pairs
        for side in (pair.prompt, pair.chosen, pair.rejected)
        if isinstance(side, list)
        for turn in side
    )
    cell = pa.string() if has_texts or as_json else turns
    columns = [("prompt", cell), ("chosen", cell), ("rejected", cell)]
    if any(pair.tools for pair in pairs):
        columns.append(("tools", pa.string()))
    if any(pair.chat_template_kwargs for pair in pairs):
        columns.append(("chat_template_kwargs", pa.string()))
    if any(pair.group is not None for pair in pairs):
        columns.append(("source", pa.string()))
    if any(pair.scores is not None for pair in pairs):
        columns += [("score_chosen", pa.float64()), ("score_rejected", pa.float64())]
    return pa.schema([*columns, (ORIGIN, pa.string())]), as_json


def _row(pair: PreferencePair, names: Sequence[str], as_json: bool) -> dict[str, Any]:
    def cell(side: Any) -> Any:
        return _json(side) if as_json and isinstance(side, list) else side

    row = {
        "prompt": cell(pair.prompt),
        "chosen": cell(pair.chosen),
        "rejected": cell(pair.rejected),
        "tools": _json(pair.tools) if pair.tools else None,
        "chat_template_kwargs": _json(pair.chat_template_kwargs) if pair.chat_template_kwargs else None,
        "source": pair.group,
        "score_chosen": pair.scores[0] if pair.scores else None,
        "score_rejected": pair.scores[1] if pair.scores else None,
        ORIGIN: pair.source,
    }
    return {name: row[name] for name in names}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _versions() -> dict[str, str]:
    return {"orpo": __version__, "python": sys.version.split()[0], **dict(_installed(_PACKAGES))}


def _installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
