"""Held-out pairs -> preference accuracy, margins, log odds, log-probs and NLL, averaged over examples.

Pairs are packed and scored as in training, without gradients. Every pair's scores are kept and averaged at
the end, so neither the batch size nor the token budget of a row changes a number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from orpo.data.dataset import TokenizedDataset
from orpo.engine.head import PairScores
from orpo.engine.metrics import evaluation_metrics
from orpo.engine.steps import EVALUATION_BLOCK, RowSettings, StepDataset
from orpo.pairs import TokenizedPair


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model was found to prefer.

    Attributes:
        metrics: Named means over examples, with standard errors under the name with `_se`.
        groups: The same for each group of pairs, where the data names groups.
        num_pairs: Pairs scored.
        num_preferences: Pairs with both sides; accuracy, margin and odds are over these.
        group_sizes: Pairs of each group.
    """

    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    num_pairs: int
    num_preferences: int
    group_sizes: dict[str, int]


def evaluate(
    model: nn.Module,
    pairs: TokenizedDataset | Sequence[TokenizedPair],
    settings: RowSettings,
    *,
    batch_size: int = EVALUATION_BLOCK,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score pairs with a prepared model and average over them.

    Args:
        model: As `prepare_model` leaves it.
        pairs: At least one.
        settings: Objective, layout and token budget; every rejected side is scored, whatever the objective.
        batch_size: Pairs that are spread over rows together; only the speed depends on it.
        progress: Called with the number of pairs scored so far.
    """
    scores = score_pairs(model, pairs, settings, batch_size=batch_size, progress=progress)
    names = pairs.groups if isinstance(pairs, TokenizedDataset) else [None] * len(pairs)
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(index)
    return Evaluation(
        metrics=evaluation_metrics(scores, settings.objective),
        groups={
            name: evaluation_metrics(_select(scores, index), settings.objective)
            for name, index in members.items()
        },
        num_pairs=len(pairs),
        num_preferences=int(scores.has_rejected_P.sum()),
        group_sizes={name: len(index) for name, index in members.items()},
    )


def score_pairs(
    model: nn.Module,
    pairs: TokenizedDataset | Sequence[TokenizedPair],
    settings: RowSettings,
    *,
    batch_size: int = EVALUATION_BLOCK,
    progress: Callable[[int], None] | None = None,
) -> PairScores:
    """The scores of every pair, in the order of `pairs`, on the CPU. Arguments as for `evaluate`."""
    all_sides = RowSettings(settings.objective, settings.layout, settings.tokens_per_row, score_rejected=True)
    steps = StepDataset(pairs, all_sides, pairs_per_step=batch_size, shuffle=False)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    found: list[PairScores] = []
    order: list[int] = []
    training = model.training
    model.eval()
    with torch.no_grad():
        for number in range(len(steps)):
            for row in steps[number].rows:
                output = model(batch=row.to(device))
                order += row.index
                found.append(PairScores(*(column.cpu() for column in output.pairs)))
            if progress:
                progress(len(order))
    model.train(training)
    place = torch.argsort(torch.tensor(order))
    return PairScores(*(torch.cat(columns)[place] for columns in zip(*found, strict=True)))


def _select(scores: PairScores, index: Sequence[int]) -> PairScores:
    chosen = torch.tensor(index)
    return PairScores(*(column[chosen] for column in scores))
