"""Texts without what no model should learn: control characters, trailing blanks; broken encoding is counted.

What could change the meaning of a text is done only where it is asked for: repairing an encoding that was read
wrongly (`fix_text`), leaving out rows with characters that are lost for good (`drop_broken`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from orpo.curation.steps import Sieve, Step, Watch, unwatched
from orpo.curation.texts import Side
from orpo.data.preferences import cannot_train
from orpo.pairs import PreferencePair

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_HALF = re.compile("[\ud800-\udfff]")
_LOST = "holds the sign of a lost character (U+FFFD)"
_WRONG = "seems to be read in a wrong encoding"


def clean(
    pairs: Sequence[PreferencePair],
    *,
    fix_text: bool = False,
    drop_broken: bool = False,
    watch: Watch = unwatched,
) -> tuple[list[PreferencePair], Step]:
    """Clean the texts of pairs, and remove the pairs that cannot train afterwards.

    Args:
        pairs: As read.
        fix_text: Repair encodings that were read wrongly (ftfy); otherwise they are counted.
        drop_broken: Remove pairs with the sign of a lost character (U+FFFD); otherwise they are counted.
        watch: Told how far it is.
    """
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    sieve = Sieve("clean", pairs)
    cleaned = []
    for index, pair in enumerate(pairs):
        if index % 1000 == 0:
            watch("cleaning", index, len(pairs))
        said: dict[str, None] = {}  # each thing counts once for a pair

        def cleaned_text(text: str, said: dict[str, None] = said) -> str:
            if not text.isascii():
                if "\ufffd" in text:
                    said[_LOST] = None
                if is_bad(text):
                    fixed = fix_encoding(text) if fix_text else text
                    said[_WRONG if fixed == text else "encoding repaired"] = None
                    text = fixed
            if _CONTROL.search(text):
                said["control characters left out"] = None
                text = _CONTROL.sub("", text)
            return text

        new = _with_texts(pair, cleaned_text, said)
        cleaned.append(new)
        reason = "holds half of a character (a lone surrogate)" if _holds_half(new) else cannot_train(new)
        if reason is None and drop_broken and _LOST in said:
            reason = _LOST
        if reason is not None:
            sieve.remove(index, reason)
            continue
        for words in said:
            sieve.change(index, words)
    watch("cleaning", len(pairs), len(pairs))
    step = sieve.step()
    if _WRONG in step.changed and not fix_text:
        step = replace(step, remark="fix_text repairs encodings")
    return [cleaned[index] for index in sieve.kept], step


def _with_texts(
    pair: PreferencePair, clean_text: Callable[[str], str], said: dict[str, None]
) -> PreferencePair:
    """The pair with every text cleaned; the same object where nothing changes."""

    def stripped(text: str) -> str:
        short = text.rstrip()
        if short != text:
            said["trailing blanks left out"] = None
        return short

    def side(value: Any, *, is_answer: bool) -> Any:
        if isinstance(value, str):
            text = clean_text(value)
            return stripped(text) if is_answer else text  # the blank before a continuation belongs to it
        return [{**turn, "content": stripped(clean_text(turn["content"]))} for turn in value]

    prompt = side(pair.prompt, is_answer=False)
    chosen = side(pair.chosen, is_answer=True)
    rejected: Side | None = None if pair.rejected is None else side(pair.rejected, is_answer=True)
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected) if said else pair


def _holds_half(pair: PreferencePair) -> bool:
    """Whether anything of the pair cannot be written as UTF-8."""
    further = [pair.tools, pair.chat_template_kwargs]
    further += [turn for side in (pair.prompt, pair.chosen, pair.rejected or "") if not isinstance(side, str)
                for turn in side if len(turn) > 2]  # fmt: skip
    texts = [pair.group or "", pair.source]
    texts += [json.dumps(value, ensure_ascii=False) for value in further if value]
    return any(not text.isascii() and _HALF.search(text) for text in texts)
