"""Preference rows of any accepted format -> `PreferencePair`, each checked and traceable to file and line.

Two kinds of trouble are kept apart. A malformed row (not parsable, a field missing or of the wrong type)
stops the run, or is skipped and counted. A well-formed row that cannot train (identical sides, an empty
answer) is dropped and counted by reason.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo.data.counts import RowCounts
from orpo.data.detect import SAMPLE, Detected, detect, named, rename
from orpo.data.formats import Format, Sides
from orpo.data.messages import BadRow
from orpo.data.rows import RawRow, Row, read_rows
from orpo.errors import ConfigError, DataError
from orpo.pairs import Message, PreferencePair


@dataclass(frozen=True)
class PreferenceSet:
    """The pairs of one or several data sets.

    Attributes:
        pairs: In the order of the data.
        formats: Name of each data set -> its format and why.
        report: What became of the rows.
        notices: Lines to print.
    """

    pairs: list[PreferencePair]
    formats: dict[str, Detected] = field(default_factory=dict)
    report: RowCounts = field(default_factory=RowCounts)
    notices: list[str] = field(default_factory=list)

    @property
    def format(self) -> Detected:
        """The format, where there is one data set."""
        return next(iter(self.formats.values()))

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSettings:
    """How rows are read; the names are those of the recipe."""

    split: str | None = "train"
    config: str | None = None
    data_format: str | None = None
    columns: Mapping[str, str] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    sft_rows: Literal["drop", "use"] = "drop"


def read_preferences(
    data: object,
    *,
    max_dropped: float = 0.1,
    seed: int = 0,
    settings: ReadSettings | None = None,
    **options: Any,
) -> PreferenceSet:
    """Read preference pairs.

    Args:
        data: A local file or folder (jsonl, json, csv, also .gz; parquet, arrow), a hub name, a `Dataset`,
            `IterableDataset` or list of dicts; a list of names; or a mapping name -> weight: how often each
            pair of that data set is seen in an epoch (0.5: a random half, 2: twice).
        max_dropped: Largest share of rows that may be dropped or skipped, in [0, 1].
        seed: For the choice of rows where a weight is not whole.
        settings: How rows are read.
        options: Fields of `ReadSettings`, instead of `settings`.

    Raises:
        DataError: Nothing to read, a malformed row, or too many rows dropped.
    """
    settings = settings or ReadSettings(**options)
    result = PreferenceSet([])
    for name, (source, weight) in _sources(data).items():
        counts = RowCounts()
        found: dict[str, Detected] = {}
        pairs = list(_pairs(source, settings, counts, found))
        result.report.add(counts)
        result.formats[name] = found["format"]
        result.notices.append(f"{name}: format {found['format'].name} ({found['format'].reason})")
        if weight is not None:
            taken = resample(pairs, weight, seed)
            result.notices.append(
                f"{name}: weight {weight:g}: {len(taken)} of {len(pairs)} pairs in an epoch"
            )
            pairs = taken
        result.pairs.extend(pairs)
    result.report.check(max_dropped)
    return result


def stream_preferences(
    data: object, *, counts: RowCounts | None = None, settings: ReadSettings | None = None, **options: Any
) -> Iterator[PreferencePair]:
    """The pairs as they come, for data that is not to be held in memory; arguments as for `read_preferences`.

    Args:
        data: One data set or a list of them, read one after the other; weights need the whole set.
        counts: Filled while reading.
        settings: How rows are read.
        options: Fields of `ReadSettings`, instead of `settings`.
    """
    settings = settings or ReadSettings(**options)
    for name, (source, weight) in _sources(data).items():
        if weight not in (None, 1):
            raise ConfigError(f"{name}: a weight needs the whole data set; leave streaming or the weight out")
        yield from _pairs(source, settings, RowCounts() if counts is None else counts, {})


def resample(pairs: Sequence[PreferencePair], weight: float, seed: int) -> list[PreferencePair]:
    """Each pair `floor(weight)` times, and a random share of them once more; the same for the same seed.

    Args:
        pairs: Of one data set.
        weight: At least 0.
        seed: Of the random share.
    """
    if weight < 0:
        raise ConfigError(f"the weight {weight:g} of a data set is negative; use 0 or more")
    whole, part = divmod(weight, 1)
    extra = random.Random(seed).sample(range(len(pairs)), round(part * len(pairs)))
    return [*(list(pairs) * int(whole)), *(pairs[index] for index in sorted(extra))]


def split_holdout(
    pairs: Sequence[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Hold out a share of the prompts; no prompt ends up on both sides.

    Args:
        pairs: All pairs.
        fraction: Share of the distinct prompts to hold out, in [0, 1); at least one prompt where it is above
            0.
        seed: Of the choice.

    Returns:
        Training pairs and held-out pairs, each in the order of `pairs`.
    """
    keys = [pair.prompt_key() for pair in pairs]
    prompts = list(dict.fromkeys(keys))
    if fraction <= 0 or len(prompts) < 2:
        return list(pairs), []
    number = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = set(random.Random(seed).sample(prompts, number))
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held]


def _sources(data: object) -> dict[str, tuple[object, float | None]]:
    """Name -> (what to read, weight)."""
    if isinstance(data, Mapping) and data and all(isinstance(value, int | float) for value in data.values()):
        return {str(name): (name, float(weight)) for name, weight in data.items()}
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
        return {str(item): (item, None) for item in data}
    return {str(data) if isinstance(data, str | Path) else "data": (data, None)}


def _pairs(
    data: object, settings: ReadSettings, counts: RowCounts, found: dict[str, Detected]
) -> Iterator[PreferencePair]:
    """The pairs of one data set; its format is left in `found`."""
    raw = read_rows(data, split=settings.split, config=settings.config)
    head = list(itertools.islice(raw, SAMPLE))
    found["format"] = _format(head, settings)
    format_ = found["format"].format
    for row in itertools.chain(head, raw):
        counts.total += 1
        try:
            pairs = _row_pairs(row, format_, settings)
        except BadRow as bad:
            if settings.on_bad_row == "stop":
                raise DataError(f"{row.source}: {bad} or set on_bad_row: skip") from None
            counts.skip(bad.reason, row.source)
            continue
        counts.total += len(pairs) - 1
        for pair in pairs:
            reason = _cannot_train(pair, settings)
            if reason is None:
                yield pair
            else:
                counts.drop(reason, pair.source)


def _format(head: Sequence[RawRow], settings: ReadSettings) -> Detected:
    if settings.data_format is not None:
        return named(settings.data_format)
    return detect(rename(row.data, settings.columns) for row in head if isinstance(row.data, dict))


def _row_pairs(raw: RawRow, format_: Format, settings: ReadSettings) -> list[PreferencePair]:
    if isinstance(raw.data, DataError):
        raise BadRow("row", str(raw.data))
    row: Row = rename(raw.data, settings.columns)
    tools = _tools(row)
    group = next((row[name] for name in ("source", "dataset") if isinstance(row.get(name), str)), None)
    sides: list[Sides] = format_.read(row)
    return [
        PreferencePair(prompt, chosen, rejected, tools, raw.source, group)
        for prompt, chosen, rejected in sides
    ]


def _tools(row: Row) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError:
            raise BadRow("tools", "is text, but not JSON") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow("tools", f"is a {type(tools).__name__}, not a list of schemas")
    return tools or None


def _cannot_train(pair: PreferencePair, settings: ReadSettings) -> str | None:
    """Why a well-formed row is of no use; None where it is."""
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if side is None:
            continue
        if not isinstance(side, str) and (not side or side[-1]["role"] != "assistant"):
            return f"the last turn of {name} is not the assistant's"
        if _is_empty(side):
            return f"empty {name} answer"
    if not pair.prompt:
        return "no prompt: the sides share no beginning"
    if pair.rejected is None:
        return None if settings.sft_rows == "use" else "no rejected answer (sft_rows: drop)"
    return "chosen and rejected are identical" if _answer(pair.chosen) == _answer(pair.rejected) else None


def _is_empty(side: list[Message] | str) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return not side[-1]["content"].strip() and not side[-1].get("tool_calls")


def _answer(side: list[Message] | str) -> object:
    if isinstance(side, str):
        return side.strip()
    return [{**message, "content": message["content"].strip()} for message in side]
