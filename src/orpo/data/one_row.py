"""One row of a data set, read as the whole set reads it: its pairs as tokens, or why there are none.

The format of a set is detected from its first rows together, so a row by itself could be read in another way
than it trains. It is therefore read in front of the set's first rows: counts name the first row of each
reason, and what they name it for is its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo.data.counts import RowCounts
from orpo.data.named_templates import DEFAULT
from orpo.data.rows import ORIGIN, SAMPLE, RawRow, read_rows
from orpo.data.source import ReadPairs, read_pairs, read_texts
from orpo.data.text_rows import LINES
from orpo.errors import DataError
from orpo.pairs import TokenizedPair
from orpo.settings.config import OrpoSettings

_FIRST = "row:0"
"""Source of the first of several rows in memory."""
_NAME = "rows"
"""What messages call the set."""


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row and its data set.

    Attributes:
        row: As it lies there.
        others: The first rows of the set but for this one, from which the format is detected.
        data: The set.
        split: Of the set.
    """

    row: RawRow
    others: tuple[RawRow, ...]
    data: Any
    split: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRow:
    """What became of one row.

    Attributes:
        source: `pairs.jsonl:118`.
        pairs: As they train; several where the row has several rejected answers, none where it is dropped.
        outcomes: (`malformed`, `dropped`, `incomplete` or `changed`; reason), for each thing that happened.
        format: Name of the format, and why; None for a row that cannot be parsed.
        unused_columns: Columns of the data set that are not read.
        template: Which chat template the row is written with; None where it is not.
        template_text: Its Jinja text, or texts by name.
        notices: Lines about the template.
    """

    source: str
    pairs: tuple[TokenizedPair, ...] = ()
    outcomes: tuple[tuple[str, str], ...] = ()
    format: str | None = None
    unused_columns: tuple[str, ...] = ()
    template: str | None = None
    template_text: str | dict[str, str] | None = None
    notices: tuple[str, ...] = ()


def find_row(data: Any, row: str | int, settings: OrpoSettings, split: str | None = None) -> FoundRow:
    """Find a row of a data set.

    Args:
        data: A name, `Dataset` or rows.
        row: Its index from 0, or its source (`pairs.jsonl:118`).
        settings: How to read.
        split: Split of the data; None: all of a file, else `dataset_train_split`.

    Raises:
        DataError: The data cannot be read, or has no such row.
    """
    is_file = isinstance(data, str | Path) and Path(data).expanduser().is_file()
    split = split or (None if is_file else settings.dataset_train_split)
    found: RawRow | None = None
    head: list[RawRow] = []
    number = 0
    for raw in read_rows(data, split=split, config=settings.dataset_config):
        if found is None and _is_named(raw, number, str(row)):
            found = raw
        elif len(head) < SAMPLE - 1:
            head.append(raw)
        number += 1
        if found is not None and len(head) == SAMPLE - 1:
            break
    if found is not None:
        return FoundRow(found, tuple(head), data, split)
    rows = (
        f"it has {number}, --row 0 to {number - 1}, the first from {head[0].source}"
        if head
        else "it is empty"
    )
    raise DataError(f"{data if isinstance(data, str | Path) else 'data'}: there is no row {row}; {rows}")


def _is_named(raw: RawRow, index: int, name: str) -> bool:
    """Whether a row is the one of an index or a source, which may be typed with the file's folder."""
    origin = raw.data.get(ORIGIN) if isinstance(raw.data, dict) else None
    return name in (str(index), raw.source, origin) or name.endswith("/" + raw.source)


def read_row(
    found: FoundRow, settings: OrpoSettings, tokenizer: Any, *, stop_tokens: Sequence[int] = ()
) -> OneRow:
    """Read and tokenize one row as the data set it is from; arguments as for `read_pairs`.

    Raises:
        DataError: No row of the data set can be used.
        ConfigError: As `read_pairs`.
    """
    source = found.row.source
    if isinstance(found.row.data, DataError):
        return OneRow(source=source, outcomes=(("malformed", str(found.row.data)),))
    rows = [found.row, *(row for row in found.others if not isinstance(row.data, DataError))]
    lenient = replace(settings, on_bad_row="skip", max_dropped=1.0, dataset_num_proc=None)
    read = _read(rows, lenient, tokenizer, stop_tokens)
    notices = list(read.pairs.notices)
    if settings.text_rows is None and any(pair.is_text for pair in read.preferences):
        # All rows of the set decide about this together.
        decided = read_texts(found.data, lenient, tokenizer, split=found.split, name=_NAME).text_rows
        read = _read(rows, replace(lenient, text_rows=decided), tokenizer, stop_tokens)
        notices = [*([LINES[decided]] if decided else []), *read.pairs.notices]
    assert read.counts is not None
    index = [number for number, name in enumerate(read.pairs.sources) if name == _FIRST]
    detected = next(iter(read.formats.values()))
    return OneRow(
        source=source,
        pairs=tuple(replace(read.pairs[number], source=source) for number in index),
        outcomes=_outcomes(read.counts),
        format=f"{detected.name} ({detected.reason})",
        unused_columns=tuple(name for names in read.unused_columns.values() for name in names),
        template=_template(read, settings, tokenizer),
        template_text=read.pairs.chat_template,
        notices=tuple(notices),
    )


def _read(
    rows: Sequence[RawRow], settings: OrpoSettings, tokenizer: Any, stop_tokens: Sequence[int]
) -> ReadPairs:
    """Read rows from memory; errors name them by their own sources."""
    try:
        return read_pairs(
            [_placed(row.data, number) for number, row in enumerate(rows)],
            settings,
            tokenizer,
            name=_NAME,
            stop_tokens=stop_tokens,
        )
    except DataError as error:
        line = re.sub(r"\brow:(\d+)", lambda place: rows[int(place[1])].source, str(error))
        raise DataError(line) from None


def _placed(row: Any, number: int) -> Any:
    """A row that carries its origin, with its place among the rows in memory instead."""
    return row | {ORIGIN: f"row:{number}"} if ORIGIN in row else row


def _outcomes(counts: RowCounts) -> tuple[tuple[str, str], ...]:
    """What was counted of the first row."""
    tables = {
        "malformed": counts.skipped, "dropped": counts.dropped, "incomplete": counts.lost,
        "changed": counts.changed,
    }  # fmt: skip
    return tuple(
        (verb, reason)
        for verb, table in tables.items()
        for reason in table
        if counts.examples[reason] == _FIRST
    )


def _template(read: ReadPairs, settings: OrpoSettings, tokenizer: Any) -> str | None:
    if read.pairs.chat_template is None:
        return None
    given = settings.chat_template
    if given is not None:
        name = "given as text" if "{" in given else given
    else:
        name = "the tokenizer's own" if tokenizer.chat_template else DEFAULT
    return f"{name}; turns end with {read.pairs.end_token}"
