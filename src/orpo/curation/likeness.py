"""How like each other two answers are, and whether they say the same.

Words in any script are compared by runs of four letters. Numbers and signs must be equal: "x = 3" and
"x = -3" share all but one letter, and are as different as a good answer and a bad one can be.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

NEARLY_SAME = 0.95
"""Likeness from which two texts with the same numbers and signs say the same."""
_RUN = 4
_EXACT = re.compile(r"\d+(?:[.,]\d+)*|[-+*/<>=%^]")


def normalised(text: str) -> str:
    """A text without its form: case, blanks, variants of letters, punctuation at its ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!\"'`*“”")


def says_the_same(one: str, other: str) -> bool:
    """Whether two texts are equal but for their form, or nearly, with the same numbers and signs."""
    if normalised(one) == normalised(other):
        return True
    return _EXACT.findall(one) == _EXACT.findall(other) and likeness(one, other) >= NEARLY_SAME


def likeness(one: str, other: str) -> float:
    """Share of runs of four letters that two texts have in common (Dice), in [0, 1]."""
    mine, theirs = _runs(one), _runs(other)
    total = mine.total() + theirs.total()
    return 2 * (mine & theirs).total() / total if total else 0.0


def _runs(text: str) -> Counter[str]:
    text = f" {normalised(text)} "
    return Counter(text[start : start + _RUN] for start in range(max(1, len(text) - _RUN + 1)))
