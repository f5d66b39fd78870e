"""Keys that are equal for the same words, and for what surrounds them: system turns, tools, arguments."""

from __future__ import annotations

import hashlib
import json

from orpo.data.words import text_of
from orpo.pairs import Message, PreferencePair

Side = list[Message] | str


def written(side: Side | None) -> str:
    """The text of a side, tool calls included; empty for a side that is not there."""
    calls = [] if side is None or isinstance(side, str) else [turn.get("tool_calls") for turn in side]
    if not any(calls):
        return text_of(side)
    return text_of(side) + json.dumps(calls, sort_keys=True, ensure_ascii=False)


def fingerprint(*parts: object) -> bytes:
    """The same for parts that are the same, runs of blanks aside."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = part if isinstance(part, str) else json.dumps(part, sort_keys=True, default=str)
        digest.update(" ".join(text.split()).encode("utf-8", "surrogatepass") + b"\0")
    return digest.digest()


def context(pair: PreferencePair) -> bytes:
    """The same for pairs whose prompts differ in the question alone: system turns, tools, arguments."""
    system = [] if isinstance(pair.prompt, str) else [t for t in pair.prompt if t["role"] == "system"]
    return fingerprint(system, pair.tools, pair.chat_template_kwargs)
