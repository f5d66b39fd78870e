"""Two answers and a label that says which is better, as raters' data is published.

The tables say what the columns of well-known sets mean: how two answers are named, which labels there are,
and which value speaks for which answer. A value in no table stops the run; a tie is dropped and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from orpo.data.messages import BadRow, Turns, Untrainable, kind, number_of, turns_of, with_system
from orpo.data.questions import question
from orpo.data.rows import Row, list_of_texts
from orpo.data.sides import Sides, part

_STEMS = (
    "response", "answer", "output", "completion", "conversation", "conv", "human_ref", "orig_response",
    "summary", "text", "generation", "candidate", "continuation", "reply", "message", "chat", "assistant",
    "solution",
)  # fmt: skip
_SUFFIXES = (
    ("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"),
)  # fmt: skip
_TIES = {
    "tie", "ties", "tied", "both", "both_good", "both_bad", "bothbad", "neither", "draw", "equal", "same",
}  # fmt: skip
TIE = "a tie: neither answer is better"


class Duel(NamedTuple):
    """How the two answers of a data set are named."""

    first: str
    second: str
    suffixes: tuple[str, str]


Judge = Callable[[Row, str, Duel], int | None]
"""A row, the label's column and the answers -> 0 or 1, the better one; None for a tie."""


def _by_name(row: Row, label: str, duel: Duel) -> int | None:
    """The value names an answer: its column, its suffix, `model_a`, or the model that wrote it."""
    value, number = row.get(label), number_of(row.get(label))
    written = value if number is None or not number.is_integer() else int(number)
    word = "_".join(str(written).lower().strip("[]").split())
    if word in _TIES or word.startswith("tie_"):
        return None
    matches = [word in _names(row, duel, index) for index in (0, 1)]
    if isinstance(value, bool) or matches[0] == matches[1]:
        raise BadRow(
            label,
            f"is {value!r}, which names neither {duel.first} nor {duel.second}",
            f"write {duel.first}, {duel.second} or tie",
        )
    return matches.index(True)


def _names(row: Row, duel: Duel, index: int) -> set[str]:
    column, suffix = (duel.first, duel.second)[index], duel.suffixes[index]
    bare = suffix.strip("_").lower()
    models = [row.get(f"{stem}{suffix}") for stem in ("model", "generator")]
    stems = ("model", "response", "answer", "output", "assistant", "option")
    return {
        column.lower(),
        bare,
        *(f"{stem}_{bare}" for stem in stems),
        *(str(m).lower() for m in models if m),
    }


def _by_number(row: Row, label: str, duel: Duel) -> int | None:
    """As `_by_name`; a rater's mean between 1 and 2 speaks for the nearer one."""
    number = number_of(row.get(label))
    if number is not None and 1 < number < 2 and duel.suffixes[0].endswith("1"):
        return None if number == 1.5 else int(number > 1.5)
    return _by_name(row, label, duel)


def _by_sign(row: Row, label: str, duel: Duel) -> int | None:
    """HelpSteer: from -3, the first is much better, to 3, the second is."""
    number = number_of(row.get(label))
    if isinstance(row.get(label), bool) or number is None:
        return _by_name(row, label, duel)
    return None if number == 0 else int(number > 0)


def _one_is_first(row: Row, label: str, duel: Duel) -> int | None:
    """SHP: 1 where A is preferred, 0 where B is."""
    number = number_of(row.get(label))
    if number not in (0, 1):
        raise BadRow(label, f"is {row.get(label)!r}; expected 0 or 1")
    return int(number == 0)


def _by_index(row: Row, label: str, duel: Duel) -> int | None:
    """Counted from 0, whatever the answers are called; a name does as well."""
    number = number_of(row.get(label))
    if duel.suffixes[0].endswith("1") or number not in (0, 1):
        return _by_name(row, label, duel)
    return int(number)


# Label -> what its values mean. The first that a row has decides; the others are named as not used.
LABELS: dict[str, Judge] = {
    "better_response_id": _by_name,
    "better_response": _by_name,
    "better": _by_name,
    "winner": _by_name,
    "preferred": _by_name,
    "preferred_response": _by_name,
    "preference": _by_number,
    "human_preference": _by_name,
    "orig_preference": _by_name,
    "choice": _by_index,
    "label": _by_name,
    "labels": _by_name,
    "chosen": _by_name,
    "overall_preference": _by_sign,
    "preference_strength": _by_sign,
}
# Where the answers are called so, a label means something else.
_SPECIAL: dict[tuple[str, str], Judge] = {("human_ref_A", "labels"): _one_is_first}
# Without a label: numbers for each answer, `score_0` or `conv_A_rating`; more is better, of ranks less.
_NUMBERS = {
    "score": 1, "rating": 1, "reward": 1, "winner_model": 1, "overall_score": 1, "overall_rating": 1,
    "votes": 1, "upvotes": 1, "preference_score": 1, "rank": -1,
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _duel(columns: frozenset[str]) -> Duel | None:
    for stem in _STEMS:
        for suffixes in _SUFFIXES:
            first, second = f"{stem}{suffixes[0]}", f"{stem}{suffixes[1]}"
            if first in columns and second in columns:
                return Duel(first, second, suffixes)
    return None


def find_duel(row: Row) -> Duel | None:
    """The two answers of a row, if it names them so and both are there."""
    found = _duel(frozenset(name for name, value in row.items() if value is not None))
    chosen, rejected = dict.get(row, "chosen"), dict.get(row, "rejected")
    if found is None or (chosen is not None and rejected is not None and not _are_named(row, found)):
        return None
    answers = ("text", "texts", "messages", "message")
    if any(kind(row.get(name)) not in answers and _texts(row[name]) is None for name in found[:2]):
        return None
    return found


def _are_named(row: Row, duel: Duel) -> bool:
    """Whether `chosen` and `rejected` are no answers but name the two that are there."""
    plain = dict(row)
    words = [str(plain[side]).strip().lower() for side in ("chosen", "rejected")]
    return any(
        words[0] in _names(plain, duel, index) and words[1] in _names(plain, duel, 1 - index)
        for index in (0, 1)
    )


def _judge(row: Row, duel: Duel) -> tuple[str, Judge] | None:
    """What says which answer is better, and how it is read."""
    for label, judge in LABELS.items():
        if row.get(label) is not None and kind(row[label]) in ("text", "other"):
            return label, _SPECIAL.get((duel.first, label), judge)
    for word in _NUMBERS:
        columns = _number_columns(row, word, duel)
        if columns is not None:
            return word, _by_numbers
    return None


def _number_columns(row: Row, word: str, duel: Duel) -> tuple[str, str] | None:
    first, second = duel.suffixes
    separator = "" if first.startswith("_") else "_"
    for names in (
        (f"{word}{first}", f"{word}{second}"),
        (f"{word}{separator}{first}", f"{word}{separator}{second}"),
        (f"{duel.first}_{word}", f"{duel.second}_{word}"),
    ):
        if all(number_of(row.get(name)) is not None for name in names):
            return names
    return None


def _by_numbers(row: Row, word: str, duel: Duel) -> int | None:
    columns = _number_columns(row, word, duel)
    if columns is None:
        raise BadRow(word, "is missing for one of the two answers")
    first, second = (_NUMBERS[word] * (number_of(row[name]) or 0.0) for name in columns)
    return None if first == second else int(second > first)


def is_pairwise(row: Row) -> bool:
    """Whether a row has two answers and a label with a known meaning."""
    duel = find_duel(row)
    return duel is not None and _judge(row, duel) is not None


def detail(row: Row) -> str:
    """Which columns hold the answers, and which says which is better."""
    duel = find_duel(row)
    found = _judge(row, duel) if duel is not None else None
    if duel is None or found is None:
        return ""
    label, judge = found
    columns = _number_columns(row, label, duel) if judge is _by_numbers else None
    return f"{duel.first} and {duel.second}, the better one by {' and '.join(columns or (label,))}"


def read_pairwise(row: Row) -> list[Sides]:
    """The better answer as chosen, the other as rejected.

    Raises:
        BadRow: An answer is missing, or the label's value is not known.
        Untrainable: A tie, or an answer that is null in a list of them.
    """
    duel = find_duel(row)
    if duel is None:
        raise BadRow("response", "is missing: the row has no two answers")
    found = _judge(row, duel)
    if found is None:
        raise BadRow("label", f"is missing: nothing says which of {duel.first} and {duel.second} is better")
    label, judge = found
    better = judge(row, label, duel)
    if better is None:
        raise Untrainable(TIE)
    sides = _conversations(row, duel)
    return [part(sides[better], sides[1 - better])._replace(scores=_scores(row, label, judge, duel, better))]


_FEW, _FARTHEST = 12, 3
"""Rows of which none may be below 0 by chance, and the farthest from 0 of scales with signs."""


def no_signs(rows: Sequence[Row]) -> str | None:
    """Why the numbers that would decide by their sign are none, of the rows that tell the format.

    A scale from 1 to 7 has its middle elsewhere; where nothing is 0 or below in many rows, or something is
    beyond 3, it may be such a one.
    """
    numbers = []
    for row in rows:
        duel = find_duel(row)
        found = _judge(row, duel) if duel is not None else None
        if found is not None and found[1] is _by_sign and (value := number_of(row[found[0]])) is not None:
            numbers.append((value, found[0]))
    if not numbers or min(numbers)[0] <= 0 or (len(numbers) < _FEW and max(numbers)[0] <= _FARTHEST):
        return None
    label = numbers[0][1]
    return (
        f"{label} is above 0 in each of the first {len(rows)} rows, as on a scale that begins at 1, and would"
        " be read by its sign (below 0: the first answer is better); name the better one in a column winner"
        " (a, b or tie), or set data_format: pairwise if 0 is the middle"
    )


def signed_labels(rows: Iterable[Row]) -> frozenset[str]:
    """Labels read by their sign whose numbers go below 0; those of any other may say how much, not which."""
    signed = (name for name, judge in LABELS.items() if judge is _by_sign)
    plain = [dict(row) for row in rows]
    return frozenset(name for name in signed if any((number_of(row.get(name)) or 0) < 0 for row in plain))


def other_winner(row: Row, signed: Collection[str]) -> str | None:
    """Which further label says that the other answer is the better one; None where none does.

    Args:
        row: Read already.
        signed: `signed_labels` of the data set.
    """
    plain = dict(row)  # a look at a column is not yet a use
    duel = find_duel(plain)
    found = _judge(plain, duel) if duel is not None else None
    if duel is None or found is None:
        return None
    label, judge = found
    better = judge(plain, label, duel)
    for name, other in LABELS.items():
        if name == label or plain.get(name) is None or (other is _by_sign and name not in signed):
            continue
        try:
            says = _SPECIAL.get((duel.first, name), other)(plain, name, duel)
        except BadRow:  # a column of the same name with another meaning
            continue
        if says is not None and says != better:
            return f"{name} says that the other answer is better than {label} does, which decides"
    return None


def _scores(row: Row, label: str, judge: Judge, duel: Duel, better: int) -> tuple[float, float] | None:
    """Numbers of the better and the other answer, or the strength of the label; those found are not noted."""
    if judge is _by_sign and (strength := number_of(row[label])) is not None:
        return abs(strength), 0.0
    plain = dict(row)
    for word, sign in _NUMBERS.items():
        if (columns := _number_columns(plain, word, duel)) is not None:
            values = [sign * (number_of(plain[name]) or 0.0) for name in columns]
            return values[better], values[1 - better]
    return None


def _conversations(row: Row, duel: Duel) -> tuple[Turns, Turns]:
    answers = (row[duel.first], row[duel.second])
    if all(kind(answer) == "messages" for answer in answers):
        whole = [turns_of(answer, name) for answer, name in zip(answers, duel[:2], strict=True)]
        if all(turns and turns[0]["role"] != "assistant" for turns in whole):
            return with_system(row, _judged(row, whole[0])), with_system(row, _judged(row, whole[1]))
    if (listed := _listed_turns(row, answers)) is not None:
        return with_system(row, listed[0]), with_system(row, listed[1])
    history = question(row)
    first, second = (history + turns_of(row[name], name) for name in duel[:2])
    return first, second


def _judged(row: Row, turns: Turns) -> Turns:
    """The turns up to the exchange that was judged, where `turn` says which."""
    number = row.get("turn")
    answers = [index for index, message in enumerate(turns) if message["role"] == "assistant"]
    if isinstance(number, int) and 0 < number < len(answers):
        return turns[: answers[number - 1] + 1]
    return turns


def _listed_turns(row: Row, answers: tuple[Any, Any]) -> tuple[Turns, Turns] | None:
    """Prompt and answers as lists of texts, one for each exchange (lmsys-arena-human-preference-55k)."""
    asked, *answered = (_texts(value) for value in (row.get("prompt"), *answers))
    if asked is None or answered == [None, None]:
        return None
    if any(texts is None or len(texts) != len(asked) for texts in answered):
        raise BadRow("prompt", f"lists {len(asked)} questions, and not each side has as many answers")
    if any(None in texts for texts in (asked, *answered) if texts is not None):
        raise Untrainable(_NO_TEXT)
    first, second = (
        [
            {"role": role, "content": text}
            for exchange in zip(asked, texts or [], strict=True)
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        for texts in answered
    )
    return first, second


_NO_TEXT = "a question or an answer in the lists of a row is missing (null)"


def _texts(value: Any) -> list[str | None] | None:
    """The texts, some perhaps missing, of a list or a text that writes one; None of anything else."""
    if isinstance(value, str):
        return list_of_texts(value)
    is_list = isinstance(value, list) and value and all(isinstance(item, str | None) for item in value)
    return list(value) if is_list else None
