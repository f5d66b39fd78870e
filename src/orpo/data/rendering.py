"""A preference pair as text: what the chat template writes, and where in it prompt and answers lie.

The prompt is what inference shows: the text the template writes when asked for an answer. The answer is what
it writes behind its header once it has one, and ends with the end-of-turn token, once, and nothing behind it.
All positions here are characters of rendered text at places where a message begins or ends; `tokenize` turns
them into tokens and checks that they hold there too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any, NamedTuple

from orpo.data import turn_markers
from orpo.data.chat_template import ChatTemplate, settled, switch
from orpo.data.reasoning import (
    REASONING_KEYS,
    Block,
    begins_with_tag,
    behind_opening,
    lost,
    opened_block,
    opens_the_same,
    outside,
)
from orpo.data.spans import assistant_spans
from orpo.data.templates import prepare_template, with_arguments
from orpo.data.turn_ends import added_ids
from orpo.data.verbatim import VerbatimWriter, looks_for
from orpo.data.verdicts import MARKS, OWN_SCORES
from orpo.errors import ConfigError, ModelError, first_line
from orpo.pairs import Message, PreferencePair

_MARKER = "ORPO turn marker"
_FIRST = re.compile(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\]|\S+)")
"""The first tag or word of a header."""
_NO_BOUNDARY = (
    "no boundary: the chat template writes the prompt differently once it is answered; "
    "give another chat_template"
)
_HANDLED = frozenset({"role", "content", "tool_calls", "tool_call_id", *MARKS, *OWN_SCORES})
"""Keys of turns that need no note here: they are written, or counted when rows are read."""
_OF_ANSWERS = _HANDLED | set(REASONING_KEYS)
"""The same of answers, of which lost reasoning is counted as such."""
_NO_CALL = "the chat template does not write tool calls; give a chat_template that does"


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
    lost: list[str]
    """What of its answers the template does not write."""
    template: ChatTemplate | None
    """What it was written with; None for plain text."""


class Renderer:
    """Writes pairs with one tokenizer's chat template."""

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        stop_tokens: Collection[int] | None = None,
        date: datetime | None = None,
    ):
        """Keep the settings; the template is settled when the first conversation needs it.

        Args:
            tokenizer: Of the model to train; it is not changed.
            chat_template: As for `prepare_template`, like the rest.
            chat_template_kwargs: Variables for the template; those of a pair win over them.
            stop_tokens: Ids that generation stops at, besides EOS.
            date: What the template writes as today's date.
        """
        self.tokenizer = tokenizer
        self._prepare = partial(
            prepare_template,
            tokenizer,
            chat_template,
            chat_template_kwargs=chat_template_kwargs,
            stop_tokens=stop_tokens,
            date=date,
        )
        self._by_arguments: dict[str, ChatTemplate] = {}
        self._end_ids: dict[frozenset[str], set[int]] = {}
        self._elsewhere: dict[tuple[str, Block | None], str] = {}
        self._writers: dict[int, VerbatimWriter | None] = {}
        self._passed_over: dict[tuple[Any, ...], tuple[str, ...]] = {}

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template in use."""
        return self._prepare()

    @cached_property
    def added(self) -> frozenset[int]:
        """Ids of special and other added tokens: what may end a turn."""
        return frozenset(added_ids(self.tokenizer))

    @cached_property
    def _added_texts(self) -> tuple[str, ...]:
        return tuple(str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self.added)))

    def render(self, pair: PreferencePair) -> Rendered:
        """Write a pair.

        Raises:
            Dropped: The template refuses it, or shows no boundary.
            ConfigError: The template cannot be used at all.
            ModelError: Nothing could end an answer.
        """
        if isinstance(pair.prompt, str):
            answers = [answer for answer in (pair.chosen, pair.rejected) if isinstance(answer, str)]
            sides = [RenderedSide(pair.prompt + self._end(answer), len(pair.prompt), 0) for answer in answers]
            notes = self.foreign_ends(answers)
            unread = [name for name in ("tools", "chat_template_kwargs") if getattr(pair, name)]
            notes += [f"{name}: not read, since a plain text takes no chat template" for name in unread]
            return Rendered(sides, [len(pair.prompt)], [], notes, [], None)
        template = self._template_of(pair)
        try:
            return _PairRenderer(self, pair, template).render()
        except (Dropped, ModelError):
            raise
        except Exception as error:  # templates raise whatever they like
            raise Dropped(f"the chat template refuses the row: {first_line(error)}") from error

    @cached_property
    def _foreign_ends(self) -> tuple[str, ...]:
        return tuple(end for end in turn_markers.ENDS if end not in self._added_texts)

    def foreign_ends(self, answers: Sequence[str]) -> list[str]:
        """Notes about answers that end with the end of turn of another family of models."""
        ended = [text.rstrip() for text in answers]
        ends = [end for end in self._foreign_ends if any(text.endswith(end) for text in ended)]
        return [
            f"{end} at the end of an answer ends no turn of this model: it trains as text" for end in ends
        ]

    def _template_of(self, pair: PreferencePair) -> ChatTemplate:
        """The template for a pair, which may bring tools and arguments of its own."""
        template = self.template.for_tools(pair.tools)
        if not pair.chat_template_kwargs:
            return template
        key = json.dumps([template is self.template, pair.chat_template_kwargs], sort_keys=True, default=str)
        if key not in self._by_arguments:
            try:
                found = with_arguments(self.tokenizer, template, pair.chat_template_kwargs)
            except ConfigError as error:
                raise Dropped(str(error)) from error
            self._by_arguments[key] = found
        return self._by_arguments[key]

    def write(
        self, template: ChatTemplate, turns: Sequence[Message], tools: list[Any] | None, *, ask: bool
    ) -> str:
        """A conversation as the template writes it, without Jinja where that is proved to be the same."""
        if id(template) not in self._writers:  # the renderer keeps its templates, so that no id comes back
            self._writers[id(template)] = self._verbatim(template)
        writer = None if tools else self._writers[id(template)]
        text = None if writer is None else writer.write(turns, ask=ask)
        return template.render(self.tokenizer, turns, tools, ask=ask) if text is None else text

    def _verbatim(self, template: ChatTemplate) -> VerbatimWriter | None:
        looked_for = None if template.takes_parts else looks_for(template.text)
        if looked_for is None:
            return None
        return VerbatimWriter(
            lambda turns, ask: template.render(self.tokenizer, turns, None, ask=ask), looked_for
        )

    def end_ids(self, template: ChatTemplate) -> set[int]:
        """Tokens that end an answer, and so stand in none."""
        tokens = template.stops | {template.end_token}
        if tokens not in self._end_ids:
            self._end_ids[tokens] = set(self.tokenizer.convert_tokens_to_ids(sorted(tokens)))
        return self._end_ids[tokens]

    def passed_over(
        self, template: ChatTemplate, turns: Sequence[Message], tools: list[Any] | None
    ) -> tuple[str, ...]:
        """Roles of turns that the template does not write, whatever they say; none where it refuses."""
        key = (id(template), bool(tools), *((turn["role"], "tool_calls" in turn) for turn in turns))
        if key not in self._passed_over:
            marks = {index: f"{_MARKER} {index}." for index, turn in enumerate(turns) if _is_asked(turn)}
            marked = [
                {**turn, "content": marks.get(index, turn["content"])} for index, turn in enumerate(turns)
            ]
            try:
                text = template.render(self.tokenizer, marked, tools, ask=True)
            except Exception:  # templates raise whatever they like
                text = "".join(marks.values())
            roles = (turns[index]["role"] for index, mark in marks.items() if mark not in text)
            self._passed_over[key] = tuple(dict.fromkeys(roles))
        return self._passed_over[key]

    def finish(self, text: str, template: ChatTemplate) -> str:
        """A rendered conversation, cut behind the end-of-turn token of its last turn."""
        if text.endswith(template.suffix):
            return text[: len(text) - len(template.suffix)] + template.end
        # A tool call may end otherwise than an answer; what stands behind the end is the same.
        return self._end(text.removesuffix(template.suffix.removeprefix(template.end)))

    def elsewhere(self, template: ChatTemplate, shown: str, block: Block | None) -> str:
        """The note where answers begin otherwise than inference, with the way out."""
        if (shown, block) not in self._elsewhere:
            way = switch(self.tokenizer, template, on=block is None)
            ways = (f"set {way}, or " if way else "") + "give another chat_template"
            self._elsewhere[shown, block] = (
                f"inference starts behind {shown!r}, but an answer opens a block of its own there: "
                f"the prompt ends before it; {ways}"
                if block is None
                else f"inference starts behind {block.opening.strip()!r}, which an answer does not close: "
                f"the prompt ends before it; close it in the answers, {'' if way else 'or '}{ways}"
            )
        return self._elsewhere[shown, block]

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


class _Headers(NamedTuple):
    """What the template writes in front of one answer, when asked for it and once it has it."""

    asked: str
    """The conversation when asked: what inference shows."""
    start: int
    """Where the answer's header begins in it."""
    head: str
    """The conversation up to the content of its answer."""
    own: int | None
    """Where the answer's header begins in that; None where it is not found."""

    @property
    def shown(self) -> str:
        return self.asked[self.start :]

    @property
    def written(self) -> str:
        return "" if self.own is None else self.head[self.own :]

    @property
    def block(self) -> Block | None:
        """A block that is opened when asked only."""
        return opened_block(self.shown, self.written)

    @property
    def common(self) -> int:
        """How much of both headers is the same, short of the block."""
        most = len(self.shown) - (len(self.block.opening) if self.block is not None else 0)
        return outside(self.shown, min(settled(self.shown, self.written), most))

    def agreed(self, full: str) -> int:
        """How much of the header shown an answered conversation begins its answer with, too.

        Raises:
            Dropped: The conversation is another one.
        """
        if self.own is None or not full.startswith(self.head[: self.own]):
            raise Dropped(_NO_BOUNDARY)
        return outside(self.shown, min(settled(self.shown, full[self.own :]), self.common))


class _Written(NamedTuple):
    """One side: its prompt as inference shows it, and the whole conversation."""

    before: list[Message]
    asked: str
    full: str
    answer: str | None
    """What follows the prompt; None where the answer begins otherwise than inference."""
    note: str | None = None


class _PairRenderer:
    """One conversational pair."""

    def __init__(self, renderer: Renderer, pair: PreferencePair, template: ChatTemplate):
        assert not isinstance(pair.prompt, str)
        self.renderer = renderer
        self.template = template
        self.pair = pair
        self.notes: list[str] = []
        self.prompt: list[Message] = self._ended_once(pair.prompt, [])
        self.answers: list[list[Message]] = [
            [*self._ended_once(answer[:-1], self.prompt), *answer[-1:]]
            for answer in (pair.chosen, pair.rejected)
            if answer is not None and not isinstance(answer, str)
        ]
        self.notes += self._notes()
        self._known: dict[str, _Headers] = {}

    def render(self) -> Rendered:
        written = [self._write(answer) for answer in self.answers]
        if any(len(answer) > 1 for answer in self.answers):
            sides = [self._side(one, self._kept([one])) for one in written]
            shared = self._shared(sides)
        else:
            # The prompt is the same text on both sides, so where it ends must be too.
            kept = self._kept(written)
            sides = [self._side(one, kept) for one in written]
            shared = [sides[0].boundary]
        lost_parts = [
            self._lost(answer[-1], side.text[side.boundary :])
            for answer, side in zip(self.answers, sides, strict=True)
        ]
        turns, text = [*self.prompt, *self.answers[0][:-1]], sides[0].text[: sides[0].boundary]
        spans, found = assistant_spans(self._turns, self.template, turns, text)
        if not found:
            self.notes.append(
                "an earlier answer was not found in the rendering: not part of nll_on: assistant"
            )
        self.notes += self._left_out(sides)
        return Rendered(
            sides, shared, spans, self.notes, [part for part in lost_parts if part], self.template
        )

    def _notes(self) -> list[str]:
        """What the template does to such a pair whatever its words are."""
        notes, template, prompt = [], self.template, self.prompt
        if self.pair.tools and template.ignores_tools:
            notes.append("the chat template does not write the tools")
        if template.ignores_calls and any(turn.get("tool_calls") for turn in prompt):
            notes.append("the chat template does not write the tool calls of earlier turns")
        if template.folds_system and prompt and prompt[0]["role"] == "system":
            notes.append(
                "the chat template has no system turn: its text opens the first user turn"
                if prompt[0]["content"].strip()
                else "the chat template has no system turn: an empty one is left out"
            )
        if prompt and prompt[-1]["role"] == "assistant" and all(len(answer) == 1 for answer in self.answers):
            notes.append("the prompt ends with an assistant turn: the answer is a turn of its own behind it")
        notes += self.renderer.foreign_ends([answer[-1]["content"] for answer in self.answers if answer])
        unread = [name for name in self.pair.chat_template_kwargs or {} if not template.reads(name)]
        return notes + [f"chat_template_kwargs: the chat template does not read {name!r}" for name in unread]

    def _turns(self, turns: Sequence[Message], *, ask: bool) -> str:
        """A conversation as the template writes it; `ask` adds the header after which the model answers."""
        return self.renderer.write(self.template, turns, self.pair.tools, ask=ask)

    def _try_turns(self, turns: Sequence[Message], *, ask: bool) -> str | None:
        """None where the template refuses a conversation that breaks off here."""
        try:
            return self._turns(turns, ask=ask)
        except Exception:
            return None

    # -------------------------------------------------------------------------------------- prompt and answer

    def _write(self, answer: list[Message]) -> _Written:
        before, last = [*self.prompt, *answer[:-1]], self._bare(answer[-1])
        asked = self._asked if len(answer) == 1 else self._turns(before, ask=True)
        full = self.renderer.finish(self._turns([*before, last], ask=False), self.template)
        if full.startswith(asked):
            return _Written(before, asked, full, full[len(asked) :])
        headers = self._headers(before, asked)
        if headers.block is None:
            return _Written(before, asked, full, self._behind(headers, full))
        return _Written(before, asked, full, *self._inside(headers, headers.block, last, full))

    @cached_property
    def _asked(self) -> str:
        """The prompt as inference shows it: the same for both sides."""
        return self._turns(self.prompt, ask=True)

    def _ended_once(self, turns: Sequence[Message], before: list[Message]) -> list[Message]:
        """Turns before the answer, without end-of-turn tokens of their own where the template writes them."""
        end = self.template.end_token
        if not any(turn["content"].rstrip().endswith(end) for turn in turns):
            return list(turns)
        text = self._try_turns([*before, *turns], ask=False) or ""
        twice = [re.escape(turn["content"].rstrip()) + rf"\s*{re.escape(end)}" for turn in turns]
        return [
            self._bare(turn, "an earlier turn") if re.search(pattern, text) else turn
            for turn, pattern in zip(turns, twice, strict=True)
        ]

    def _bare(self, turn: Message, what: str = "an answer") -> Message:
        """A turn without an end-of-turn token of its own: the template writes it."""
        content, end = turn["content"], self.template.end_token
        if not content.rstrip().endswith(end):
            return turn
        while content.rstrip().endswith(end):
            content = content.rstrip().removesuffix(end)
        self.notes.append(f"{end} at the end of {what}: not repeated")
        return {**turn, "content": content}

    def _headers(self, before: list[Message], asked: str) -> _Headers:
        """Both headers of the answer to a conversation."""
        if asked in self._known:
            return self._known[asked]
        marked = self._turns([*before, {"role": "assistant", "content": _MARKER}], ask=False)
        head, found, _ = marked.partition(_MARKER)
        if not found:
            raise Dropped(_NO_BOUNDARY)
        bare = self._try_turns(before, ask=False) or head
        start = settled(asked, bare)
        own = start if head.startswith(asked[:start]) else _found_again(asked[:start], head)
        if own is not None:
            own += _counterpart(asked[start:], head[own:])
        self._known[asked] = _Headers(asked, start, head, own)
        return self._known[asked]

    def _behind(self, headers: _Headers, full: str) -> str | None:
        """The answer behind a header that is complete; None where it opens a block of its own there."""
        extra, own = headers.shown[headers.common :], headers.written[headers.common :]
        if full.startswith(headers.head):
            rest = full[len(headers.head) :]
            # Inference shows something else in place of words or an empty block in front of an answer.
            lead = own if not extra or (begins_with_tag(own) and not opens_the_same(own, extra)) else ""
            if extra.strip() and extra.strip() in lead:
                raise Dropped(_NO_BOUNDARY)
        elif headers.own is not None and full.startswith(headers.head[: headers.own + headers.common]):
            lead, rest = "", full[headers.own + headers.common :]
        else:
            return None
        return None if extra and opens_the_same(rest, extra) else lead + rest

    def _inside(
        self, headers: _Headers, block: Block, last: Message, full: str
    ) -> tuple[str | None, str | None]:
        """The answer behind a header that opens a block, None where it does not close it; and a note."""
        position = (headers.own or 0) + headers.common
        if headers.own is None or not full.startswith(headers.head[:position]):
            return None, None
        rest = full[position:]
        if block.closing in rest:
            return behind_opening(rest, block), None
        _, closed, said = last["content"].partition(block.closing)
        if not closed or said.strip() not in rest:
            return None, None
        # The template cuts the block out of an answer that has it: written as inference would continue.
        ending = rest[rest.rindex(said.strip()) + len(said.strip()) :] if said.strip() else rest
        tag = block.opening.strip()
        note = f"the chat template cuts {tag} out of an answer: written behind the prompt's {tag}"
        return behind_opening(last["content"], block).rstrip() + ending, note

    def _kept(self, written: list[_Written]) -> int | None:
        """How much of the header shown the prompts keep that begin these sides; None: all of it."""
        if all(one.answer is not None for one in written):
            self.notes += [one.note for one in written if one.note]
            return None
        kept = min(self._headers(one.before, one.asked).agreed(one.full) for one in written)
        headers = self._headers(written[0].before, written[0].asked)
        self.notes.append(self.renderer.elsewhere(self.template, headers.shown[kept:].strip(), headers.block))
        return kept

    def _side(self, written: _Written, kept: int | None) -> RenderedSide:
        """The side as text; its prompt ends where inference starts, or behind so much of its header."""
        if kept is None:
            text, boundary = written.asked + (written.answer or ""), len(written.asked)
        else:
            headers = self._headers(written.before, written.asked)
            boundary = headers.start + kept
            text = written.asked[:boundary] + written.full[(headers.own or 0) + kept :]
        anchor = max((text.rfind(token, 0, boundary) for token in self.template.anchors), default=0)
        return RenderedSide(text, boundary, max(anchor, 0))

    def _lost(self, last: Message, written: str) -> str | None:
        """What of an answer the template does not write."""
        names = [str(call.get("function", call).get("name")) for call in last.get("tool_calls") or []]
        if any(name not in written for name in names) or (names and self.template.ignores_calls):
            if not last["content"].strip():
                raise Dropped(f"an answer is a tool call, and {_NO_CALL}")
            return _NO_CALL
        return lost(last, written)

    def _left_out(self, sides: list[RenderedSide]) -> list[str]:
        """Notes about turns, and keys of turns, that the template passes over."""
        roles: dict[str, None] = {}
        keys: dict[str, None] = {}
        for number, (answer, side) in enumerate(zip(self.answers, sides, strict=True)):
            keys |= dict.fromkeys(self._unwritten_keys(answer[-1], side.text, _OF_ANSWERS))
            if number and len(answer) == 1:  # then what stands before it is the prompt, as on the first side
                continue
            before, text = [*self.prompt, *answer[:-1]], side.text[: side.boundary]
            roles |= dict.fromkeys(self.renderer.passed_over(self.template, before, self.pair.tools))
            for turn in before:
                if _is_asked(turn) and not _is_written(turn["content"].strip(), text):
                    roles[turn["role"]] = None
                keys |= dict.fromkeys(self._unwritten_keys(turn, side.text, _HANDLED))
        return [
            *(f"the chat template does not write a {role} turn of the prompt" for role in roles),
            *(f"the chat template does not write {key!r} of a turn" for key in keys),
        ]

    def _unwritten_keys(self, turn: Message, text: str, handled: Collection[str]) -> list[str]:
        """Keys of a turn that hold something and are not in its rendering."""
        if len(turn) == 2:
            return []
        return [
            key
            for key, value in turn.items()
            if key not in handled
            and value
            and (key, turn["role"]) != ("name", "tool")
            and (not self.template.reads(key) or (key not in REASONING_KEYS and not _says(value, text)))
        ]

    def _shared(self, sides: list[RenderedSide]) -> list[int]:
        """Where both conversations could be cut, if they part before the last turn."""
        ends = []
        for index in range(len(self.prompt), 0, -1):
            next_turns = [[*self.prompt, *answer][index] for answer in self.answers]
            asks = (True, False) if all(turn["role"] == "assistant" for turn in next_turns) else (False,)
            for text in (self._try_turns(self.prompt[:index], ask=ask) for ask in asks):
                if text and all(side.text.startswith(text) for side in sides):
                    ends.append(len(text))
        if not ends:
            raise Dropped("no boundary: the sides share no whole message once rendered")
        return ends


def _is_asked(turn: Message) -> bool:
    """Whether a turn says something that is no answer."""
    return turn["role"] != "assistant" and bool(turn["content"].strip())


def _is_written(content: str, text: str) -> bool:
    """Whether a text is in another one: as it stands, escaped as in JSON, or with other blanks."""
    if content in text:
        return True
    if any(json.dumps(content, ensure_ascii=ascii)[1:-1] in text for ascii in (True, False)):
        return True
    return "".join(content.split()) in "".join(text.split())


def _says(value: object, text: str) -> bool:
    """Whether a value is in a text; of one that is no text itself nobody can tell."""
    return not isinstance(value, str) or _is_written(value.strip(), text)


def _counterpart(shown: str, written: str) -> int:
    """Where the header shown begins in the one written: behind what closes the question once it is answered.

    Templates that write something between turns alone (`{% if not loop.last %}`) close a question only then.
    """
    first = _FIRST.match(shown)
    if first is None or written.startswith(first[0]):
        return 0
    places = [match.start() for match in re.finditer(re.escape(first[0]), written)]
    return max(places, key=lambda place: settled(shown, written[place:]), default=0)


def _found_again(text: str, other: str) -> int | None:
    """Where the end of `text` stands in `other`, by as much of it as is there; None if nothing of it is."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text[-middle:] in other else (low, middle - 1)
    ending = text[len(text) - low :]
    return other.rindex(ending) + low if ending.strip() else None
