"""Reasoning in answers: blocks that are opened and closed, and words that a rendering lost.

Templates open a block when asked for an answer (`<think>`), write an empty one, or cut it out of answers that
have one. What they do is read off the text they write, by its tags, never off their names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from orpo.pairs import Message

# How a tag is closed depends on how it is opened: `<think>`, `[THINK]`, `<|START_THINKING|>`, `<|channel>`.
_TAGS = (
    (r"<([A-Za-z][\w:]*)>", "</{}>"),
    (r"\[([A-Z_]+)\]", "[/{}]"),
    (r"<\|START_(\w+)\|>", "<|END_{}|>"),
    (r"<\|begin_of_(\w+)\|>", "<|end_of_{}|>"),
    (r"<\|(\w+)_prefix\|>", "<|{}_suffix|>"),
    (r"<\|(\w+)>", "<{}|>"),
    (r"◁(\w+)▷", "◁/{}▷"),
)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold its reasoning."""


_SAID = ("text", "content", "summary", *REASONING_KEYS)
"""Keys of an object that hold what it says; others may be its type, or a signature."""


class Block(NamedTuple):
    """A block that a text opens and does not close."""

    opening: str
    """The text from its tag on."""
    closing: str


def open_blocks(text: str) -> list[Block]:
    """Blocks that a text leaves open, the first opened first."""
    found = []
    for pattern, closing in _TAGS:
        for tag in re.finditer(pattern, text):
            end = closing.format(tag[1])
            if end not in text[tag.end() :]:
                found.append((tag.start(), Block(text[tag.start() :], end)))
    return [block for _, block in sorted(found)]


def opened_block(asked: str, answered: str) -> Block | None:
    """The block that a header opens when asked and does not leave open before an answer, if any."""
    known = {block.closing for block in open_blocks(answered)}
    return next((block for block in open_blocks(asked) if block.closing not in known), None)


def outside(text: str, end: int) -> int:
    """The position, moved in front of a block that is open there and closed later."""
    inside = [block for block in open_blocks(text[:end]) if block.closing in text[end:]]
    return end - len(inside[0].opening) if inside else end


def opens_the_same(text: str, other: str) -> bool:
    """Whether both begin with the same block, blanks aside."""
    tags = (re.match(pattern, other.lstrip()) for pattern, _ in _TAGS)
    return any(tag is not None and text.lstrip().startswith(tag[0]) for tag in tags)


def begins_with_tag(text: str) -> bool:
    """Whether a text begins with a tag of any kind, blanks aside."""
    return re.match(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])", text) is not None


def behind_opening(text: str, block: Block) -> str:
    """What follows where a prompt has opened the block: the text without an opening of its own."""
    tag = block.opening.rstrip()
    bare = text.lstrip()
    if not bare.startswith(tag):
        return text
    blanks = block.opening[len(tag) :]
    rest = bare[len(tag) :]
    return rest.removeprefix(blanks) if blanks else rest


def lost(message: Message, written: str) -> str | None:
    """What of an answer its rendering lacks, in words for the table of reasons; None if it lacks nothing."""
    for key in REASONING_KEYS:
        if any(_lacks(written, said) for said in _texts(message.get(key))):
            return f"the chat template does not write the reasoning of an answer (its key {key!r})"
    content = message["content"]
    if not _lacks(written, content):
        return None
    thought, tag, rest = content.rpartition("</think>")
    if tag and not _lacks(written, rest) and _lacks(written, thought):
        return "the chat template cuts the reasoning (everything up to </think>) out of an answer"
    return "the chat template leaves out words of an answer"


def _texts(value: object) -> Iterator[str]:
    """The texts that a value holds, in whatever lists and objects: reasoning may be steps."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        said = [value[key] for key in _SAID if value.get(key)]
        for item in said or value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _lacks(written: str, said: str) -> bool:
    """Whether words of `said` are missing; tags and blanks are the template's to write as it does."""
    if said.strip() in written:
        return False
    return bool(_words(re.sub(r"</?\w+>", " ", said)) - _words(written))


def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text))
