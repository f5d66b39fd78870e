"""Groups of texts that nearly repeat each other, by MinHash over runs of three words (rensa).

`orpo.data.near_duplicates` tells which texts repeat an earlier one; here it matters which texts belong
together: they are to stay on one side of a split, and a pair is repeated only where all of its parts are.
"""

from __future__ import annotations

from collections.abc import Iterable

from rensa import RMinHash, RMinHashLSH

from orpo.curation.fingerprints import fingerprint
from orpo.data.near_duplicates import SIMILARITY
from orpo.data.stages import report
from orpo.data.words import runs_of, words_of

NUM_HASHES, NUM_BANDS = 128, 32
CROWD = 64
"""Members of a group that further ones are compared with."""


class Groups:
    """Numbers that can be joined; the number of a group is its smallest member."""

    def __init__(self) -> None:
        self._parents: list[int] = []

    def add(self, like: int | None = None) -> int:
        """Add a number, to the group of another or to one of its own."""
        number = len(self._parents)
        self._parents.append(number if like is None else like)
        return number

    def of(self, number: int) -> int:
        """The group of a number."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        low, high = sorted((self.of(one), self.of(other)))
        self._parents[high] = low

    def numbers(self) -> list[int]:
        """The group of every number."""
        return [self.of(number) for number in range(len(self._parents))]


def similar_groups(
    texts: Iterable[str],
    total: int,
    *,
    similarity: float = SIMILARITY,
    what: str = "comparing texts",
) -> list[int]:
    """The same number for texts that share about `similarity` of their word runs, directly or by others.

    Texts of fewer than three words are of one group only where they are the same, case and blanks aside.

    Args:
        texts: One after the other.
        total: How many there are.
        similarity: Share of the word runs of two texts that both have, in [0.5, 1]; estimated to about 0.04.
        what: The stage that is reported.
    """
    index = RMinHashLSH(threshold=SIMILARITY, num_perm=NUM_HASHES, num_bands=NUM_BANDS)
    groups, first, signatures = Groups(), dict[bytes, int](), dict[int, RMinHash]()
    for number, text in enumerate(texts):
        if number % 1000 == 0:
            report(what, number, total)
        earlier = first.setdefault(fingerprint(text.casefold()), number)
        groups.add(earlier)
        runs = runs_of(words_of(text), 3) if earlier == number else []
        if not runs:
            continue
        signature = RMinHash(NUM_HASHES, 0)
        signature.update(runs)
        near = index.query(signature)
        for other in near:
            if groups.of(other) != groups.of(number) and signatures[other].jaccard(signature) >= similarity:
                groups.join(other, number)
        if sum(groups.of(other) == groups.of(number) for other in near) < CROWD:
            signatures[number] = signature
            index.insert(number, signature)
    report(what, total, total)
    return groups.numbers()
