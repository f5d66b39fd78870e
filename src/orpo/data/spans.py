"""Where the earlier answers of a conversation lie in its text, for `nll_on: assistant`.

An earlier answer covers what it would cover as the last one: everything behind the header that asks for it,
up to its end-of-turn token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orpo.data.chat_template import ChatTemplate, common
from orpo.pairs import Message

_MARKER = "ORPO span marker"


class Render(Protocol):
    """Writes a conversation; `ask` adds the header after which the model answers."""

    def __call__(self, turns: Sequence[Message], *, ask: bool) -> str:
        """The text."""


def assistant_spans(
    render: Render, template: ChatTemplate, turns: list[Message], text: str
) -> tuple[list[tuple[int, int]], bool]:
    """Half-open ranges of the assistant turns in a text, and whether all were found.

    Args:
        render: As the text was written.
        template: What it was written with.
        turns: The conversation.
        text: As the template writes it when asked for the next answer, or a beginning of that.
    """
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not indices:
        return [], True
    finder = _Finder(render, template, turns, text)
    spans = finder.at_once(indices)
    if spans is None:
        found = [finder.one(index) for index in indices]
        spans = [span for span in found if span is not None]
    # A tool call that the template does not write leaves an end token behind, which says nothing.
    said = [span for span in spans if text[slice(*span)].removesuffix(finder.end).strip()]
    return said, len(spans) == len(indices)


class _Finder:
    """One conversation and its text."""

    def __init__(self, render: Render, template: ChatTemplate, turns: list[Message], text: str):
        self.render = render
        self.template = template
        self.turns = turns
        self.text = text
        self.end = template.earlier_end or template.end

    def at_once(self, indices: list[int]) -> list[tuple[int, int]] | None:
        """From one rendering with a marker for every answer; None if the text does not match it."""
        if any(set(self.turns[index]) > {"role", "content"} for index in indices):
            return None
        marked = [_marked(turn) if turn["role"] == "assistant" else turn for turn in self.turns]
        first, *pieces = self.render(marked, ask=True).split(_MARKER)
        if len(pieces) != len(indices) or not self.text.startswith(first):
            return None
        pieces[-1] = pieces[-1][: len(self.text)]
        spans, position, lead = [], len(first), self._lead(first)
        for index, piece in zip(indices, pieces, strict=True):
            content = self.turns[index]["content"]
            said = next(
                (
                    one
                    for one in (content, content.strip())
                    if self._continues(position, one, piece, last=index == indices[-1])
                ),
                None,
            )
            if said is None:
                return None
            stop = position + len(said)
            spans.append((position - lead, self._closed(stop)))
            position, lead = stop + len(piece), self._lead(piece)
        return spans

    def one(self, index: int) -> tuple[int, int] | None:
        """One answer: from the end of the conversation before it, when asked, to its end when answered."""
        before = self._try(self.turns[:index], ask=True)
        after = self._try(self.turns[: index + 1], ask=False)
        if before is not None and after is not None and self.text.startswith(before):
            answered = after.removesuffix(self.template.suffix)
            if len(answered) > len(before) and self.text.startswith(answered):
                return len(before), self._closed(len(answered))
        turns = [*self.turns[:index], _marked(self.turns[index]), *self.turns[index + 1 :]]
        first, _, rest = (self._try(turns, ask=True) or "").partition(_MARKER)
        if not rest or not self.text.startswith(first):
            return None
        stop = self.text.find(rest[: len(self.text)], len(first))
        unasked = common(self._try(self.turns[:index], ask=False) or "", first)
        lead = self._lead(first, max(0, unasked - len(self.template.header)))
        return (len(first) - lead, self._closed(stop)) if stop >= 0 else None

    def _lead(self, text: str, floor: int = 0) -> int:
        """How much of a text in front of an answer's content belongs to the answer: all behind its header."""
        header = self.template.header
        start = text.rfind(header, floor) if header else -1
        return len(text) - start - len(header) if start >= 0 else 0

    def _closed(self, stop: int) -> int:
        return stop + (len(self.end) if self.text.startswith(self.end, stop) else 0)

    def _continues(self, position: int, content: str, piece: str, *, last: bool) -> bool:
        """Whether the text has this content here, then the template's piece, which the last may cut short."""
        if not self.text.startswith(content, position):
            return False
        rest = self.text[position + len(content) :]
        return piece.startswith(rest) if last and len(rest) < len(piece) else rest.startswith(piece)

    def _try(self, turns: list[Message], *, ask: bool) -> str | None:
        """None where the template refuses a conversation that breaks off here."""
        try:
            return self.render(turns, ask=ask)
        except Exception:
            return None


def _marked(turn: Message) -> Message:
    return {"role": turn["role"], "content": _MARKER}
