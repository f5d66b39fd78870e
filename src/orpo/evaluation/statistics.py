"""Means over pairs with standard errors that know which pairs share a prompt, and what they can tell apart.

Shape suffixes: P = pairs.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orpo.run.log import Figure

CONFIDENCE, POWER = 0.95, 0.8
"""Of a change that is called measurable, and of the pairs said to be needed for one: the usual values."""
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)
_DRAWN_AT_ONCE = 500
"""Of a bootstrap, for its memory."""


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
    mean = (sum_P.sum() / total).item()
    residual = _by_prompt(sum_P - mean * weight_P, prompt_P)
    num_prompts = int(prompt_P[weight_P > 0].unique().numel())
    return Figure(mean, error_of((residual / total).tolist(), num_prompts))


def error_of(influences: Iterable[float], num_prompts: int) -> float | None:
    """The standard error of a figure from how far each prompt moves it.

    Args:
        influences: One for each prompt; they add up to about 0.
        num_prompts: Prompts that could move it.

    Returns:
        None where fewer than two could.
    """
    if num_prompts < 2:
        return None
    return math.sqrt(math.fsum(one * one for one in influences) * num_prompts / (num_prompts - 1))


def bootstrap_interval(
    sum_P: Tensor, weight_P: Tensor, prompt_P: Tensor, *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float] | None:
    """Bounds of the mean `sum_P.sum() / weight_P.sum()`: the middle 95 % of what prompts drawn again give.

    Args:
        sum_P: As for `clustered_mean`, like the two that follow.
        weight_P: Weights.
        prompt_P: Prompts.
        draws: How often all prompts are drawn, with replacement.
        seed: Of the draws.

    Returns:
        None where fewer than two prompts have weight.

    Source:
        Percentile bootstrap over clusters (Davison and Hinkley, Bootstrap Methods, chapter 3.8).
    """
    sums = _by_prompt(sum_P.double(), prompt_P).numpy()
    weights = _by_prompt(weight_P.double(), prompt_P).numpy()
    sums, weights = sums[weights > 0], weights[weights > 0]
    number = len(weights)
    if number < 2:
        return None
    random = np.random.default_rng(seed)
    means: list[float] = []
    while len(means) < draws:
        index = random.integers(number, size=(min(_DRAWN_AT_ONCE, draws - len(means)), number))
        means += (sums[index].sum(1) / weights[index].sum(1)).tolist()
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _by_prompt(value_P: Tensor, prompt_P: Tensor) -> Tensor:
    """Sums of the pairs of each prompt."""
    return torch.zeros(int(prompt_P.max()) + 1, dtype=torch.float64).index_add_(0, prompt_P, value_P)


class Estimate(NamedTuple):
    """A mean over pairs and runs, its standard error where it has one, and how well that is known.

    `df` is the degrees of freedom of Student's t that the interval is taken from.
    """

    mean: float
    se: float | None
    df: float

    @property
    def figure(self) -> Figure:
        """Mean and error."""
        return Figure(self.mean, self.se)

    def interval(self, looks: int = 1) -> tuple[float, float] | None:
        """The bounds that hold with `CONFIDENCE`, for so many intervals together (Bonferroni)."""
        if self.se is None:
            return None
        half = critical(self.df + 1, looks=looks) * self.se
        return self.mean - half, self.mean + half


def mean_over_runs(value_RP: Tensor, weight_P: Tensor, prompt_P: Tensor) -> Estimate | None:
    """The mean of what several runs say of the same pairs; prompts and runs both are what was drawn.

    Its variance is that of the mean over prompts, with each pair's mean over the runs, and that of the runs'
    means. What runs and pairs share is in both, so the error is a little too large rather than too small.

    Args:
        value_RP: Values, a row for each of at least one run.
        weight_P: Weights of the pairs, at least 0.
        prompt_P: The same number for pairs with the same prompt, from 0 on.

    Returns:
        The estimate, without an error where fewer than two prompts have weight; None where no pair has any.

    Source:
        Degrees of freedom of a sum of variances: Satterthwaite (1946).
    """
    value_RP, weight_P = value_RP.double(), weight_P.double()
    runs = len(value_RP)
    value_RP = torch.where(weight_P > 0, value_RP, 0)
    figure = clustered_mean(value_RP.mean(0) * weight_P, weight_P, prompt_P)
    if figure is None:
        return None
    if figure.se is None:
        return Estimate(figure.mean, None, 0.0)
    prompts = float(prompt_P[weight_P > 0].unique().numel() - 1)
    of_prompts, of_runs = figure.se**2, 0.0
    if runs > 1:
        mean_R = (value_RP * weight_P).sum(1) / weight_P.sum()
        of_runs = mean_R.var(correction=1).item() / runs
    total = of_prompts + of_runs
    parts = of_prompts**2 / prompts + (of_runs**2 / (runs - 1) if runs > 1 else 0.0)
    return Estimate(figure.mean, math.sqrt(total), total**2 / parts if parts else prompts)


def critical(num_prompts: float, *, looks: int = 1) -> float:
    """How many of its standard errors a mean over so many prompts must be from 0 to be measurable.

    Args:
        num_prompts: At least 2; one more than the degrees of freedom.
        looks: Means that are looked at together (Bonferroni).

    Returns:
        The quantile of Student's t for `CONFIDENCE`: 1.96 for many prompts, 2.26 for ten, 4.2 for three.

    Source:
        Cornish-Fisher expansion in 1/df (Abramowitz and Stegun, 26.7.5); 3 % too small at df = 2, and an
        eighth there for five looks.
    """
    df, z = max(num_prompts - 1, 1.0), NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / looks)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    correction: float = sum(term / df**power for power, term in enumerate(terms, start=1))
    return z + correction


def visible(change: Figure, num_prompts: float, *, looks: int = 1) -> float | None:
    """The smallest change that pairs would have shown with probability `POWER`; None without an error.

    Args:
        change: With its error.
        num_prompts: As for `critical`, like `looks`.
        looks: Changes that are looked at together.
    """
    if change.se is None or num_prompts < 2:
        return None
    return (critical(num_prompts, looks=looks) + _Z_POWER) * change.se


def pairs_needed(effect: float, spread: float) -> int:
    """Pairs that show a change of `effect` with probability `POWER`, at least 2.

    Args:
        effect: A mean change, not 0.
        spread: Standard error of the mean change over n pairs, times the root of n: what one pair's change
            varies by, with more for pairs that share prompts.
    """
    return max(2, math.ceil(((_Z + _Z_POWER) * spread / effect) ** 2))


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
