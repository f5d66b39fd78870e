"""What is odd about a set of pairs before it is trained on: duplicates, contradictions, leaks, length bias.

Nothing is dropped here; these are findings about well-formed rows that a person should know of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from orpo.data.dataset import TokenizedDataset
from orpo.data.near_duplicates import near_duplicates
from orpo.data.words import text_of
from orpo.pairs import PreferencePair, side_key


@dataclass(frozen=True)
class LengthBias:
    """How far length alone tells the chosen answer from the rejected one.

    Attributes:
        mean_difference: Tokens of the chosen response minus those of the rejected one, averaged over pairs.
        standard_error: Of that mean.
        chosen_longer: Share of pairs whose chosen response is the longer one, in [0, 1]; equal lengths count
            half.
    """

    mean_difference: float
    standard_error: float
    chosen_longer: float

    def line(self) -> str:
        """The bias as a printable line."""
        which = "longer" if self.mean_difference >= 0 else "shorter"
        return (
            f"chosen answers are {abs(self.mean_difference):.1f} tokens {which} on average"
            f" (standard error {self.standard_error:.1f});"
            f" the longer answer is the chosen one in {self.chosen_longer:.0%} of the pairs"
        )


@dataclass(frozen=True)
class Findings:
    """Findings about training pairs, and about the evaluation pairs that go with them.

    Attributes:
        pairs: Training pairs.
        duplicates: Pairs that repeat an earlier one word for word.
        near_duplicates: Pairs whose prompt nearly repeats an earlier, other one.
        contradictions: Pairs whose sides stand swapped in another pair with the same prompt.
        shared_prompts: Evaluation pairs whose prompt is also trained on; None without evaluation data.
        length_bias: Of the tokenized training pairs; None where they are not given.
        examples: Finding -> where the first few of it are.
    """

    pairs: int
    duplicates: int
    near_duplicates: int
    contradictions: int
    shared_prompts: int | None = None
    length_bias: LengthBias | None = None
    examples: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One printable line per finding; none where nothing was found."""
        found = {
            "duplicates": (self.duplicates, "pair repeats an earlier one", "pairs repeat an earlier one"),
            "near_duplicates": (
                self.near_duplicates,
                "prompt nearly repeats an earlier one",
                "prompts nearly repeat an earlier one",
            ),
            "contradictions": (
                self.contradictions,
                "pair contradicts another: same prompt, sides swapped",
                "pairs contradict another: same prompt, sides swapped",
            ),
            "shared_prompts": (
                self.shared_prompts or 0,
                "evaluation pair has a prompt that is trained on",
                "evaluation pairs have a prompt that is trained on",
            ),
        }  # fmt: skip
        lines = [
            f"{number} {one if number == 1 else several} ({', '.join(self.examples[key])})"
            for key, (number, one, several) in found.items()
            if number
        ]
        return lines + ([self.length_bias.line()] if self.length_bias is not None else [])

    def to_dict(self) -> dict[str, Any]:
        """For data_report.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Findings:
        """Inverse of `to_dict`."""
        bias = data.get("length_bias")
        return cls(**{**data, "length_bias": None if bias is None else LengthBias(**bias)})


def find(
    train: Sequence[PreferencePair],
    evaluation: Sequence[PreferencePair] | None = None,
    *,
    near: Sequence[int] | None = None,
) -> Findings:
    """Look for oddities that no single row shows; the length bias, which takes tokens, is left open.

    Args:
        train: Training pairs; a row that is there several times because of its weight is no duplicate.
        evaluation: Held-out pairs.
        near: `near_duplicates` of the prompts of `train`, where somebody has looked already.
    """
    examples: dict[str, list[str]] = {}

    def count(finding: str, sources: list[str]) -> int:
        if sources:
            examples[finding] = sources[:3]
        return len(sources)

    keys = [pair_key(pair) for pair in train]
    seen = set(keys)
    first: dict[tuple[bytes, bytes, bytes], str] = {}
    repeats = [
        pair.source
        for pair, key in zip(train, keys, strict=True)
        if first.setdefault(key, pair.source) != pair.source
    ]
    swapped = [
        pair.source
        for pair, (prompt, chosen, rejected) in zip(train, keys, strict=True)
        if pair.rejected is not None and (prompt, rejected, chosen) in seen
    ]
    near = near_duplicates([text_of(pair.prompt) for pair in train]) if near is None else near
    shared = None
    if evaluation is not None:
        prompts = {key[0] for key in keys}
        shared = count(
            "shared_prompts", [pair.source for pair in evaluation if _digest(pair.prompt_key()) in prompts]
        )
    return Findings(
        pairs=len(train),
        duplicates=count("duplicates", repeats),
        near_duplicates=count("near_duplicates", [train[index].source for index in near]),
        contradictions=count("contradictions", swapped),
        shared_prompts=shared,
        examples=examples,
    )


def length_bias(pairs: TokenizedDataset) -> LengthBias | None:
    """Response lengths compared over the pairs that have both; None where there is no such pair."""
    lengths = pairs.lengths
    responses = lengths[:, 1:] - pairs.contexts
    differences = (responses[:, 0] - responses[:, 1])[lengths[:, 2] > 0].astype(np.float64)
    if not len(differences):
        return None
    spread = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else 0.0
    longer = (differences > 0).mean() + (differences == 0).mean() / 2
    return LengthBias(float(differences.mean()), float(spread), float(longer))


def pair_key(pair: PreferencePair) -> tuple[bytes, bytes, bytes]:
    """Equal for pairs that are the same word for word; short, so that all keys of a large set can be held."""
    return _digest(pair.prompt_key()), _digest(side_key(pair.chosen)), _digest(side_key(pair.rejected))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
