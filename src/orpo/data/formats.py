"""The formats in which preference data is published: how each is recognised and how its rows are read.

`FORMATS` is the only list of them; a new format is one entry there. Sides are either plain text (no chat
template will be used) or messages. A row that does not fit the format of its data set is malformed
(`BadRow`); it is never read as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orpo.data import pairwise, ranked, turn_markers
from orpo.data.messages import (
    ROLES,
    BadRow,
    Turns,
    alternatives,
    kind,
    number_of,
    text_of,
    turns_of,
    with_system,
)
from orpo.data.questions import asked_in, check_asked, instruction, is_transcript, transcript
from orpo.data.rows import ORIGIN, Row
from orpo.data.sides import Sides, goes_on, pair_up, part


def _has_texts(row: Row, *names: str) -> bool:
    return all(kind(row.get(name)) == "text" for name in names)


def _sides(row: Row) -> tuple[str, list[str]]:
    """The texts of `chosen` and of every `rejected`; none in an SFT-only row."""
    chosen, rejected = text_of(row, "chosen"), row.get("rejected")
    if rejected is None:
        return chosen, []
    return chosen, [
        text_of({"rejected": answer}, "rejected") for answer in alternatives(rejected, "rejected")
    ]


# ------------------------------------------------------------------------------------------------ messages


def _has_history(row: Row) -> bool:
    """Whether a list of messages is what the sides answer, not one more copy of them (UltraFeedback)."""
    if kind(_history(row)) != "messages":
        return False
    chosen, rejected, prompt = (kind(row.get(name)) for name in ("chosen", "rejected", "prompt"))
    if chosen != "messages" or rejected not in ("messages", "conversations", "null"):
        return True
    first = row["chosen"][0]
    return prompt == "null" and ROLES.get(str(first.get("role") or first.get("from")).lower()) == "assistant"


def _history(row: Row) -> object:
    return row["messages"] if row.get("messages") is not None else row.get("conversations")


def _is_sharegpt(row: Row) -> bool:
    return _has_history(row) and "from" in _history(row)[0]  # type: ignore[index]


def _read_messages(row: Row) -> list[Sides]:
    history = with_system(row, turns_of(_history(row), "messages"))
    if row.get("chosen") is not None:
        return pair_up(history, row["chosen"], row.get("rejected"))
    if not history:
        raise BadRow("messages", "is empty")
    # Without a chosen column the conversation holds the chosen answer as its last turn.
    return pair_up(history[:-1], [history[-1]], row.get("rejected"))


def _has_message_sides(row: Row) -> bool:
    chosen, rejected = kind(row.get("chosen")), kind(row.get("rejected"))
    return chosen in ("messages", "message") or rejected in ("messages", "message", "conversations")


def _is_conversational(row: Row) -> bool:
    prompt = kind(row.get("prompt"))
    if _has_message_sides(row):
        return prompt != "null"
    return prompt == "messages" and kind(row.get("chosen")) == "text"


def _read_conversational(row: Row) -> list[Sides]:
    prompt = row.get("prompt")
    if prompt is None:
        raise BadRow("prompt", "is missing")
    if not isinstance(prompt, str):
        return _conversations(row, turns_of(prompt, "prompt"))
    rejected = alternatives(row.get("rejected"), "rejected")
    sides = [("chosen", row.get("chosen")), *(("rejected", answer) for answer in rejected)]
    whole = [(field, turns) for field, side in sides if (turns := _whole(side, field))]
    for field, turns in whole:
        check_asked(prompt, turns, field, _UNASKED)
    is_whole = any(field == "chosen" for field, _ in whole)
    return _conversations(row, [] if is_whole else [{"role": "user", "content": prompt}])


_UNASKED = "fix the row or set data_format: conversational_implicit, which reads no prompt column,"


def _whole(side: object, field: str) -> Turns | None:
    """The turns of a side that is a whole conversation; None of an answer alone."""
    turns = turns_of(side, field) if kind(side) == "messages" else None
    return turns if turns and turns[0]["role"] != "assistant" else None


def _is_conversational_implicit(row: Row) -> bool:
    return _has_message_sides(row) and kind(row.get("prompt")) == "null"


def _read_conversational_implicit(row: Row) -> list[Sides]:
    return _conversations(row, [])


def _conversations(row: Row, history: Turns) -> list[Sides]:
    found = pair_up(history, row.get("chosen"), row.get("rejected"))
    return [sides._replace(prompt=with_system(row, sides.prompt)) for sides in found]  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- texts that become messages


def _is_hh(row: Row) -> bool:
    if kind(row.get("prompt")) not in ("text", "null"):
        return False
    texts = [row.get("chosen"), row.get("prompt")]
    return _has_texts(row, "chosen") and any(is_transcript(text) for text in texts if text is not None)


def _read_hh(row: Row) -> list[Sides]:
    def whole(field: str, answer: str) -> Turns:
        return with_system(row, said(field, answer))

    def said(field: str, answer: str) -> Turns:
        if row.get("prompt") is None or is_transcript(answer):
            turns = transcript(answer, field)
            if row.get("prompt") is not None:
                check_asked(text_of(row, "prompt"), turns, field)
            return turns
        return [*asked_in(text_of(row, "prompt")), {"role": "assistant", "content": answer.strip()}]

    text, others = _sides(row)
    chosen = whole("chosen", text)
    if not others:
        return [Sides(chosen[:-1], chosen[-1:], None)]
    return [part(chosen, whole("rejected", other)) for other in others]


def _is_instruction(row: Row) -> bool:
    if row.get("prompt") is not None:
        return _has_texts(row, "prompt", "chosen") and (row.get("system") is not None or _has_exchanges(row))
    if not _has_texts(row, "instruction"):
        return False
    if kind(row.get("output")) == "texts" and row.get("chosen") is None:
        return not ranked.unknown_numbers(row, ranked.answer_list(row))
    return _has_texts(row, "chosen") or _has_texts(row, "output")


def _has_exchanges(row: Row) -> bool:
    return isinstance(row.get("history"), list) and bool(row["history"])


def _read_instruction(row: Row) -> list[Sides]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    output = row.get("output") if chosen is None else None
    if kind(output) == "texts":
        chosen, *others = output  # type: ignore[misc]
        rejected = others or None
    elif rejected is None and isinstance(output, str):
        chosen = output
    elif isinstance(output, str):
        raise BadRow("chosen", "is missing", "set columns: {chosen: output} if that is the good answer")
    if kind(chosen) == "text" and rejected is not None:
        for answer in alternatives(rejected, "rejected"):
            text_of({"rejected": answer}, "rejected")
    return pair_up(instruction(row), chosen, rejected)


# ---------------------------------------------------------------------------------------------- plain texts


def _is_rendered(row: Row) -> bool:
    asked = row.get("prompt") if row.get("prompt") is not None else row.get("instruction")
    if not isinstance(asked, str) or not _has_texts(row, "chosen"):
        return False
    chosen, rejected = row["chosen"], row.get("rejected")
    if turn_markers.is_rendered(chosen) or turn_markers.is_conversation(chosen):
        return True
    other = rejected if isinstance(rejected, str) else chosen
    shared = chosen[: common_words(chosen, other)]
    repeats = bool(asked.strip()) and asked.strip() in shared and not chosen.startswith(asked)
    return repeats and not is_transcript(chosen)


def _read_rendered(row: Row) -> list[Sides]:
    asked = text_of(row, "prompt" if row.get("prompt") is not None else "instruction")
    text, others = _sides(row)
    chosen = _rendered_whole(asked, text, "chosen")
    if not others:
        cut = turn_markers.answer_begins(chosen)
        found = [Sides(chosen[:cut], chosen[cut:], None)]
    else:
        wholes = [_rendered_whole(asked, other, "rejected") for other in others]
        found = []
        for rejected in wholes:
            cut = turn_markers.answer_begins(chosen, _shared_length(chosen, rejected))
            found.append(Sides(chosen[:cut], chosen[cut:], rejected[cut:]))
    for prompt, best, *_ in found:
        if not prompt or turn_markers.asks(str(best)):
            raise BadRow(
                "chosen", "is rendered already, and nothing shows where its answer begins", _UNRENDER
            )
        if asked.split() and " ".join(asked.split()) not in " ".join(str(prompt).split()):
            raise BadRow(
                "chosen", "is rendered already, and with another question than the prompt", _UNRENDER
            )
    return found


_UNRENDER = "give the rows as they were before the chat template"


def _rendered_whole(asked: str, side: str, field: str) -> str:
    """The whole text of a side: as it stands, or behind the rendered prompt without a second header."""
    if turn_markers.is_conversation(side) or asked.strip() in side:
        return side
    if not turn_markers.asks(asked):
        raise BadRow(field, "is rendered already, unlike the prompt", _UNRENDER)
    return asked + (turn_markers.without_header(side) if turn_markers.ends_with_header(asked) else side)


def _shared_length(one: str, other: str) -> int:
    shortest = min(len(one), len(other))
    return next((i for i in range(shortest) if one[i] != other[i]), shortest)


def _is_standard_implicit(row: Row) -> bool:
    return (
        _has_texts(row, "chosen", "rejected")
        and row.get("prompt") is None
        and common_words(row["chosen"], row["rejected"]) > 0
    )


def _read_standard_implicit(row: Row) -> list[Sides]:
    chosen, others = _sides(row)
    if not others:
        raise BadRow(
            "rejected", "is missing, so that nothing tells prompt and answer apart", "add a prompt column"
        )
    result = []
    for rejected in others:
        cut = common_words(chosen, rejected)
        if turn_markers.asks(chosen[cut:]) or _answers_later(chosen, cut):
            raise BadRow("chosen", "is rendered already, and parts before its last turn", _UNRENDER)
        result.append(Sides(chosen[:cut], chosen[cut:], rejected[cut:]))
    return result


def _answers_later(chosen: str, cut: int) -> bool:
    return turn_markers.is_in_tokens(chosen) and turn_markers.answer_begins(chosen) > cut


_UNBREAKABLE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def common_words(one: str, other: str) -> int:
    """Length of the common beginning of two texts without a prompt of their own, cut where no word is split.

    Where the beginning holds the header of an answer (`<|assistant|>`, `[/INST]`, or `Answer:` where no such
    tokens begin turns), it ends with the last one; else at the last border between words. Blanks go with what
    follows, line ends with what precedes.
    """
    limit = _shared_length(one, other)
    if header := turn_markers.answer_begins(one, limit):
        return header
    inside = {
        position
        for text in (one, other)
        for match in _UNBREAKABLE.finditer(text, max(0, limit - 64))
        for position in range(match.start() + 1, match.end())
    }
    while limit > 0 and (limit in inside or not (_parts_words(one, limit) and _parts_words(other, limit))):
        limit -= 1
    return limit


def _parts_words(text: str, index: int) -> bool:
    """Whether a prompt may end here: between words, something left to answer."""
    before, after = text[index - 1], text[index : index + 1]
    if before == " " or after == "\n" or not text[index:].strip():
        return False
    return not (_in_word(before) and _in_word(after))


def _in_word(character: str) -> bool:
    return character.isalnum() or character in "_'\u2019"


def is_standard_repeated(row: Row) -> bool:
    """Whether a row of texts speaks for sides that begin with the prompt."""
    if not has_text_sides(row) or not row["prompt"]:
        return False
    sides = [row["chosen"], *alternatives(row["rejected"], "rejected")]
    return all(goes_on(row["prompt"], side) for side in sides)


def has_text_sides(row: Row) -> bool:
    """Whether prompt and both sides are texts, of the rejected ones one or several."""
    return _has_texts(row, "prompt", "chosen") and kind(row.get("rejected")) in ("text", "texts")


def _read_standard_repeated(row: Row) -> list[Sides]:
    result = []
    for prompt, chosen, rejected, _ in _read_standard(row):
        assert isinstance(prompt, str)
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            if side is not None and not side.startswith(prompt):  # type: ignore[union-attr]
                raise BadRow(
                    field,
                    "does not begin with the prompt, as those of most rows do",
                    "fix the row, or set data_format: standard to take all sides as they are,",
                )
        cut = None if rejected is None else rejected[len(prompt) :]
        result.append(Sides(prompt, chosen[len(prompt) :], cut))
    return result


def _is_standard(row: Row) -> bool:
    return _has_texts(row, "prompt", "chosen")


def _read_standard(row: Row) -> list[Sides]:
    for name, is_there in (("system", bool(row.get("system"))), ("history", _has_exchanges(row))):
        if is_there:
            raise BadRow(
                name,
                "would be left out: the rows that tell the format are texts without it",
                "set data_format: instruction",
            )
    for name in ("prompt", *_SIDE_NAMES):
        if isinstance(row.get(name), str) and is_transcript(row[name]):
            raise BadRow(
                name,
                "is a transcript with 'Human:' and 'Assistant:', unlike the rows that tell the format",
                "write it as they are, or set data_format: standard to take it as it is,",
            )
    return _read_as_standard(row)


_SIDE_NAMES = ("chosen", "rejected")


def _read_as_standard(row: Row) -> list[Sides]:
    prompt = text_of(row, "prompt")
    chosen, others = _sides(row)
    if not others:
        return [Sides(prompt, chosen, None)]
    return [Sides(prompt, chosen, rejected) for rejected in others]


# ------------------------------------------------------------------------------------------------- prepared


def _is_prepared(row: Row) -> bool:
    return isinstance(row.get(ORIGIN), str)


def _read_prepared(row: Row) -> list[Sides]:
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    scores = [number_of(row.get(name)) for name in ("score_chosen", "score_rejected")]
    both = None if None in scores else (scores[0], scores[1])
    if isinstance(prompt, str):
        text = None if rejected is None else text_of(row, "rejected")
        return [Sides(prompt, text_of(row, "chosen"), text, both)]  # type: ignore[arg-type]
    answer = None if rejected is None else turns_of(rejected, "rejected")
    return [Sides(turns_of(prompt, "prompt"), turns_of(chosen, "chosen"), answer, both)]  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- registry

Reader = Callable[[Row], list[Sides]]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write preference pairs down."""

    name: str
    reason: str
    """One line: what in the data speaks for it."""
    matches: Callable[[Row], bool]
    """Whether a row, under our column names, speaks for it."""
    read: Reader
    """A row to its pairs; raises `BadRow` where it does not fit, `Untrainable` where it has no preference."""
    detail: Callable[[Row], str] | None = None
    """Of a row that matches: which columns decide."""
    problem: Callable[[Sequence[Row]], str | None] | None = None
    """Of the rows that tell the format: why they cannot be read so; None where they can."""
    yields_to: str = ""
    """Format that takes all rows where some of them match it."""
    named: Format | None = None
    """How rows are read where `data_format` names this format, if that is another way than by detection."""


_RANKED = "several answers to a prompt and what says how good each is: the best against each worse one"

# A row speaks for the first format that it matches.
FORMATS = (
    Format(
        "prepared",
        "written by orpo data prepare or subset: taken as it is",
        _is_prepared,
        _read_prepared,
    ),
    Format(
        "pairwise",
        "two answers and a label that says which is better",
        pairwise.is_pairwise,
        pairwise.read_pairwise,
        detail=pairwise.detail,
        problem=pairwise.no_signs,
    ),
    Format(
        "sharegpt",
        "a conversation of from/value turns; chosen and rejected answer it",
        _is_sharegpt,
        _read_messages,
    ),
    Format(
        "messages",
        "a list of messages; chosen and rejected answer it, or its last turn is the chosen answer",
        _has_history,
        _read_messages,
    ),
    Format(
        "conversational",
        "a prompt column, chosen and rejected are messages",
        _is_conversational,
        _read_conversational,
    ),
    Format(
        "conversational_implicit",
        "chosen and rejected are conversations: the shared turns are the prompt",
        _is_conversational_implicit,
        _read_conversational_implicit,
    ),
    Format(
        "ranked",
        _RANKED,
        ranked.is_ranked,
        ranked.read_ranked,
        detail=ranked.detail,
        named=Format(
            "ranked",
            f"as data_format says: {_RANKED}; the first is the best where nothing says so",
            ranked.is_ranked,
            ranked.read_best_first,
        ),
    ),
    Format("hh", "texts are transcripts with 'Human:' and 'Assistant:'", _is_hh, _read_hh),
    Format(
        "rendered",
        "the sides are rendered already and hold the prompt: texts, cut at the last header of an answer",
        _is_rendered,
        _read_rendered,
    ),
    Format(
        "instruction",
        "an instruction, or a prompt with a system text, and answers: made into turns",
        _is_instruction,
        _read_instruction,
    ),
    Format(
        "standard_implicit",
        "texts without a prompt column: the prompt is their common beginning",
        _is_standard_implicit,
        _read_standard_implicit,
    ),
    Format(
        "standard_repeated",
        "texts; chosen and rejected begin with the prompt",
        is_standard_repeated,
        _read_standard_repeated,
    ),
    Format(
        "standard",
        "prompt, chosen and rejected are texts",
        _is_standard,
        _read_standard,
        # What stands in front of a few prompts must not be left out; the others have nothing there.
        yields_to="instruction",
        named=Format("standard", "as data_format says", _is_standard, _read_as_standard),
    ),
)
