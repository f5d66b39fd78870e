"""Texts that nearly repeat an earlier one, by MinHash over runs of three words.

Two texts of which a share J of the word runs is common agree in each of the hashes with probability J. Bands
of hashes find candidates without comparing all texts; the share of agreeing hashes then estimates J.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from rensa import RMinHashDeduplicator

from orpo.data.words import runs_of, words_of

SIMILARITY = 0.8
NUM_HASHES, NUM_BANDS = 256, 32
MAX_WORDS = 512
"""Words of a text that are looked at."""
_BATCH = 2000

_Entry = tuple[str, list[bytes]]


def near_duplicates(texts: Sequence[str], known: Sequence[str] | None = None) -> list[int]:
    """Indices of texts of whose word runs about `SIMILARITY` or more stand in an earlier, other text.

    An earlier text counts where it is no near-duplicate itself. Texts of fewer than three words, and exact
    repeats, are never counted.

    Args:
        texts: In order.
        known: Look among these, and not among the texts.
    """
    index = RMinHashDeduplicator(SIMILARITY, NUM_HASHES, True, NUM_BANDS, 0)
    for batch in _batches(known or (), without=()):
        index.add_pairs([(f"known {key}", runs) for key, runs in batch])
    found = []
    for batch in _batches(texts, without=known or ()):
        old = (
            index.is_duplicate_pairs(batch)
            if known is not None
            else [not new for new in index.add_pairs(batch)]
        )
        found += [int(key) for (key, _), is_old in zip(batch, old, strict=True) if is_old]
    return found


def _batches(texts: Sequence[str], without: Sequence[str]) -> Iterator[list[_Entry]]:
    """Index and runs of texts that are long enough, repeat no earlier one and are not among `without`."""
    entries = _entries(texts, set(without))
    while batch := list(islice(entries, _BATCH)):
        yield batch


def _entries(texts: Sequence[str], seen: set[str]) -> Iterator[_Entry]:
    for index, text in enumerate(texts):
        if text in seen:
            continue
        seen.add(text)
        runs = runs_of(words_of(text)[:MAX_WORDS], 3)
        if runs:
            yield str(index), runs
