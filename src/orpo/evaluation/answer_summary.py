"""What answers look like, in a few figures that show at once where a model went wrong.

An answer that does not end, repeats itself or refuses is seldom what was wanted, and a mean length shows a
model that has learnt to be long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from orpo.data.refusals import refuses
from orpo.data.words import runs_of, words_of
from orpo.evaluation.answers import Answer, Reply
from orpo.evaluation.diversity import Diversity, diversity
from orpo.evaluation.statistics import clustered_mean
from orpo.run.log import Figure, Figures

RUN = 3
"""Words of a run whose repeats are counted."""
LOOPING = 0.5
"""Share of repeated runs from which an answer is counted as looping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSummary:
    """Figures of answers.

    Attributes:
        number: Of the answers.
        mean_tokens: Of those whose tokens are known; None where none are.
        mean_words: Words an answer.
        ended: Share that ended by itself, in [0, 1].
        repetition: Mean share of runs of three words that repeat an earlier one in the same answer.
        looping: Share of answers in which at least half of the runs do.
        refusing: Share that begins with a refusal.
        empty: Answers without a word.
        diversity: How much answers resemble each other; None where nobody asked, and no prompt has two.
    """

    number: int
    mean_tokens: float | None
    mean_words: float
    ended: float
    repetition: float
    looping: float
    refusing: float
    empty: int
    diversity: Diversity | None = None

    def lines(self) -> list[str]:
        """To print."""
        tokens = "" if self.mean_tokens is None else f"{self.mean_tokens:.1f} tokens, "
        return [
            f"answers     {self.number:,}" + (f", {self.empty:,} of them empty" if self.empty else ""),
            f"length      {tokens}{self.mean_words:.1f} words on average",
            f"ended       {self.ended:.1%} by themselves; the others were cut at --max_tokens",
            f"repetition  {self.repetition:.1%} of runs of {RUN} words came before; "
            f"{self.looping:.1%} of answers loop",
            f"refusals    {self.refusing:.1%}, by set phrases in English",
            *(self.diversity.lines() if self.diversity is not None else ()),
        ]


def repetition(text: str) -> float:
    """Share of a text's runs of three words that repeat an earlier one, in [0, 1); 0 for fewer words."""
    runs = runs_of(words_of(text), RUN)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def summarise(answers: Sequence[Answer], embeddings: str | Path | None = None) -> AnswerSummary:
    """The figures of at least one answer.

    Args:
        answers: Of one model.
        embeddings: Folder of a sentence-embedding model to tell their diversity by; None: by words, where a
            prompt has several answers and scikit-learn is installed.

    Raises:
        ModelError: The folder holds no such model.
    """
    number = len(answers)
    tokens = [answer.num_tokens for answer in answers if answer.num_tokens is not None]
    words = [len(words_of(answer.output)) for answer in answers]
    repeated = [repetition(answer.output) for answer in answers]
    return AnswerSummary(
        number=number,
        mean_tokens=sum(tokens) / len(tokens) if tokens else None,
        mean_words=sum(words) / number,
        ended=sum(answer.ended for answer in answers) / number,
        repetition=sum(repeated) / number,
        looping=sum(share >= LOOPING for share in repeated) / number,
        refusing=sum(refuses(answer.output) for answer in answers) / number,
        empty=sum(not count for count in words),
        diversity=_diversity(answers, embeddings),
    )


def answer_figures(answers: Sequence[Answer | Reply], before: Sequence[Answer | Reply] = ()) -> Figures:
    """How often answers end and repeat themselves, with standard errors over prompts.

    Args:
        answers: One to each prompt, at least one.
        before: Another model's to the same prompts in the same order; then it is the mean change from these.
    """
    values = _values(answers)
    if before:
        other = _values(before)
        values = {
            name: [a - b for a, b in zip(ours, other[name], strict=True)] for name, ours in values.items()
        }
    found: dict[str, Figure] = {}
    for name, one in values.items():
        value_P = torch.tensor(one, dtype=torch.float64)
        figure = clustered_mean(value_P, torch.ones_like(value_P), torch.arange(len(one)))
        assert figure is not None
        found[name] = figure
    return found


def _values(answers: Sequence[Answer | Reply]) -> dict[str, list[float]]:
    texts = [answer.output if isinstance(answer, Answer) else answer.text for answer in answers]
    return {
        "ended": [float(answer.ended) for answer in answers],
        "repetition": [repetition(text) for text in texts],
    }


def _diversity(answers: Sequence[Answer], embeddings: str | Path | None) -> Diversity | None:
    if embeddings is not None:
        return diversity(answers, embeddings)
    has_several = len({answer.prompt_key() for answer in answers}) < len(answers)
    return diversity(answers) if has_several and find_spec("sklearn") is not None else None
