"""The formats in which preference data is published: how each is recognised and how its rows are read.

`FORMATS` is the only list of them; a new format is one entry there. Sides are either plain text (no chat
template will be used) or messages. A row that does not fit the format of its data set is malformed
(`BadRow`); it is never read as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from orpo.data.messages import ROLES, BadRow, Turns, alternatives, kind, text_of, turns_of, with_system
from orpo.data.rows import Row

HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Sides(NamedTuple):
    """What a row says: the shared beginning and the two ways to go on; `rejected` None is an SFT-only row."""

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str | None


def _part(chosen: Turns, rejected: Turns) -> Sides:
    """Two whole conversations, cut where they part; each keeps at least its last turn."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and chosen[shared] == rejected[shared]:
        shared += 1
    return Sides(chosen[:shared], chosen[shared:], rejected[shared:])


def _pair_up(history: Turns, row: Row) -> list[Sides]:
    """History plus `chosen` and one or several `rejected`, whose turns follow it (or repeat it first)."""

    def follow(answer: object, field: str) -> Turns:
        turns = turns_of(answer, field)
        if turns and turns[0]["role"] == "system" and history and history[0]["role"] == "system":
            return turns if len(turns) > 1 else history
        return turns if history and turns[: len(history)] == history else history + turns

    chosen = follow(row.get("chosen"), "chosen")
    rejected = row.get("rejected")
    if rejected is None:
        return [Sides(chosen[:-1], chosen[-1:], None)]
    return [_part(chosen, follow(answer, "rejected")) for answer in alternatives(rejected, "rejected")]


def _read_standard(row: Row) -> list[Sides]:
    prompt, chosen = text_of(row, "prompt"), text_of(row, "chosen")
    if row.get("rejected") is None:
        return [Sides(prompt, chosen, None)]
    answers = alternatives(row["rejected"], "rejected")
    return [Sides(prompt, chosen, text_of({"rejected": answer}, "rejected")) for answer in answers]


def _read_standard_repeated(row: Row) -> list[Sides]:
    result = []
    for prompt, chosen, rejected in _read_standard(row):
        assert isinstance(prompt, str)
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            if side is not None and not side.startswith(prompt):  # type: ignore[union-attr]
                raise BadRow(field, "does not begin with the prompt, as the other rows do")
        cut = None if rejected is None else rejected[len(prompt) :]
        result.append(Sides(prompt, chosen[len(prompt) :], cut))
    return result


def _read_standard_implicit(row: Row) -> list[Sides]:
    chosen = text_of(row, "chosen")
    if row.get("rejected") is None:
        raise BadRow(
            "rejected", "is missing, so that nothing tells prompt and answer apart", "add a prompt column"
        )
    result = []
    for answer in alternatives(row["rejected"], "rejected"):
        rejected = text_of({"rejected": answer}, "rejected")
        cut = common_words(chosen, rejected)
        result.append(Sides(chosen[:cut], chosen[cut:], rejected[cut:]))
    return result


# Where a rendered prompt ends: the headers after which models answer.
_HEADER = re.compile(
    r"<\|im_start\|>assistant\n|<\|assistant\|>\n?|<start_of_turn>model\n|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|### (?:Response|Assistant|Answer):\n?"
    r"|\b(?:ASSISTANT|Assistant|Answer):"
)
_UNBREAKABLE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def common_words(one: str, other: str) -> int:
    """Length of the common beginning of two texts without a prompt of their own, cut where no word is split.

    Where the beginning holds the header of an answer (`<|assistant|>`, `[/INST]`, `Answer:`), it ends with
    the last one; else at the last border between words. Blanks go with what follows, line ends with what
    precedes.
    """
    limit = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    headers = [match.end() for match in _HEADER.finditer(one, 0, limit)]
    if headers:
        return headers[-1]
    inside = {
        position
        for text in (one, other)
        for match in _UNBREAKABLE.finditer(text, max(0, limit - 64))
        for position in range(match.start() + 1, match.end())
    }

    while limit > 0 and (limit in inside or not (_parts_words(one, limit) and _parts_words(other, limit))):
        limit -= 1
    return limit


def _parts_words(text: str, place: int) -> bool:
    """Whether a prompt may end here: between words, something left to answer."""
    before, after = text[place - 1], text[place : place + 1]
    if before == " " or after == "\n" or not text[place:].strip():
        return False
    return not (_in_word(before) and _in_word(after))


def _in_word(character: str) -> bool:
    return character.isalnum() or character in "_'\u2019"


def _read_conversational(row: Row) -> list[Sides]:
    prompt = row.get("prompt")
    if prompt is None:
        raise BadRow("prompt", "is missing")
    if isinstance(prompt, str):
        first = row.get("chosen")
        whole = kind(first) == "messages" and turns_of(first, "chosen")[0]["role"] != "assistant"
        prompt_turns = [] if whole else [{"role": "user", "content": prompt}]
    else:
        prompt_turns = turns_of(prompt, "prompt")
    return [_add_system(row, sides) for sides in _pair_up(prompt_turns, row)]


def _add_system(row: Row, sides: Sides) -> Sides:
    prompt = sides.prompt
    assert not isinstance(prompt, str)
    return sides._replace(prompt=with_system(row, prompt))


def _read_conversational_implicit(row: Row) -> list[Sides]:
    return [_add_system(row, sides) for sides in _pair_up([], row)]


def _transcript(text: str, field: str) -> Turns:
    pieces = HH_TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRow(field, "is no transcript: it does not begin with 'Human:'", "set data_format: standard")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _asked(text: str) -> Turns:
    """A transcript up to the answer that is asked for."""
    turns = _transcript(text, "prompt")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def _read_hh(row: Row) -> list[Sides]:
    def whole(field: str, answer: str) -> Turns:
        if row.get("prompt") is None or answer.startswith(text_of(row, "prompt")):
            return _transcript(answer, field)
        return [*_asked(text_of(row, "prompt")), {"role": "assistant", "content": answer.strip()}]

    chosen = whole("chosen", text_of(row, "chosen"))
    if row.get("rejected") is None:
        return [Sides(chosen[:-1], chosen[-1:], None)]
    answers = alternatives(row["rejected"], "rejected")
    return [_part(chosen, whole("rejected", text_of({"rejected": answer}, "rejected"))) for answer in answers]


def _instruction(row: Row) -> Turns:
    text = text_of(row, "instruction" if row.get("instruction") is not None else "prompt")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("input", f"is a {type(extra).__name__}, not text")
    earlier: Turns = []
    for exchange in row.get("history") or []:
        if kind(exchange) != "texts" or len(exchange) != 2:
            raise BadRow("history", "is not a list of [question, answer]")
        earlier += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    asked = f"{text}\n\n{extra}" if extra else text
    return with_system(row, [*earlier, {"role": "user", "content": asked}])


def _read_instruction(row: Row) -> list[Sides]:
    output = row.get("output")
    if row.get("chosen") is None and kind(output) == "texts":
        best, *others = output  # type: ignore[misc]
        row = {**row, "chosen": best, "rejected": others or None}
    elif row.get("chosen") is None and row.get("rejected") is None and isinstance(output, str):
        row = {**row, "chosen": output}
    if kind(row.get("chosen")) == "text" and row.get("rejected") is not None:
        for answer in alternatives(row["rejected"], "rejected"):
            text_of({"rejected": answer}, "rejected")
    return _pair_up(_instruction(row), row)


def _read_messages(row: Row) -> list[Sides]:
    turns = turns_of(row.get("messages", row.get("conversations")), "messages")
    history = with_system(row, turns)
    if row.get("chosen") is not None:
        return _pair_up(history, row)
    if not history:
        raise BadRow("messages", "is empty")
    # Without a chosen column the conversation holds the chosen answer as its last turn.
    return _pair_up(history[:-1], {**row, "chosen": [history[-1]]})


def _answer_text(answer: object) -> object:
    if isinstance(answer, Mapping) and kind(answer) != "message":
        for field in ("response", "answer", "content", "text", "completion", "output"):
            if isinstance(answer.get(field), str):
                return answer[field]
        raise BadRow("answers", "has an entry without a response")
    return answer


def _answer_score(answer: object) -> float | None:
    if isinstance(answer, Mapping):
        for field in ("score", "overall_score", "rating", "reward"):
            if isinstance(answer.get(field), int | float):
                return float(answer[field])
        if isinstance(answer.get("rank"), int | float):
            return -float(answer["rank"])
    return None


def _read_ranked(row: Row) -> list[Sides]:
    """The best answer against each that is strictly worse; a list without scores is ranked best first."""
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise BadRow("answers", "is missing or empty")
    scores: list[Any] = (
        row["scores"] if row.get("scores") is not None else [_answer_score(one) for one in answers]
    )
    if all(score is None for score in scores):
        scores = [-float(place) for place in range(len(answers))]
    if len(scores) != len(answers) or not all(isinstance(score, int | float) for score in scores):
        raise BadRow("scores", "does not give one number for each answer")
    texts = [_answer_text(answer) for answer in answers]
    best = max(range(len(scores)), key=lambda place: scores[place])
    worse = sorted((i for i in range(len(scores)) if scores[i] < scores[best]), key=lambda i: -scores[i])
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        history = with_system(row, turns_of(prompt, "prompt"))
    elif isinstance(prompt, str) and HH_TURN.match(prompt):
        history = _asked(prompt)
    else:
        history = _instruction(row)
    if not worse:
        return _pair_up(history, {"chosen": texts[best], "rejected": texts[best]})
    return [
        sides for i in worse for sides in _pair_up(history, {"chosen": texts[best], "rejected": texts[i]})
    ]


def _has_history(row: Row) -> bool:
    """Whether a list of messages is what the sides answer, not one more copy of them (UltraFeedback)."""
    if row.get("messages") is None and row.get("conversations") is None:
        return False
    chosen, rejected, prompt = (kind(row.get(name)) for name in ("chosen", "rejected", "prompt"))
    if chosen != "messages" or rejected not in ("messages", "conversations", "null"):
        return True
    first = row["chosen"][0]
    return prompt == "null" and ROLES.get(str(first.get("role") or first.get("from")).lower()) == "assistant"


def _is_sharegpt(row: Row) -> bool:
    turns = row.get("messages", row.get("conversations"))
    return _has_history(row) and kind(turns) == "messages" and "from" in turns[0]  # type: ignore[index]


def _is_messages(row: Row) -> bool:
    turns = row.get("messages", row.get("conversations"))
    return _has_history(row) and kind(turns) == "messages" and "from" not in turns[0]  # type: ignore[index]


def _has_message_sides(row: Row) -> bool:
    chosen, rejected = kind(row.get("chosen")), kind(row.get("rejected"))
    return chosen in ("messages", "message") or rejected in ("messages", "message", "conversations")


def _is_conversational(row: Row) -> bool:
    prompt = kind(row.get("prompt"))
    if _has_message_sides(row):
        return prompt != "null"
    return prompt == "messages" and kind(row.get("chosen")) == "text"


def _is_conversational_implicit(row: Row) -> bool:
    return _has_message_sides(row) and kind(row.get("prompt")) == "null"


def _is_ranked(row: Row) -> bool:
    return kind(row.get("answers")) in ("texts", "records", "messages")


def _is_instruction(row: Row) -> bool:
    if kind(row.get("instruction")) == "text":
        return kind(row.get("chosen")) == "text" or kind(row.get("output")) in ("text", "texts")
    return _has_texts(row, "chosen", "prompt") and row.get("system") is not None


def _has_texts(row: Row, *names: str) -> bool:
    return all(kind(row.get(name)) == "text" for name in names)


def _is_hh(row: Row) -> bool:
    if kind(row.get("chosen")) != "text" or kind(row.get("prompt")) not in ("text", "null"):
        return False
    if row.get("instruction") is not None:
        return False
    first = row["chosen"] if row.get("prompt") is None else row["prompt"]
    return HH_TURN.match(first) is not None and "Assistant:" in first


def _is_standard_implicit(row: Row) -> bool:
    return (
        _has_texts(row, "chosen", "rejected")
        and row.get("prompt") is None
        and common_words(row["chosen"], row["rejected"]) > 0
    )


def _is_standard_repeated(row: Row) -> bool:
    if not _has_texts(row, "prompt", "chosen", "rejected") or not row["prompt"]:
        return False
    return all(row[side].startswith(row["prompt"]) for side in ("chosen", "rejected"))


def _is_standard(row: Row) -> bool:
    return _has_texts(row, "prompt", "chosen")


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write preference pairs down."""

    name: str
    reason: str
    """One line: what in the data speaks for it."""
    matches: Callable[[Row], bool]
    """Whether a row, under our column names, speaks for it."""
    read: Callable[[Row], list[Sides]]
    """A row to its pairs; raises `BadRow` where it does not fit."""


# A row speaks for the first format that it matches.
FORMATS = (
    Format(
        "sharegpt",
        "a conversation of from/value turns; chosen and rejected answer it",
        _is_sharegpt,
        _read_messages,
    ),
    Format(
        "messages",
        "a list of messages; chosen and rejected answer it, or its last turn is the chosen answer",
        _is_messages,
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
        "several answers to a prompt, scored or best first: the best against each worse one",
        _is_ranked,
        _read_ranked,
    ),
    Format("hh", "texts are transcripts with 'Human:' and 'Assistant:'", _is_hh, _read_hh),
    Format(
        "instruction",
        "an instruction, or a prompt with a system text, and answers: made into turns",
        _is_instruction,
        _read_instruction,
    ),
    Format(
        "standard_implicit",
        "texts without prompt column or chat template: the prompt is their common beginning",
        _is_standard_implicit,
        _read_standard_implicit,
    ),
    Format(
        "standard_repeated",
        "texts without a chat template; chosen and rejected begin with the prompt",
        _is_standard_repeated,
        _read_standard_repeated,
    ),
    Format(
        "standard",
        "prompt, chosen and rejected are texts, used as they are, without a chat template",
        _is_standard,
        _read_standard,
    ),
)
