"""Preference pairs of a file with what a model says of them, kept by weights and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from orpo.data.dataset import TokenizedDataset, prompt_index
from orpo.data.stages import report
from orpo.engine.objective import log_odds
from orpo.engine.steps import EVALUATION_BLOCK
from orpo.errors import DataError
from orpo.evaluation.kept_values import KeptValues, content_key
from orpo.evaluation.local_model import fingerprint
from orpo.evaluation.preferences import ready_to_score, score_pairs
from orpo.suites.measured import Column

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """What a model says of one pair.

    Attributes:
        item: Where it comes from, and which of the pairs from there it is.
        prompt: Number of its prompt.
        group: Of the row.
        chosen: Mean log-prob of a token of the chosen answer.
        rejected: The same of the rejected one.
        lengths: Tokens of the two answers.
    """

    item: str
    prompt: int
    group: str | None
    chosen: float
    rejected: float
    lengths: tuple[int, int]

    @property
    def margin(self) -> float:
        """Difference of the means, in nats."""
        return self.chosen - self.rejected

    @property
    def sum_margin(self) -> float:
        """Difference of the sums."""
        return self.chosen * self.lengths[0] - self.rejected * self.lengths[1]


def preference_columns(pairs: list[ScoredPair]) -> dict[str, Column]:
    """The metrics that every set of pairs has."""
    scores = {
        side: torch.tensor([getattr(pair, side) for pair in pairs], dtype=torch.float64)
        for side in ("chosen", "rejected")
    }
    odds = log_odds(scores["chosen"]) - log_odds(scores["rejected"])
    return {
        "accuracy": Column([float(pair.margin > 0) for pair in pairs]),
        "accuracy by sum": Column([float(pair.sum_margin > 0) for pair in pairs]),
        "log odds ratio": Column(odds.tolist(), unit="number"),
        "chosen log-prob": Column(scores["chosen"].tolist(), unit="nats"),
        "rejected log-prob": Column(scores["rejected"].tolist(), unit="nats"),
    }


def scored_pairs(
    subject: Subject,
    suite: str,
    about: str,
    options: Options,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[ScoredPair], list[str]]:
    """The pairs of a file with their scores, those with both sides, and lines to print.

    Args:
        subject: The model.
        suite: For messages.
        about: The file.
        options: Of the run.
        settings: How rows are read, under those of the subject.

    Raises:
        OrpoError: The file cannot be used, or the model is behind an endpoint.
    """
    ready = ready_to_score(
        subject.path(suite), about, quiet=True, **dict(settings or {}) | subject.pair_settings
    )
    dataset = ready.read.pairs
    chosen = [n for n in range(len(dataset)) if len(dataset[n].rejected)][: options.limit]
    if not chosen:
        raise DataError(f"{about}: holds no pair with a chosen and a rejected answer")
    kept = KeptValues(f"pairs-{fingerprint(ready.model, [])}")
    keys = {n: _key(dataset, n) for n in chosen}
    missing = [n for n in chosen if keys[n] not in kept]
    for start in range(0, len(missing), EVALUATION_BLOCK):
        report(f"{subject.name}: {suite}", start, len(missing))
        block = missing[start : start + EVALUATION_BLOCK]
        some = TokenizedDataset.from_pairs([dataset[n] for n in block])
        scores = score_pairs(ready.model, some, ready.batches)
        rows = torch.stack([scores.chosen_logprob_P, scores.rejected_logprob_P], 1).tolist()
        kept.add({keys[n]: row for n, row in zip(block, rows, strict=True)})
    report(f"{subject.name}: {suite}", len(missing), len(missing))
    prompts, seen = prompt_index(dataset), dict[str, int]()
    found = []
    for n in chosen:
        pair, source = dataset[n], dataset.sources[n]
        seen[source] = seen.get(source, 0) + 1
        lengths = len(pair.chosen) - pair.chosen_context, len(pair.rejected) - pair.rejected_context
        item = f"{source} {seen[source]}"
        mine, other = kept[keys[n]]
        found.append(ScoredPair(item, int(prompts[n]), dataset.groups[n], mine, other, lengths))
    return found, [line for line in ready.read.lines() if "of" in line and "rows" in line]


def _key(dataset: TokenizedDataset, number: int) -> str:
    pair = dataset[number]
    contexts = pair.chosen_context, pair.rejected_context
    return content_key(list(pair.prompt), list(pair.chosen), list(pair.rejected), contexts)
