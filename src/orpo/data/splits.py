"""Splits of local data: which files, and which of their rows, `train`, `test_prefs` or `train[:5]` stand for.

The conventions of the hub hold for folders too: the front matter of README.md says which files make a split;
without it `train_prefs-00000-of-00002.parquet` is of the split `train_prefs`, `my-train.jsonl` of `train`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from orpo.errors import DataError

T = TypeVar("T")

DEFAULT = "train"
_PART = re.compile(r"([^\[\]]+?)\s*(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_KEYWORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
MANIFEST = "prepared.json"
"""What `orpo data prepare` writes next to the data: how it came about."""
_NO_DATA = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", MANIFEST,
}  # fmt: skip


class Part(NamedTuple):
    """One term of a split: `train[10%:20%]` is ("train", "10%", "20%")."""

    name: str
    start: str | None = None
    stop: str | None = None

    def take(self, rows: Iterable[T]) -> Iterator[T]:
        """The rows that the slice keeps; negative bounds and percentages need all rows in memory."""
        bounds = (self.start, self.stop)
        if not any(bound and (bound.startswith("-") or bound.endswith("%")) for bound in bounds):
            start, stop = (int(bound) if bound else None for bound in bounds)
            return itertools.islice(rows, start, stop)
        held = list(rows)
        return iter(held[slice(*(_boundary(bound, len(held)) for bound in bounds))])


def _boundary(bound: str | None, number: int) -> int | None:
    if bound is None:
        return None
    return round(int(bound[:-1]) * number / 100) if bound.endswith("%") else int(bound)


def parse_split(split: str | None) -> list[Part]:
    """The terms of a split in the notation of `datasets`: `train`, `train[:5]`, `train[:10%]+test`.

    Raises:
        DataError: It is not of that notation.
    """
    found = []
    for term in (split or DEFAULT).split("+"):
        match = _PART.fullmatch(term.strip())
        if match is None:
            raise DataError(f"the split {split!r} cannot be read; write train, train[:100] or train[:10%]")
        found.append(Part(*match.groups()))
    return found


def check_file(path: Path, name: str) -> None:
    """Stop where a single file is asked for a split that it is not.

    Raises:
        DataError: The split is neither the default, which is the whole file, nor in the file's name.
    """
    stem = _stem(path)
    if name in (DEFAULT, stem, _keyword(stem)) or name == _keyword(path.parent.name):
        return
    raise DataError(
        f"{path}: a single file has no splits, so there is no {name!r}; set dataset_train_split to train and "
        f"dataset_test_split to null, or give a folder with one file for each split"
    )


def files_of_split(
    folder: Path, name: str, config: str | None, is_data: Callable[[Path], bool]
) -> list[Path]:
    """The data files of one split of a folder.

    Args:
        folder: As written by hand, or a snapshot of a hub data set.
        name: Of the split.
        config: Configuration: a name in the front matter of README.md, or a sub-folder.
        is_data: Whether a file can be read as data.

    Raises:
        DataError: The folder holds no data, or not that split, or more than one that could be meant.
    """
    splits = splits_of_folder(folder, config, is_data)
    if name in splits:
        return splits[name]
    # `train_pairs.jsonl` is the split `train`; a shard's name is already exact.
    keyed = [key for key, files in splits.items() if _keyword(key) == name and not _is_sharded(files)]
    if len(keyed) == 1:
        return splits[keyed[0]]
    known = ", ".join(sorted(splits))
    if keyed:
        raise DataError(f"{folder}: the split {name!r} could be any of {', '.join(sorted(keyed))}; name one")
    raise DataError(f"{folder}: there is no split {name!r}; the folder has {known}")


def splits_of_folder(
    folder: Path, config: str | None, is_data: Callable[[Path], bool]
) -> dict[str, list[Path]]:
    """The splits of a folder and their files; arguments as for `files_of_split`.

    Raises:
        DataError: The folder holds no data.
    """
    splits = _splits_of_card(folder, config)
    return _splits_by_name(folder, _data_files(folder, config, is_data)) if splits is None else splits


def evaluation_split(names: Iterable[str], train_split: str | None) -> str | None:
    """The split to evaluate on while training: validation, else test, that goes with the training split.

    Args:
        names: All splits of the data.
        train_split: What is trained on; `train_prefs` goes with `test_prefs`.
    """
    trained = {part.name for part in parse_split(train_split)}
    others = [name for name in names if name not in trained]
    for keyword in ("validation", "test"):
        found = [name for name in others if _keyword(name) == keyword]
        same = [name for name in found if _further_words(name) in map(_further_words, trained)]
        if len(chosen := same or found) == 1:
            return chosen[0]
    return None


def _further_words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_\d]+", name.lower()) if word and word not in _KEYWORDS]


def _stem(path: Path) -> str:
    stem = path.name.split(".")[0]
    if (shard := _SHARD.fullmatch(stem)) is not None:
        return shard[1]
    return re.sub(r"[-_ ]?\d*$", "", stem)


def _is_sharded(files: Sequence[Path]) -> bool:
    return all(_SHARD.fullmatch(file.name.split(".")[0]) for file in files)


def _keyword(name: str) -> str | None:
    words = re.split(r"[\W_\d]+", name.lower())
    return next((_KEYWORDS[word] for word in words if word in _KEYWORDS), None)


def _data_files(folder: Path, config: str | None, is_data: Callable[[Path], bool]) -> list[Path]:
    """The files of the first of these places that has any: the folder, its `data`, its sub-folders."""
    root = folder / config if config and (folder / config).is_dir() else folder
    for pattern in ("*", "data/*", "data/*/*", "*/*", "*/*/*"):
        files = [
            file
            for file in sorted(root.glob(pattern))
            if file.is_file() and is_data(file) and file.name not in _NO_DATA
            and not any(part.startswith(".") for part in file.relative_to(root).parts)
        ]  # fmt: skip
        configs = {file.relative_to(root).parts[0] for file in files} if pattern == "*/*/*" else set()
        if len(configs) > 1:
            known = ", ".join(sorted(configs))
            raise DataError(
                f"{folder}: there are several configurations; set dataset_config to one of {known}"
            )
        if files:
            return files
    raise DataError(f"{folder}: the folder holds no data file")


def _splits_by_name(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for file in files:
        named_by_folder = file.parent != folder and _keyword(file.parent.name) is not None
        splits.setdefault(file.parent.name if named_by_folder else _stem(file), []).append(file)
    if any(_keyword(name) is not None or _is_sharded(group) for name, group in splits.items()):
        return splits
    return {DEFAULT: list(files)}


def _splits_of_card(folder: Path, config: str | None) -> dict[str, list[Path]] | None:
    """Split -> files as the front matter of README.md says; None where it says nothing."""
    entries = [entry for entry in _configs_of_card(folder) if isinstance(entry, Mapping)]
    entries = [entry for entry in entries if entry.get("data_files")]
    if config is not None:
        entries = [entry for entry in entries if entry.get("config_name") == config]
    if not entries:
        return None
    preferred = [e for e in entries if e.get("default") or e.get("config_name") == "default"]
    if len(entries) > 1 and not preferred:
        known = ", ".join(str(entry.get("config_name")) for entry in entries)
        raise DataError(f"{folder}: there are several configurations; set dataset_config to one of {known}")
    data_files = (preferred or entries)[0]["data_files"]
    if isinstance(data_files, str) or all(isinstance(item, str) for item in data_files):
        data_files = [{"split": DEFAULT, "path": data_files}]
    splits = {str(item["split"]): _matching(folder, item["path"]) for item in data_files}
    return {split: files for split, files in splits.items() if files} or None


def _configs_of_card(folder: Path) -> list[Any]:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    try:
        loaded = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return []
    configs = loaded.get("configs") if isinstance(loaded, Mapping) else None
    return configs if isinstance(configs, list) else []


def _matching(folder: Path, patterns: str | list[str]) -> list[Path]:
    listed = [patterns] if isinstance(patterns, str) else patterns
    return sorted({file for pattern in listed for file in folder.glob(pattern.lstrip("/")) if file.is_file()})
