"""What the texts themselves show: broken encoding, refusals, languages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from orpo.curation.texts import PairTexts
from orpo.data.refusals import beginning, refuses

LANGUAGE_SAMPLE = 2000
"""Answers whose language is told."""
_LANGUAGE_CHARACTERS, _FEWEST_LETTERS = 1000, 40


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of one kind: how many, and where the first three are."""

    number: int = 0
    first: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"number": self.number, "first": list(self.first)}


def found(sources: Iterable[str]) -> Found:
    """The rows at these sources."""
    listed = list(sources)
    return Found(len(listed), tuple(listed[:3]))


# ------------------------------------------------------------------------------------- encoding

_CONTROLS = bytes({*range(32), 127} - {9, 10, 13})
_FURTHER_CONTROLS = re.compile(b"\xc2[\x80-\x9f]")
# UTF-8 read as a one-byte code: a leading byte, then the signs that its other bytes become. ftfy decides.
_BEHIND = (
    "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2026\u2030\u2039\u203a"
    "\u20ac\u2122"
)
_SUSPECTS = {
    b"\xc3": re.compile(f"[\xc2-\xf4][{_BEHIND}]"),
    b"\xd0": re.compile("(?:[\u0420\u0421][\xa0-\xbf\u0402-\u045f\u2013-\u2122]){3}"),
}
"""First byte of the first sign of what may be mojibake, in UTF-8, and its pattern."""
_WINDOW, _WINDOWS = 40, 8


def broken_encoding(texts: PairTexts, progress: Callable[[int], None]) -> dict[str, Found]:
    """Pairs with U+FFFD, with control characters, and, where ftfy is installed, with mojibake.

    Args:
        texts: Of all pairs.
        progress: Called with the number of pairs each time some are done.
    """
    checks: dict[str, Callable[[str, bytes], bool]] = {
        "replacement characters": lambda _, raw: b"\xef\xbf\xbd" in raw,
        "control characters": has_control_characters,
    }
    with suppress(ImportError):
        from ftfy import fix_encoding

        checks["mojibake"] = lambda text, raw: is_mojibake(text, raw, fix_encoding)
    rows: dict[str, list[str]] = {name: [] for name in checks}
    for number, (*sides, source) in enumerate(
        zip(texts.prompts, texts.chosen, texts.rejected, texts.sources, strict=True), start=1
    ):
        encoded = [(text, text.encode("utf-8", "surrogatepass")) for text in sides]
        for name, is_broken in checks.items():
            if any(is_broken(text, raw) for text, raw in encoded):
                rows[name].append(source)
        if number % 1000 == 0:
            progress(1000)
    return {name: found(sources) for name, sources in rows.items()}


def has_control_characters(_: str, raw: bytes) -> bool:
    """Whether UTF-8 has one besides tab and the ends of lines."""
    if len(raw.translate(None, _CONTROLS)) < len(raw):
        return True
    return b"\xc2" in raw and _FURTHER_CONTROLS.search(raw) is not None


def is_mojibake(text: str, raw: bytes, fix_encoding: Callable[[str], str]) -> bool:
    """Whether ftfy would repair one of the first places that look like bytes read in the wrong code.

    Args:
        text: It.
        raw: The same in UTF-8.
        fix_encoding: Of ftfy.
    """
    for first, suspect in _SUSPECTS.items():
        if first in raw:
            for place in islice(suspect.finditer(text), _WINDOWS):
                window = text[max(place.start() - _WINDOW, 0) : place.end() + _WINDOW]
                if fix_encoding(window) != window:
                    return True
    return False


# ------------------------------------------------------------------------------------- refusals

_REFUSAL_WORDS = re.compile(
    r"\b(?:sorry|apologi[sz]e|unfortunately|can'?t|cannot|can not|won'?t|unable|illegal|unethical"
    r"|inappropriate|harmful|dangerous|as an ai|language model)\b"
)


def num_refusal_words(answer: str) -> int:
    """Words that refusals are made of, in an answer's beginning."""
    return sum(1 for _ in _REFUSAL_WORDS.finditer(beginning(answer)))


@dataclass(frozen=True, slots=True)
class Refusals:
    """Pairs whose answers refuse.

    Attributes:
        chosen: Share of the chosen answers, in [0, 1].
        rejected: Share of the rejected answers.
        only_chosen: Pairs in which the chosen answer alone refuses.
        only_rejected: Pairs in which the rejected answer alone refuses.
    """

    chosen: float
    rejected: float
    only_chosen: Found
    only_rejected: Found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "chosen": self.chosen,
            "rejected": self.rejected,
            "only_chosen": self.only_chosen.to_json(),
            "only_rejected": self.only_rejected.to_json(),
        }


def refusals(texts: PairTexts) -> Refusals:
    """Count the refusals of all pairs."""
    sides = list(zip(map(refuses, texts.chosen), map(refuses, texts.rejected), texts.sources, strict=True))
    number = max(len(sides), 1)
    return Refusals(
        sum(chosen for chosen, _, _ in sides) / number,
        sum(rejected for _, rejected, _ in sides) / number,
        found(source for chosen, rejected, source in sides if chosen and not rejected),
        found(source for chosen, rejected, source in sides if rejected and not chosen),
    )


# ------------------------------------------------------------------------------------- languages


@dataclass(frozen=True, slots=True)
class Languages:
    """Languages of answers.

    Attributes:
        answers: Chosen answers that were long enough to tell.
        of_answers: Chosen answers that were looked at.
        shares: ISO 639-1 code -> share of these, the largest first.
    """

    answers: int
    of_answers: int
    shares: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"answers": self.answers, "of_answers": self.of_answers, "shares": self.shares}


def languages(answers: Sequence[str]) -> Languages:
    """Tell the languages of answers; those with too few letters are left out. Needs py3langid.

    Raises:
        ImportError: py3langid is not installed.
    """
    import py3langid

    texts = [answer[:_LANGUAGE_CHARACTERS] for answer in answers]
    texts = [text for text in texts if sum(map(str.isalpha, text)) >= _FEWEST_LETTERS]
    counted = Counter(str(py3langid.classify(text)[0]) for text in texts)
    return Languages(
        len(texts), len(answers), {code: number / len(texts) for code, number in counted.most_common()}
    )
