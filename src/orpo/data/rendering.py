"""A preference pair as text: what the chat template writes, and where in it prompt and answers lie.

The prompt ends where the template has written the header it writes when asked for an answer; the answer ends
with the end-of-turn token, once, and nothing behind it. All positions here are characters of rendered text at
places where a message begins or ends; `tokenize` turns them into tokens and checks that they hold there too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from orpo.data.templates import ChatTemplate, prepare_template
from orpo.errors import ModelError, first_line
from orpo.pairs import Message, PreferencePair

_MARKER = "ORPO turn marker"


class Dropped(Exception):  # noqa: N818 - a verdict, not an error
    """A well-formed pair that cannot train; the message is the reason."""


class RenderedSide(NamedTuple):
    """One whole conversation as text."""

    text: str
    boundary: int
    """Where the prompt ends and the answer begins."""
    anchor: int
    """Where tokenizing may start afresh at or before the boundary: an added token begins there; or 0."""


class Rendered(NamedTuple):
    """Both sides of a pair as text."""

    sides: list[RenderedSide]
    shared: list[int]
    """Ends of messages up to which both sides are the same text, the longest first."""
    spans: list[tuple[int, int]]
    """Where the earlier assistant turns lie in the chosen side, end-of-turn tokens included."""
    notes: list[str]
    """What was done to the pair, for the table of reasons."""


class Renderer:
    """Writes pairs with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        """Keep the settings; the template is settled when the first conversation needs it.

        Args:
            tokenizer: Of the model to train; it is not changed.
            chat_template: As for `prepare_template`.
        """
        self.tokenizer = tokenizer
        self._chat_template = chat_template

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template in use."""
        return prepare_template(self.tokenizer, self._chat_template)

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of special and other added tokens: what may end a turn."""
        return frozenset({*self.tokenizer.added_tokens_decoder, *self.tokenizer.all_special_ids})

    @cached_property
    def _added_texts(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self.added)))

    def render(self, pair: PreferencePair) -> Rendered:
        """Write a pair.

        Raises:
            Dropped: The template refuses it, or shows no boundary.
            ModelError: Nothing could end an answer.
        """
        if isinstance(pair.prompt, str):
            answers = [answer for answer in (pair.chosen, pair.rejected) if isinstance(answer, str)]
            sides = [RenderedSide(pair.prompt + self._end(answer), len(pair.prompt), 0) for answer in answers]
            return Rendered(sides, [len(pair.prompt)], [], [])
        try:
            return _PairRenderer(self, pair).render()
        except (Dropped, ModelError):
            raise
        except Exception as error:  # templates raise whatever they like
            raise Dropped(f"the chat template refuses the row: {first_line(error)}") from error

    def turns(self, turns: Sequence[Message], tools: list[Any] | None, *, ask: bool) -> str:
        """A conversation as the template writes it; `ask` adds the header after which the model answers."""
        try:
            return self.template.render(self.tokenizer, turns, tools, ask=ask)
        except Exception:
            if not any("tool_calls" in turn for turn in turns):
                raise
        # Some templates join the arguments of a call as text, where most expect an object.
        return self.template.render(
            self.tokenizer, [_with_text_arguments(turn) for turn in turns], tools, ask=ask
        )

    def finish(self, text: str) -> str:
        """A rendered conversation, cut behind the end-of-turn token of its last turn."""
        template = self.template
        if text.endswith(template.suffix):
            return text[: len(text) - len(template.suffix)] + template.end
        return self._end(text)

    def _end(self, text: str) -> str:
        """Text with its end token: the one it was written with, else the usual one."""
        bare = text.rstrip()
        if bare.endswith(self._added_texts):
            return bare
        if self.tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token"
            )
        return text + str(self.tokenizer.eos_token)


class _PairRenderer:
    """One conversational pair."""

    def __init__(self, renderer: Renderer, pair: PreferencePair):
        assert not isinstance(pair.prompt, str)
        self.renderer = renderer
        self.template = renderer.template
        self.pair = pair
        self.prompt: list[Message] = pair.prompt
        self.answers: list[list[Message]] = [
            list(answer)
            for answer in (pair.chosen, pair.rejected)
            if answer is not None and not isinstance(answer, str)
        ]
        self.notes: list[str] = []

    def render(self) -> Rendered:
        if self.pair.tools and self.template.ignores_tools:
            self.notes.append("the chat template does not write the tools")
        if self.template.folds_system and self.prompt and self.prompt[0]["role"] == "system":
            self.notes.append("the chat template has no system turn: its text opens the first user turn")
        sides = [self._side(answer) for answer in self.answers]
        if any(len(answer) > 1 for answer in self.answers):
            shared = self._shared(sides)
        else:
            # The prompt is the same text on both sides, so where it ends must be too.
            boundary = min(side.boundary for side in sides)
            sides = [side._replace(boundary=boundary, anchor=min(side.anchor, boundary)) for side in sides]
            shared = [boundary]
        return Rendered(sides, shared, self._spans(sides[0]), self.notes)

    def _turns(self, turns: Sequence[Message], *, ask: bool) -> str:
        return self.renderer.turns(turns, self.pair.tools, ask=ask)

    def _try_turns(self, turns: Sequence[Message], *, ask: bool) -> str | None:
        """None where the template refuses a conversation that breaks off here."""
        try:
            return self._turns(turns, ask=ask)
        except Exception:
            return None

    # -------------------------------------------------------------------------------------- prompt and answer

    def _side(self, answer: list[Message]) -> RenderedSide:
        before, last = [*self.prompt, *answer[:-1]], self._bare(answer[-1])
        asked = self._turns(before, ask=True)
        text = self.renderer.finish(self._turns([*before, last], ask=False))
        boundary = len(asked) if text.startswith(asked) else self._boundary(before, asked, text)
        anchor = max((text.rfind(token, 0, boundary) for token in self.template.anchors), default=0)
        return RenderedSide(text, boundary, max(anchor, 0))

    def _bare(self, last: Message) -> Message:
        """The answer without an end-of-turn token of its own: the template writes it."""
        content, end = last["content"], self.template.end_token
        while content.rstrip().endswith(end):
            content = content.rstrip().removesuffix(end)
            self.notes.append(f"{end} at the end of an answer: not repeated")
        return {**last, "content": content}

    def _boundary(self, before: list[Message], asked: str, text: str) -> int:
        """Where the prompt ends if the template writes another header when asked than before an answer.

        The last place up to which both agree and at which something begins: the answer's content, a line of
        its header, or the header.
        """
        agree = common(asked, text)
        marked = self._turns([*before, {"role": "assistant", "content": _MARKER}], ask=False)
        header = len(self._try_turns(before, ask=False) or "")
        line = marked.rfind("\n", header, common(asked, marked)) + 1
        places = [marked.find(_MARKER), line, header]
        fitting = [place for place in places if 0 < place <= agree and text[:place] == marked[:place]]
        if not fitting:
            raise Dropped("no boundary: the chat template writes the prompt differently once it is answered")
        self.notes.append("the prompt ends before the header the chat template writes when asked")
        return max(fitting)

    def _shared(self, sides: list[RenderedSide]) -> list[int]:
        """Where both conversations could be cut, if they part before the last turn."""
        ends = []
        for place in range(len(self.prompt), 0, -1):
            next_turns = [[*self.prompt, *answer][place] for answer in self.answers]
            asks = (True, False) if all(turn["role"] == "assistant" for turn in next_turns) else (False,)
            for text in (self._try_turns(self.prompt[:place], ask=ask) for ask in asks):
                if text and all(side.text.startswith(text) for side in sides):
                    ends.append(len(text))
        if not ends:
            raise Dropped("no boundary: the sides share no whole message once rendered")
        return ends

    # -------------------------------------------------------------------------------------- earlier answers

    def _spans(self, side: RenderedSide) -> list[tuple[int, int]]:
        turns = [*self.prompt, *self.answers[0][:-1]]
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not places:
            return []
        text = side.text[: side.boundary]
        spans = self._spans_at_once(turns, places, text)
        if spans is None:
            found = [self._span(turns, place, text) for place in places]
            spans = [span for span in found if span is not None]
            if len(spans) < len(places):
                self.notes.append(
                    "an earlier answer was not found in the rendering: not part of nll_on: assistant"
                )
        return spans

    def _spans_at_once(
        self, turns: list[Message], places: list[int], text: str
    ) -> list[tuple[int, int]] | None:
        """From one rendering with a marker for every answer; None if the text does not match it."""
        if any(set(turns[place]) > {"role", "content"} for place in places):
            return None
        marked = [{**turn, "content": _MARKER} if turn["role"] == "assistant" else turn for turn in turns]
        first, *pieces = self._turns(marked, ask=True).split(_MARKER)
        if len(pieces) != len(places):
            return None
        pieces[-1] = pieces[-1][: len(text)]
        spans, position, end = [], len(first), self.template.end
        for place, piece in zip(places, pieces, strict=True):
            content = turns[place]["content"]
            last = place == places[-1]
            said = next(
                (one for one in (content, content.strip()) if _goes_on(text, position, one, piece, last)),
                None,
            )
            if said is None:
                return None
            stop = position + len(said)
            spans.append((position, stop + (len(end) if text.startswith(end, stop) else 0)))
            position = stop + len(piece)
        return spans if text.startswith(first) else None

    def _span(self, turns: list[Message], place: int, text: str) -> tuple[int, int] | None:
        """One answer: from the end of the conversation before it, when asked, to its end when answered."""
        before = self._try_turns(turns[:place], ask=True)
        after = self._try_turns(turns[: place + 1], ask=False)
        if before is not None and after is not None:
            after = self.renderer.finish(after)
            if text.startswith(before) and text.startswith(after):
                return len(before), len(after)
        marked = self._try_turns(
            [*turns[:place], {"role": "assistant", "content": _MARKER}, *turns[place + 1 :]], ask=True
        )
        first, _, rest = (marked or "").partition(_MARKER)
        if rest and text.startswith(first) and (stop := text.find(rest[: len(text)], len(first))) >= 0:
            end = self.template.end
            return len(first), stop + (len(end) if text.startswith(end, stop) else 0)
        return None


def _goes_on(text: str, position: int, content: str, piece: str, last: bool) -> bool:
    """Whether the text has this content here, then the template's piece (the boundary may cut it short)."""
    if not text.startswith(content, position):
        return False
    rest = text[position + len(content) :]
    return piece.startswith(rest) if last and len(rest) < len(piece) else rest.startswith(piece)


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _with_text_arguments(turn: Message) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}
