"""Every metric: its name, title, unit, what it averages, and the one way to write its numbers.

While training, a window of sums stays on the device, is added over the ranks once per log line and divided
once. An evaluation holds every pair's scores, so its means and errors do not depend on how the pairs were put
into batches or ranks (evaluation/preferences.py). A new metric is one entry of `METRICS`.

Shape suffixes: P = pairs.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from orpo.engine.head import PairScores
from orpo.engine.objective import log_odds, preference_loss, preference_slopes, reward
from orpo.errors import RunError
from orpo.run.log import Figure
from orpo.settings.config import Objective

Unit = Literal["share", "nats", "number", "count", "rate", "GiB"]
Divisor = Literal["steps", "nll_weight", "pairs", "preferences"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What is known about a metric.

    Attributes:
        name: In metrics.jsonl.
        title: For people.
        unit: How its numbers are written; `share` as a percentage.
        better: +1 where larger is better, -1 where smaller is, 0 where neither.
        divisor: What its sum over a training window is divided by; None where it is no such sum.
        value: Its values [P] from the scores of pairs, to be summed over those that have both sides where the
            divisor is `preferences`; None where the trainer measures it.
        caption: One sentence for a reader who does not know it.
        of: Which objectives have it; None: all.
        trl: TRL's name for it.
        trl_reward: TRL's name for beta times it.
        short: Its title where there is little room; empty: the title.
    """

    name: str
    title: str
    unit: Unit = "number"
    better: int = 0
    divisor: Divisor | None = None
    value: Callable[[PairScores, Objective], Tensor] | None = None
    caption: str = ""
    of: Callable[[Objective], bool] | None = None
    trl: str | None = None
    trl_reward: str | None = None
    short: str = ""

    def is_of(self, objective: Objective) -> bool:
        """Whether this objective has it."""
        return self.of is None or self.of(objective)


def _margin(scores: PairScores, objective: Objective) -> Tensor:
    return scores.chosen_logprob_P - scores.rejected_logprob_P


def _accuracy(scores: PairScores, objective: Objective) -> Tensor:
    margin_P = _margin(scores, objective)
    return (margin_P > 0).to(margin_P.dtype)


def _log_odds_ratio(scores: PairScores, objective: Objective) -> Tensor:
    return log_odds(scores.chosen_logprob_P) - log_odds(scores.rejected_logprob_P)


def _odds_ratio_loss(scores: PairScores, objective: Objective) -> Tensor:
    return preference_loss(*scores.sides, objective)


def _rewards(scores: PairScores, objective: Objective) -> tuple[Tensor, Tensor]:
    chosen, rejected = scores.sides
    return reward(chosen, objective), reward(rejected, objective)


def _reward_margin(scores: PairScores, objective: Objective) -> Tensor:
    chosen_P, rejected_P = _rewards(scores, objective)
    return chosen_P - rejected_P


def _reward_accuracy(scores: PairScores, objective: Objective) -> Tensor:
    margin_P = _reward_margin(scores, objective)
    return (margin_P > 0).to(margin_P.dtype)


def _has_margin(objective: Objective) -> bool:
    """Whether the reward margin is another number than the log odds ratio, up to a factor."""
    return objective.preference_weight > 0 and objective.compares != "odds"


def _has_rewards(objective: Objective) -> bool:
    """Whether the rewards are other numbers than the log-probs, up to a factor."""
    return objective.preference_weight > 0 and objective.compares in ("sums", "ratios")


def odds_gradient(scores: PairScores, objective: Objective) -> Tensor:
    """Half the L1 norm of the gradient that a pair's preference loss has in all its logits. [P].

    The slope in the log-prob of a token is the same for all tokens of an answer, and a slope s in log p is
    the gradient s * (onehot - softmax) in the logits, whose L1 norm is |s| * 2 * (1 - p): hence the `doubt`
    of the scores. A pair without a rejected side comes out as a number that means nothing.
    """
    chosen_P, rejected_P = preference_slopes(*scores.sides, objective)
    return chosen_P.abs() * scores.chosen_doubt_P + rejected_P.abs() * scores.rejected_doubt_P


METRICS = (
    Metric(
        "accuracy", "accuracy", "share", +1, "preferences", _accuracy,
        "Share of pairs whose chosen answer has the higher mean log-prob.", trl="rewards/accuracies",
    ),
    Metric(
        "log_odds_ratio", "log odds ratio", "number", +1, "preferences", _log_odds_ratio,
        "How much likelier, in log odds, the chosen answer is than the rejected one.", trl="log_odds_chosen",
    ),
    Metric(
        "margin", "margin", "nats", +1, "preferences", _margin,
        "Mean log-prob of the chosen answer minus that of the rejected one.", trl_reward="rewards/margins",
    ),
    Metric(
        "chosen_logprob", "chosen log-prob", "nats", +1, "pairs",
        lambda scores, objective: scores.chosen_logprob_P,
        "Mean log-prob of a token of the chosen answer.", None, "logps/chosen", "rewards/chosen",
    ),
    Metric(
        "rejected_logprob", "rejected log-prob", "nats", -1, "preferences",
        lambda scores, objective: scores.rejected_logprob_P,
        "Mean log-prob of a token of the rejected answer.", None, "logps/rejected", "rewards/rejected",
    ),
    Metric(
        "nll", "NLL", "nats", -1, "nll_weight", lambda scores, objective: scores.nll_sum_P,
        "Negative log-likelihood of a token of the chosen side.", trl="nll_loss",
    ),
    Metric(
        "nll_token_mean", "NLL over tokens", "nats", -1,
        caption="The NLL with every token weighted the same.",
    ),
    Metric(
        "odds_ratio_loss", "preference loss", "number", -1, "preferences", _odds_ratio_loss,
        "The part of the loss that compares the two answers; ln 2 where it cannot, and without a margin.",
    ),
    Metric(
        "reward_margin", "reward margin", "number", +1, "preferences", _reward_margin,
        "What the objective pushes up: its reward of the chosen answer minus that of the rejected one.",
        _has_margin, "rewards/margins",
    ),
    Metric(
        "reward_accuracy", "reward accuracy", "share", +1, "preferences", _reward_accuracy,
        "Share of pairs whose chosen answer has the higher reward.", _has_rewards, "rewards/accuracies",
    ),
    Metric(
        "chosen_reward", "chosen reward", "number", +1, "pairs",
        lambda scores, objective: _rewards(scores, objective)[0],
        "The objective's reward of the chosen answer.", _has_rewards, "rewards/chosen",
    ),
    Metric(
        "rejected_reward", "rejected reward", "number", -1, "preferences",
        lambda scores, objective: _rewards(scores, objective)[1],
        "The objective's reward of the rejected answer.", _has_rewards, "rewards/rejected",
    ),
    Metric("loss", "loss", "number", -1, "steps", caption="What is minimised."),
    Metric(
        "router_loss", "router loss", "number", -1, "steps",
        caption="What is minimised besides, so that a mixture of experts uses all of them.",
    ),
    Metric(
        "odds_share", "preference share of the gradient", "share",
        caption="Share of the term that compares in the gradient that the two terms have in the logits.",
        short="preference share",
    ),
    Metric(
        "prompt_share", "prompt share of the NLL", "share",
        caption="Share of the NLL's tokens that come before the answer.", short="prompt share",
    ),
    Metric("grad_norm", "gradient norm", "number"),
    Metric("learning_rate", "learning rate", "rate"),
    Metric("tokens_per_second", "tokens/s", "count", +1),
    Metric("tokens", "tokens", "count"),
    Metric("peak_memory", "peak memory", "GiB"),
    Metric(
        "ended", "answers that end", "share", +1, caption="Share of answers that ended by themselves.",
    ),
    Metric(
        "repetition", "repetition", "share", -1,
        caption="Mean share of an answer's runs of three words that came before in it.",
    ),
)  # fmt: skip
"""In the order in which tables show them."""

_BY_NAME = {metric.name: metric for metric in METRICS}
_COUNTS = ("steps", "tokens", "nll_weight", "pairs", "preferences", "nll_tokens", "context_tokens")
_GRADIENTS = ("nll_gradient", "odds_gradient")
SUMS = (*_COUNTS, *_GRADIENTS, *(metric.name for metric in METRICS if metric.divisor))
"""What a window adds up."""


def metric_named(name: str) -> Metric:
    """The metric of that name; one that is not ours, of a `compute_metrics` say, is a plain number."""
    return _BY_NAME.get(name) or Metric(name, name)


def is_ours(name: str) -> bool:
    """Whether there is a metric of that name in `METRICS`."""
    return name in _BY_NAME


def in_order(names: Iterable[str]) -> list[str]:
    """Names of metrics as tables show them: ours first, in our order, then others as they come."""
    given = list(names)
    return [name for name in _BY_NAME if name in given] + [name for name in given if name not in _BY_NAME]


class Written(NamedTuple):
    """A figure as text: its value, its standard error, which is empty where there is none, and a unit."""

    value: str
    error: str
    unit: str = ""

    def __str__(self) -> str:
        error = f" ± {self.error}" if self.error else ""
        return f"{self.value}{error}{self.unit and ' '}{self.unit}"


def write_figure(name: str, figure: Figure | None) -> Written:
    """Write a figure of the metric `name`: `71.2 % ± 3.4`, `-2.105 ± 0.031`; a dash where there is none."""
    return write_with_unit(figure, metric_named(name).unit)


def write_with_unit(figure: Figure | None, unit: str) -> Written:
    """Write a figure of a metric with that unit, as `write_figure` does."""
    if figure is None:
        return Written("-", "")
    error = figure.se
    if unit == "share":
        return Written(f"{100 * figure.mean:.1f} %", "" if error is None else f"{100 * error:.1f}")
    style = {"count": ",.0f", "rate": ".2e", "GiB": ".2f"}.get(unit, ".3f")
    return Written(format(figure.mean, style), "" if error is None else format(error, style))


def write_change(name: str, change: Figure | None) -> Written:
    """A difference with its own error: `+3.1 ± 1.2 points` for a share, `-0.204 ± 0.031` for the rest."""
    return write_change_with_unit(change, metric_named(name).unit)


def write_change_with_unit(change: Figure | None, unit: str) -> Written:
    """Write a difference in a metric with that unit, as `write_change` does."""
    if change is None:
        return Written("-", "")
    is_share = unit == "share"
    factor, style = (100, ".1f") if is_share else (1, ".3f")
    error = "" if change.se is None else format(factor * change.se, style)
    return Written(format(factor * change.mean, "+" + style), error, "points" if is_share else "")


class MetricWindow:
    """The sums since the last log line.

    Attributes:
        objective: What is minimised in the steps that are added.
    """

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._sums = torch.zeros(len(SUMS), dtype=sum_dtype(device), device=device)
        self._before = [0.0] * len(SUMS)
        self.objective = objective

    def copy(self) -> Self:
        """A window with the same sums."""
        other = copy.copy(self)
        other._sums = self._sums.clone()
        return other

    def add_pairs(self, scores: PairScores, num_context_tokens: int = 0) -> None:
        """Add the pairs of one micro-batch, of whose NLL tokens so many come before the answers."""
        has_P = scores.has_rejected_P
        values = {}
        for metric in METRICS:
            if metric.value is not None and metric.is_of(self.objective):
                value_P = metric.value(scores, self.objective)
                chosen_only = metric.divisor != "preferences"
                values[metric.name] = (value_P if chosen_only else torch.where(has_P, value_P, 0)).sum()
        self._add(
            pairs=has_P.numel(),
            preferences=has_P.sum(),
            nll_weight=scores.nll_weight_P.sum(),
            nll_tokens=scores.nll_tokens_P.sum(),
            context_tokens=num_context_tokens,
            nll_gradient=self.objective.nll_weight * scores.nll_doubt_P.sum(),
            odds_gradient=self.objective.preference_weight
            * torch.where(has_P, odds_gradient(scores, self.objective), 0).sum(),
            **values,
        )

    def add_step(
        self, loss: Tensor, num_tokens: int, num_ranks: int, router_loss: Tensor | float = 0.0
    ) -> None:
        """Add one optimizer step: this rank's share of its losses, and the tokens this rank has read."""
        self._add(steps=1 / num_ranks, loss=loss, router_loss=router_loss, tokens=num_tokens)

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[SUMS.index(name)] += value

    def fold(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Add this window over the ranks, all of which must call.

        Returns:
            The sums so far by name, the same on every rank.
        """
        self._before = [old + new for old, new in zip(self._before, reduce(self._sums).tolist(), strict=True)]
        self._sums.zero_()
        return dict(zip(SUMS, self._before, strict=True))

    def restore(self, sums: Mapping[str, float] | None) -> None:
        """Continue from sums that `fold` returned before an interruption; from nothing without them.

        Raises:
            RunError: They are not of this version.
        """
        if sums is not None and (not isinstance(sums, Mapping) or set(sums) != set(SUMS)):
            raise RunError("the checkpoint is of another version of orpo; start again in another output_dir")
        self._before = [0.0 if sums is None else sums[name] for name in SUMS]
        self._sums.zero_()

    def close(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Add the window over the ranks, empty it, and return its means by name, and `tokens` as a sum."""
        sums = self.fold(reduce)
        self._before = [0.0] * len(SUMS)
        means = {
            metric.name: sums[metric.name] / sums[metric.divisor]
            for metric in METRICS
            if metric.divisor and sums[metric.divisor] > 0 and metric.is_of(self.objective)
        }
        if sums["router_loss"] == 0:  # of models that have none
            means.pop("router_loss", None)
        return means | self._shares(sums) | {"tokens": sums["tokens"]}

    def _shares(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Shares of the gradient and of the NLL's tokens, where both terms, or an NLL, are there."""
        shares = {}
        nll = sums["nll_gradient"] / max(sums["nll_weight"], 1)
        odds = sums["odds_gradient"] / max(sums["preferences"], 1)
        if nll > 0 and odds > 0:
            shares["odds_share"] = odds / (nll + odds)
        if self.objective.nll_weight > 0 and sums["nll_tokens"] > 0:
            shares["prompt_share"] = sums["context_tokens"] / sums["nll_tokens"]
        return shares


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over pairs are held in."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def trl_names(metrics: Mapping[str, float], objective: Objective) -> dict[str, float]:
    """The same numbers under the names of TRL's trainers, for dashboards made for them (docs/metrics.md).

    TRL's `log_odds_ratio` is left out: it is log sigmoid of ours, that is minus our `odds_ratio_loss`.
    """
    known = [metric for metric in METRICS if metric.name in metrics]
    # ORPO's rewards are its log-probs times the weight of the term, SimPO's times the scale.
    beta = objective.preference_weight if objective.compares == "odds" else objective.scale
    rewards = {metric.trl_reward: beta * metrics[metric.name] for metric in known if metric.trl_reward}
    return rewards | {metric.trl: metrics[metric.name] for metric in known if metric.trl}
