"""Plan a run from its settings: what `orpo plan` does, for Python too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orpo.errors import ConfigError
from orpo.plan.advice import Change, cheapest_changes
from orpo.plan.lengths import drawn_lengths, read_lengths
from orpo.plan.lines import plan_json, plan_lines
from orpo.plan.machine import cluster
from orpo.plan.plan import Plan, make_plan
from orpo.settings.config import check_recipe


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what to change where it does not fit.

    Attributes:
        plan: The run on paper.
        changes: The cheapest changes that make it fit; none where it fits, or nothing helps.
    """

    plan: Plan
    changes: tuple[Change, ...]

    def lines(self) -> list[str]:
        """In words."""
        return plan_lines(self.plan, self.changes)

    def to_json(self) -> dict[str, Any]:
        """As plain values; bytes, seconds, hours, dollars."""
        return plan_json(self.plan, self.changes)


def plan_run(
    settings: Mapping[str, Any],
    gpu: str = "h100-80",
    *,
    gpus: int = 1,
    nodes: int = 1,
    mfu: float = 0.4,
    price: float | None = None,
    pairs: int | None = None,
    lengths: str | None = None,
) -> Planned:
    """Memory, hours and cost of a run on GPUs that need not be there; no weights are loaded.

    Args:
        settings: Of a recipe, by key; `model_name_or_path` is needed, and `dataset_name` without `pairs`.
        gpu: Kind of GPU: a name of `orpo.plan.machine.GPUS`.
        gpus: GPUs of a node.
        nodes: Nodes.
        mfu: Share of the GPUs' peak rate that training reaches, in (0, 1].
        price: Dollars of a GPU and hour; None: a usual one.
        pairs: Pairs of the data, which is then not read; with `lengths`.
        lengths: Mean tokens of prompt, chosen and rejected: `149/304/304`.

    Raises:
        OrpoError: The settings cannot be planned, or model or data cannot be read.
    """
    if (pairs is None) != (lengths is None):
        raise ConfigError("--pairs and --lengths stand for the data together; write both, or neither")
    check_recipe(settings)
    if not settings.get("model_name_or_path"):
        raise ConfigError("model_name_or_path is not set; name a recipe, or write --model_name_or_path M")
    where = cluster(gpu, gpus, nodes, mfu=mfu, price=price)
    if pairs is None or lengths is None:
        found = read_lengths(settings)
    else:
        found = drawn_lengths(lengths, pairs, settings)
    plan = make_plan(settings, where, found)
    return Planned(plan, () if plan.fits else tuple(cheapest_changes(settings, plan)))
