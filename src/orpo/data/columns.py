"""The columns of a data set under our names: mapped, translated, unpacked; and a note of which were read.

Other projects name columns differently, nest them (`input.messages`) or store conversations as text. Here
every row becomes one with our names, so that `formats` need not know; a row also notes each column that is
read, so that the columns that were of no use can be named.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from orpo.data.messages import BadRow, kind
from orpo.data.rows import NOT_PARSED, KeyTwice, Row, python_literal, strict_json
from orpo.errors import DataError

# Names other projects use for our columns; `columns` in the recipe maps any further ones.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("query", "text_prompt"),
    "chosen": (
        "completion", "chosen_messages", "chosen_response", "response_chosen", "preferred_output",
        "response_j", "accepted", "text_chosen",
    ),
    "rejected": (
        "rejected_response", "rejected_messages", "rejected_responses", "response_rejected",
        "non_preferred_output", "response_k", "text_rejected",
    ),
    "instruction": ("question",),
    "system": ("system_prompt",),
    "answers": (
        "completions", "responses", "summaries", "generations", "candidates", "outputs", "samples", "replies",
    ),
    "messages": ("input.messages",),
    "tools": ("input.tools",),
}  # fmt: skip

PROVENANCE = "provenance"
"""Column that says where a pair comes from; nothing is read from it, and it is not noise."""

_MISSING = object()
_TEXTS = ("prompt", "chosen", "rejected")
_ASKED_MOSTLY = (
    *ALIASES, "conversations", "input", "output", "scores", "ranks", "history", "labels", "winner",
)  # fmt: skip
_SIDES = ("prompt", "chosen", "rejected", "messages", "conversations")
_LISTS = ("answers", "scores", "history", "labels")
"""Columns that hold lists, so that text in them is JSON."""
_KEYS = ("role", "content")
_WRAPPERS = ("messages", "conversations")
_OBJECT = re.compile(r"""\s*"?\s*(?:\[\s*)*\{\s*\\?['"]""")
_KEY = re.compile(r"""['"](\w+)\\?['"]\s*:""")
_BETWEEN_OBJECTS = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|\}\s+\{""")


def quoted(name: str) -> str:
    """A column's name for people: in quotes where it is empty, as of pandas' index in CSV, or has blanks."""
    return name if name and name == name.strip() else repr(name)


class NamedRow(dict[str, Any]):
    """A row under our column names that notes which of the data's columns are read, and what is asked for."""

    def __init__(self, row: Row, theirs: Mapping[str, str], used: set[str], asked: set[str]) -> None:
        super().__init__(row)
        self._theirs = theirs
        self._used = used
        self._asked = asked

    def theirs(self, name: str) -> str:
        """The data's name of one of our columns."""
        return self._theirs.get(name, name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict, and noted."""
        self._note(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def _note(self, name: str) -> None:
        if name in self:
            self._used.add(self._theirs.get(name, name))
        self._asked.add(name)


class Columns:
    """How the columns of one data set are named, and which of them were seen and read.

    Args:
        mapping: Our name -> the data's name, `input.messages` for one inside another, `answers.votes` for one
            inside every entry of a list; None: no column is ours, not even one of that name. `role` and
            `content` rename the keys of messages.
        as_texts: Take texts of the sides as they stand, also where they write a conversation.
    """

    def __init__(self, mapping: Mapping[str, str | None] | None = None, *, as_texts: bool = False) -> None:
        self._left_out = {ours for ours, theirs in (mapping or {}).items() if theirs is None}
        named = {ours: theirs for ours, theirs in (mapping or {}).items() if theirs is not None}
        self.mapping = {ours: theirs for ours, theirs in named.items() if ours not in _KEYS}
        self._keys = {named[ours]: ours for ours in _KEYS if ours in named}
        self._opened = {theirs.split(".")[0] for theirs in self.mapping.values() if "." in theirs}
        self._plans: dict[tuple[tuple[str, ...], tuple[type, ...]], dict[str, str]] = {}
        self._seen: dict[str, None] = {}
        self._used: set[str] = set()
        self._asked: set[str] = set()
        self._as_texts = as_texts
        self._texts: set[str] = set()

    @property
    def unused(self) -> list[str]:
        """The data's columns that held something and that no row was read from, in their order."""
        return [name for name in self._seen if name not in self._used]

    def forget(self) -> None:
        """Forget the columns that were read while the format was being detected."""
        self._used.clear()

    def check(self, head: Iterable[Row], *, may_lack: bool = False) -> None:
        """Stop where a column is mapped that no row has.

        Args:
            head: The first rows, as read.
            may_lack: Accept a data set that has our name instead, as one of several may.

        Raises:
            DataError: It names the columns that are there.
        """
        rows = [{str(name): value for name, value in row.items()} for row in head]
        if not rows:
            return
        present = dict.fromkeys(name for row in rows for name in row)
        for ours, theirs in self.mapping.items():
            if any(_find(row, theirs) is not _MISSING for row in rows) or (may_lack and ours in present):
                continue
            names = ", ".join(map(quoted, present))
            raise DataError(f"columns: {ours}: there is no column {theirs!r}; the data has {names}")
        keys = {key for row in rows for key in _keys_inside(row)}
        for theirs, ours in self._keys.items():
            if theirs not in keys and not may_lack:
                raise DataError(f"columns: {ours}: no message has a key {theirs!r}")

    def look(self, head: Iterable[Row]) -> None:
        """See in the first rows which columns hold texts, though some of these write a conversation."""
        filled: Counter[str] = Counter()
        written: Counter[str] = Counter()
        for row in head:
            for name, value in row.items():
                if isinstance(value, str) and value.strip() and not self._is_read(str(name)):
                    filled[str(name)] += 1
                    begins = bool(_OBJECT.match(value)) and _begins_conversation(value)
                    written[str(name)] += begins or writes_conversation(value, self._keys)
        self._texts = {name for name, number in written.items() if 0 < number * 2 < filled[name]}

    def check_names(self, looks_at: Callable[[str], bool]) -> None:
        """Stop where a column is mapped to a misspelled name, which nothing has asked for in the rows so far.

        Args:
            looks_at: Whether a name is looked at without being asked for.

        Raises:
            DataError: It names the right one.
        """
        for ours in (*self.mapping, *self._left_out):
            near = difflib.get_close_matches(ours, _ASKED_MOSTLY, 1, 0.85)
            if near and near[0] != ours and ours not in self._asked and not looks_at(ours):
                raise DataError(
                    f"columns: {quoted(ours)}: nothing here reads a column of that name; did you mean"
                    f" {near[0]}?"
                )

    def name(self, raw: Row) -> NamedRow:
        """The row under our column names.

        Raises:
            BadRow: A cell holds a conversation as text that cannot be parsed.
        """
        row = {str(name): self._parsed(str(name), value) for name, value in raw.items()}
        pattern = (tuple(row), tuple(map(type, row.values())))
        theirs = self._plans.get(pattern)
        if theirs is None:
            theirs = self._plan(row)
            # What lies inside an object may differ from row to row.
            if len(self._plans) < 1000 and not any(isinstance(value, Mapping) for value in row.values()):
                self._plans[pattern] = theirs
        named = row
        if theirs or self._left_out:
            taken = {*theirs.values(), *self._left_out}
            named = {name: value for name, value in row.items() if name not in taken}
            named |= {ours: _find(row, path) for ours, path in theirs.items()}
        _unwrap(named)
        return NamedRow(named, theirs, self._used, self._asked)

    def _plan(self, row: Row) -> dict[str, str]:
        """Our names of the columns that have others -> the data's names or paths; notes what was seen."""
        theirs = {ours: path for ours, path in self.mapping.items() if _find(row, path) is not _MISSING}
        taken = {*theirs.values(), *self._left_out}

        def has(ours: str) -> bool:
            return ours in theirs or (ours not in taken and row.get(ours) is not None)

        for ours, paths in ALIASES.items():
            if has(ours) or ours in self._left_out:
                continue
            free = (path for path in paths if path not in taken and _holds(row, path))
            if (path := next(free, None)) is not None:
                theirs[ours] = path
        if has("rejected") and not has("chosen") and _holds(row, "response") and "response" not in taken:
            theirs["chosen"] = "response"  # ms-swift: query, response, rejected_response
        asked = any(has(name) for name in ("instruction", "prompt", "messages", "conversations"))
        if not asked and kind(row.get("input")) == "text" and "input" not in taken:
            theirs["instruction"] = "input"  # Axolotl's icr: the input is the question
        self._see(row, set(theirs.values()))
        return theirs

    def _see(self, row: Row, taken: set[str]) -> None:
        """Note the columns that hold something; of one that columns are taken out of, what it holds."""
        for name, value in row.items():
            inside = [column for column in taken if column.startswith(f"{name}.")]
            names = [name]
            if inside and isinstance(value, Mapping):
                keys = [f"{name}.{key}" for key, item in value.items() if item is not None]
                rest = [
                    key for key in keys if not any(f"{column}.".startswith(f"{key}.") for column in inside)
                ]
                names = [*inside, *rest]
            if value is not None and name != PROVENANCE:
                self._seen.update(dict.fromkeys(names))

    def _parsed(self, name: str, value: Any) -> Any:
        if isinstance(value, str) and value[:64].lstrip()[:1] in ("[", "{", '"'):
            value = self._stored(name, value)
        return _rename_keys(value, self._keys) if self._keys else value

    def _ours(self, name: str) -> str:
        return next((our for our, theirs in self.mapping.items() if theirs == name), name)

    def _is_read(self, name: str) -> bool:
        """Whether text in a column is JSON whatever it says: where lists are due, or a path leads into it."""
        ours = self._ours(name)
        is_list = ours in _LISTS or any(name in ALIASES.get(column, ()) for column in _LISTS)
        return is_list or name in self._opened

    def _stored(self, name: str, text: str) -> Any:
        """What a text cell holds, where that is a conversation or a list; else the text."""
        if name in self._texts or (self._as_texts and self._ours(name) in _TEXTS):
            return text
        is_opened = self._is_read(name)
        if not (is_opened or _OBJECT.match(text)):
            return text
        value = _literal(text)
        if value is None and (is_opened or _begins_conversation(text)):
            _refuse_key_twice(name, text)
        if value is not None and (is_opened or _is_conversation(_rename_keys(value, self._keys))):
            return value
        if value is None and _begins_conversation(text):
            raise BadRow(name, "begins like a conversation stored as text, but is neither JSON nor Python")
        return text


def _refuse_key_twice(name: str, text: str) -> None:
    for parse in _PARSERS:
        try:
            value = parse(text)
        except KeyTwice as error:
            raise BadRow(name, f"holds an object as text, which {error}") from None
        except NOT_PARSED:
            continue
        if isinstance(value, str):  # JSON within JSON
            _refuse_key_twice(name, value)
        return


def writes_conversation(value: object, keys: Mapping[str, str] | None = None) -> bool:
    """Whether a text is a message, or turns of a conversation, in JSON or Python; `keys`: theirs -> ours."""
    if not isinstance(value, str) or not _OBJECT.match(value):
        return False
    return _is_conversation(_rename_keys(_literal(value), keys or {}))


def _begins_conversation(text: str) -> bool:
    keys = set(_KEY.findall(text[:4000]))
    return {"role", "content"} <= keys or {"from", "value"} <= keys or not keys.isdisjoint(_WRAPPERS)


def _literal(text: str) -> Any:
    """The list or object that a text writes in JSON, in Python, or as numpy prints it; None for any other."""
    for parse in _PARSERS:
        try:
            value = parse(text)
        except KeyTwice:
            return None
        except NOT_PARSED:
            continue
        if isinstance(value, str) and value[:1] in ("[", "{"):  # JSON within JSON
            return _literal(value)
        return value if isinstance(value, list | dict) else None
    return None


def _numpy_literal(text: str) -> Any:
    """An array of objects as numpy prints it: no commas between them (pandas writes parquet to CSV so)."""
    return python_literal(_BETWEEN_OBJECTS.sub(lambda match: match[1] or "}, {", text))


_PARSERS = (strict_json, python_literal, _numpy_literal)


def _is_conversation(value: Any) -> bool:
    if isinstance(value, Mapping) and any(kind(value.get(key)) == "messages" for key in _WRAPPERS):
        return True
    return kind(value) in ("message", "messages", "conversations")


def _unwrap(row: Row) -> None:
    """`{"messages": [...], "tools": [...]}` in a side is its messages; the tools become the row's."""
    if kind(row.get("prompt")) == "message":
        row["prompt"] = [row["prompt"]]
    for name in _SIDES:
        value = row.get(name)
        if value is None or isinstance(value, str | list) or not isinstance(value, Mapping):
            continue
        turns = next((value[key] for key in _WRAPPERS if kind(value.get(key)) == "messages"), None)
        if turns is None:
            continue
        row[name] = turns
        tools = value.get("tools")
        if tools and row.get("tools") not in (None, tools):
            raise BadRow(name, "brings other tools than the rest of the row")
        if tools:
            row["tools"] = tools


def _find(row: Mapping[str, Any], path: str) -> Any:
    """A column, or what lies at a path of keys inside one; `_MISSING` where there is none."""
    if path in row:
        return row[path]
    column, _, rest = path.partition(".")
    if not rest or column not in row:
        return _MISSING
    value = row[column]
    for key in rest.split("."):
        value = _step(_literal(value) if isinstance(value, str) else value, key)
    return _MISSING if value is None else value


def _holds(row: Mapping[str, Any], path: str) -> bool:
    value = _find(row, path)
    return value is not None and value is not _MISSING


def _step(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(key)
    if isinstance(value, list) and key.isdecimal():
        return value[int(key)] if int(key) < len(value) else None
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [item.get(key) if isinstance(item, Mapping) else None for item in value]
    return None


def _rename_keys(value: Any, keys: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {keys.get(name, name): item for name, item in value.items()}
    if isinstance(value, list):
        return [_rename_keys(item, keys) for item in value]
    return value


def _keys_inside(row: Row) -> Iterable[str]:
    """Keys of the objects in a row's cells, also those stored as text."""
    for value in row.values():
        held = _literal(value) if isinstance(value, str) and value[:1] in ("[", "{", '"') else value
        for item in held if isinstance(held, list) else [held]:
            if isinstance(item, Mapping):
                yield from map(str, item)
