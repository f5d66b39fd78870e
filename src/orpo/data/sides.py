"""What a row says: a shared beginning and two ways to continue it.

Rows write this as two whole conversations, as a history and two answers, or as something in between (a prompt
that the sides repeat, with other blanks or without its system turn); here all of them become `Sides`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from orpo.data.messages import BadRow, Turns, alternatives, turns_of
from orpo.pairs import Message


class Sides(NamedTuple):
    """The shared beginning and its two continuations; `rejected` None is an SFT-only row."""

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str | None
    scores: tuple[float, float] | None = None
    """How good the row says chosen and rejected are; more is better."""


def goes_on(asked: str, answer: str) -> bool:
    """Whether an answer begins with what was asked, up to the end of a word."""
    if not answer.startswith(asked):
        return False
    around = asked[-1:] + answer[len(asked) :][:1]
    return len(around) < 2 or not (around.isascii() and around.isalnum())


def part(chosen: Turns, rejected: Turns) -> Sides:
    """Two whole conversations, cut where they part; each keeps at least its last turn."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and _same(chosen[shared : shared + 1], rejected[shared : shared + 1]):
        shared += 1
    return Sides(chosen[:shared], chosen[shared:], rejected[shared:])


def pair_up(history: Turns, chosen: object, rejected: object) -> list[Sides]:
    """A history plus one chosen and one or several rejected answers, which follow it or repeat it first."""
    said = turns_of(chosen, "chosen")
    if len(said) == 1 and len(history) > 1 and said[0]["role"] == "assistant" and _same(history[-1:], said):
        history = history[:-1]  # the conversation holds the chosen answer already
    best = _follow(history, said, "chosen")
    if rejected is None:
        _check_one_answer(said if _begins_with_answer(said) else [], "chosen")
        return [Sides(best[:-1], best[-1:], None)]
    answers = [turns_of(answer, "rejected") for answer in alternatives(rejected, "rejected")]
    if not history and _begins_with_answer(*answers) and not _begins_with_answer(best):
        history = best[:-1]  # the chosen conversation is whole, the rejected answers are not
    found = [part(best, _follow(history, answer, "rejected")) for answer in answers]
    for sides in found:
        _check_one_answer(sides.chosen, "chosen")
        _check_one_answer(sides.rejected, "rejected")
    return found


def _check_one_answer(side: object, field: str) -> None:
    """Refuse two answers in a row where the sides differ: the odds would be on the second alone.

    They may be two answers to choose from, or one in two parts; a call of a tool and its answer are one.
    """
    assert isinstance(side, list)
    for turn, following in itertools.pairwise(side):
        if turn["role"] == following["role"] == "assistant" and not (
            turn.get("tool_calls") or following.get("tool_calls")
        ):
            raise BadRow(
                field,
                "has two turns of the assistant in a row, which may be one answer or two",
                "join them, or write several rejected answers as a list of lists ([[...], [...]]),",
            )


def _begins_with_answer(*sides: Turns) -> bool:
    return all(turns and turns[0]["role"] == "assistant" for turns in sides)


def _follow(history: Turns, turns: Turns, field: str) -> Turns:
    if not history or _same(turns[: len(history)], history):
        return [*history, *turns[len(history) :]]
    if not turns or turns[0]["role"] not in ("system", "user"):
        return history + turns
    return _joined(history, turns, field)


def _joined(history: Turns, turns: Turns, field: str) -> Turns:
    """History and a side that begins with a question: it repeats the history, or follows an answer."""
    (system, asked), (own_system, said) = _without_system(history), _without_system(turns)
    if system and own_system and not _same(system, own_system):
        raise BadRow(field, "begins with another system text than the prompt")
    for start in range(len(said) - len(asked) + 1):
        end = start + len(asked)
        if _same(said[start:end], asked):
            return [*(system or own_system), *said[:start], *asked, *said[end:]]
    if asked[-1]["role"] == "assistant":
        return [*(system or own_system), *asked, *said]
    if not any(turn["role"] == "assistant" for turn in said):
        raise BadRow(field, "has no turn of the assistant, and so no answer")
    raise BadRow(field, "begins with another question than the prompt")


def _without_system(turns: Turns) -> tuple[Turns, Turns]:
    number = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:number], turns[number:]


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether turns are the same, blanks aside."""
    if some == others:
        return True
    return len(some) == len(others) and all(
        {**one, "content": one["content"].split()} == {**other, "content": other["content"].split()}
        for one, other in zip(some, others, strict=True)
    )
