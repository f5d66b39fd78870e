"""Which format a data set is in: told once from the columns of its first rows and their types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from orpo.data.formats import HH_TURN, READERS, common_words
from orpo.data.messages import ROLES, kind
from orpo.data.rows import Row
from orpo.errors import DataError

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

_REASONS = {
    "standard": "prompt, chosen and rejected are texts, used as they are, without a chat template",
    "standard_repeated": "texts without a chat template; chosen and rejected begin with the prompt",
    "standard_implicit": "texts without prompt column or chat template: the prompt is their common beginning",
    "conversational": "a prompt column, chosen and rejected are messages",
    "conversational_implicit": "chosen and rejected are conversations: the shared turns are the prompt",
    "hh": "texts are transcripts with 'Human:' and 'Assistant:'",
    "instruction": "an instruction, or a prompt with a system text, and answers: made into turns",
    "sharegpt": "a conversation of from/value turns; chosen and rejected answer it",
    "messages": "a list of messages; chosen and rejected answer it, or its last turn is the chosen answer",
    "ranked": "several answers to a prompt, scored or best first: the best against each worse one",
}


class Format(NamedTuple):
    """How the rows of one data set are read."""

    name: str
    reason: str
    """One line: what in the data spoke for it."""


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


def recognise(row: Row) -> str | None:
    """The format one row speaks for, or None."""
    chosen, rejected, prompt = (kind(row.get(name)) for name in ("chosen", "rejected", "prompt"))
    if row.get("messages") is not None or row.get("conversations") is not None:
        lists = chosen == "messages" and rejected in ("messages", "conversations", "null")
        if not lists or (_turns_start(row["chosen"]) == "assistant" and prompt == "null"):
            return _recognise_history(row)
    if chosen in ("messages", "message") or rejected in ("messages", "message", "conversations"):
        return "conversational_implicit" if prompt == "null" else "conversational"
    if kind(row.get("answers")) in ("texts", "records", "messages"):
        return "ranked"
    return _recognise_texts(row, chosen, prompt)


def _turns_start(value: Any) -> str | None:
    first = value[0]
    return ROLES.get(str(first.get("role") or first.get("from")).lower())


def _recognise_history(row: Row) -> str | None:
    turns = row.get("messages", row.get("conversations"))
    if kind(turns) != "messages":
        return None
    return "sharegpt" if "from" in turns[0] else "messages"  # type: ignore[index]


def _recognise_texts(row: Row, chosen: str, prompt: str) -> str | None:
    if kind(row.get("instruction")) == "text":
        return "instruction" if chosen == "text" or kind(row.get("output")) in ("text", "texts") else None
    if chosen != "text":
        return None
    if prompt == "messages":
        return "conversational"
    first = row["prompt"] if prompt == "text" else row["chosen"]
    if HH_TURN.match(first) and "Assistant:" in first:
        return "hh"
    if prompt == "null":
        rejected = row.get("rejected")
        shared = common_words(row["chosen"], rejected) if isinstance(rejected, str) else 0
        return "standard_implicit" if shared else None
    if prompt != "text":
        return None
    if row.get("system") is not None:
        return "instruction"
    sides = [side for side in (row["chosen"], row.get("rejected")) if isinstance(side, str)]
    repeated = len(row["prompt"]) > 0 and all(side.startswith(row["prompt"]) for side in sides)
    return "standard_repeated" if repeated and len(sides) == 2 else "standard"


def detect(rows: Iterable[Row]) -> Format:
    """The format most of the first rows speak for.

    Args:
        rows: Renamed rows; at most 256 are looked at.

    Raises:
        DataError: No row is of a known format.
    """
    votes: Counter[str] = Counter()
    columns: list[str] = []
    seen = 0
    for row in rows:
        seen += 1
        columns = columns or sorted(row)
        name = recognise(row)
        if name is not None:
            votes[name] += 1
        if seen == SAMPLE:
            break
    if not votes:
        if not seen:
            raise DataError("the data set is empty")
        raise DataError(
            f"cannot tell the format from the columns {', '.join(columns)}; map them with columns "
            f"(chosen: {columns[0] if columns else 'better'}) or set data_format: {', '.join(READERS)}"
        )
    # A few answers that happen to repeat their prompt must not change how the others are read.
    if votes["standard_repeated"] and votes["standard"]:
        votes["standard"] += votes.pop("standard_repeated")
    name, count = votes.most_common(1)[0]
    told = _REASONS[name] + ("" if count == seen else f" ({count} of the first {seen} rows)")
    return Format(name, told)
