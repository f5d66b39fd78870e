"""Means over pairs with standard errors that know which pairs share a prompt.

Shape suffixes: P = pairs.
"""

import math

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
