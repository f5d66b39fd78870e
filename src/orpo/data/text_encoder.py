"""Texts -> token ids: each word once where words cannot touch each other, else by the tokenizer as it is.

Byte-level tokenizers cut a text into words before they look for tokens, and none of their published rules
looks across a single blank between two other characters. So the tokens of a text are those of its words, put
one after the other, and most words of a data set have been seen before. `words_are_independent` tells from
the tokenizer's own description whether this holds; where it does not say so, the tokenizer gets whole texts.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.data.chat_template import common

Ids = npt.NDArray[np.int32]

# A blank that stands alone between two words begins the second; all other white space lies inside a word.
_WORDS = re.compile(r"\s*\S+(?:(?! \S)\s+\S*)*")
_BORDER = re.compile(r"(?<=\S) (?=\S)")
_INNER = re.compile(r" \S(?:.*\S)?", re.DOTALL)
"""Words that may stand between two others."""
_TOGETHER = 64
_CROSSES = re.compile(r"\S \S|\S $")
_MOST_WORDS = 1 << 18
_LONGEST_WORD = 48
"""Longer ones are seldom seen twice."""

# Alternatives of the patterns by which tokenizers split (GPT-2 and 4, Llama 3, Qwen, DeepSeek, gpt-oss). Each
# matches white space only as its first character, or nothing but white space.
_LETTERS = (
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'(?:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    "'(?i:[sdmt]|ll|ve|re)", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)  # fmt: skip
_OTHERS = (
    r" ?\p{N}+", r"\p{N}{1,3}", r"\p{N}{1,3}+", r"\p{N}", r"\p{N}+", "[0-9]", r"\d", " ?[^\\s\\p{L}\\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r" ?[\p{P}\p{S}]+[\r\n]*", "[一-龥\u3040-ゟ\u30a0-ヿ]+",
)  # fmt: skip
_BLANKS = (r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s++$", r"\s+", r"\s")
_ALTERNATIVES = {*_LETTERS, *_OTHERS, *_BLANKS}


class TextEncoder:
    """Token ids of texts without special tokens around them, as one tokenizer makes them.

    Attributes:
        remembers: Whether words are tokenized once and remembered.
    """

    def __init__(self, tokenizer: Any, *, remember: bool = True):
        """Look at how the tokenizer cuts texts.

        Args:
            tokenizer: Any object with the interface of a transformers tokenizer.
            remember: Tokenize each word once, where that gives the same tokens.
        """
        self.tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self.remembers = remember and self._backend is not None and words_are_independent(self._backend)
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """The token ids of each text; the arrays are not to be written to."""
        if not texts:
            return []
        if not self.remembers:
            return [np.array(ids, dtype=np.int32) for ids in self._whole(texts)]
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        words = [_WORDS.findall(text) or [text] for text in texts]
        new = set().union(*words).difference(known)
        self._learn(new)
        found = [np.frombuffer(b"".join(map(known.__getitem__, some)), dtype=np.int32) for some in words]
        for word in new:
            if len(word) > _LONGEST_WORD:
                del known[word]
        return found

    def token_at(self, text: str, ids: Ids, position: int) -> int:
        """Number of tokens of a text before the one that holds a character, or the next that any token holds.

        Args:
            text: The text.
            ids: Its tokens.
            position: Of the character.
        """
        if self._backend is None:
            return common(self.encode([text[:position]])[0].tolist(), ids.tolist())
        start, stop = self._word_at(text, position) if self.remembers else (0, len(text))
        self._free()
        record = self._backend.encode(text[start:stop], add_special_tokens=False)
        for index in range(position - start, stop - start):
            token = record.char_to_token(index)
            if token is not None:
                return int(token) + (len(self.encode([text[:start]])[0]) if start else 0)
        return len(ids) if stop == len(text) else self.token_at(text, ids, stop)

    def _word_at(self, text: str, position: int) -> tuple[int, int]:
        """Where the word begins and ends that a character lies in."""
        start = 0
        for border in _BORDER.finditer(text, max(0, position - 400)):
            if border.start() > position:
                return start, border.start()
            start = border.start()
        return start, len(text)

    def _learn(self, words: Iterable[str]) -> None:
        """Tokenize words, many in one text: to begin a text takes longer than a word does."""
        alone = [word for word in words if not _INNER.fullmatch(word)]
        for word, own in zip(alone, self._whole(alone), strict=True):
            self._known[word] = array("i", own).tobytes()
        inner = [word for word in words if _INNER.fullmatch(word)]
        groups = [inner[start : start + _TOGETHER] for start in range(0, len(inner), _TOGETHER)]
        self._free()
        records = self._backend.encode_batch(["".join(group) for group in groups], add_special_tokens=False)
        for group, record in zip(groups, records, strict=True):
            ids = np.array(record.ids, dtype=np.int32)
            ends = np.cumsum([len(word) for word in group])
            begins = np.array([start for start, _ in record.offsets])
            stops = np.searchsorted(begins, ends).tolist()
            for word, start, stop in zip(group, [0, *stops], stops, strict=False):
                self._known[word] = ids[start:stop].tobytes()

    def _whole(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """Whole texts through the tokenizer."""
        if self._backend is None:
            return self._called(texts)
        self._free()
        return (one.ids for one in self._backend.encode_batch_fast(list(texts), add_special_tokens=False))

    def _free(self) -> None:
        """Let the backend neither cut nor pad, as a call of the tokenizer does."""
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self.tokenizer.split_special_tokens

    def _called(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = batch["input_ids"]
        return ids


def words_are_independent(backend: Any) -> bool:
    """Whether the tokens of a text are those of its words, one after the other.

    Args:
        backend: A `tokenizers.Tokenizer`.
    """
    if getattr(backend.model, "dropout", None):  # merges left out by chance
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.rstrip or token.single_word or _CROSSES.search(token.content):
            return False
    normal, splits = _state(backend.normalizer), _state(backend.pre_tokenizer)
    # A blank composes with no character in front of it.
    if any(step["type"] != "NFC" for step in normal) or not splits:
        return False
    return all(map(_is_local, splits)) and any(map(_splits_at_blanks, splits))


def _state(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, as tokenizer.json writes them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return _steps(state)


def _steps(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    inner = state.get("pretokenizers", state.get("normalizers"))
    return [dict(state)] if inner is None else [step for one in inner for step in _steps(one)]


def _is_local(split: Mapping[str, Any]) -> bool:
    """Whether a step looks across no blank between two words."""
    if split["type"] == "ByteLevel":
        return not split["add_prefix_space"]
    if split["type"] == "Split":
        isolates = split["behavior"] in ("Isolated", "Removed") and not split["invert"]
        return isolates and _alternatives(split) <= _ALTERNATIVES
    return bool(split["type"] == "Digits")


def _splits_at_blanks(split: Mapping[str, Any]) -> bool:
    if split["type"] == "ByteLevel":
        return bool(split["use_regex"])
    return split["type"] == "Split" and split["behavior"] == "Isolated" and r"\s+" in _alternatives(split)


def _alternatives(split: Mapping[str, Any]) -> set[str]:
    """What the pattern of a step matches: the parts between its outermost bars."""
    pattern = split["pattern"].get("Regex")
    if pattern is None:
        return {split["pattern"]["String"], "not a pattern"}
    parts, depth, in_class, position = [""], 0, False, 0
    while position < len(pattern):
        letter = pattern[position : position + (2 if pattern[position] == "\\" else 1)]
        position += len(letter)
        in_class = letter == "[" or (in_class and letter != "]")
        if not in_class:
            depth += (letter == "(") - (letter == ")")
        if letter == "|" and not in_class and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return set(parts)
