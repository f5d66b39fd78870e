"""What was asked: the conversation before the answers, from whichever columns hold it.

Formats whose answers stand in columns of their own (an instruction, a ranking, two answers and a label) share
this; formats with whole conversations need it no more than for the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from orpo.data.messages import BadRow, Turns, kind, text_of, turns_of, type_name, with_system
from orpo.data.rows import Row

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_HH_LINE = re.compile(r"(?:^|\n)(Human|Assistant):")
_STEERLM_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation with `Human:` and `Assistant:` at the starts of its lines."""
    pieces = _transcript_pieces(text)
    return len(pieces) >= 5 and not pieces[0].strip() and pieces[1] == "Human"


def _transcript_pieces(text: str) -> list[str]:
    """Speakers at the odd places; turns stand apart by a blank line or, where there is none, by a line."""
    pieces = _HH_TURN.split(text)
    return pieces if "Assistant" in pieces[1::2] else _HH_LINE.split(text)


def transcript(text: str, field: str) -> Turns:
    """The turns of a text with `Human:` and `Assistant:`."""
    pieces = _transcript_pieces(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRow(field, "is no transcript: it does not begin with 'Human:'", "set data_format: standard")
    return _turns(pieces)


def asked_in(text: str) -> Turns:
    """A transcript up to the answer that is asked for."""
    turns = transcript(text, "prompt")
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def check_asked(prompt: str, conversation: Turns, field: str, remedy: str = "fix the row") -> None:
    """Check that a conversation asks, before its last answer, what a prompt next to it asks.

    Raises:
        BadRow: Words of the prompt would be lost.
    """
    pieces = _transcript_pieces(prompt)
    asked = [prompt] if len(pieces) < 3 or pieces[0].strip() else pieces[2::2]
    if "".join(asked).strip() and _words(asked) not in _words(
        [turn["content"] for turn in conversation[:-1]]
    ):
        raise BadRow(field, "begins with another question than the prompt", remedy)


def _words(texts: Iterable[str]) -> str:
    return f" {' '.join(word for text in texts for word in text.split())} "


def _turns(pieces: list[str]) -> Turns:
    return [
        {"role": _ROLES[speaker], "content": words.strip()}
        for speaker, words in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def instruction(row: Row) -> Turns:
    """A prompt or an instruction, its input, the earlier exchanges and the system text, as turns."""
    text = text_of(row, "prompt" if row.get("prompt") is not None else "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("input", f"is {type_name(extra)}; expected text")
    asked = f"{text}\n\n{extra}" if extra else text
    return with_system(row, [*_exchanges(row.get("history")), {"role": "user", "content": asked}])


def _exchanges(history: object) -> Turns:
    turns: Turns = []
    if isinstance(history, str) and not history.strip():  # a blank cell of CSV
        return turns
    if kind(history) == "messages":
        return turns_of(history, "history")
    if history is not None and not isinstance(history, list):
        raise BadRow("history", f"is {type_name(history)}; expected a list of [question, answer]")
    for exchange in history or []:
        if kind(exchange) != "texts" or len(exchange) != 2:
            raise BadRow("history", "is not a list of [question, answer]")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return turns


def question(row: Row) -> Turns:
    """The turns before the answers, from whichever column holds them.

    Raises:
        BadRow: None does.
    """
    has = {name: kind(value) for name, value in row.items()}  # a look at a column is not yet a use
    for name in ("prompt", "messages", "conversations", "context"):
        if has.get(name) in ("messages", "message"):
            return with_system(row, turns_of(row[name], name))
    if has.get("prompt") == "text":
        return with_system(row, _asked_in_prompt(row))
    if has.get("info") == "other":
        return [{"role": "user", "content": _post(_mapping(row, "info"))}]
    if has.get("instruction") == "other":
        return with_system(
            row, [{"role": "user", "content": text_of(_mapping(row, "instruction"), "full_text")}]
        )
    if has.get("instruction", "null") == has.get("prompt", "null") == "null":
        for name in ("history", "context"):
            if has.get(name) == "text":
                return with_system(row, [{"role": "user", "content": row[name]}])
    return instruction(row)


def _asked_in_prompt(row: Row) -> Turns:
    prompt = text_of(row, "prompt")
    if is_transcript(prompt):
        return asked_in(prompt)
    if _STEERLM_TURN.search(prompt):
        first, *others = _STEERLM_TURN.split(prompt.removesuffix("<extra_id_1>Assistant\n"))
        return _turns(["", "User", first, *others])
    return instruction(row)


def _mapping(row: Row, name: str) -> Row:
    if not isinstance(row[name], Mapping):
        raise BadRow(name, f"is {type_name(row[name])}; expected text or an object")
    return dict(row[name])


def _post(info: Row) -> str:
    """What summarize_from_feedback had summarised, in the words that TL;DR models are trained with."""
    if info.get("article") is not None:
        return f"Article:\n{text_of(info, 'article')}\n\nTL;DR:"
    parts = [f"SUBREDDIT: r/{info['subreddit']}"] if info.get("subreddit") else []
    parts += [f"TITLE: {info['title']}"] if info.get("title") else []
    return "\n\n".join([*parts, f"POST: {text_of(info, 'post')}", "TL;DR:"])
