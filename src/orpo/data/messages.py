"""The cells of a row as chat messages.

Every project writes messages a little differently (`from`/`value`, tool calls as JSON text, content in parts,
the empty keys an Arrow table adds); here they all become the `role`/`content` form that chat templates
understand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.rows import KeyTwice, Row, strict_json
from orpo.errors import DataError
from orpo.pairs import Message

Turns = list[Message]

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "function_call",
}  # fmt: skip
_PLAIN_ROLES = ("system", "user", "assistant")


class BadRow(DataError):  # noqa: N818 - a verdict on a row, worded for the user
    """A row that cannot be read as its format: which field, and what is wrong with it."""

    def __init__(self, field: str, problem: str, remedy: str = "fix the row"):
        super().__init__(f"'{field}' {problem}; {remedy}")
        self.reason = f"'{field}' {problem}"


class Untrainable(Exception):  # noqa: N818 - a verdict on a row
    """A well-formed row that holds no preference, and why."""


def type_name(value: object) -> str:
    """The type of a value with its article: `an int`, `a list`."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def number_of(value: object) -> float | None:
    """A finite number, also one written as text (CSV knows no other); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def kind(value: object) -> str:
    """What a cell holds: null, text, message, messages, texts, conversations, records or other."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    # Asking for the types themselves first: the question about an abstract one takes ten times as long.
    if isinstance(value, dict) or (not isinstance(value, list) and isinstance(value, Mapping)):
        return "message" if "role" in value or "from" in value else "other"
    if isinstance(value, list | tuple | Sequence) and value:
        kinds = set(map(kind, value))
        if kinds == {"message"}:
            return "messages"
        if all(isinstance(item, dict | Mapping) for item in value):
            return "records"
        if kinds == {"text"}:
            return "texts"
        if kinds == {"messages"}:
            return "conversations"
    return "other"


def text_of(row: Row, field: str) -> str:
    """A cell that must be text."""
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRow(field, "is missing" if value is None else f"is {type_name(value)}; expected text")
    return value


def without_nulls(value: Any) -> Any:
    """Arrow tables give every struct all keys of the column; the ones a row did not set come back as None."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _message(value: object, field: str) -> Message:
    if not isinstance(value, dict | Mapping):
        raise BadRow(field, f"holds {type_name(value)}; expected a message")
    role, content = value.get("role"), value.get("content")
    if len(value) == 2 and isinstance(content, str) and role in _PLAIN_ROLES:
        return {"role": role, "content": content}  # by far the commonest
    message = without_nulls(value)
    role, content = _role_and_content(message, field)
    if media := sorted(MEDIA_KEYS & {key for key, item in message.items() if item}):
        raise BadRow(field, f"has a turn with {media[0]}; only text is trained")
    known = ROLES.get(str(role).lower())
    if known is None:
        raise BadRow(field, f"has a turn of unknown role {role!r}", "use system, user, assistant or tool")
    if known == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(_json(content, field), field)}
    if isinstance(message.get("function_call"), Mapping) and not message.get("tool_calls"):
        message["tool_calls"] = [message.pop("function_call")]  # as OpenAI wrote calls until 2023
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(_json(message["tool_calls"], field), field)
    else:
        message.pop("tool_calls", None)
    content = "" if content is None and "tool_calls" in message else _content(content, field)
    return {"role": known, "content": content, **message}


def _role_and_content(message: Message, field: str) -> tuple[Any, Any]:
    """The role and the content, taken out of a message, under whichever of their names they stand."""
    role, sender = message.pop("role", None), message.pop("from", None)
    content, value = message.pop("content", None), message.pop("value", None)
    if role and sender and ROLES.get(str(sender).lower()) != ROLES.get(str(role).lower()):
        if str(sender).lower() in ROLES:
            raise BadRow(field, f"has a turn of two roles, role {role!r} and from {sender!r}")
        message["from"] = sender
    if content is not None and value is not None and content != value:
        if isinstance(value, str):
            raise BadRow(field, "has a turn with one text in 'content' and another in 'value'")
        message["value"] = value
    return role or sender, value if content is None else content


MEDIA = {
    "image", "images", "video", "videos", "audio", "audios", "pixel_values", "image_url", "image_urls",
    "image_file", "image_path", "video_url", "audio_url", "input_image", "input_audio",
}  # fmt: skip
"""Columns, keys of turns and types of content that are no text."""
MEDIA_KEYS = MEDIA | {"files", "attachments"}
"""Further keys of turns, and of parts of their content, that hold what is no text."""
_PARTS = (None, "text", "input_text", "output_text")
"""Types of a part of a content that is text."""


def _content(content: object, field: str) -> str:
    if isinstance(content, list):
        media = [part for part in content if isinstance(part, Mapping) and part.get("type") not in _PARTS]
        if media:
            raise BadRow(field, f"has a turn with a part of type {media[0]['type']!r}; only text is trained")
        keys = {key for part in content if isinstance(part, Mapping) for key, item in part.items() if item}
        if held := sorted(MEDIA_KEYS & keys):
            raise BadRow(field, f"has a turn with {held[0]} in a part of it; only text is trained")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        problem = "no content" if content is None else f"content that is not text ({type(content).__name__})"
        raise BadRow(field, f"has a turn with {problem}")
    return content


def _json(value: object, field: str, what: str = "text") -> Any:
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value)
    except KeyTwice as error:
        raise BadRow(field, f"holds JSON as text, which {error}") from None
    except ValueError:
        raise BadRow(field, f"holds {what} that should be JSON") from None


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls in the form chat templates expect: arguments as an object, not as a JSON string."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(field, "has a tool call without a name")
        given = function.get("arguments")
        arguments = (
            {}
            if given is None or given == ""
            else _json(given, field, f"the arguments of {function['name']}")
        )
        outer = dict(call) if "function" in call else {"type": "function"}
        result.append({**outer, "function": {**function, "arguments": arguments}})
    return result


def turns_of(value: object, field: str) -> Turns:
    """A text is one assistant answer; a message is itself; a list is its messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, list | tuple):
        return [_message(item, field) for item in value]
    if isinstance(value, Mapping):
        return [_message(value, field)]
    raise BadRow(field, "is missing" if value is None else f"is {type_name(value)}; expected messages")


def alternatives(value: object, field: str) -> list[Any]:
    """The answers of a `rejected` cell, which may hold several."""
    if kind(value) in ("texts", "conversations"):
        return list(value)  # type: ignore[call-overload,no-any-return]
    return [value]


def with_system(row: Row, turns: Turns) -> Turns:
    """The turns with the row's `system` column in front, unless they begin with the same system turn."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRow("system", f"is {type_name(system)}; expected text")
    if not system or not system.strip():
        return turns
    if turns and turns[0]["role"] == "system":
        if system.split() != turns[0]["content"].split():
            raise BadRow("system", "is another text than the system turn", "keep one of them")
        return turns
    return [{"role": "system", "content": system}, *turns]
