"""Which format a data set is in: detected once from the columns of its first rows and their types.

Rows that no format can be proved for stop the run with what they seem to be and what to set (`_HINTS`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from orpo.data import pairwise, ranked
from orpo.data.columns import NamedRow, quoted
from orpo.data.formats import FORMATS, Format
from orpo.data.messages import BadRow, kind, type_name
from orpo.data.verdicts import VERDICTS
from orpo.errors import ConfigError, DataError


class Detected(NamedTuple):
    """The format of one data set."""

    format: Format
    reason: str
    """One line: what in the data spoke for it."""

    @property
    def name(self) -> str:
        """Its `data_format`."""
        return self.format.name


def named(name: str) -> Detected:
    """The format that `data_format` names.

    Raises:
        ConfigError: There is none of that name.
    """
    found = _format(name)
    if found is None:
        raise ConfigError(f"data_format: {name!r} is unknown; use one of {_known()}")
    return (
        Detected(found.named, found.named.reason) if found.named else Detected(found, "as data_format says")
    )


def detect(rows: Iterable[NamedRow]) -> Detected:
    """The format most of the first rows speak for.

    Args:
        rows: The first rows, under our names.

    Raises:
        DataError: No row is of a known format, or the rows together cannot be read in theirs.
    """
    seen = list(rows)
    votes: Counter[Format] = Counter()
    examples: dict[Format, NamedRow] = {}
    for row in seen:
        found = next((one for one in FORMATS if one.matches(row)), None)
        if found is not None:
            votes[found] += 1
            examples.setdefault(found, row)
    if not seen:
        raise DataError("the data set is empty")
    if not votes:
        raise DataError(_no_format(seen))
    for one in list(votes):
        general = _format(one.yields_to)
        if general is not None and votes[general]:
            votes[general] += votes.pop(one)
    winner = min(votes, key=lambda one: (-votes[one], FORMATS.index(one)))
    if winner.problem is not None and (problem := winner.problem(seen)) is not None:
        raise DataError(problem)
    count = votes[winner]
    parts = [winner.reason, _detail(winner, examples[winner])]
    share = "" if count == len(seen) else f" ({count} of the first {len(seen)} rows)"
    return Detected(winner, ": ".join(filter(None, parts)) + share)


def _detail(format_: Format, row: NamedRow) -> str:
    try:
        return format_.detail(row) if format_.detail else ""
    except BadRow:  # reading says so, with file and line
        return ""


def _format(name: str) -> Format | None:
    return next((one for one in FORMATS if one.name == name), None)


def _known() -> str:
    return ", ".join(one.name for one in FORMATS)


# ------------------------------------------------------------------------------------- what no format fits


def _no_format(rows: Sequence[NamedRow]) -> str:
    """What to say of rows in no known format: the columns that are there, and what to do about them."""
    row = rows[0]
    columns = ", ".join(sorted(quoted(row.theirs(name)) for name in row))
    hint = next((hint for hint in (find(row) for find in _HINTS) if hint), None)
    if hint is None:
        hint = (
            f"map them with columns (prompt: ..., chosen: ..., rejected: ...) or set data_format: {_known()}"
        )
    return f"cannot tell the format from the columns {columns}; {hint}"


def _steps(row: NamedRow) -> str | None:
    answers, labels = ranked.answer_list(row), row.get("labels")
    name = row.theirs(ranked.answer_column(row) or "answers")
    if ranked.are_steps(answers):
        return f"{name} holds the steps of one solution, which are no preference"
    if not (isinstance(labels, list) and answers and len(labels) == len(answers)):
        return None
    return (
        f"{name} with a label for each looks like the steps of one solution, which hold no preference; if "
        f"these are whole answers, set columns: {{scores: {row.theirs('labels')}}}"
    )


def _unranked(row: NamedRow) -> str | None:
    column = ranked.answer_column(row)
    if column is None or row.get("chosen") is not None:
        return None
    name = row.theirs(column)
    numbers = [
        number.replace(f"{column}.", f"{name}.", 1)
        for number in ranked.unknown_numbers(row, ranked.answer_list(row))
    ]
    which = numbers[0] if numbers else "..."
    others = f" (or {', '.join(numbers[1:])})" if numbers[1:] else ""
    return (
        f"{name} holds several answers and nothing known says which is best; set columns: "
        f"{{scores: {which}}}{others} where more is better, {{ranks: {which}}} where 1 is best, "
        "or data_format: ranked where the first is the best"
    )


def _unjudged(row: NamedRow) -> str | None:
    duel = pairwise.find_duel(row)
    if duel is None:
        return None
    return (
        f"{duel.first} and {duel.second} are two answers, and nothing known says which is better; set "
        "columns: {winner: ...} to a column that names the better one, or write chosen and rejected"
    )


_SINGLE = ("response", "answer", "output", "text", "generation")


def _unpaired(row: NamedRow) -> str | None:
    verdict = next((name for name in VERDICTS if row.get(name) is not None), None)
    if verdict is None or not any(kind(row.get(name)) == "text" for name in _SINGLE):
        return None
    return (
        f"each row seems to be one answer and how good it is ({row.theirs(verdict)}); put the good and the "
        "bad answer to a prompt into one row, as chosen and rejected"
    )


def _nested(row: NamedRow) -> str | None:
    for name, value in row.items():
        if isinstance(value, dict) and {"chosen", "rejected"} <= value.keys():
            inside = ", ".join(
                f"{key}: {row.theirs(name)}.{key}" for key in value if key in ("prompt", "chosen", "rejected")
            )
            return f"the columns lie inside {row.theirs(name)!r}; set columns: {{{inside}}}"
    return None


def _wrong_type(row: NamedRow) -> str | None:
    for name in ("prompt", "instruction", "chosen", "rejected"):
        what = kind(row.get(name))
        if what in ("other", "records") or (what == "texts" and name != "rejected"):
            return f"{row.theirs(name)} is {type_name(row[name])}; expected text or messages"
    return None


def _no_prompt(row: NamedRow) -> str | None:
    """Chosen and rejected are there, what they answer is not: columns that could be it."""
    if row.get("chosen") is None or row.get("rejected") is None:
        return None
    others = [name for name in row if name not in ("chosen", "rejected")]
    talks = [row.theirs(name) for name in others if kind(row[name]) == "messages"]
    texts = [row.theirs(name) for name in others if kind(row[name]) == "text"]
    if len(talks) == 1:
        return f"nothing says what chosen and rejected answer; set columns: {{messages: {talks[0]}}}"
    which = texts[0] if len(texts) == 1 else "..."
    listed = f" (one of {', '.join(texts)})" if len(texts) > 1 else ""
    return f"nothing says what chosen and rejected answer; set columns: {{prompt: {which}}}{listed}"


def _separator(row: NamedRow) -> str | None:
    """What to say of a table whose columns are not separated by commas, so that it has a single one."""
    name = row.theirs(next(iter(row)))
    mark = next((mark for mark in (";", "\t", "|") if mark in name), None)
    if len(row) > 1 or mark is None:
        return None
    return f"its columns seem to be separated by {mark!r}; write commas, or rows as jsonl"


def _blanks(row: NamedRow) -> str | None:
    """Names known but for the blanks around them, as of a CSV header with a blank after each comma."""
    known = ("prompt", "chosen", "rejected")
    spaced = {name.strip(): name for name in map(row.theirs, row) if name != name.strip()}
    found = ", ".join(f"{name}: {spaced[name]!r}" for name in known if name in spaced)
    return f"blanks stand around names: take them out, or set columns: {{{found}}}" if found else None


def _no_answers(row: NamedRow) -> str | None:
    if row.get("chosen") is None and row.get("rejected") is None:
        return None
    missing = "rejected" if row.get("chosen") is not None else "chosen"
    return f"there is no {missing} answer; set columns: {{{missing}: ...}}"


_HINTS: tuple[Callable[[NamedRow], str | None], ...] = (
    _separator, _blanks, _steps, _unranked, _unjudged, _nested, _wrong_type, _unpaired, _no_prompt,
    _no_answers,
)  # fmt: skip
