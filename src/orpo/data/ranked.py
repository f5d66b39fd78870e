"""Several answers to a prompt and what says how good each is: the best against every strictly worse one.

A list says nothing about its order. Numbers inside or next to the answers are used where their name says what
they mean (`MEANINGS`, `number_names`), or where the recipe maps them to `scores`; a list without them is
ranked best first only where the recipe asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from orpo.data.columns import NamedRow
from orpo.data.messages import MEDIA_KEYS, BadRow, kind, number_of
from orpo.data.number_names import direction, is_measure, words_of
from orpo.data.questions import question
from orpo.data.reasoning import REASONING_KEYS
from orpo.data.rows import Row
from orpo.data.sides import Sides, pair_up
from orpo.data.verdicts import MARKS

# What a number is called -> which way it goes; the first of these that is there decides.
MEANINGS = {
    "score": 1, "overall_score": 1, "rating": 1, "overall_rating": 1, "reward": 1, "rm_score": 1,
    "pm_score": 1, "quality": 1, "rank": -1, "vote": 1, "upvote": 1, "like": 1,
    "selected": 1, "is_selected": 1, "accepted": 1, "is_accepted": 1, "chosen": 1, "is_chosen": 1, "best": 1,
    "is_best": 1, "preferred": 1, "is_preferred": 1, "correct": 1, "is_correct": 1, "is_correct_answer": 1,
}  # fmt: skip
# Columns that hold the index of the best answer, counted from 0.
_INDEX = (
    "choice", "chosen", "best_index", "best_idx", "chosen_index", "chosen_idx", "preferred_index",
    "winner_index",
)  # fmt: skip
_TEXT_KEYS = (
    "response", "answer", "content", "text", "completion", "output", "summary", "generation", "reply", "body",
)  # fmt: skip
_BESIDE_TEXT = ("tool_calls", "function_call", *REASONING_KEYS, *MARKS, *sorted(MEDIA_KEYS))
"""Keys of what belongs to an answer beside its text."""
_MESSAGE_KEYS = ("role", "from", "content", "value", "name", *_BESIDE_TEXT)


class Ranking(NamedTuple):
    """How good each answer is."""

    name: str
    """The data's name of what says so."""
    values: list[float]
    """One for each answer; more is better."""


def answer_column(row: Row) -> str | None:
    """Our name of the column that holds several answers."""
    for name in ("answers", "output"):
        if kind(dict.get(row, name)) in ("texts", "records", "messages", "conversations"):
            return name
    return None


def answer_list(row: Row) -> list[Any]:
    """The answers of a row, if it holds several."""
    name = answer_column(row)
    return [] if name is None else list(row[name])


def are_steps(answers: Sequence[Any]) -> bool:
    """Whether the texts are numbered steps of one solution and no answers of their own."""
    return len(answers) > 1 and all(
        isinstance(answer, str) and re.match(rf"\W*step {number}\b", answer, flags=re.IGNORECASE)
        for number, answer in enumerate(answers, start=1)
    )


def is_ranked(row: Row) -> bool:
    """Whether a row holds several answers and something that says how good each is."""
    answers = answer_list(row)
    sides = [dict.get(row, name) for name in ("chosen", "rejected")]
    if None not in sides and not all(_is_index(side, answers) for side in sides):
        return False
    try:
        return bool(answers) and ranking(row, answers) is not None
    except BadRow:
        return True


def detail(row: Row) -> str:
    """Which column ranks the answers."""
    found = ranking(row, answer_list(row))
    return "" if found is None else f"ranked by {found.name}"


def read_ranked(row: Row) -> list[Sides]:
    """The best answer against each that is strictly worse."""
    answers = _answers(row)
    found = ranking(row, answers)
    if found is None:
        raise BadRow("scores", "does not give one number for each answer")
    return _best_against_worse(row, answers, found.values)


def read_best_first(row: Row) -> list[Sides]:
    """The same; a list without scores is ranked by its order."""
    answers = _answers(row)
    found = ranking(row, answers)
    return _best_against_worse(
        row, answers, found.values if found else [float(-i) for i in range(len(answers))]
    )


def _answers(row: Row) -> list[Any]:
    answers = answer_list(row)
    if not answers:
        raise BadRow("answers", "is missing, empty or no list of answers")
    if are_steps(answers):
        raise BadRow("answers", "holds the steps of one solution, which are no answers of their own")
    return answers


def _best_against_worse(row: Row, answers: Sequence[Any], scores: Sequence[float]) -> list[Sides]:
    _check_keys(answers)
    texts = [_answer_text(answer) for answer in answers]
    best = max(range(len(scores)), key=lambda index: scores[index])
    worse = sorted((i for i in range(len(scores)) if scores[i] < scores[best]), key=lambda i: -scores[i])
    history = question(row)
    # Where no answer is worse, the sides are one and the same, and the pair is dropped as identical.
    return [
        sides._replace(scores=(scores[best], scores[i]))
        for i in worse or [best]
        for sides in pair_up(history, texts[best], texts[i])
    ]


def _answer_text(answer: object) -> object:
    if kind(answer) == "message":
        return {key: answer[key] for key in _MESSAGE_KEYS if key in answer}  # type: ignore[index,operator]
    if isinstance(answer, Mapping):
        text = answer[_text_key(answer)]
        beside = {key: answer[key] for key in _BESIDE_TEXT if answer.get(key) not in (None, "", [])}
        return {"role": "assistant", "content": text, **beside} if beside else text
    return answer


def _text_key(answer: Mapping[str, Any]) -> str:
    """The key of a record that holds the answer."""
    found = next((key for key in _TEXT_KEYS if isinstance(answer.get(key), str)), None)
    if found is None:
        raise BadRow("answers", "has an entry without a response")
    return found


def _check_keys(answers: Sequence[Any]) -> None:
    """Refuse records of which one holds its answer under another key than the others."""
    records = [one for one in answers if isinstance(one, Mapping) and kind(one) != "message"]
    keys = list(dict.fromkeys(map(_text_key, records)))
    if len(keys) > 1:
        raise BadRow("answers", f"has one answer in {keys[0]!r} and another in {keys[1]!r}")


def ranking(row: Row, answers: Sequence[Any]) -> Ranking | None:
    """What the row says about its answers; None where nothing with a known meaning does.

    Raises:
        BadRow: The numbers are incomplete, or several say different things.
    """
    if row.get("scores") is not None:
        return Ranking("scores", _checked(row["scores"], len(answers), "scores"))
    candidates = dict(_candidates(row, answers))
    for meaning, sign in MEANINGS.items():
        for name, values in candidates.items():
            if _bare(name) == meaning:
                return Ranking(
                    _note(row, name), [sign * value for value in _checked(values, len(answers), name)]
                )
    if (index := _index_of_best(row, answers)) is not None:
        name, best = index
        return Ranking(name, [float(i == best) for i in range(len(answers))])
    return _by_last_word(row, candidates, len(answers))


def other_best(row: NamedRow) -> str | None:
    """Which numbers say that another answer is the best; None where none do, or `columns` maps scores."""
    answers = answer_list(row)
    found = None if row.theirs("scores") != "scores" else ranking(row, answers)
    if found is None:
        return None
    for name, values in _candidates(row, answers):
        numbers = [number for value in values if (number := number_of(value)) is not None]
        sign = MEANINGS.get(_bare(name))
        if sign is None or len(numbers) != len(answers):
            continue
        signed = [sign * number for number in numbers]
        best = [value == max(found.values) for value in found.values]
        if not any(here and value == max(signed) for here, value in zip(best, signed, strict=True)):
            return f"{name} says that another answer is the best than {found.name} does, which decides"
    return None


def unread_keys(row: NamedRow) -> list[str]:
    """Keys of the answers that hold something and are neither trained nor say how good one is."""
    records = [one for one in answer_list(row) if isinstance(one, Mapping)]
    if not records:
        return []
    found = ranking(row, answer_list(row))
    read = {*row.theirs("scores").split("."), *(found.name.split(".") if found is not None else ())}
    for one in records:
        read.update(_MESSAGE_KEYS if kind(one) == "message" else (_text_key(one), *_BESIDE_TEXT))
    held = dict.fromkeys(
        key for one in records for key, value in one.items() if value not in (None, "", [], {})
    )
    return [key for key in held if key not in read and _bare(key) not in MEANINGS]


def unknown_numbers(row: Row, answers: Sequence[Any]) -> list[str]:
    """Columns with a number for each answer; for the message where none of them has a known meaning."""
    column = answer_column(row)
    return [
        name if name.partition(".")[0] in row else f"{column}.{name}"
        for name, values in _candidates(row, answers)
        if all(number_of(value) is not None for value in values)
    ]


def _by_last_word(row: Row, candidates: Mapping[str, list[Any]], number: int) -> Ranking | None:
    """`reward_model_score`, `helpfulness.Rating`: the last word says what they are, if all say the same."""
    found: dict[str, list[float]] = {}
    signs = {name: direction(words_of(name)) for name in candidates}
    for name, sign in signs.items():
        if sign is not None:
            found[name] = [sign * value for value in _checked(candidates[name], number, name)]
    if not found or _are_of_one_group([*found], [name for name, sign in signs.items() if sign is None]):
        return None
    names = list(found)
    aspects = {_group(name) for name in names}
    if len(names) > 1 and "" not in aspects and len(aspects) == 1:
        # Aspects of one annotation (helpfulness, honesty, ...): binarized UltraFeedback ranks by their mean.
        (group,) = aspects
        return Ranking(group, [sum(values) / len(names) for values in zip(*found.values(), strict=True)])
    if len({tuple(_order(values)) for values in found.values()}) > 1:
        raise BadRow(
            "answers", f"carry numbers that disagree ({', '.join(names)})", "set columns: {scores: ...}"
        )
    return Ranking(_note(row, names[0]), found[names[0]])


def _are_of_one_group(known: Sequence[str], unknown: Sequence[str]) -> bool:
    """Whether among the aspects of one annotation is one of which nobody can tell which way it goes."""
    groups = {_group(name) for name in known} - {""}
    return any(_group(name) in groups and is_measure(words_of(name)) for name in unknown)


def _group(name: str) -> str:
    """`annotations` of `annotations.helpfulness.Rating`."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _order(values: Sequence[float]) -> Iterator[tuple[bool, bool]]:
    best = max(values)
    return ((value == best, any(value < other for other in values)) for value in values)


def _note(row: Row, name: str) -> str:
    """The name; a column next to the answers is noted as read."""
    row.get(name.partition(".")[0])
    return name


def _bare(name: str) -> str:
    """`Scores` -> `score`."""
    return name.lower().removesuffix("s")


def _candidates(row: Row, answers: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Values that come one for each answer: inside the answers, in lists next to them, and inside those."""
    for path, values in _inside(answers):
        yield path, values
    for name, cells in row.items():
        if name == answer_column(row) or not isinstance(cells, list) or len(cells) != len(answers):
            continue
        if any(number_of(value) is not None for value in cells):
            yield name, cells
        for path, values in _inside(cells):
            yield f"{name}.{path}", values


def _inside(records: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Path of keys -> its value in every record, where some of these are numbers."""
    if not all(isinstance(record, Mapping) for record in records):
        return
    for path in dict.fromkeys(path for record in records for path in _leaves(record)):
        values = [_at(record, path) for record in records]
        if any(number_of(value) is not None for value in values):
            yield path, values


def _leaves(value: Mapping[str, Any], depth: int = 3) -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, Mapping) and depth > 1:
            yield from (f"{key}.{rest}" for rest in _leaves(item, depth - 1))
        elif not isinstance(item, Mapping | list):
            yield str(key)


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _checked(values: object, number: int, name: str) -> list[float]:
    numbers = [number_of(value) for value in values] if isinstance(values, list) else []
    found = [value for value in numbers if value is not None]
    if len(found) != number or len(numbers) != number:
        raise BadRow(name, "does not give one number for each answer")
    return found


def _is_index(value: Any, answers: Sequence[Any]) -> bool:
    """Whether a number, also one written as text, counts one of the answers and is none of them itself."""
    if isinstance(value, bool) or not (isinstance(value, int) or str(value).isdecimal()):
        return False
    return 0 <= int(value) < len(answers) and value not in answers


def _index_of_best(row: Row, answers: Sequence[Any]) -> tuple[str, int] | None:
    for name in _INDEX:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value < len(answers):
            last = len(answers) - 1
            raise BadRow(name, f"is {value}; expected the index of an answer, from 0 to {last}")
        if value is not None and _is_index(value, answers):
            return name, int(value)
    return None
