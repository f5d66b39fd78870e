"""How much answers resemble each other: to the same prompt, and to different prompts.

These are equations 14 and 15 of the paper. Every answer becomes a vector, and what is measured is the mean
cosine of two of them: less is more diverse. Per input: over the answers to one prompt, and then over prompts.
Across inputs: over the first answers of all prompts. Mean cosines come from sums: of n unit vectors that add
up to s, two have the mean cosine (|s|^2 - n) / (n (n - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.words import words_of
from orpo.errors import ConfigError
from orpo.evaluation.answers import Answer
from orpo.evaluation.statistics import error_of
from orpo.evaluation.vectors import SentenceEncoder, word_weights
from orpo.run.log import Figure

WORDS = "TF-IDF of words"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diversity:
    """Mean cosines of answers; less is more diverse.

    Attributes:
        per_input: Of two answers to the same prompt, in [-1, 1]; None where no prompt has two.
        across_input: Of the first answers to two prompts; None of fewer than two prompts. Its error is that
            of a mean over pairs of what was drawn.
        prompts: Prompts with at least two answers that have words.
        all_prompts: Prompts with at least one.
        by: What vectors are made of. Numbers by another maker do not compare, nor do numbers by `WORDS`
            of other answers: what a word weighs depends on all of them.
    """

    per_input: Figure | None
    across_input: Figure | None
    prompts: int
    all_prompts: int
    by: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        figures = {"per_input": self.per_input, "across_input": self.across_input}
        written = {name: None if figure is None else figure.to_json() for name, figure in figures.items()}
        return {**written, "prompts": self.prompts, "all_prompts": self.all_prompts, "by": self.by}

    def lines(self) -> list[str]:
        """To print."""
        found = []
        for title, figure, number in (
            ("to one prompt", self.per_input, self.prompts),
            ("to different prompts", self.across_input, self.all_prompts),
        ):
            if figure is not None:
                error = "" if figure.se is None else f", se {figure.se:.3f}"
                found.append(f"{figure.mean:.3f} mean cosine {title} (n {number:,}{error})")
        names = ["likeness", *[""] * len(found)]
        return [f"{name:<12}{line}" for name, line in zip(names, [*found, f"by {self.by}"], strict=True)]


def diversity(answers: Sequence[Answer], embeddings: str | Path | None = None) -> Diversity:
    """Measure how much answers resemble each other. Answers without a word are left out.

    Args:
        answers: Samples of a prompt share `instruction` and `prompt`.
        embeddings: Folder of a sentence-embedding model; None: by words, which takes scikit-learn.

    Raises:
        ConfigError: scikit-learn is needed and not installed.
        ModelError: The folder holds no such model.
    """
    said = [answer for answer in answers if words_of(answer.output)]
    members: dict[str, list[int]] = {}
    for number, answer in enumerate(said):
        members.setdefault(answer.prompt_key(), []).append(number)
    vectors = _vectors([answer.output for answer in said], embeddings)
    several = [rows for rows in members.values() if len(rows) > 1]
    inside = [_mean_cosine(vectors[rows]) for rows in several]
    first = [min(rows, key=lambda row: said[row].sample) for rows in members.values()]
    return Diversity(
        per_input=_mean(inside) if inside else None,
        across_input=_across(vectors[first]) if len(first) > 1 else None,
        prompts=len(several),
        all_prompts=len(members),
        by=WORDS if embeddings is None else f"embeddings of {Path(embeddings).name}",
    )


def _vectors(texts: Sequence[str], embeddings: str | Path | None) -> Any:
    """Unit vectors [n, d]: an array, or a sparse matrix of words."""
    if not texts:
        return np.zeros((0, 1))
    if embeddings is not None:
        return SentenceEncoder(embeddings).encode(texts).astype(np.float64)
    try:
        words = word_weights(texts, len(texts))
    except ImportError:
        raise ConfigError(
            "diversity by words needs scikit-learn: pip install 'orpo[data]', or name --embeddings"
        ) from None
    return np.ones((len(texts), 1)) if words is None else words.astype(np.float64)


def _sum(vectors: Any) -> Any:
    return np.asarray(vectors.sum(axis=0)).ravel()


def _mean_cosine(vectors: Any) -> float:
    """Of two of at least two unit vectors."""
    total, number = _sum(vectors), vectors.shape[0]
    return float((total @ total - number) / (number * (number - 1)))


def _mean(values: Sequence[float]) -> Figure:
    number = len(values)
    mean = math.fsum(values) / number
    return Figure(mean, error_of([(value - mean) / number for value in values], number))


def _across(vectors: Any) -> Figure:
    """The mean cosine of two vectors, each of which stands in many of the pairs."""
    total, number = _sum(vectors), vectors.shape[0]
    mean = _mean_cosine(vectors)
    own = (np.asarray(vectors @ total).ravel() - 1) / (number - 1)  # mean cosine of each with the others
    return Figure(mean, error_of((2 * (own - mean) / number).tolist(), number))
