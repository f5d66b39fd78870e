"""All that reading gives a run, kept on disk: the next start on the same data reads no row.

The cache of tokens (dataset.py) is keyed by the pairs, which must be read first: of 60,000 rows that takes
ten seconds. The key here is made from what the pairs come from: bytes of files, fingerprints of data sets,
the settings, tokenizer and template, and the release.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub.constants import HF_HOME

from orpo import __version__
from orpo.console import say
from orpo.data.counts import RowCounts
from orpo.data.dataset import open_cached, tokenizer_identity
from orpo.data.detect import named
from orpo.data.findings import Findings
from orpo.data.rows import source_identity
from orpo.data.source import CACHED_FROM, ReadPairs, TrainingData, pair_tokenizer, read_training
from orpo.errors import ConfigError, DataError, ModelError, OrpoError, first_line
from orpo.run.directory import read_json, write_json
from orpo.settings.config import OrpoSettings

SETTINGS = (
    "chat_template", "chat_template_kwargs", "columns", "data_format", "dataset_config", "dataset_name",
    "dataset_test_split", "dataset_train_split", "eval_dataset_name", "eval_split", "max_dropped",
    "max_length", "on_bad_row", "seed", "sft_rows", "streaming", "text_rows",
)  # fmt: skip
"""What reading looks at, apart from the number of processes and from what the template's identity tells."""
_CONTENTS = "contents.json"
_VERSION = 3
"""To be raised where the same rows are read in another way within a release."""


def read_training_once(
    train: Any,
    evals: Any,
    settings: OrpoSettings,
    tokenizer: Any,
    *,
    evaluates: bool,
    stop_tokens: Sequence[int] = (),
) -> TrainingData:
    """`read_training`, or what it gave for the same data, settings and tokenizer before; same arguments."""
    key = _key(train, evals, settings, tokenizer, evaluates, stop_tokens)
    folder = None if key is None else Path(HF_HOME) / "orpo" / f"run-{key}"
    if folder is not None and (known := _load(folder)) is not None:
        say(f"the data has not changed: taken from {folder}")
        return known
    read = read_training(train, evals, settings, tokenizer, evaluates=evaluates, stop_tokens=stop_tokens)
    if folder is not None and isinstance(read.train, ReadPairs) and len(read.train.pairs) >= CACHED_FROM:
        try:
            _keep(read, folder)
        except (OSError, OrpoError) as error:
            say(f"what was read could not be kept ({first_line(error)}); the next start reads it again")
    return read


def _key(
    train: Any,
    evals: Any,
    settings: OrpoSettings,
    tokenizer: Any,
    evaluates: bool,
    stop_tokens: Sequence[int],
) -> str | None:
    """A name for everything the result depends on; None where that is not known before reading."""
    if settings.streaming:
        return None
    try:
        template = pair_tokenizer(settings, tokenizer, stop_tokens).renderer.template.identity()
    except (ConfigError, ModelError):  # reading says so, if it needs one
        return None
    given = {
        "train": settings.dataset_name if train is None else train,
        "evals": settings.eval_dataset_name if evals is None else evals,
    }
    splits = (settings.dataset_train_split, settings.dataset_test_split)
    try:
        sources = {
            name: one if one is None else source_identity(one, splits, settings.dataset_config)
            for name, one in given.items()
        }
    except (DataError, OSError):
        return None
    if given["train"] is None or any(sources[name] is None for name, one in given.items() if one is not None):
        return None
    said = {name: getattr(settings, name, None) for name in SETTINGS}
    reader = [_VERSION, __version__, tokenizer_identity(tokenizer), template, sorted(stop_tokens)]
    about = json.dumps([reader, sources, said, evals is None, evaluates], sort_keys=True, default=str)
    return xxhash.xxh3_128(about.encode()).hexdigest()


def _keep(read: TrainingData, folder: Path) -> None:
    """Write what was read to a folder, all or nothing; tokens that are cached already are named."""
    assert isinstance(read.train, ReadPairs)
    scratch = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
    sets = {"train": read.train, **{f"eval {name}": one for name, one in read.evals.items()}}
    try:
        scratch.mkdir(parents=True)
        contents: dict[str, Any] = {"notices": list(read.notices), "text_rows": read.text_rows, "sets": {}}
        for number, (name, one) in enumerate(sets.items()):
            if one.pairs.folder is None:
                one.pairs.save(scratch / str(number))
            at = str(number) if one.pairs.folder is None else f"../{one.pairs.folder.name}"
            contents["sets"][name] = {"tokens": at} | _about(one)
        write_json(scratch / _CONTENTS, contents)
        if not folder.exists():  # another process may have been faster
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _about(read: ReadPairs) -> dict[str, Any]:
    return {
        "name": read.name,
        "formats": {name: [one.name, one.reason] for name, one in read.formats.items()},
        "unused_columns": {name: list(columns) for name, columns in read.unused_columns.items()},
        "counts": None if read.counts is None else read.counts.to_dict(),
        "findings": None if read.findings is None else read.findings.to_dict(),
        "notices": list(read.notices),
    }


def _load(folder: Path) -> TrainingData | None:
    """What `_keep` has written; None where there is none, or not all of it."""
    if not folder.exists():
        return None
    try:
        contents = read_json(folder / _CONTENTS, {})
        sets = {name: _set(folder, one) for name, one in contents["sets"].items()}
    except (OrpoError, OSError, KeyError, TypeError, ValueError) as error:
        say(f"{folder}: what was kept of the data is damaged ({first_line(error)}) and is made again")
        sets = {"train": None}
    if None in sets.values():
        shutil.rmtree(folder, ignore_errors=True)
        return None
    whole = {name: one for name, one in sets.items() if one is not None}
    evals = {name.removeprefix("eval "): one for name, one in whole.items() if name != "train"}
    notices = tuple(contents["notices"])
    return TrainingData(train=whole["train"], evals=evals, notices=notices, text_rows=contents["text_rows"])


def _set(folder: Path, about: Mapping[str, Any]) -> ReadPairs | None:
    pairs = open_cached(folder / about["tokens"])
    if pairs is None:
        return None
    formats = {key: named(name)._replace(reason=reason) for key, (name, reason) in about["formats"].items()}
    return ReadPairs(
        name=about["name"],
        pairs=pairs,
        formats=formats,
        unused_columns=about["unused_columns"],
        counts=None if about["counts"] is None else RowCounts.from_dict(about["counts"]),
        findings=None if about["findings"] is None else Findings.from_dict(about["findings"]),
        notices=tuple(about["notices"]),
    )
