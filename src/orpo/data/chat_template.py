"""A chat template and what it writes around an answer.

A template is a program we cannot read, so it is asked: short conversations are rendered with markers, and
what stands between the markers tells the header of an answer, its end-of-turn token and the text behind it
that must not be trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from orpo.data.named_templates import NAMED
from orpo.data.turn_ends import added_tokens, earlier_turn_end, turn_end
from orpo.errors import ConfigError, first_line
from orpo.pairs import Message

ANSWER = "ORPO answer marker"
QUESTION = "ORPO question marker"
_TOOL = "orpo_tool_marker"
TOOLS = [
    {
        "type": "function",
        "function": {"name": _TOOL, "description": "", "parameters": {"type": "object", "properties": {}}},
    }
]
_CALLED = "orpo_call_marker"
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": _CALLED, "arguments": {}}}],
}
ASK: list[Message] = [{"role": "user", "content": QUESTION}]
EXCHANGE: list[Message] = [*ASK, {"role": "assistant", "content": ANSWER}]

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what was found out about it.

    Attributes:
        text: The Jinja text.
        name: `tokenizer` for its own, one of `NAMED`, or `given`.
        saved: What to save with the model: the text, or all texts by name where the tokenizer has several.
        arguments: Variables it is rendered with (`chat_template_kwargs`).
        date: What `strftime_now` shows in it.
        header: What it writes in front of an answer both when asked for one and when it has one.
        suffix: What it writes after an answer.
        end: The part of `suffix` to train on: up to the end-of-turn token, this included.
        end_token: That token; the tokenizer's EOS where the template has none.
        earlier_end: As `end`, behind an answer that another turn follows.
        anchors: Added tokens it writes between a question and its answer.
        stops: Tokens that generation stops at, as far as they are known.
        folds_system: It has no system turn of its own, so `text` opens the first user turn with its text.
        ignores_tools: It does not write the `tools` it is given.
        ignores_calls: It does not write the `tool_calls` of an answer.
        takes_parts: It wants contents as a list of parts, as those of vision models.
        tool_use: The template for rows with tools, where the tokenizer has one.
        notices: Lines to print.
    """

    text: str
    name: str
    saved: str | dict[str, str] = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    date: datetime = field(default_factory=datetime.now)
    header: str = ""
    suffix: str = ""
    end: str = ""
    end_token: str = ""
    earlier_end: str = ""
    anchors: tuple[str, ...] = ()
    stops: frozenset[str] = frozenset()
    folds_system: bool = False
    ignores_tools: bool = False
    ignores_calls: bool = False
    takes_parts: bool = False
    tool_use: ChatTemplate | None = None
    notices: tuple[str, ...] = ()

    def render(self, tokenizer: Any, turns: Sequence[Message], tools: list[Any] | None, *, ask: bool) -> str:
        """The conversation as text; `ask` adds the header after which the model answers."""

        def apply(turns: Sequence[Message]) -> str:
            turns = [_in_parts(turn) for turn in turns] if self.takes_parts else list(turns)
            text: str = tokenizer.apply_chat_template(
                turns,
                tools=tools or None,
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=ask,
                **self.arguments,
            )
            return text

        try:
            return apply(turns)
        except Exception:
            if not any("tool_calls" in turn for turn in turns):
                raise
        # Some templates join the arguments of a call as text, where most expect an object.
        return apply([_with_text_arguments(turn) for turn in turns])

    @cached_property
    def _dated(self) -> str:
        """The text with its clock stopped; a macro, because a template is given no function from outside."""
        if not self.reads("strftime_now"):
            return self.text
        shown = "".join(
            f".replace({sign + letter!r}, {self.date.strftime(sign + letter)!r})"
            for sign in ("%-", "%")
            for letter in "aAbBcdHIjmMpSuUVwWxXyY"
        )
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{shown} }}}}{{%- endmacro %}}\n{self.text}"

    def for_tools(self, tools: list[Any] | None) -> ChatTemplate:
        """The template for a row with these tools: the one transformers takes."""
        return self.tool_use if tools and self.tool_use is not None else self

    def reads(self, name: str) -> bool:
        """Whether a variable of this name occurs in it."""
        return re.search(rf"\b{re.escape(name)}\b", self.text) is not None

    def identity(self) -> str:
        """Equal for templates that write the same: part of the key of cached tokens."""
        dates = str(self.date) if self.reads("strftime_now") else ""
        more = self.tool_use.identity() if self.tool_use is not None else ""
        return json.dumps([self.text, dict(self.arguments), dates, self.end, more], default=str)


def probed(tokenizer: Any, bare: ChatTemplate, tools: list[Any] | None = None) -> ChatTemplate:
    """The template with what it writes around an answer.

    Args:
        tokenizer: Of the model.
        bare: Text, arguments, date and stops.
        tools: Given with every probe.

    Raises:
        ConfigError: The template cannot be rendered.
        ModelError: Nothing ends an answer.
    """
    try:
        rendered = bare.render(tokenizer, EXCHANGE, tools, ask=False)
    except Exception as error:
        raise ConfigError(
            f"chat_template: it cannot write a question and an answer ({first_line(error)}); "
            f"give its variables with chat_template_kwargs, or name one of {', '.join(NAMED)}"
        ) from error
    if rendered.count(ANSWER) != 1:
        raise ConfigError("chat_template: it does not write the assistant's answer once; name another")
    opening, _, behind = rendered.partition(QUESTION)
    answered, _, suffix = behind.partition(ANSWER)
    asked = (try_rendering(tokenizer, bare, ASK, tools) or "").partition(QUESTION)[2]
    unasked = (try_rendering(tokenizer, bare, ASK, tools, ask=False) or "").partition(QUESTION)[2]
    twice = try_rendering(tokenizer, bare, [*EXCHANGE, *EXCHANGE], tools, ask=False) or ""
    between = twice.partition(ANSWER)[2].partition(QUESTION)[0]
    earlier = earlier_turn_end(tokenizer, between, opening, bare.stops) if QUESTION in twice else ""
    end = turn_end(tokenizer, suffix, earlier, opening, bare.stops)
    with_tools = try_rendering(tokenizer, bare, ASK, TOOLS) or ""
    with_call = try_rendering(tokenizer, bare, [*ASK, _CALL], TOOLS, ask=False)
    return replace(
        bare,
        header=_header(asked, unasked, answered),
        suffix=suffix,
        end=end.text,
        end_token=end.token,
        earlier_end=earlier,
        anchors=tuple(dict.fromkeys(token.text for token in added_tokens(tokenizer, asked))),
        ignores_tools=_TOOL not in with_tools,
        ignores_calls=with_call is not None and _CALLED not in with_call,
    )


def _header(asked: str, unasked: str, answered: str) -> str:
    """What stands in front of an answer, asked for or given; where nothing does, what ends the question."""
    start = settled(asked, unasked)
    common_part = asked[: settled(asked, answered)]
    return common_part[start:] or common_part


def switch(tokenizer: Any, template: ChatTemplate, *, on: bool) -> str | None:
    """The setting that turns thinking on or off in the header of an answer, where the template has one."""
    shown = try_rendering(tokenizer, template, ASK)
    for name in ("enable_thinking", "thinking"):
        other = replace(template, arguments={**template.arguments, name: on})
        if template.reads(name) and try_rendering(tokenizer, other, ASK) != shown:
            return f"chat_template_kwargs: {{{name}: {str(on).lower()}}}"
    return None


def _in_parts(turn: Message) -> Message:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def _with_text_arguments(turn: Message) -> Message:
    if "tool_calls" not in turn:
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def try_rendering(
    tokenizer: Any,
    template: ChatTemplate,
    turns: list[Message],
    tools: list[Any] | None = None,
    *,
    ask: bool = True,
) -> str | None:
    """None where the template refuses the conversation."""
    try:
        return template.render(tokenizer, turns, tools, ask=ask)
    except Exception:
        return None


def settled(one: str, other: str) -> int:
    """Length of the common beginning, short of a tag of which only a part is common."""
    length = common(one, other)
    for text in (one, other):
        for tag in _TAG.finditer(text, max(0, length - 100)):
            if tag.start() < length < tag.end():
                length = tag.start()
    return length


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
