"""Which chat template a run uses, and what the run adds to it.

What a run adds (BOS where the tokenizer writes it, the run's arguments, an opening for the system text) is
written into the template's text, so that the template saved with the model renders the very prompts the model
was trained on.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from orpo.data.chat_template import ANSWER, ASK, EXCHANGE, TOOLS, ChatTemplate, probed, try_rendering
from orpo.data.named_templates import DEFAULT, NAMED, missing_tokens
from orpo.errors import ConfigError, ModelError
from orpo.pairs import Message

_SYSTEM = "ORPO system marker"
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
        tool_use = _completed(tokenizer, make(texts["tool_use"]), TOOLS)
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
    needs_tools = try_rendering(tokenizer, own, EXCHANGE, ask=False) is None
    return probed(tokenizer, own, TOOLS if needs_tools else None)


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
        first = next(iter(texts))
        notice = f"the tokenizer names no template 'default': using {first!r}"
        return {"default": texts[first], **texts}, "tokenizer", [] if "default" in texts else [notice]
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
    for takes_parts, given in ((False, tools), (False, TOOLS), (True, tools)):
        trial = replace(bare, takes_parts=takes_parts)
        written = try_rendering(tokenizer, trial, EXCHANGE, given, ask=False) or ""
        if ANSWER in written and repr(ANSWER) not in written:  # nor the list of parts itself, as text
            bare, tools = trial, given
            break
    asked = try_rendering(tokenizer, bare, ASK, tools) or ""
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
    system: list[Message] = [{"role": "system", "content": _SYSTEM}, *ASK]
    folds = asked != "" and _SYSTEM not in (try_rendering(tokenizer, bare, system, tools) or "")
    front += _FOLD if folds and not bare.takes_parts else ""
    text = front + _BEHIND + bare.text if front else bare.text
    return probed(tokenizer, replace(bare, text=text, folds_system=folds, notices=tuple(notices)), tools)
