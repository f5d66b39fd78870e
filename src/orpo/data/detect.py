"""Which format a data set is in: told once from the columns of its first rows and their types."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orpo.data.formats import FORMATS, Format
from orpo.data.messages import kind
from orpo.data.rows import Row
from orpo.errors import ConfigError, DataError

SAMPLE = 256

# Names other projects use for our columns; `columns` in the recipe maps any further ones.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("query",),
    "chosen": ("completion", "chosen_response", "response_chosen"),
    "rejected": ("rejected_response", "rejected_messages", "rejected_responses", "response_rejected"),
    "instruction": ("question",),
    "system": ("system_prompt",),
    "answers": ("completions", "responses"),
    "scores": ("ratings",),
}


class Detected(NamedTuple):
    """The format of one data set."""

    format: Format
    reason: str
    """One line: what in the data spoke for it."""

    @property
    def name(self) -> str:
        """Its `data_format`."""
        return self.format.name


def rename(row: Row, columns: Mapping[str, str] | None) -> Row:
    """The row under our column names.

    Args:
        row: As read.
        columns: Our name -> the data's name. `role` and `content` rename the keys of messages.
    """
    row = dict(row)
    for ours, theirs in (columns or {}).items():
        if ours not in ("role", "content") and theirs in row:
            row[ours] = row.pop(theirs)
    for ours, others in ALIASES.items():
        if ours not in row:
            found = next((name for name in others if name in row), None)
            if found is not None:
                row[ours] = row.pop(found)
    if (
        not row.keys() & {"instruction", "prompt", "messages", "conversations"}
        and kind(row.get("input")) == "text"
    ):
        row["instruction"] = row.pop("input")  # Axolotl's icr: the input is the question
    keys = {theirs: ours for ours, theirs in (columns or {}).items() if ours in ("role", "content")}
    if keys:
        row = {name: _rename_keys(value, keys) for name, value in row.items()}
    return row


def _rename_keys(value: Any, keys: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {keys.get(name, name): item for name, item in value.items()}
    if isinstance(value, list):
        return [_rename_keys(item, keys) for item in value]
    return value


def named(name: str) -> Detected:
    """The format that `data_format` names.

    Raises:
        ConfigError: There is none of that name.
    """
    found = next((one for one in FORMATS if one.name == name), None)
    if found is None:
        known = ", ".join(one.name for one in FORMATS)
        raise ConfigError(f"data_format: {name!r} is unknown; use one of {known}")
    return Detected(found, "as data_format says")


def detect(rows: Iterable[Row]) -> Detected:
    """The format most of the first rows speak for.

    Args:
        rows: Renamed rows; at most 256 are looked at.

    Raises:
        DataError: No row is of a known format.
    """
    votes: Counter[Format] = Counter()
    columns: list[str] = []
    seen = 0
    for row in itertools.islice(rows, SAMPLE):
        seen += 1
        columns = columns or sorted(row)
        found = next((one for one in FORMATS if one.matches(row)), None)
        if found is not None:
            votes[found] += 1
    if not votes:
        if not seen:
            raise DataError("the data set is empty")
        raise DataError(
            f"cannot tell the format from the columns {', '.join(columns)}; map them with columns "
            f"(chosen: {columns[0] if columns else 'better'}) "
            f"or set data_format: {', '.join(one.name for one in FORMATS)}"
        )
    # A few answers that happen to repeat their prompt must not change how the others are read.
    for special, general in (("standard_repeated", "standard"),):
        one, other = named(special).format, named(general).format
        if votes[one] and votes[other]:
            votes[other] += votes.pop(one)
    winner, count = votes.most_common(1)[0]
    seen_in = "" if count == seen else f" ({count} of the first {seen} rows)"
    return Detected(winner, winner.reason + seen_in)
