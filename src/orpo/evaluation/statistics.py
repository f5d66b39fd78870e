"""Means over pairs with standard errors that know which pairs share a prompt.

Shape suffixes: P = pairs.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from orpo.run.log import Figure


def clustered_mean(sum_P: Tensor, weight_P: Tensor, prompt_P: Tensor) -> Figure | None:
    """The mean `sum_P.sum() / weight_P.sum()`, and its standard error where prompts are what was drawn.

    Pairs of one prompt are not independent of each other, so the error is that of a ratio of sums over
    prompts. With one pair a prompt and equal weights it is the usual standard error of a mean.

    Args:
        sum_P: What is averaged, times its weight.
        weight_P: Weights, at least 0.
        prompt_P: The same number for pairs with the same prompt, from 0 on.

    Returns:
        The figure, without an error where fewer than two prompts have weight; None where no pair has any.

    Source:
        Linearisation of a ratio estimator under cluster sampling (Cochran, Sampling Techniques, chapter 6.)
    """
    sum_P, weight_P = sum_P.double(), weight_P.double()
    total = weight_P.sum()
    if total <= 0:
        return None
    mean = sum_P.sum() / total
    num_prompts = int(prompt_P[weight_P > 0].unique().numel())
    if num_prompts < 2:
        return Figure(mean.item())
    residual = torch.zeros(int(prompt_P.max()) + 1, dtype=torch.float64)
    residual.index_add_(0, prompt_P, sum_P - mean * weight_P)
    spread = residual.square().sum() * num_prompts / (num_prompts - 1)
    return Figure(mean.item(), math.sqrt(spread) / total.item())


class Interval(NamedTuple):
    """A share in [0, 1], and the bounds of its confidence interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


def share_interval(share_P: Tensor, prompt_P: Tensor, *, looks: int = 1, terms: int = 1) -> Interval:
    """The mean of shares with an interval that holds with 95 %, prompts being what was drawn.

    The interval is Wilson's for as many independent pairs as have the standard error that was found, and for
    no more than there are prompts: it has a width where all pairs agree, too.

    Args:
        share_P: In [0, 1], at least one.
        prompt_P: The same number for pairs with the same prompt, from 0 on.
        looks: Intervals that are to hold together (Bonferroni).
        terms: In how many places of the statistic each pair stands; 2 where pairs are compared with each
            other and `share_P` is the mean of each over the others.
    """
    figure = clustered_mean(share_P, torch.ones_like(share_P), prompt_P)
    assert figure is not None
    share = min(max(figure.mean, 0.0), 1.0)
    number = float(prompt_P.unique().numel())
    if figure.se:
        number = min(number, max(share * (1 - share), 1e-9) / (terms * figure.se) ** 2)
    z = NormalDist().inv_cdf(1 - 0.025 / looks)
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))
