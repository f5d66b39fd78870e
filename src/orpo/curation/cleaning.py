"""Texts without what no model should learn: control characters, trailing blanks; broken encoding is counted.

What could change the meaning of a text is done only where it is asked for: repairing an encoding that was
read wrongly (`fix_text`), leaving out rows with characters that are lost for good (`drop_broken`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orpo.curation.steps import Sieve, Step
from orpo.curation.wording import is_mojibake
from orpo.data.preferences import cannot_train
from orpo.data.stages import report
from orpo.pairs import PreferencePair

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_HALF = re.compile("[\ud800-\udfff]")
_LOST = "holds the sign of a lost character (U+FFFD)"
_HALF_REASON = "holds half of a character (a lone surrogate)"
_WRONG = "seems to be read in a wrong encoding"


def clean(
    pairs: Sequence[PreferencePair],
    *,
    fix_text: bool = False,
    drop_broken: bool = False,
) -> tuple[list[PreferencePair], Step]:
    """Clean the texts of pairs, and remove the pairs that cannot train afterwards.

    Args:
        pairs: As read.
        fix_text: Repair encodings that were read wrongly (ftfy); otherwise they are counted.
        drop_broken: Remove pairs with the sign of a lost character (U+FFFD); otherwise they are counted.
    """
    sieve = Sieve("clean", pairs)
    cleaned = []
    for index, pair in enumerate(pairs):
        if index % 1000 == 0:
            report("cleaning", index, len(pairs))
        cleaner = _Cleaner(fix_text)
        cleaned.append(cleaner.pair(pair))
        reason = _HALF_REASON if _holds_half(cleaned[-1]) else cannot_train(cleaned[-1])
        if reason is None and drop_broken and _LOST in cleaner.said:
            reason = _LOST
        if reason is not None:
            sieve.remove(index, reason)
        for words in cleaner.said if reason is None else ():
            sieve.change(index, words)
    report("cleaning", len(pairs), len(pairs))
    step = sieve.step()
    if _WRONG in step.changed and not fix_text:
        step = replace(step, remark="fix_text repairs encodings")
    return [cleaned[index] for index in sieve.kept], step


class _Cleaner:
    """Cleans one pair, and says what there was to clean; each thing once."""

    def __init__(self, fix_text: bool) -> None:
        self._fix_text = fix_text
        self.said: dict[str, None] = {}

    def pair(self, pair: PreferencePair) -> PreferencePair:
        """The pair with clean texts; the same object where nothing changes."""
        prompt = self._side(pair.prompt, is_answer=False)
        chosen = self._side(pair.chosen, is_answer=True)
        rejected = None if pair.rejected is None else self._side(pair.rejected, is_answer=True)
        return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected) if self.said else pair

    def _side(self, side: Any, *, is_answer: bool) -> Any:
        if isinstance(side, str):
            text = self._text(side)
            return self._stripped(text) if is_answer else text  # a continuation needs the blank before it
        return [{**turn, "content": self._stripped(self._text(turn["content"]))} for turn in side]

    def _stripped(self, text: str) -> str:
        short = text.rstrip()
        if short != text:
            self.said["trailing blanks left out"] = None
        return short

    def _text(self, text: str) -> str:
        if not text.isascii():
            text = self._decoded(text)
        if _CONTROL.search(text):
            self.said["control characters left out"] = None
            text = _CONTROL.sub("", text)
        return text

    def _decoded(self, text: str) -> str:
        from ftfy import fix_encoding

        if "\ufffd" in text:
            self.said[_LOST] = None
        if not is_mojibake(text, text.encode("utf-8", "surrogatepass"), fix_encoding):
            return text
        fixed = fix_encoding(text) if self._fix_text else text
        self.said[_WRONG if fixed == text else "encoding repaired"] = None
        return fixed


def _holds_half(pair: PreferencePair) -> bool:
    """Whether anything of the pair cannot be written as UTF-8."""
    further = [pair.tools, pair.chat_template_kwargs]
    further += [turn for side in (pair.prompt, pair.chosen, pair.rejected or "") if not isinstance(side, str)
                for turn in side if len(turn) > 2]  # fmt: skip
    texts = [pair.group or "", pair.source]
    texts += [json.dumps(value, ensure_ascii=False) for value in further if value]
    return any(not text.isascii() and _HALF.search(text) for text in texts)
