"""Pairs that repeat or contradict another, and pairs whose sides hardly differ.

Exact: the same word for word, runs of blanks aside. Near: prompt, chosen and rejected each nearly repeat
those of one earlier pair. Of repeats the first stays; of contradictions none does, because nobody can tell
which is right.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Hashable, Iterable, Sequence

from orpo.curation.fingerprints import context, fingerprint, written
from orpo.curation.similar import similar_groups
from orpo.curation.steps import Sieve, Step
from orpo.curation.texts import asked
from orpo.pairs import PreferencePair

SIMILAR_SIDES, REPEATS, CONTRADICTIONS, NEAR_REPEATS = (
    "similar_sides",
    "duplicates",
    "contradictions",
    "near_duplicates",
)
KINDS = {
    SIMILAR_SIDES: "the sides differ in case, blanks or punctuation alone",
    REPEATS: "repeats an earlier pair",
    CONTRADICTIONS: "contradicts another pair: same prompt, sides swapped",
    NEAR_REPEATS: "nearly repeats an earlier pair",
}
"""What is removed -> the reason."""
# Signs that change what a number or a formula says are no punctuation here.
_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[\s*_#\"'`!?;:\u2018\u2019\u201c\u201d]")


def remove_repeats(pairs: Sequence[PreferencePair], *, keep: Collection[str] = ()) -> tuple[list[int], Step]:
    """Find pairs that add nothing, or that contradict another.

    Args:
        pairs: To look at.
        keep: Of `KINDS`, what is counted and stays.

    Returns:
        Indices of the pairs that stay, and what was found.
    """
    sieve = Sieve("deduplicate", pairs)
    gone: set[int] = set()

    def found(indices: Iterable[int], kind: str) -> None:
        for index in indices:
            if kind in keep:
                sieve.change(index, f"{KINDS[kind]} (kept)")
            else:
                gone.add(index)
                sieve.remove(index, KINDS[kind])

    keys = [
        (fingerprint(pair.prompt, pair.tools), fingerprint(pair.chosen), fingerprint(pair.rejected))
        for pair in pairs
    ]
    found((index for index, pair in enumerate(pairs) if _are_similar(pair)), SIMILAR_SIDES)
    found(_later(keys), REPEATS)
    found(_contradictions(keys), CONTRADICTIONS)
    # Those that repeat word for word, and were kept, are not counted once more.
    left = [index for index in _firsts(keys) if index not in gone]
    near = _near_keys([pairs[index] for index in left])
    found((left[place] for place in _later(near)), NEAR_REPEATS)
    return sieve.kept, sieve.step()


def _firsts(keys: Sequence[Hashable]) -> list[int]:
    first: dict[Hashable, int] = {}
    return [index for index, key in enumerate(keys) if first.setdefault(key, index) == index]


def _later(keys: Sequence[Hashable]) -> list[int]:
    """Indices of keys that stand earlier too."""
    return sorted(set(range(len(keys))) - set(_firsts(keys)))


def _contradictions(keys: Sequence[tuple[bytes, bytes, bytes]]) -> list[int]:
    """Indices of pairs whose sides stand swapped in another pair."""
    seen = set(keys)
    return [
        index
        for index, (prompt, chosen, rejected) in enumerate(keys)
        if chosen != rejected and (prompt, rejected, chosen) in seen
    ]


def _are_similar(pair: PreferencePair) -> bool:
    return pair.rejected is not None and _bare(written(pair.chosen)) == _bare(written(pair.rejected))


def _bare(text: str) -> str:
    return _PUNCTUATION.sub("", text.casefold())


def _near_keys(pairs: Sequence[PreferencePair]) -> list[Hashable]:
    """Equal for pairs all of whose parts nearly repeat each other."""
    number = len(pairs)
    prompts = similar_groups(map(asked, pairs), number, what="comparing prompts")
    sides = itertools.chain((p.chosen for p in pairs), (p.rejected for p in pairs))
    answers = similar_groups(map(written, sides), 2 * number, what="comparing answers")
    return [
        (context(pair), prompts[index], answers[index], answers[number + index])
        for index, pair in enumerate(pairs)
    ]
