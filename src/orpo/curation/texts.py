"""The words of a pair: what was asked, what was answered, and keys that are equal for the same words."""

from __future__ import annotations

import hashlib
import json

from orpo.pairs import Message, PreferencePair

Side = list[Message] | str


def asked(pair: PreferencePair) -> str:
    """The text of the prompt; system turns are left out, because many prompts share them."""
    if isinstance(pair.prompt, str):
        return pair.prompt
    return written([turn for turn in pair.prompt if turn["role"] != "system"] or pair.prompt)


def written(side: Side | None) -> str:
    """The text of a side, tool calls included; empty for a side that is not there."""
    if side is None or isinstance(side, str):
        return side or ""
    parts = []
    for turn in side:
        parts.append(turn["content"])
        if turn.get("tool_calls"):
            parts.append(json.dumps(turn["tool_calls"], sort_keys=True, ensure_ascii=False))
    return "\n".join(parts)


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
