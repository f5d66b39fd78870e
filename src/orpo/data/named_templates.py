"""Chat templates of our own, for models that have none: the formats of the best-known families.

Each is written so that an answer ends with one trainable token, whatever the vocabulary holds: a token that
it lacks is written as plain text, and a turn then ends with the tokenizer's EOS.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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
    {{- 'Tools, one JSON schema a line. ' }}
    {{- 'Call one by writing its name and arguments as JSON between <tool_call> and </tool_call>.' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- END + '\\n' }}
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


def missing_tokens(tokenizer: Any, name: str) -> list[str]:
    """Tokens a named template writes that the vocabulary lacks: what `resize_embeddings` is to add."""
    template, vocabulary = NAMED[name], tokenizer.get_vocab()
    return [token for token in (*template.tokens, template.end) if token and token not in vocabulary]
