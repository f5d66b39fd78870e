"""Chat templates: which one is used, and what it writes around an answer.

A template is a program we cannot read, so it is asked: short conversations are rendered with markers, and
what stands between the markers tells the header of an answer, its end-of-turn token and the text behind it
that must not be trained. What a run adds to a template (BOS where the tokenizer writes it, the run's
arguments, a place for the system text) is written into its text, so that the template saved with the model
renders the very prompts the model was trained on.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from orpo.data.named_templates import DEFAULT, NAMED, missing_tokens
from orpo.data.turn_ends import added_tokens, earlier_turn_end, turn_end
from orpo.errors import ConfigError, ModelError, first_line
from orpo.pairs import Message

_ANSWER = "ORPO answer marker"
_QUESTION = "ORPO question marker"
_SYSTEM = "ORPO system marker"
_TOOL = "orpo_tool_marker"
_TOOLS = [
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
_ASK: list[Message] = [{"role": "user", "content": _QUESTION}]
_EXCHANGE: list[Message] = [*_ASK, {"role": "assistant", "content": _ANSWER}]

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
# The text behind it starts a line, as the template itself did: blocks and blanks there are read as before.
_BEHIND = "{# written in front by the training run #}\n"
_FOLD = """\
{%- if messages and messages[0]['role'] == 'system' %}
{%- set folded = namespace(turns=[], text=messages[0]['content']) %}
{%- for turn in messages[1:] %}
{%- if turn['role'] == 'user' and folded.text | trim %}
{%- set text = folded.text + '\\n\\n' + turn['content'] %}
{%- set folded.turns = folded.turns + [{'role': 'user', 'content': text}] %}
{%- set folded.text = '' %}
{%- else %}
{%- set folded.turns = folded.turns + [turn] %}
{%- endif %}
{%- endfor %}
{%- if folded.text | trim %}
{%- set folded.turns = [{'role': 'user', 'content': folded.text}] + folded.turns %}
{%- endif %}
{%- set messages = folded.turns %}
{%- endif %}"""


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


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front of plain text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def prepare_template(
    tokenizer: Any,
    chat_template: str | Mapping[str, str] | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop_tokens: Collection[int] | None = None,
    date: datetime | None = None,
) -> ChatTemplate:
    """Settle which template is used, and probe it.

    Args:
        tokenizer: Of the model to train; it is not changed.
        chat_template: One of `NAMED`, a file, a Jinja text, several texts by name, or None: the tokenizer's
            own, else the default. Of several, `tool_use` is for rows with tools, as in transformers.
        chat_template_kwargs: Variables for the template, such as `enable_thinking`.
        stop_tokens: Ids that generation stops at, besides EOS: those of the model's generation_config.
        date: What the template writes as today's date; None: now.

    Raises:
        ConfigError: The template is unknown or cannot be rendered, or does not read one of the arguments.
        ModelError: Neither template nor tokenizer has an end-of-turn token.
    """
    arguments, date = dict(chat_template_kwargs or {}), date or datetime.now()
    texts, name, notices = _choose(tokenizer, chat_template)
    _check_arguments(tokenizer, arguments)
    stops = {tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(list(stop_tokens or []))} - {None}
    make = partial(ChatTemplate, name=name, arguments=arguments, date=date, stops=frozenset(stops))
    default = _completed(tokenizer, make(texts["default"]))
    tool_use = None
    if "tool_use" in texts:
        tool_use = _completed(tokenizer, make(texts["tool_use"]), _TOOLS)
        notices.append("rows with tools are written with the tokenizer's template 'tool_use'")
    if default.reads("strftime_now") or (tool_use is not None and tool_use.reads("strftime_now")):
        notices.append(f"the chat template writes today's date: {date:%d %B %Y} in every row of this run")
    for argument in arguments:
        if not any(one is not None and one.reads(argument) for one in (default, tool_use)):
            raise ConfigError(
                f"chat_template_kwargs: the chat template does not read {argument!r}; leave it out"
            )
    saved: str | dict[str, str] = default.text
    if len(texts) > 1:
        saved = {**texts, "default": default.text} | ({"tool_use": tool_use.text} if tool_use else {})
    every = [*notices, *default.notices, *(tool_use.notices if tool_use else ())]
    return replace(default, saved=saved, tool_use=tool_use, notices=tuple(dict.fromkeys(every)))


def with_arguments(tokenizer: Any, template: ChatTemplate, more: Mapping[str, Any]) -> ChatTemplate:
    """The template with a row's own arguments, which win over the run's.

    Raises:
        ConfigError: One of them cannot be an argument.
    """
    _check_arguments(tokenizer, more)
    own = replace(template, arguments={**template.arguments, **more}, notices=())
    return probed(tokenizer, own, _TOOLS if _try(tokenizer, own, _EXCHANGE, ask=False) is None else None)


# --------------------------------------------------------------------------------------------- which template


def _choose(
    tokenizer: Any, chat_template: str | Mapping[str, str] | None
) -> tuple[dict[str, str], str, list[str]]:
    """Texts by name (`default` among them), name and notices of the template asked for."""
    if isinstance(chat_template, Mapping):
        return {"default": next(iter(chat_template.values())), **chat_template}, "given", []
    own = getattr(tokenizer, "chat_template", None)
    texts: dict[str, str] = own if isinstance(own, dict) else {"default": own} if own else {}
    if chat_template is None and texts:
        return {"default": next(iter(texts.values())), **texts}, "tokenizer", []
    if chat_template in texts:
        return {**texts, "default": texts[chat_template]}, "tokenizer", []
    if chat_template is None:
        text, notices = _named(tokenizer, DEFAULT)
        notices.insert(0, f"the tokenizer has no chat template: using {DEFAULT!r}")
        return {"default": text}, DEFAULT, notices
    if chat_template in NAMED:
        text, notices = _named(tokenizer, chat_template)
        return {"default": text}, chat_template, notices
    if "{{" in chat_template or "{%" in chat_template:
        return {"default": chat_template}, "given", []
    path = Path(chat_template).expanduser()
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}, "given", []
    names = [*texts, *NAMED] if len(texts) > 1 else list(NAMED)
    near = difflib.get_close_matches(chat_template, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"chat_template: {chat_template!r} is no file and no template; {hint}named ones: {', '.join(names)}"
    )


def _named(tokenizer: Any, name: str) -> tuple[str, list[str]]:
    template, missing = NAMED[name], missing_tokens(tokenizer, name)
    if template.end is not None and template.end not in missing:
        end = repr(template.end)
    elif tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer has neither {template.end} nor an EOS token; set one or name another template"
        )
    else:
        end = "eos_token"
    notices = []
    if missing:
        ends = f"; turns end with {tokenizer.eos_token}" if template.end in missing else ""
        notices.append(
            f"the vocabulary has no {', '.join(missing)}: written as plain text{ends}; "
            "resize_embeddings: true adds them"
        )
    return template.text.replace("END", end), notices


def _check_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that mean something else to the tokenizer."""
    if not arguments:
        return
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
    for name in arguments:
        if name in taken or not name.isidentifier():
            raise ConfigError(f"chat_template_kwargs: {name!r} is not a variable of a chat template")


# --------------------------------------------------------------------------------------------- what it writes


def _completed(tokenizer: Any, bare: ChatTemplate, tools: list[Any] | None = None) -> ChatTemplate:
    """The template with what the run writes in front of it, and with what it was found out to write."""
    for takes_parts, given in ((False, tools), (False, _TOOLS), (True, tools)):
        trial = replace(bare, takes_parts=takes_parts)
        written = _try(tokenizer, trial, _EXCHANGE, given, ask=False) or ""
        if _ANSWER in written and repr(_ANSWER) not in written:  # nor the list of parts itself, as text
            bare, tools = trial, given
            break
    asked = _try(tokenizer, bare, _ASK, tools) or ""
    front, notices = "", []
    if adds_bos(tokenizer) and asked and not asked.startswith(tokenizer.bos_token):
        front = "{{- bos_token }}"
        notices.append(
            f"the chat template does not write {tokenizer.bos_token}, which the tokenizer does: "
            "put in front of it"
        )
    front += "".join(
        f"{{%- if {name} is not defined or {name} is none %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in bare.arguments.items()
        if bare.reads(name)
    )
    system: list[Message] = [{"role": "system", "content": _SYSTEM}, *_ASK]
    folds = asked != "" and _SYSTEM not in (_try(tokenizer, bare, system, tools) or "")
    front += _FOLD if folds and not bare.takes_parts else ""
    text = front + _BEHIND + bare.text if front else bare.text
    return probed(tokenizer, replace(bare, text=text, folds_system=folds, notices=tuple(notices)), tools)


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
        rendered = bare.render(tokenizer, _EXCHANGE, tools, ask=False)
    except Exception as error:
        raise ConfigError(
            f"chat_template: it cannot write a question and an answer ({first_line(error)}); "
            f"give its variables with chat_template_kwargs, or name one of {', '.join(NAMED)}"
        ) from error
    if rendered.count(_ANSWER) != 1:
        raise ConfigError("chat_template: it does not write the assistant's answer once; name another")
    opening, _, behind = rendered.partition(_QUESTION)
    answered, _, suffix = behind.partition(_ANSWER)
    asked, unasked = (
        (_try(tokenizer, bare, _ASK, tools, ask=ask) or "").partition(_QUESTION)[2] for ask in (True, False)
    )
    twice = _try(tokenizer, bare, [*_EXCHANGE, *_EXCHANGE], tools, ask=False) or ""
    between = twice.partition(_ANSWER)[2].partition(_QUESTION)[0]
    earlier = earlier_turn_end(tokenizer, between, opening, bare.stops) if _QUESTION in twice else ""
    end = turn_end(tokenizer, suffix, earlier, opening, bare.stops)
    with_tools = _try(tokenizer, bare, _ASK, _TOOLS) or ""
    with_call = _try(tokenizer, bare, [*_ASK, _CALL], _TOOLS, ask=False)
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
    for name in ("enable_thinking", "thinking"):
        other = replace(template, arguments={**template.arguments, name: on})
        if template.reads(name) and _try(tokenizer, other, _ASK) != _try(tokenizer, template, _ASK):
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


def _try(
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
