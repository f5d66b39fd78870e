"""The words of a text and their runs: what near-duplicates and overlaps are measured in."""

from __future__ import annotations

import re

from orpo.pairs import Message

_PUNCTUATION = re.compile("[\xa0-\xbf\u2010-\u205e\u3000-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20]+")
_LETTERS = re.compile("([\u3040-\u9fff\uac00-\ud7af])")
"""Of scripts that put no blanks between words."""
_TO_BLANKS = bytes(byte if byte >= 128 or chr(byte).isalnum() else 32 for byte in range(256))


def words_of(text: str) -> list[bytes]:
    """The words of a text in lower case, as UTF-8; a Chinese, Japanese or Korean letter is one."""
    text = text.lower()
    if not text.isascii():
        text = _PUNCTUATION.sub(" ", text)
    if not text.isascii():
        text = _LETTERS.sub(r" \1 ", text)
    return text.encode("utf-8", "surrogatepass").translate(_TO_BLANKS).split()


def runs_of(words: list[bytes], length: int) -> list[bytes]:
    """All runs of `length` words, in order; none where there are fewer words."""
    return list(map(b" ".join, zip(*(words[start:] for start in range(length)), strict=False)))


def text_of(side: list[Message] | str | None) -> str:
    """What is said in messages, turn by turn; plain text as it is."""
    if side is None or isinstance(side, str):
        return side or ""
    return "\n\n".join(message["content"] for message in side)
