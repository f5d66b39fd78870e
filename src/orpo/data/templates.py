"""Chat templates: which one is used, and what it writes around an answer.

A template is a program we cannot read, so it is asked: one short conversation is rendered with a marker for
the answer, and what comes after the marker tells the end-of-turn token and the text behind it that must not
be trained. The template that leaves here writes BOS exactly where the tokenizer itself would; saved with the
model, it renders the very prompts the model was trained on.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orpo.errors import ConfigError, ModelError, first_line
from orpo.pairs import Message

_ANSWER = "ORPO answer marker"
_SYSTEM = "ORPO system marker"
_TOOL = "orpo_tool_marker"


class NamedTemplate(NamedTuple):
    """A template of our own; `END` in its text stands for the end of a turn."""

    text: str
    end: str | None
    """The end-of-turn token; None: the tokenizer's EOS."""
    tokens: tuple[str, ...]
    """Further tokens it writes, which a vocabulary should hold as single tokens."""


_TOOL_CALLS = """\
{%- for call in message.tool_calls or [] %}
    {{- '\\n' if message.content or not loop.first }}
    {{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}"""

_CHATML = (
    """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Tools, one JSON schema a line. Call one by writing its name and arguments as JSON between <tool_call>
    and ' }} {{- '</tool_call>.' }} {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %} {{- END
    + '\\n' }}
{%- endif %}
{%- for message in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    """
    + _TOOL_CALLS
    + """
    {{- END + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
)

_ROLE_LINES = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + END + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + END }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Gemma and Mistral have no system turn: its text opens the first user turn.
_GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content | trim + '\\n\\n' %}
    {%- else %}
        {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
        {{- ns.system + message.content | trim + END + '\\n' }}
        {%- set ns.system = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

_MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content + '\\n\\n' %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + END }}
    {%- else %}
        {{- '[INST] ' + ns.system + message.content + '[/INST]' }}
        {%- set ns.system = '' %}
    {%- endif %}
{%- endfor %}"""

NAMED: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(_CHATML, "<|im_end|>", ("<|im_start|>",)),
    "zephyr": NamedTemplate(_ROLE_LINES, None, ("<|system|>", "<|user|>", "<|assistant|>")),
    "llama3": NamedTemplate(_LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "gemma": NamedTemplate(_GEMMA, "<end_of_turn>", ("<start_of_turn>",)),
    "phi3": NamedTemplate(_ROLE_LINES, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")),
    "mistral": NamedTemplate(_MISTRAL, None, ("[INST]", "[/INST]")),
}
DEFAULT = "chatml"


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what was found out about it.

    Attributes:
        text: The Jinja text; to be saved with the model.
        name: `tokenizer` for its own, one of `NAMED`, or `given`.
        suffix: What it writes after an answer.
        end: The part of `suffix` to train on: up to the end-of-turn token, this included.
        end_token: That token; the tokenizer's EOS where the template has none.
        anchors: Added tokens it writes between a question and its answer.
        folds_system: It takes no system turn, so its text goes in front of the first user turn.
        ignores_tools: It does not write the `tools` it is given.
        notices: Lines to print.
    """

    text: str
    name: str
    suffix: str = ""
    end: str = ""
    end_token: str = ""
    anchors: tuple[str, ...] = ()
    folds_system: bool = False
    ignores_tools: bool = False
    notices: tuple[str, ...] = ()

    def render(self, tokenizer: Any, turns: Sequence[Message], tools: list[Any] | None, *, ask: bool) -> str:
        """The conversation as text; `ask` adds the header after which the model answers."""
        if self.folds_system:
            turns = fold_system(turns)
        text: str = tokenizer.apply_chat_template(
            list(turns), tools=tools, chat_template=self.text, tokenize=False, add_generation_prompt=ask
        )
        return text


def fold_system(turns: Sequence[Message]) -> list[Message]:
    """The system text in front of the first user turn, for templates without a system turn."""
    if not turns or turns[0]["role"] != "system":
        return list(turns)
    system, *rest = turns
    for place, turn in enumerate(rest):
        if turn["role"] == "user":
            joined = {**turn, "content": f"{system['content']}\n\n{turn['content']}"}
            return [*rest[:place], joined, *rest[place + 1 :]]
    return [{**system, "role": "user"}, *rest]


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front of plain text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def prepare_template(tokenizer: Any, chat_template: str | None = None) -> ChatTemplate:
    """Settle which template is used, and probe it.

    Args:
        tokenizer: Of the model to train; it is not changed.
        chat_template: One of `NAMED`, a file, a Jinja text, or None: the tokenizer's own, else the default.

    Raises:
        ConfigError: The template is unknown or cannot be rendered.
        ModelError: Neither template nor tokenizer has an end-of-turn token.
    """
    text, name, notices = _choose(tokenizer, chat_template)
    bare = ChatTemplate(text, name)
    question: Message = {"role": "user", "content": "Q"}
    probe = [question, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = bare.render(tokenizer, probe, None, ask=False)
    except Exception as error:
        raise ConfigError(f"chat_template: {first_line(error)}; name one of {', '.join(NAMED)}") from error
    if rendered.count(_ANSWER) != 1:
        raise ConfigError("chat_template: it does not write the assistant's answer once; name another")
    bos = tokenizer.bos_token
    if adds_bos(tokenizer) and not rendered.startswith(bos):
        text = "{{- bos_token }}" + text
        notices.append(
            f"the chat template does not write {bos}, which the tokenizer does: put in front of it"
        )
    suffix = rendered.partition(_ANSWER)[2]
    end, end_token = _end_of_turn(tokenizer, suffix)
    folds = not _writes(tokenizer, bare, [{"role": "system", "content": _SYSTEM}, *probe], None, _SYSTEM)
    tool = {
        "type": "function",
        "function": {"name": _TOOL, "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    return ChatTemplate(
        text=text,
        name=name,
        suffix=suffix,
        end=end,
        end_token=end_token,
        anchors=_anchors(tokenizer, bare, question),
        folds_system=folds,
        ignores_tools=not _writes(tokenizer, bare, probe, [tool], _TOOL),
        notices=tuple(notices),
    )


def _choose(tokenizer: Any, chat_template: str | None) -> tuple[str, str, list[str]]:
    """Text, name and notices of the template asked for."""
    if chat_template is None:
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        if own:
            return own, "tokenizer", []
        text, notices = _named(tokenizer, DEFAULT)
        return text, DEFAULT, [f"the tokenizer has no chat template: using {DEFAULT!r}", *notices]
    if chat_template in NAMED:
        text, notices = _named(tokenizer, chat_template)
        return text, chat_template, notices
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template, "given", []
    path = Path(chat_template).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8"), "given", []
    near = difflib.get_close_matches(chat_template, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"chat_template: {chat_template!r} is no file and no template; {hint}named ones: {', '.join(NAMED)}"
    )


def missing_tokens(tokenizer: Any, name: str) -> list[str]:
    """Tokens a named template writes that the vocabulary lacks: what `resize_embeddings` is to add."""
    template, vocabulary = NAMED[name], tokenizer.get_vocab()
    return [token for token in (*template.tokens, template.end) if token and token not in vocabulary]


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


def _anchors(tokenizer: Any, template: ChatTemplate, question: Message) -> tuple[str, ...]:
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    header = template.render(tokenizer, [{**question, "content": _ANSWER}], None, ask=True).partition(
        _ANSWER
    )[2]
    ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    return tuple(
        str(tokenizer.convert_ids_to_tokens(token)) for token in dict.fromkeys(ids) if token in added
    )


def _end_of_turn(tokenizer: Any, suffix: str) -> tuple[str, str]:
    """What of the text behind an answer is trained, and the token it ends with."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    last, stop = "", 0
    for token in tokenizer(suffix, add_special_tokens=False)["input_ids"]:
        written = str(tokenizer.convert_ids_to_tokens(token)) if token in added else ""
        # End tokens in a row belong together; what stands apart behind them is no longer the turn's.
        if last and not (written and suffix.startswith(written, stop)):
            break
        if written and (found := suffix.find(written, stop)) >= 0:
            last, stop = written, found + len(written)
    if last:
        return suffix[:stop], last
    if tokenizer.eos_token is None:
        raise ModelError(
            "neither the chat template nor the tokenizer has an end-of-turn token; set tokenizer.eos_token"
        )
    return suffix.rstrip() + tokenizer.eos_token, tokenizer.eos_token


def _writes(
    tokenizer: Any, template: ChatTemplate, turns: list[Message], tools: list[Any] | None, marker: str
) -> bool:
    """Whether the template takes these turns and writes the marker."""
    try:
        return marker in template.render(tokenizer, turns, tools, ask=False)
    except Exception:
        return False
