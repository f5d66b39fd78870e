"""The win rate if both answers were of the same length: AlpacaEval's logistic regression.

A verdict is explained by the difference in length, by how hard its instruction is, and by the models; the
rate is what the fit says with the first of these at 0. The leaderboard also knows the difficulties, from all
of its models, adds verdicts on answers made long or short on purpose, and fits under an L1 penalty. Without
these two files the rate is this package's own and no number of a leaderboard: it is fitted without a penalty,
which on few verdicts pulls every rate to a half.

Shape suffixes: R = verdicts, F = features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orpo.errors import DataError

Float64 = npt.NDArray[np.float64]
FEWEST = 20
"""Verdicts that a rate is fitted to."""
FOLDS = 5
_STRENGTHS = np.logspace(-4, 4, 10)
"""Inverse strengths of the L1 penalty that are tried, the default grid of scikit-learn."""
_GAMED_WEIGHT = 0.1
"""Of a verdict on a gamed answer: 0.2, over two gamed baselines."""
_SEED = 123
DRAWS = 200
"""Fits of the bootstrap."""


class Gamed(NamedTuple):
    """AlpacaEval's verdicts on answers of the baseline made longer or shorter, `df_gamed.csv`.

    Attributes:
        preference_R: In [0, 1].
        length_R: Standardised differences in length.
        difficulty_R: Of the instructions.
        own_R: 1 where the row is of no gamed baseline.
    """

    preference_R: Float64
    length_R: Float64
    difficulty_R: Float64
    own_R: Float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What is known besides the verdicts.

    Attributes:
        difficulty: Of each instruction, in the order of the verdicts.
        gamed: Further verdicts.
    """

    difficulty: Sequence[float] | None = None
    gamed: Gamed | None = None

    @property
    def is_leaderboards(self) -> bool:
        """Whether rates are those of AlpacaEval's leaderboard."""
        return self.difficulty is not None and self.gamed is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """A length-controlled win rate.

    Attributes:
        rate: In [0, 1].
        spread: Standard error of the mean of what the fit says of each instruction, which is what the
            leaderboard prints; 0 without difficulties.
        interval: Bounds that hold with 95 %: the fit of prompts drawn again, at the same penalty.
        length: The coefficient of the difference in length, baseline minus model; below 0 where longer
            answers win more.
        difficulty: The coefficient of the difficulty; None where that is not known.
        model: The coefficient of the model.
        penalty: Inverse strength of the L1 penalty that predicts best; None where there is none.
        comparable: Whether the rate may be compared with AlpacaEval's leaderboard.
    """

    rate: float
    spread: float
    interval: tuple[float, float]
    length: float
    difficulty: float | None
    model: float
    penalty: float | None
    comparable: bool

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "rate": self.rate,
            "spread_of_predictions": self.spread,
            "interval_95": self.interval,
            "coefficients": {"length": self.length, "difficulty": self.difficulty, "model": self.model},
            "inverse_penalty": self.penalty,
            "comparable_with_leaderboard": self.comparable,
        }


def length_controlled(
    scores: Sequence[float],
    lengths: Sequence[tuple[int, int]],
    control: Control | None = None,
    prompts: Sequence[str] | None = None,
    *,
    draws: int | None = None,
) -> LengthControlled | None:
    """Fit the regression; the penalty of AlpacaEval's is chosen by five-fold cross-validation.

    Args:
        scores: In [0, 1], 1 where the second answer won.
        lengths: Characters of the two answers.
        control: What else is known.
        prompts: Equal for verdicts on the same prompt, for the interval; None: each is of its own.
        draws: How often prompts are drawn again for the interval; None: `DRAWS` times.

    Returns:
        None where there are fewer than `FEWEST` verdicts, or all differences in length are the same.

    Raises:
        DataError: The difficulties are not as many as the verdicts.
    """
    control = control or Control()
    difficulty = control.difficulty
    if difficulty is not None and len(difficulty) != len(scores):
        raise DataError(f"{len(difficulty)} difficulties for {len(scores)} verdicts; they go by position")
    longer_R = np.array([first - second for first, second in lengths], dtype=np.float64)
    if len(scores) < FEWEST or longer_R.std() == 0:
        return None
    score_R = np.array(scores, dtype=np.float64)
    own_RF = _features(longer_R / longer_R.std(ddof=1), difficulty, np.ones(len(scores)))
    same_RF = own_RF.copy()
    same_RF[:, 0] = 0
    x_RF, y_R, weight_R = own_RF, score_R, np.ones(len(scores))
    if control.gamed is not None:
        gamed = control.gamed
        gamed_RF = _features(gamed.length_R, None if difficulty is None else gamed.difficulty_R, gamed.own_R)
        x_RF, y_R = np.concatenate([gamed_RF, own_RF]), np.concatenate([gamed.preference_R, score_R])
        weight_R = np.concatenate([np.where(gamed.own_R > 0, 1.0, _GAMED_WEIGHT), weight_R])
    penalty = _best_penalty(x_RF, y_R, weight_R) if control.is_leaderboards else None
    coefficients = _fit(x_RF, y_R, weight_R, penalty)
    said_R = _logistic(same_RF @ coefficients)
    return LengthControlled(
        rate=float(said_R.mean()),
        spread=float(said_R.std(ddof=1) / np.sqrt(len(said_R))),
        interval=_interval((x_RF, y_R, weight_R), same_RF, penalty, prompts, draws or DRAWS),
        length=float(coefficients[0]),
        difficulty=None if difficulty is None else float(coefficients[1]),
        model=float(coefficients[-1]),
        penalty=penalty,
        comparable=control.is_leaderboards,
    )


def _features(length_R: Float64, difficulty: Sequence[float] | Float64 | None, own_R: Float64) -> Float64:
    hard = [] if difficulty is None else [np.asarray(difficulty, dtype=np.float64)]
    return np.stack([np.tanh(length_R), *hard, own_R], axis=1)


def _fit(x_RF: Float64, y_R: Float64, weight_R: Float64, penalty: float | None) -> Float64:
    """Coefficients [F] without an intercept; a soft label is two rows, weighted by p and 1 - p."""
    from sklearn.linear_model import LogisticRegression

    if penalty is None:
        model = LogisticRegression(C=np.inf, fit_intercept=False)
    else:
        model = LogisticRegression(
            C=penalty, l1_ratio=1, solver="liblinear", fit_intercept=False, random_state=_SEED
        )
    labels = np.repeat([1, 0], len(y_R))
    both_R = np.concatenate([y_R * weight_R, (1 - y_R) * weight_R])
    coefficients: Float64 = model.fit(np.concatenate([x_RF, x_RF]), labels, sample_weight=both_R).coef_[0]
    return coefficients


def _best_penalty(x_RF: Float64, y_R: Float64, weight_R: Float64) -> float:
    """The penalty with the least log loss on the folds that it was not fitted to."""
    from sklearn.model_selection import GroupKFold

    groups = np.tile(np.arange(len(y_R)), 2)  # both rows of a verdict stay in one fold
    losses = np.zeros(len(_STRENGTHS))
    for inside, outside in GroupKFold(FOLDS).split(groups, groups=groups):
        train, test = inside[inside < len(y_R)], outside[outside < len(y_R)]
        for number, penalty in enumerate(_STRENGTHS):
            said = _logistic(x_RF[test] @ _fit(x_RF[train], y_R[train], weight_R[train], penalty))
            said = np.clip(said, 1e-15, 1 - 1e-15)
            loss = y_R[test] * np.log(said) + (1 - y_R[test]) * np.log(1 - said)
            losses[number] -= (weight_R[test] * loss).mean()
    return float(_STRENGTHS[losses.argmin()])


def _interval(
    fitted: tuple[Float64, Float64, Float64],
    same_RF: Float64,
    penalty: float | None,
    prompts: Sequence[str] | None,
    draws: int,
) -> tuple[float, float]:
    """The middle 95 % of the rates of prompts drawn again; verdicts on gamed answers stay."""
    members: dict[str, list[int]] = {}
    for row in range(len(same_RF)):
        members.setdefault(str(row) if prompts is None else prompts[row], []).append(row)
    clusters = list(members.values())
    random, rates = np.random.default_rng(0), []
    fixed = np.arange(len(fitted[0]) - len(same_RF))
    for _ in range(draws):
        drawn = random.integers(len(clusters), size=len(clusters))
        own = np.array([row for cluster in drawn for row in clusters[cluster]])
        index = np.concatenate([fixed, len(fixed) + own])
        x_RF, y_R, weight_R = (part[index] for part in fitted)
        rates.append(float(_logistic(same_RF[own] @ _fit(x_RF, y_R, weight_R, penalty)).mean()))
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)


def _logistic(value: Float64) -> Float64:
    return np.exp(-np.logaddexp(0, -value))
