"""Texts that nearly repeat an earlier one, by MinHash over runs of three words.

Two texts of which a share J of the word runs is common agree in each of the hashes with probability J. Bands
of hashes find candidates without comparing all texts; the share of agreeing hashes then estimates J.
"""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

NUM_HASHES, BAND = 64, 4
SIMILARITY = 0.8
MAX_WORDS = 512
"""Words of a text that are looked at."""


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """Indices of texts of whose word runs about `SIMILARITY` or more stand in an earlier, other text.

    Texts of fewer than three words, and exact repeats, are never counted.
    """
    words: dict[str, int] = {}
    random = np.random.default_rng(0)
    identity = random.integers(1, 2**63, 100_003, dtype=np.uint64)
    factor, shift = random.integers(1, 2**63, (2, NUM_HASHES), dtype=np.uint64) | np.uint64(1)
    buckets: defaultdict[bytes, list[int]] = defaultdict(list)
    signatures: dict[int, np.ndarray] = {}
    seen: set[str] = set()
    found = []
    for index, text in enumerate(texts):
        tokens = re.findall(r"\w+", text.lower())[:MAX_WORDS]
        if text in seen or len(tokens) < 3:
            continue
        seen.add(text)
        ids = identity[[words.setdefault(word, len(words)) % len(identity) for word in tokens]]
        runs = ids[:-2] * np.uint64(3) + ids[1:-1] * np.uint64(5) + ids[2:] * np.uint64(7)
        signature = ((runs[:, None] * factor + shift) >> np.uint64(32)).min(0)
        bands = [bytes([band]) + part.tobytes() for band, part in enumerate(signature.reshape(-1, BAND))]
        candidates = {other for band in bands for other in buckets[band][:16]}
        if any((signatures[other] == signature).mean() >= SIMILARITY for other in candidates):
            found.append(index)
        signatures[index] = signature
        for band in bands:
            buckets[band].append(index)
    return found
