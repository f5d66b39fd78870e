"""How well trivial features of two answers tell the chosen one: what a model could learn instead of the task.

Each look at the pairs is a linear classifier over differences chosen - rejected, without an intercept and
with the sides in random order, so that it knows nothing but the feature. It is fitted five times, each time
without the prompts that it then judges. Accuracy and AUC are of these held-out pairs; their intervals are
clustered by prompt and hold for all looks together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from orpo.curation.texts import PairTexts
from orpo.curation.wording import num_refusal_words
from orpo.data.words import words_of
from orpo.evaluation.statistics import Interval, share_interval

FEWEST = 50
"""Prompts; with fewer, no interval of an accuracy could say anything."""
FOLDS = 5
_RARE = 5
"""A word in fewer answers than this is left out."""
_VOCABULARY = 20_000

Floats = npt.NDArray[np.float64]
_Numbers = Callable[[str, str], Sequence[float]]
"""Prompt and answer -> what is compared between the answers."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the pairs.

    Attributes:
        name: `length`, `markdown`, `refusal`, `echo`, `first_words`, `words` or `together`.
        title: For people.
        accuracy: Share of held-out pairs whose chosen answer it names.
        auc: Area under the ROC curve, over both orders of the sides.
        leaning: What marks the chosen answers, in words; empty where no feature stands out.
    """

    name: str
    title: str
    accuracy: Interval
    auc: Interval
    leaning: str = ""

    @property
    def predicts(self) -> bool:
        """Whether it is better than chance beyond doubt."""
        return self.accuracy.low > 0.5

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        measured = {"accuracy": self.accuracy._asdict(), "auc": self.auc._asdict()}
        return {"title": self.title, **measured, "predicts": self.predicts, "leaning": self.leaning}


@dataclass(frozen=True, slots=True)
class Audit:
    """What the looks found.

    Attributes:
        pairs: Looked at.
        prompts: Of these, distinct.
        looks: In order, `together` last; none where there are fewer than `FEWEST` prompts.
    """

    pairs: int
    prompts: int
    looks: tuple[Look, ...] = field(default=())

    @property
    def strongest(self) -> Look | None:
        """The single feature that tells most, where any tells anything."""
        single = [look for look in self.looks[:-1] if look.predicts]
        return max(single, key=lambda look: look.accuracy.share, default=None)

    def sentence(self) -> str:
        """What a model could learn without learning the task."""
        if not self.looks:
            return (
                f"Too few prompts to say whether something trivial predicts the preference: {self.prompts:,},"
                f" and it takes {FEWEST}."
            )
        best, together = self.strongest, self.looks[-1]
        if best is None and not together.predicts:
            top = max(self.looks, key=lambda look: look.accuracy.share)
            return (
                f"Nothing trivial predicts the preference: the best of {len(self.looks)} looks is right in"
                f" {_percent(top.accuracy)}, and 50 % is chance."
            )
        if best is None:
            return f"Trivial features together tell chosen from rejected in {_percent(together.accuracy)}."
        leaning = f": {best.leaning}" if best.leaning else ""
        length = self.looks[0]
        others = []
        if length.predicts and best is not length:
            others.append(f"length alone {100 * length.accuracy.share:.0f} %: {length.leaning}")
        if together.accuracy.share > best.accuracy.share + 0.005:
            others.append(f"all trivial features together {100 * together.accuracy.share:.0f} %")
        more = f" ({'; '.join(others)})" if others else ""
        return f"{best.title} alone tells chosen from rejected in {_percent(best.accuracy)}{leaning}{more}."

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        looks = {look.name: look.to_json() for look in self.looks}
        return {
            "pairs": self.pairs,
            "prompts": self.prompts,
            "looks": looks,
            "sentence": self.sentence(),
        }


def _percent(found: Interval) -> str:
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.share:.0f} % of held-out pairs (95 % interval {low:.0f} to {high:.0f})"


def audit(texts: PairTexts, *, seed: int = 0) -> Audit:
    """Look at pairs; needs scikit-learn.

    Args:
        texts: Pairs with both sides.
        seed: Of the folds and of the order of the sides.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    numbers: dict[str, int] = {}
    prompt_P = np.array(
        [numbers.setdefault(prompt, len(numbers)) for prompt in texts.prompts], dtype=np.int64
    )
    if len(numbers) < FEWEST:
        return Audit(len(texts), len(numbers))
    from scipy import sparse

    random = np.random.default_rng(seed)
    fold_P = (random.permutation(len(numbers)) % FOLDS)[prompt_P]
    sign_P = random.choice([-1.0, 1.0], len(texts))
    looks: list[Look] = []
    seen: list[Any] = []
    for name, title, differences in (*_LOOKS, ("together", "All together", None)):
        features = _Features(sparse.hstack(seen, format="csr")) if differences is None else differences(texts)
        seen.append(features.matrix)
        score_P, weights = _held_out(features.matrix, sign_P, fold_P)
        accuracy, auc = _measure(score_P, prompt_P)
        looks.append(Look(name, title, accuracy, auc, features.leaning(weights)))
    return Audit(len(texts), len(numbers), tuple(looks))


def _held_out(matrix: Any, sign_P: Floats, fold_P: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """How far the classifier that has not seen a pair's prompt is for its chosen side; its mean weights."""
    from sklearn.linear_model import LogisticRegression

    score_P = np.zeros(len(sign_P))
    weights = np.zeros(matrix.shape[1])
    swapped = matrix.multiply(sign_P[:, None]).tocsr()
    for fold in range(FOLDS):
        held = fold_P == fold
        learned = sign_P[~held]
        if held.any() and len(set(learned)) == 2:
            model = LogisticRegression(C=0.1, fit_intercept=False, max_iter=300)
            model.fit(swapped[~held], learned)
            score_P[held] = matrix[held] @ model.coef_[0]
            weights += model.coef_[0] / FOLDS
    return score_P, weights


def _measure(score_P: Floats, prompt_P: npt.NDArray[np.int64]) -> tuple[Interval, Interval]:
    """Accuracy and AUC of scores that are above 0 where a pair is judged rightly."""
    looks, prompts = len(_LOOKS) + 1, torch.from_numpy(prompt_P)
    right_P = torch.from_numpy((score_P > 0) + (score_P == 0) / 2)
    # Over both orders of the sides, a pair i ranks above the turned pair j where score i > - score j.
    order = np.sort(-score_P)
    below, up_to = np.searchsorted(order, score_P, "left"), np.searchsorted(order, score_P, "right")
    above_P = torch.from_numpy((below + up_to) / 2 / len(score_P))
    return (
        share_interval(right_P, prompts, looks=looks),
        share_interval(above_P, prompts, looks=looks, terms=2),
    )


# ------------------------------------------------------------------------------------- the features


class _Features(NamedTuple):
    """Differences chosen - rejected, `[pairs, features]` and sparse, and what the features are called.

    The name of a number is what to say where chosen answers have more of it, and where they have less; that
    of a word is the word.
    """

    matrix: Any
    names: Sequence[Any] = ()

    def leaning(self, weights: Floats) -> str:
        """What marks the chosen answers."""
        if not len(self.names):
            return ""
        if isinstance(self.names[0], tuple):
            strongest = int(np.abs(weights).argmax())
            return str(self.names[strongest][0 if weights[strongest] > 0 else 1]) if weights.any() else ""
        order = np.argsort(weights)
        more = [self.names[index] for index in order[::-1][:5] if weights[index] > 0]
        less = [self.names[index] for index in order[:5] if weights[index] < 0]
        sides = [
            f"{side} answers have {_quoted(words)}"
            for side, words in (("chosen", more), ("rejected", less))
            if words
        ]
        return ", ".join(sides)


def _quoted(words: Sequence[str]) -> str:
    return " ".join(f"“{word}”" for word in words)


def _numbers(count: _Numbers, *names: tuple[str, str]) -> Callable[[PairTexts], _Features]:
    """Differences of a few numbers of each answer, all of the same scale."""

    def differences(texts: PairTexts) -> _Features:
        from scipy import sparse

        sides = [
            np.array(
                [count(prompt, answer) for prompt, answer in zip(texts.prompts, side, strict=True)], float
            )
            for side in (texts.chosen, texts.rejected)
        ]
        difference = sides[0] - sides[1]
        spread = np.sqrt((difference**2).mean(0))
        return _Features(sparse.csr_matrix(difference / np.where(spread > 0, spread, 1)), names)

    return differences


def _words(analyzer: Callable[[str], list[str]]) -> Callable[[PairTexts], _Features]:
    """Which words only the chosen (1) or only the rejected (-1) answer has."""

    def differences(texts: PairTexts) -> _Features:
        from scipy import sparse
        from sklearn.feature_extraction.text import CountVectorizer

        vectorizer = CountVectorizer(
            analyzer=analyzer, binary=True, dtype=np.float64, max_features=_VOCABULARY
        )
        both = vectorizer.fit_transform([*texts.chosen, *texts.rejected])
        usual = np.asarray(both.sum(0)).ravel() >= _RARE
        if not usual.any():
            return _Features(sparse.csr_matrix((len(texts), 1)))
        both, names = both[:, usual], vectorizer.get_feature_names_out()[usual]
        return _Features(both[: len(texts)] - both[len(texts) :], list(names))

    return differences


_MARKS = (
    re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE),
    re.compile(r"^\s*#{1,6} |\*\*|__|`|^\|", re.MULTILINE),
    re.compile(r"\n\s*\n"),
)


def _length(_: str, answer: str) -> list[float]:
    return [np.log1p(len(answer))]


def _markdown(_: str, answer: str) -> list[float]:
    return [np.log1p(sum(1 for _ in mark.finditer(answer))) for mark in _MARKS]


def _refusal(_: str, answer: str) -> list[float]:
    return [num_refusal_words(answer)]


def _echo(prompt: str, answer: str) -> list[float]:
    asked, said = set(words_of(prompt)), set(words_of(answer))
    common = len(asked & said)
    return [common / max(len(said), 1), common / max(len(asked), 1)]


def _word_list(text: str) -> list[str]:
    return [word.decode("utf-8", "replace") for word in words_of(text)]


def _first_words(text: str) -> list[str]:
    words = _word_list(text[:200])[:3]
    return [" ".join(words[:number]) + " …" for number in range(1, len(words) + 1)]


_LOOKS: tuple[tuple[str, str, Callable[[PairTexts], _Features] | None], ...] = (
    (
        "length",
        "Length",
        _numbers(_length, ("the longer answer is the chosen one", "the shorter answer is the chosen one")),
    ),
    (
        "markdown",
        "Lists and markdown",
        _numbers(
            _markdown,
            ("chosen answers have more list items", "chosen answers have fewer list items"),
            ("chosen answers have more markdown", "chosen answers have less markdown"),
            ("chosen answers have more paragraphs", "chosen answers have fewer paragraphs"),
        ),
    ),
    (
        "refusal",
        "Refusal words",
        _numbers(_refusal, ("chosen answers refuse more", "rejected answers refuse more")),
    ),
    (
        "echo",
        "Echo of the question",
        _numbers(
            _echo,
            ("chosen answers stay with words of the question", "chosen answers leave words of the question"),
            ("chosen answers repeat more of the question", "chosen answers repeat less of the question"),
        ),
    ),
    ("first_words", "First words", _words(_first_words)),
    ("words", "Bag of words", _words(_word_list)),
)  # fmt: skip
