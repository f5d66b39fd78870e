"""The term of the loss that compares two responses, and its slopes, as functions of tensors.

    loss = nll_weight * NLL(chosen) + preference_weight * L
    L = -(1 - smoothing) * log sigmoid(z) - smoothing * log sigmoid(-z)
    z = scale * (v(chosen) - v(rejected)) - margin

What tells the objectives apart is the value v of a response y, with a(y) the mean and S(y) the sum of the
log-probabilities of its tokens (`compares`, the registry `VALUES`):

    odds    v = a - log(1 - e^a)   ORPO, Eq. 4 to 7 of https://arxiv.org/abs/2403.07691: scale 1; tempered by
                                   a scale beta: section 3.1.2 of https://arxiv.org/abs/2502.01237 (v3)
    means   v = a                  SimPO, Eq. 6 of https://arxiv.org/abs/2405.14734: scale beta, margin gamma
    sums    v = S                  CPO, Eq. 3 of https://arxiv.org/abs/2401.08417: scale beta
    ratios  v = S - S_reference    DPO, Eq. 7 of https://arxiv.org/abs/2305.18290: scale beta

Label smoothing is that of Eq. 3 of https://ericmitchell.ai/cdpo.pdf.

Slopes are written out rather than left to autograd because the head needs them in the same sweep as the
logits, and because autograd of the textbook form is NaN for an answer the model is certain of.

Shape suffixes: P = pairs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo.settings.config import Compares, Objective

EPSILON = 1e-6
"""Smallest 1 - p, and smallest negative mean log-probability, that the odds tell apart."""


def log_odds(mean_logprob_P: Tensor) -> Tensor:
    """Log odds log(p / (1 - p)) of a response, p being the geometric mean of its token probabilities.

    Args:
        mean_logprob_P: Mean token log-probability in nats, at most 0. Shape [P], float32 or float64.

    Returns:
        Shape [P], finite for every input: at most -log(expm1(EPSILON)), about 13.8.

    Source:
        Eq. 3 and 4. With n = -log p, the odds are 1 / expm1(n) and expm1(n) = e^n * -expm1(-n).
    """
    nll_P = (-mean_logprob_P).clamp_min(EPSILON)
    return -(nll_P + torch.log(-torch.expm1(-nll_P)))


def log_odds_slope(mean_logprob_P: Tensor) -> Tensor:
    """Derivative of `log_odds`, 1 / (1 - p), capped at 1 / EPSILON. Shape [P], at least 1.

    Capped and not cut to zero, so that a rejected answer the model is certain of is still pushed down.
    """
    return 1 / (-torch.expm1(mean_logprob_P)).clamp_min(EPSILON)


class Side(NamedTuple):
    """What the loss of pairs reads of one of their two responses.

    Attributes:
        mean_logprob_P: Mean log-probability of its tokens, in nats, at most 0.
        tokens_P: How many they are.
        reference_P: The same mean by the reference model; only the ratios read it.
    """

    mean_logprob_P: Tensor
    tokens_P: Tensor
    reference_P: Tensor


class Value(NamedTuple):
    """What of a response is compared.

    Attributes:
        of: Its value. Shape [P].
        slope: The derivative of the value in the response's mean log-probability. Shape [P], at least 0.
    """

    of: Callable[[Side], Tensor]
    slope: Callable[[Side], Tensor]


VALUES: dict[Compares, Value] = {
    "odds": Value(
        lambda side: log_odds(side.mean_logprob_P), lambda side: log_odds_slope(side.mean_logprob_P)
    ),
    "means": Value(lambda side: side.mean_logprob_P, lambda side: torch.ones_like(side.mean_logprob_P)),
    "sums": Value(lambda side: side.tokens_P * side.mean_logprob_P, lambda side: side.tokens_P),
    "ratios": Value(
        lambda side: side.tokens_P * (side.mean_logprob_P - side.reference_P), lambda side: side.tokens_P
    ),
}


def reward(side: Side, objective: Objective) -> Tensor:
    """A response's value times the scale: what its paper calls its reward. Shape [P]."""
    return objective.scale * VALUES[objective.compares].of(side)


def preference_loss(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """The loss L of pairs. Shape [P], at least 0."""
    z_P = reward(chosen, objective) - reward(rejected, objective) - objective.margin
    loss_P = -F.logsigmoid(z_P)
    # -log sigmoid(-z) = z - log sigmoid(z)
    return loss_P + objective.label_smoothing * z_P if objective.label_smoothing else loss_P


def preference_slopes(chosen: Side, rejected: Side, objective: Objective) -> tuple[Tensor, Tensor]:
    """Derivatives of `preference_loss` in the two mean log-probabilities. Shape [P].

    Without label smoothing the first is at most 0 and the second at least 0. The appendix of ORPO's paper
    prints the opposite sign: it differentiates +log sigmoid.

    Source:
        Eq. 8 to 10 for the odds, with delta = sigmoid(-z).
    """
    z_P = reward(chosen, objective) - reward(rejected, objective) - objective.margin
    outer_P = objective.scale * (objective.label_smoothing - torch.sigmoid(-z_P))
    slope = VALUES[objective.compares].slope
    return outer_P * slope(chosen), -outer_P * slope(rejected)
