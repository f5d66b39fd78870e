"""From per-pair scores to named numbers: sums over a log window while training, means over examples in
evaluation.

A training window is a vector of sums that stays on the device, is added over the ranks once per log line and
divided once. An evaluation holds every pair's scores, so its means and standard errors do not depend on how
the pairs were put into rows, batches or ranks.

Shape suffixes: P = pairs.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from orpo.engine.head import PairScores
from orpo.engine.objective import log_odds, odds_ratio_loss
from orpo.settings.config import Objective

SUMS = (
    "steps", "loss", "tokens", "nll_weight", "nll", "pairs", "chosen_logprob",
    "preferences", "rejected_logprob", "margin", "accuracy", "log_odds_ratio", "odds_ratio_loss",
)  # fmt: skip
"""What a window adds up; what follows `preferences` is over pairs with both sides."""

_DIVISOR = {"loss": "steps", "nll": "nll_weight", "chosen_logprob": "pairs"} | dict.fromkeys(
    ("rejected_logprob", "margin", "accuracy", "log_odds_ratio", "odds_ratio_loss"), "preferences"
)


def preference_values(scores: PairScores, objective: Objective) -> dict[str, Tensor]:
    """What is told of a pair with both sides; shapes [P], to be masked by `has_rejected_P`."""
    log_odds_ratio_P = log_odds(scores.chosen_logprob_P) - log_odds(scores.rejected_logprob_P)
    margin_P = scores.chosen_logprob_P - scores.rejected_logprob_P
    return {
        "rejected_logprob": scores.rejected_logprob_P,
        "margin": margin_P,
        "accuracy": (margin_P > 0).to(margin_P.dtype),
        "log_odds_ratio": log_odds_ratio_P,
        "odds_ratio_loss": odds_ratio_loss(log_odds_ratio_P, objective.odds_scale),
    }


class MetricWindow:
    """The sums since the last log line."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self._sums = torch.zeros(len(SUMS), dtype=self.dtype, device=device)
        self._before = [0.0] * len(SUMS)
        self._objective = objective

    def copy(self) -> Self:
        """A window with the same sums."""
        other = copy.copy(self)
        other._sums = self._sums.clone()
        return other

    def add_row(self, scores: PairScores) -> None:
        """Add the pairs of one row."""
        has = scores.has_rejected_P
        values = preference_values(scores, self._objective)
        self._add(
            pairs=has.numel(),
            preferences=has.sum(),
            nll=scores.nll_sum_P.sum(),
            nll_weight=scores.nll_weight_P.sum(),
            chosen_logprob=scores.chosen_logprob_P.sum(),
            **{name: torch.where(has, value, 0).sum() for name, value in values.items()},
        )

    def add_step(self, loss: Tensor, num_tokens: int, num_ranks: int) -> None:
        """Add one optimizer step: this rank's share of its loss, and the tokens this rank has read."""
        self._add(steps=1 / num_ranks, loss=loss, tokens=num_tokens)

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[SUMS.index(name)] += value

    def fold(self, reduce: Callable[[Tensor], Tensor]) -> list[float]:
        """Add this window over the ranks, all of which must call; returns the sums so far, alike on each."""
        self._before = [old + new for old, new in zip(self._before, reduce(self._sums).tolist(), strict=True)]
        self._sums.zero_()
        return self._before

    def restore(self, sums: list[float] | None) -> None:
        """Go on from sums that `fold` returned before an interruption; from nothing without them."""
        self._before = [0.0] * len(SUMS) if sums is None else list(sums)
        self._sums.zero_()

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Add the window over the ranks, empty it, and return its named means, and `tokens` as a sum."""
        sums = dict(zip(SUMS, self.fold(reduce), strict=True))
        self._before = [0.0] * len(SUMS)
        means = {name: sums[name] / sums[by] for name, by in _DIVISOR.items() if sums[by] > 0}
        return means | {"tokens": sums["tokens"]}


def evaluation_metrics(scores: PairScores, objective: Objective) -> dict[str, float]:
    """Means over examples with their standard errors (`_se`), and `loss`, the objective of these means.

    `nll` is the mean over examples of each one's token mean; `nll_token_mean` weights every token alike.
    """
    nll_P = scores.nll_sum_P / scores.nll_weight_P
    values = {"nll": nll_P, "chosen_logprob": scores.chosen_logprob_P}
    loss_P = objective.nll_weight * nll_P
    has = scores.has_rejected_P
    if bool(has.any()):
        preferences = preference_values(scores, objective)
        values |= {name: value[has] for name, value in preferences.items()}
        # Without a rejected side a pair has no odds term, so the others' weigh more: means, then their sum.
        share = has.numel() / int(has.sum())
        loss_P = loss_P + torch.where(has, objective.beta * share * preferences["odds_ratio_loss"], 0)
    metrics: dict[str, float] = {}
    for name, value in ({"loss": loss_P} | values).items():
        metrics[name] = value.double().mean().item()
        if value.numel() > 1:
            metrics[f"{name}_se"] = value.double().std().item() / math.sqrt(value.numel())
    tokens_P = scores.nll_tokens_P.double()
    metrics["nll_token_mean"] = ((nll_P.double() * tokens_P).sum() / tokens_P.sum()).item()
    return metrics


def trl_names(metrics: Mapping[str, float], beta: float) -> dict[str, float]:
    """The same numbers under the names of TRL's ORPO trainer, for dashboards made for it (docs/metrics.md).

    TRL's `log_odds_ratio` is left out: it is log sigmoid of ours, that is minus our `odds_ratio_loss`.
    """
    scaled = {
        "rewards/chosen": "chosen_logprob",
        "rewards/rejected": "rejected_logprob",
        "rewards/margins": "margin",
    }
    same = {
        "rewards/accuracies": "accuracy",
        "logps/chosen": "chosen_logprob",
        "logps/rejected": "rejected_logprob",
        "log_odds_chosen": "log_odds_ratio",
        "nll_loss": "nll",
    }
    return {theirs: beta * metrics[ours] for theirs, ours in scaled.items() if ours in metrics} | {
        theirs: metrics[ours] for theirs, ours in same.items() if ours in metrics
    }
