"""What a suite has measured, item by item: means with errors, and the change from one model to another.

Every metric is a ratio of two sums over items: what was found, and what it weighs. An item is a question, a
pair of sentences, a preference pair. Two models are compared on the items that both have, so the error of a
change is that of the change, not what the errors of two means add up to. Items of one cluster (the two turns
of a question, the pairs of a prompt) count as one piece of evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo.errors import DataError
from orpo.run.log import Figure


@dataclass(frozen=True, slots=True)
class Column:
    """One metric of every item.

    Attributes:
        sums: What was found, times its weight; what stands beside a weight of 0 does not count.
        weights: At least 0; 0 for an item that says nothing of this metric. None: 1 each.
        unit: As of `orpo.engine.metrics.Metric`.
    """

    sums: Sequence[float]
    weights: Sequence[float] | None = None
    unit: str = "share"

    def weight(self, index: int) -> float:
        """Of one item."""
        return 1.0 if self.weights is None else float(self.weights[index])


@dataclass(frozen=True, slots=True)
class Value:
    """A figure and the number of items it is over."""

    figure: Figure
    n: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"mean": self.figure.mean, "se": self.figure.se, "n": self.n}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a suite has found out about one model.

    Attributes:
        items: A key for each, the same for every model, each once.
        columns: By metric, in the order of a table; each as long as `items`.
        clusters: The cluster of each item; empty: each is of its own.
        notices: Lines to print: what could not be measured, and why.
        settings: What the figures depend on besides the model: temperature, judge, limit.
    """

    items: Sequence[str]
    columns: Mapping[str, Column]
    clusters: Sequence[str] = ()
    notices: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, name: str) -> str:
        """The metric of all items whose metric of a group `name` is; of others the name itself."""
        whole = name.partition(" (")[0]
        return whole if whole in self.columns else name

    def unit(self, name: str) -> str:
        """The unit of a metric."""
        return self.columns[name if name in self.columns else self.whole(name)].unit

    def values(self) -> dict[str, Value]:
        """Each metric; one that no item has is left out."""
        import torch

        from orpo.evaluation.statistics import clustered_mean

        found = {}
        clusters = _numbered(self.clusters or self.items)
        for name, column in self.columns.items():
            sums, weights = self._sums(column)
            sum_i, weight_i = (torch.tensor(one, dtype=torch.float64) for one in (sums, weights))
            figure = clustered_mean(sum_i, weight_i, torch.tensor(clusters))
            if figure is not None:
                found[name] = Value(figure, sum(weight > 0 for weight in weights))
        return found

    def changes_to(self, after: Measured) -> dict[str, Value]:
        """Each metric's change from this model to `after`, on the items that say something of both."""
        mine = {item: index for index, item in enumerate(self.items)}
        both = [(mine[item], index) for index, item in enumerate(after.items) if item in mine]
        found = {}
        for name, column in self.columns.items():
            other = after.columns.get(name)
            if other is not None:
                # An item that one model has no value of stays in: a mean may be over different items.
                value = self._change(column, after, other, both)
                if value is not None:
                    found[name] = value
        return found

    def _change(
        self, column: Column, after: Measured, other: Column, both: Sequence[tuple[int, int]]
    ) -> Value | None:
        from orpo.evaluation.statistics import error_of

        groups = self.clusters or self.items
        totals = [0.0, 0.0]
        sums = [0.0, 0.0]
        rows: list[tuple[str, tuple[float, float], tuple[float, float]]] = []
        for first, second in both:
            weights = column.weight(first), other.weight(second)
            pair = tuple(
                float(of.sums[index]) if weight > 0 else 0.0
                for of, index, weight in zip((column, other), (first, second), weights, strict=True)
            )
            totals = [total + weight for total, weight in zip(totals, weights, strict=True)]
            sums = [total + value for total, value in zip(sums, pair, strict=True)]
            if max(weights) > 0:
                rows.append((groups[first], (pair[0], pair[1]), weights))
        if min(totals) <= 0:
            return None
        means = [one / total for one, total in zip(sums, totals, strict=True)]
        influence: dict[str, float] = {}
        for group, pair, weights in rows:
            moved = [
                (value - mean * weight) / total
                for value, mean, weight, total in zip(pair, means, weights, totals, strict=True)
            ]
            influence[group] = influence.get(group, 0.0) + moved[1] - moved[0]
        return Value(Figure(means[1] - means[0], error_of(influence.values(), len(influence))), len(rows))

    def _sums(self, column: Column) -> tuple[list[float], list[float]]:
        weights = [column.weight(index) for index in range(len(self.items))]
        return [
            float(value) if weight > 0 else 0.0 for value, weight in zip(column.sums, weights, strict=True)
        ], weights


def _numbered(names: Iterable[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def by_group(
    name: str, column: Column, groups: Sequence[str | None], *, fewest: int = 1
) -> dict[str, Column]:
    """A column for each group of items: `name (group)`, of groups with at least `fewest` items."""
    counted: dict[str, int] = {}
    for group in groups:
        if group is not None:
            counted[group] = counted.get(group, 0) + 1
    return {
        f"{name} ({group})": Column(
            column.sums,
            [column.weight(index) * (one == group) for index, one in enumerate(groups)],
            column.unit,
        )
        for group in sorted(counted)
        if counted[group] >= fewest
    }


def first_of(items: Sequence[Any], limit: int | None) -> list[Any]:
    """The first `limit` items; all without one.

    Raises:
        DataError: There is none.
    """
    taken = list(items)[:limit]
    if not taken:
        raise DataError("the suite has no item to measure on")
    return taken
