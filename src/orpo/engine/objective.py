"""The two terms of the ORPO loss and their slopes (https://arxiv.org/abs/2403.07691), as functions of
tensors.

    loss = nll_weight * NLL(chosen) + beta * L_OR
    L_OR = -log sigmoid(odds_scale * (log_odds(a_chosen) - log_odds(a_rejected)))

where a(y) is the mean log-probability of a response's tokens and log_odds(a) = a - log(1 - e^a). Slopes are
written out rather than left to autograd because the head needs them in the same sweep as the logits, and
because autograd of the textbook form is NaN for an answer the model is certain of.

Shape suffixes: P = pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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


def odds_ratio_loss(log_odds_ratio_P: Tensor, odds_scale: float = 1.0) -> Tensor:
    """L_OR of Eq. 7, for a log odds ratio of the chosen over the rejected response. Shape [P], at least 0."""
    return -F.logsigmoid(odds_scale * log_odds_ratio_P)


def odds_ratio_slope(log_odds_ratio_P: Tensor, odds_scale: float = 1.0) -> Tensor:
    """Derivative of `odds_ratio_loss`: -odds_scale * delta, with the delta of Eq. 9.

    The paper's appendix prints the opposite sign; this is the slope of the loss, which is never positive.
    """
    return -odds_scale * torch.sigmoid(-odds_scale * log_odds_ratio_P)
