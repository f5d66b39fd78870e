"""A few thousand of many pairs: the most diverse ones, by the margin of scores, or at random.

Diverse: as many clusters as pairs are wanted, and of each cluster the pair nearest to its centre. What that
gains is measured, and compared with pairs drawn at random: how far, on average, a pair that was left out is
from the nearest one that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orpo.curation.filters import check_scores
from orpo.curation.fingerprints import written
from orpo.curation.folder import PreparedData, check_out, describe_input, write_folder
from orpo.curation.parting import TRAIN
from orpo.curation.reading import check_packages, curation_settings, only_name, other_splits, read_input
from orpo.curation.sampling import take_shares
from orpo.curation.steps import Sieve, Step
from orpo.curation.texts import asked
from orpo.data.stages import report
from orpo.errors import ConfigError
from orpo.evaluation.vectors import Float32, SentenceEncoder, tfidf
from orpo.pairs import PreferencePair
from orpo.settings.config import OrpoSettings

By = Literal["diversity", "margin", "random"]
BYS: tuple[By, ...] = ("diversity", "margin", "random")
_CHARACTERS = 4000
"""Of a pair's text that are looked at."""
_CHUNK = 4096
_PASSES = 5
"""Times that each pair is looked at while clusters are found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetOptions:
    """What `subset_data` does.

    Attributes:
        n: Pairs to choose.
        by: `diversity`, `margin` (scores) or `random` (each source keeps its share).
        margin: With `by: margin`: the `largest` differences of scores, or those in the `middle`.
        embeddings: Folder of a sentence-embedding model, instead of TF-IDF.
        split: Split of the data to choose from; the others are taken over whole.
        seed: Of every random choice.
    """

    n: int = 7000
    by: By = "diversity"
    margin: Literal["largest", "middle"] = "largest"
    embeddings: str | None = None
    split: str = TRAIN
    seed: int = 0

    def check(self) -> None:
        """Check what was given.

        Raises:
            ConfigError: Naming the option.
        """
        if self.n < 1:
            raise ConfigError(f"n: {self.n} is out of range; expected at least 1")
        if self.by not in BYS:
            raise ConfigError(f"by: {self.by!r} is not one of {', '.join(BYS)}")
        if self.margin not in ("largest", "middle"):
            raise ConfigError(f"margin: {self.margin!r} is not one of largest, middle")


@dataclass(frozen=True, slots=True)
class Coverage:
    """How near the pairs that were left out are to the nearest chosen one.

    Attributes:
        chosen: Mean distance, in [0, 2], of vectors of length 1.
        random: The same for as many pairs drawn at random.
    """

    chosen: float
    random: float

    def line(self) -> str:
        """The comparison as a printable line."""
        change = 1 - self.chosen / self.random if self.random else 0.0
        which = "nearer" if change >= 0 else "farther"
        return (
            f"coverage: a pair left out is {self.chosen:.3f} from the nearest chosen one on average; "
            f"with pairs drawn at random {self.random:.3f} ({abs(change):.0%} {which})"
        )


def subset_data(
    data: Any,
    out: str | Path,
    options: SubsetOptions | None = None,
    *,
    settings: dict[str, Any] | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    **given: Any,
) -> PreparedData:
    """Choose some of many preference pairs, and write them to a folder as `prepare_data` does.

    Args:
        data: A file, folder, hub name or object, or a list of names. Further splits of a folder are kept.
        out: Folder to write; it must be empty or not there.
        options: What to choose.
        settings: Of a recipe, for how rows are read.
        force: Replace a folder that was prepared before.
        say: Gets each line as it is known.
        given: Fields of `SubsetOptions`, instead of `options`.

    Raises:
        ConfigError: An option is out of range, the folder is not empty, or a package is missing.
        DataError: The data cannot be read, or has no scores to choose by.
        ModelError: The embedding model cannot be used.
    """
    options = replace(options or SubsetOptions(), **given)
    options.check()
    say = say or (lambda line: None)
    if options.by != "random":
        check_packages(["sklearn"], f"choosing by {options.by}")
    folder = check_out(out, data, force=force)
    data = only_name(data)
    resolved = curation_settings(settings)
    report("reading", 0, None)
    read, step, lines = read_input(data, options.split, resolved)
    for line in [*lines, step.line()]:
        say(line)
    kept, chosen, coverage = choose(read.pairs, options)
    for line in [chosen.line(), *([coverage.line()] if coverage else [])]:
        say(line)
    splits = {TRAIN: [read.pairs[index] for index in kept]}
    inputs = describe_input(data, options.split, resolved.dataset_config)
    for name in other_splits(data, options.split, resolved.dataset_config):
        splits[name] = _taken_over(data, name, resolved, say)
        inputs += describe_input(data, name, resolved.dataset_config)
    about = {
        "command": "orpo data subset",
        "options": asdict(options),
        "settings": settings or {},
        "input": inputs,
        "coverage": None if coverage is None else asdict(coverage),
    }
    return write_folder(folder, splits, [step, chosen], about)


def _taken_over(
    data: Any, name: str, settings: OrpoSettings, say: Callable[[str], None]
) -> list[PreferencePair]:
    read, step, _ = read_input(data, name, settings)
    say(f"{name}: taken over whole, {step.line().removeprefix('read: ')}")
    return read.pairs


def choose(
    pairs: Sequence[PreferencePair], options: SubsetOptions
) -> tuple[list[int], Step, Coverage | None]:
    """Choose pairs.

    Returns:
        Their indices in order, what was done, and how well they cover the others where that was measured.
    """
    sieve = Sieve(f"choose by {options.by}", pairs)
    if options.by == "random":
        kept = take_shares([pair.group for pair in pairs], options.n, options.seed)
        return _chosen(sieve, pairs, kept, options), sieve.step(), None
    candidates = list(range(len(pairs)))
    if options.by == "margin":
        check_scores(pairs, "--by margin")
        candidates = [index for index in candidates if pairs[index].scores is not None]
        for index in sorted(set(range(len(pairs))) - set(candidates)):
            sieve.remove(index, "no scores")
    if len(candidates) <= options.n:
        return sieve.kept, sieve.step(f"no more than {options.n:,}: all are taken"), None
    folder = options.embeddings
    if folder:
        vectors = SentenceEncoder(folder).encode([text_of(pair) for pair in pairs])
    else:
        vectors = tfidf(map(text_of, pairs), len(pairs), seed=options.seed)
    if options.by == "margin":
        kept = _by_margin(pairs, candidates, options)
    else:
        kept = diverse(vectors, options.n, seed=options.seed)
    coverage = measure_coverage(vectors, kept, seed=options.seed)
    return _chosen(sieve, pairs, kept, options), sieve.step(), coverage


def text_of(pair: PreferencePair) -> str:
    """What a pair is compared by: the question and the chosen answer."""
    half = _CHARACTERS // 2
    return f"{asked(pair)[:half]}\n{written(pair.chosen)[:half]}"


def _chosen(
    sieve: Sieve, pairs: Sequence[PreferencePair], kept: list[int], options: SubsetOptions
) -> list[int]:
    for index in sorted(set(range(len(pairs))) - set(kept)):
        sieve.remove(index, f"not among the {options.n:,}")
    return kept


def _by_margin(
    pairs: Sequence[PreferencePair], candidates: Sequence[int], options: SubsetOptions
) -> list[int]:
    """The pairs of the largest margins, or of those nearest to the median."""
    margins = np.array([pairs[index].margin for index in candidates], dtype=np.float64)
    distance = -margins if options.margin == "largest" else np.abs(margins - np.median(margins))
    # Equal margins (ratings are whole numbers) are drawn, so that the order of the file decides nothing.
    order = np.lexsort((np.random.default_rng(options.seed).random(len(margins)), distance))
    return sorted(candidates[int(place)] for place in order[: options.n])


def diverse(vectors: Float32, number: int, *, seed: int) -> list[int]:
    """The members nearest to the centres of `number` clusters; indices in order.

    Args:
        vectors: Of length 1, [n, d].
        number: How many to choose, at most n.
        seed: Of the clusters' first centres.
    """
    from sklearn.cluster import MiniBatchKMeans

    clusters = MiniBatchKMeans(number, random_state=seed, n_init=1, reassignment_ratio=0.0)
    order = np.random.default_rng(seed).permutation(len(vectors))
    size, total = max(_CHUNK, number), _PASSES * len(vectors)
    report("clustering", 0, total)
    clusters.partial_fit(vectors[order[: max(size, 3 * number)]])  # draws the first centres
    for start in range(0, total, size):
        report("clustering", start, total)
        clusters.partial_fit(vectors[order[np.arange(start, start + size) % len(vectors)]])
    members = clusters.predict(vectors)
    near = np.linalg.norm(vectors - clusters.cluster_centers_[members], axis=1)
    order = np.lexsort((near, members))
    labels = members[order]
    first = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    chosen = order[first].tolist()
    # Clusters without members leave places, which go to the pairs farthest from what is chosen.
    distance = nearest(vectors, vectors[chosen])
    distance[chosen] = -1.0
    while len(chosen) < number:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(vectors - vectors[chosen[-1]], axis=1))
        distance[chosen] = -1.0
    return sorted(chosen)


def nearest(vectors: Float32, chosen: Float32) -> Float32:
    """Distance of each vector to the nearest of some, [n]; all are of length 1."""
    found = np.empty(len(vectors), dtype=np.float32)
    for start in range(0, len(vectors), _CHUNK):
        report("measuring", start, len(vectors))
        product = (vectors[start : start + _CHUNK] @ chosen.T).max(1)
        found[start : start + _CHUNK] = np.sqrt(np.maximum(0, 2 - 2 * product))
    return found


def measure_coverage(vectors: Float32, chosen: Sequence[int], *, seed: int) -> Coverage:
    """Compare chosen pairs with as many drawn at random."""
    drawn = np.random.default_rng(seed).choice(len(vectors), len(chosen), replace=False)

    def left_out(indices: Any) -> float:
        rest = np.setdiff1d(np.arange(len(vectors)), indices)
        return float(nearest(vectors[rest], vectors[indices]).mean())

    return Coverage(left_out(list(chosen)), left_out(drawn))
