"""How long prompts and answers are, what a run costs in tokens, and what each `max_length` drops or cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.data.counts import RowCounts
from orpo.data.tokenize import BATCH, PairTokenizer, shorter_prompts
from orpo.engine.planning import pair_tokens
from orpo.pairs import PreferencePair

LIMITS = (512, 1024, 2048, 4096)
"""Each `max_length` that is looked at, besides the recipe's."""
_PERCENTILES = (5, 25, 50, 75, 95, 99)

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution of lengths.

    Attributes:
        number: Of lengths.
        mean: Their mean.
        smallest: The smallest.
        percentiles: Percentile -> length.
        largest: The largest.
        histogram: (lower bound, number) of bins, each about 1.2 times as wide as the last.
    """

    number: int
    mean: float
    smallest: int
    percentiles: dict[int, int]
    largest: int
    histogram: tuple[tuple[int, int], ...]

    @property
    def median(self) -> int:
        """Half are longer."""
        return self.percentiles[50]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "number": self.number,
            "mean": round(self.mean, 2),
            "min": self.smallest,
            **{f"p{key}": value for key, value in self.percentiles.items()},
            "max": self.largest,
            "histogram": [list(one) for one in self.histogram],
        }


def spread(lengths: Sequence[int] | Int64) -> Spread | None:
    """The distribution of lengths; None where there are none."""
    values = np.asarray(lengths, dtype=np.int64)
    if not len(values):
        return None
    edges = [0, *sorted({round(2 ** (step / 4)) for step in range(4 * 40)})]
    edges = [edge for edge in edges if edge <= 2 * values.max() + 1]
    counts, _ = np.histogram(values, [*edges, np.inf])
    filled = np.flatnonzero(counts)
    bins = tuple((edges[place], int(counts[place])) for place in range(filled[0], filled[-1] + 1))
    at = np.percentile(values, _PERCENTILES, method="lower").astype(int).tolist()
    return Spread(
        len(values),
        float(values.mean()),
        int(values.min()),
        dict(zip(_PERCENTILES, at, strict=True)),
        int(values.max()),
        bins,
    )


@dataclass(frozen=True, slots=True)
class Limit:
    """What one `max_length` does, and what an epoch then costs.

    Attributes:
        max_length: In tokens; the longer side counts.
        whole: Pairs that train as they are.
        cut: Pairs that lose the oldest turns of their prompt.
        dropped: Pairs that are too long with the last question alone.
        shared_tokens: Tokens of an epoch in this package, which runs each prompt once for both sides.
        padded_tokens: Tokens of an epoch in a trainer that runs the prompt with each side and pads a batch to
            its longest side.
    """

    max_length: int
    whole: int
    cut: int
    dropped: int
    shared_tokens: int
    padded_tokens: int

    def to_json(self) -> dict[str, int]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Tokens:
    """Pairs as tokens of a model.

    Attributes:
        model: Whose tokens.
        pairs: Pairs that were tokenized.
        of_pairs: Pairs there are; figures of `limits` are scaled up where not all were tokenized.
        counts: Reasons why pairs do not train, or train in a changed form, with this model's template.
        prompt: Lengths of the prompts.
        chosen: Lengths of the rest of the chosen sides.
        rejected: Lengths of the rest of the rejected sides.
        limits: Each `max_length`, in order.
        max_length: The one of the settings; None: no limit.
        batch_size: Pairs of a padded batch.
        epochs: Of the settings.
    """

    model: str
    pairs: int
    of_pairs: int
    counts: RowCounts
    prompt: Spread | None
    chosen: Spread | None
    rejected: Spread | None
    limits: tuple[Limit, ...]
    max_length: int | None
    batch_size: int
    epochs: float

    @property
    def set_limit(self) -> Limit:
        """The limit of the settings; the one that leaves all whole where they set none."""
        return next((one for one in self.limits if one.max_length == self.max_length), self.limits[-1])

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.model,
            "pairs": self.pairs,
            "of_pairs": self.of_pairs,
            "rows": self.counts.to_dict(),
            **{name: spread_json(getattr(self, name)) for name in ("prompt", "chosen", "rejected")},
            "limits": [one.to_json() for one in self.limits],
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
        }


def spread_json(one: Spread | None) -> dict[str, Any] | None:
    """A distribution as plain values."""
    return None if one is None else one.to_json()


def count_tokens(
    pairs: Sequence[PreferencePair],
    encoder: PairTokenizer,
    *,
    of_pairs: int,
    model: str,
    batch_size: int,
    epochs: float,
    progress: Callable[[int], None],
) -> Tokens:
    """Tokenize pairs and look at their lengths.

    Args:
        pairs: All, or those drawn.
        encoder: Of the model, with the `max_length` of the settings.
        of_pairs: How many pairs there are.
        model: Its name.
        batch_size: Pairs of a padded batch.
        epochs: Of the settings.
        progress: Called with the number of pairs each time some are done.
    """
    limit = encoder.max_length
    encoder.max_length = None
    lengths = _lengths(pairs, encoder, progress)
    counts = encoder.counts
    counts.total = len(pairs)
    trains = lengths[:, 0] > 0
    kept = [pair for pair, one in zip(pairs, trains, strict=True) if one]
    lengths = lengths[trains]
    scale = of_pairs / max(len(pairs), 1)
    limits = sorted({*LIMITS, limit or int(_sides(lengths).max(initial=2))})
    found = tuple(_limit(kept, lengths, encoder, one, scale, batch_size) for one in limits)
    encoder.max_length = limit
    return Tokens(
        model=model,
        pairs=len(pairs),
        of_pairs=of_pairs,
        counts=counts,
        prompt=spread(lengths[:, 0]),
        chosen=spread(lengths[:, 1]),
        rejected=spread(lengths[:, 2][lengths[:, 2] > 0]),
        limits=found,
        max_length=limit,
        batch_size=batch_size,
        epochs=epochs,
    )


def _lengths(
    pairs: Sequence[PreferencePair], encoder: PairTokenizer, progress: Callable[[int], None] | None = None
) -> Int64:
    """Tokens of prompt, chosen and rejected, `[n, 3]`; zeros where a pair does not train."""
    encoder.counts = RowCounts()
    found = np.zeros((len(pairs), 3), np.int64)
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        for index, one in enumerate(encoder.encode(batch), start=start):
            if one is not None:
                found[index] = len(one.prompt), len(one.chosen), len(one.rejected)
        if progress is not None:
            progress(len(batch))
    return found


def _sides(lengths: Int64) -> Int64:
    """Tokens of each pair's longer side, the prompt included, `[n]`."""
    sides: Int64 = lengths[:, 0] + lengths[:, 1:].max(1, initial=0)
    return sides


def _limit(
    pairs: Sequence[PreferencePair],
    lengths: Int64,
    encoder: PairTokenizer,
    limit: int,
    scale: float,
    batch_size: int,
) -> Limit:
    encoder.max_length = limit
    fitting = lengths.copy()
    over = np.flatnonzero(_sides(lengths) > limit)
    fitting[over] = 0
    cuttable = [index for index in over.tolist() if shorter_prompts(pairs[index].prompt)]
    fitting[cuttable] = _lengths([pairs[index] for index in cuttable], encoder)
    kept = fitting[fitting[:, 0] > 0]
    num_cut = int((fitting[cuttable][:, 0] > 0).sum())
    return Limit(
        limit,
        whole=round(scale * (len(lengths) - len(over))),
        cut=round(scale * num_cut),
        dropped=round(scale * (len(over) - num_cut)),
        shared_tokens=round(scale * int(pair_tokens(kept).sum())),
        padded_tokens=round(scale * padded_tokens(kept, batch_size)),
    )


def padded_tokens(lengths: Int64, batch_size: int, seed: int = 0) -> int:
    """Tokens of an epoch of padded batches, in random order.

    Each pair takes two lines, one for a side with its prompt, as wide as the longest side of its batch.

    Args:
        lengths: Tokens of prompt, chosen and rejected, `[n, 3]`.
        batch_size: Pairs of a batch.
        seed: Of the order.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    sides = _sides(lengths)[order]
    widths = [sides[start : start + batch_size] for start in range(0, len(sides), batch_size)]
    return sum(2 * len(batch) * int(batch.max()) for batch in widths)
