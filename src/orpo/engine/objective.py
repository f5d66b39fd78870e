"""The term of the loss that compares two responses, and its slopes, as functions of tensors.

    loss = nll_weight * NLL(chosen) + beta * L
    L = -log sigmoid(odds_scale * (v(a_chosen) - v(a_rejected)) - target_margin)

where a(y) is the mean log-probability of a response's tokens. ORPO (https://arxiv.org/abs/2403.07691)
compares odds, v(a) = log_odds(a) = a - log(1 - e^a), without a margin. SimPO (https://arxiv.org/abs/2405.14734,
Eq. 6) compares the log-probabilities themselves, v(a) = a, with odds_scale its beta, target_margin its gamma.

Slopes are written out rather than left to autograd because the head needs them in the same sweep as the
logits, and because autograd of the textbook form is NaN for an answer the model is certain of.

Shape suffixes: P = pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo.settings.config import Objective

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


def odds_ratio_loss(log_odds_ratio_P: Tensor, odds_scale: float = 1.0, target_margin: float = 0.0) -> Tensor:
    """L_OR of Eq. 7, for a log odds ratio of the chosen over the rejected response. Shape [P], at least 0.

    With another difference than that of the log odds, and a margin, it is the loss of SimPO.
    """
    return -F.logsigmoid(odds_scale * log_odds_ratio_P - target_margin)


def odds_ratio_slope(log_odds_ratio_P: Tensor, odds_scale: float = 1.0, target_margin: float = 0.0) -> Tensor:
    """Derivative of `odds_ratio_loss`: -odds_scale * delta, with the delta of Eq. 9.

    The paper's appendix prints the opposite sign; this is the slope of the loss, which is never positive.
    """
    return -odds_scale * torch.sigmoid(target_margin - odds_scale * log_odds_ratio_P)


def preference_loss(chosen_P: Tensor, rejected_P: Tensor, objective: Objective) -> Tensor:
    """The loss L of pairs. Shape [P], at least 0.

    Args:
        chosen_P: Mean log-probability of the chosen response's tokens, in nats, at most 0. Shape [P].
        rejected_P: The same of the rejected response.
        objective: What is compared, with which scale and margin.
    """
    difference_P = _compared(chosen_P, objective) - _compared(rejected_P, objective)
    return odds_ratio_loss(difference_P, objective.odds_scale, objective.target_margin)


def preference_slopes(chosen_P: Tensor, rejected_P: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Derivatives of `preference_loss` in its two log-probabilities: at most 0, and at least 0. Shape [P]."""
    difference_P = _compared(chosen_P, objective) - _compared(rejected_P, objective)
    outer_P = odds_ratio_slope(difference_P, objective.odds_scale, objective.target_margin)
    if objective.compares == "logprobs":
        return outer_P, -outer_P
    return outer_P * log_odds_slope(chosen_P), -outer_P * log_odds_slope(rejected_P)


def _compared(mean_logprob_P: Tensor, objective: Objective) -> Tensor:
    return mean_logprob_P if objective.compares == "logprobs" else log_odds(mean_logprob_P)
