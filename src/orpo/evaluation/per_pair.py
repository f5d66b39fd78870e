"""What a model says of every single pair: kept on the disk, so that two models are compared pair by pair.

A file holds one JSON line a pair, with the name of its evaluation set, where it comes from, the number of its
prompt and its scores. Two evaluations of the same pairs give the change of each pair, and the error of its
mean is far smaller than what the errors of two separate means add up to.

Shape suffixes: P = pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orpo.data.dataset import TokenizedDataset, prompt_index
from orpo.engine.head import PairScores
from orpo.engine.metrics import METRICS, Metric
from orpo.errors import DataError
from orpo.evaluation.statistics import clustered_mean
from orpo.run.directory import write_json_lines
from orpo.run.log import Figures, read_text
from orpo.settings.config import Objective


@dataclass(frozen=True, slots=True)
class PairResults:
    """The scores of an evaluation set, and which pairs they are of.

    Attributes:
        scores: On the CPU.
        prompt_P: The same number for pairs with the same prompt.
        sources: Where each pair comes from.
        groups: Value of its `source` column.
    """

    scores: PairScores
    prompt_P: Tensor
    sources: Sequence[str]
    groups: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.sources)

    @classmethod
    def of(cls, scores: PairScores, pairs: TokenizedDataset) -> PairResults:
        """The scores of `pairs`."""
        return cls(scores, torch.from_numpy(prompt_index(pairs)), pairs.sources, pairs.groups)

    def at(self, index: Sequence[int]) -> PairResults:
        """Those of the pairs at `index`, in that order."""
        chosen = list(index)
        return PairResults(
            PairScores(*(column[chosen] for column in self.scores)),
            self.prompt_P[chosen],
            [self.sources[number] for number in chosen],
            [self.groups[number] for number in chosen],
        )

    def by_group(self) -> dict[str, PairResults]:
        """The results of each group, where the data names groups."""
        members: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            if group is not None:
                members.setdefault(group, []).append(number)
        return {name: self.at(index) for name, index in members.items()}

    @property
    def num_preferences(self) -> int:
        """Pairs with both sides."""
        return int(self.scores.has_rejected_P.sum())

    @property
    def num_prompts(self) -> int:
        """Different prompts of pairs with both sides."""
        return int(self.prompt_P[self.scores.has_rejected_P].unique().numel())

    def figures(self, objective: Objective) -> Figures:
        """Means over the pairs; figures that no pair has a value for are left out."""
        value_P, weight_P = pair_values(self.scores, objective)
        return self._means(value_P, weight_P)

    def change_to(self, after: PairResults, objective: Objective) -> Figures:
        """Mean changes from these results to those of the same pairs by another model, pair by pair."""
        before_P, weight_P = pair_values(self.scores, objective)
        after_P, _ = pair_values(after.scores, objective)
        both = before_P.keys() & after_P.keys()
        return self._means({name: after_P[name] - before_P[name] for name in both}, weight_P)

    def _means(self, value_P: Mapping[str, Tensor], weight_P: Mapping[str, Tensor]) -> Figures:
        found = {}
        for metric in METRICS:
            if metric.name in value_P:
                weight = weight_P[metric.name]
                value = torch.where(weight > 0, value_P[metric.name], 0).double()
                figure = clustered_mean(value * weight, weight, self.prompt_P)
                if figure is not None:
                    found[metric.name] = figure
        return found


OF_MEANS = ("nll", "nll_token_mean", "loss")
"""Metrics of an evaluation that are made of the others' means."""


def evaluated_metrics() -> list[Metric]:
    """Every metric that an evaluation has."""
    return [metric for metric in METRICS if metric.value is not None or metric.name in OF_MEANS]


def pair_values(scores: PairScores, objective: Objective) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each metric's values by pair, and the pairs' weights in its mean. Both [P] by name.

    `nll` is each pair's token mean, `nll_token_mean` weights every token the same, and `loss` is the
    objective of these means. What an objective tells from a reference model's scores is left out where these
    are not known.

    Args:
        scores: Of at least one pair.
        objective: What is minimised.
    """
    has_P = scores.has_rejected_P.double()
    one_P = torch.ones_like(has_P)
    nll_P = scores.nll_sum_P / scores.nll_weight_P
    value_P = {
        metric.name: metric.value(scores, objective)
        for metric in METRICS
        if metric.value is not None and metric.is_of(objective)
    }
    # A pair without a rejected side has nothing to compare, so the others weigh more: means, then their sum.
    share = objective.preference_weight * len(one_P) / max(int(has_P.sum()), 1)
    compared_P = torch.where(scores.has_rejected_P, share * value_P["odds_ratio_loss"], 0)
    value_P |= {"nll": nll_P, "nll_token_mean": nll_P, "loss": objective.nll_weight * nll_P + compared_P}
    if objective.needs_reference and not knows_reference(scores):
        value_P = {name: value for name, value in value_P.items() if not bool(value.isnan().any())}
    preferences = {metric.name for metric in METRICS if metric.divisor == "preferences"}
    weight_P = {name: has_P if name in preferences else one_P for name in value_P}
    return value_P, weight_P | {"nll_token_mean": scores.nll_tokens_P.double()}


def knows_reference(scores: PairScores) -> bool:
    """Whether there are scores of a reference model beside those of the model."""
    return not bool(scores.chosen_reference_P.isnan().any())


def with_one_reference(first: PairResults, second: PairResults) -> tuple[PairResults, PairResults]:
    """Both results of the same pairs with the same reference, so that what depends on it can be compared.

    It is that of the second model; where that is not known, that of the first; where neither is known, the
    first model itself.
    """
    known = next((one.scores for one in (second, first) if knows_reference(one.scores)), None)
    if known is None:
        chosen_P, rejected_P = first.scores.chosen_logprob_P, first.scores.rejected_logprob_P
    else:
        chosen_P, rejected_P = known.chosen_reference_P, known.rejected_reference_P
    columns = {"chosen_reference_P": chosen_P, "rejected_reference_P": rejected_P}
    return (
        replace(first, scores=first.scores._replace(**columns)),
        replace(second, scores=second.scores._replace(**columns)),
    )


def matched(before: PairResults, after: PairResults) -> tuple[PairResults, PairResults]:
    """The pairs that two evaluations have in common, in the same order.

    Pairs are told by where they come from; a row that became several pairs gives them in the same order to
    both. Prompts and groups are those of `before`: another tokenizer may number prompts in another way.
    """
    where = {key: number for number, key in enumerate(_keys(after))}
    both = [(number, where[key]) for number, key in enumerate(_keys(before)) if key in where]
    first = before.at([one for one, _ in both])
    second = after.at([two for _, two in both])
    return first, PairResults(second.scores, first.prompt_P, first.sources, first.groups)


def _keys(results: PairResults) -> Iterator[tuple[str, int]]:
    seen: dict[str, int] = {}
    for source in results.sources:
        seen[source] = seen.get(source, -1) + 1
        yield source, seen[source]


def write_results(path: Path, sets: Mapping[str, PairResults]) -> None:
    """Write the results of evaluation sets by name, one pair a line."""
    write_json_lines(path, (line for name, results in sets.items() for line in _lines(name, results)))


def _lines(name: str, results: PairResults) -> Iterator[dict[str, object]]:
    columns = {key: column.tolist() for key, column in results.scores._asdict().items()}
    prompts = results.prompt_P.tolist()
    for number, (source, group) in enumerate(zip(results.sources, results.groups, strict=True)):
        scores = {key: _or_null(values[number]) for key, values in columns.items()}
        yield {"set": name, "source": source, "group": group, "prompt": prompts[number], **scores}


def _or_null(value: Any) -> Any:
    return None if value != value else value  # JSON has no word for what is not a number


def read_results(path: Path) -> dict[str, PairResults]:
    """Inverse of `write_results`; empty where there is no file.

    Raises:
        DataError: A line is damaged.
    """
    if not path.exists():
        return {}
    sets: dict[str, list[dict[str, object]]] = {}
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        try:
            line = json.loads(text)
            sets.setdefault(line["set"], []).append({name: line[name] for name in _FIELDS})
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{path}:{number}: damaged; delete the file and evaluate again") from None
    return {name: _from_lines(lines) for name, lines in sets.items()}


_FIELDS = ("source", "group", "prompt", *PairScores._fields)


def _column(values: Sequence[Any]) -> Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


def _from_lines(lines: Sequence[Mapping[str, object]]) -> PairResults:
    columns = {name: [line[name] for line in lines] for name in _FIELDS}
    scores = {name: _column(columns[name]) for name in PairScores._fields}
    return PairResults(
        PairScores(**(scores | {"has_rejected_P": scores["has_rejected_P"] > 0})),
        torch.tensor(columns["prompt"]),
        columns["source"],  # type: ignore[arg-type]
        columns["group"],  # type: ignore[arg-type]
    )
