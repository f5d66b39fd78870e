"""What to change where a plan does not fit: of the changes that make it fit, the cheapest ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orpo.plan.lengths import PairLengths
from orpo.plan.machine import Cluster
from orpo.plan.plan import DEFAULT_OPTIMIZER, Plan, has_checkpointing, lay_out, make_plan
from orpo.settings.config import ONE_WEIGHT_AT_A_TIME

MOST_RANKS = 1024
LEAST_BUDGET = 1024
"""Tokens of the smallest micro-batch that training chooses by itself."""


class Change(NamedTuple):
    """A change that makes a run fit.

    Attributes:
        words: What to write, as on the command line.
        plan: What the run is then.
        same_model: Whether the same weights are trained in the same way.
    """

    words: str
    plan: Plan
    same_model: bool


def cheapest_changes(settings: Mapping[str, Any], plan: Plan) -> list[Change]:
    """The cheapest change that keeps the training what it is, and the cheapest one that does not.

    Either is left out where there is none, and the second one where it costs more.
    """
    fitting = [change for change in _tried(settings, plan) if change.plan.fits]
    kept = min((c for c in fitting if c.same_model), key=lambda c: c.plan.cost, default=None)
    other = min((c for c in fitting if not c.same_model), key=lambda c: c.plan.cost, default=None)
    if kept is not None and other is not None and other.plan.cost >= kept.plan.cost:
        other = None
    return [change for change in (kept, other) if change is not None]


def _tried(settings: Mapping[str, Any], plan: Plan) -> Iterator[Change]:
    where, lengths, on_cpu = plan.cluster, plan.lengths, plan.setup.on_cpu
    for changes, words in _same_model(settings, where):
        yield Change(words, lay_out(changes, plan.model, where, lengths, on_cpu=on_cpu), True)
    yield from _more_gpus(settings, plan)
    for changes, words in _other_model(settings, where):
        yield Change(words, _planned(changes, where, lengths, on_cpu), False)


def _planned(settings: Mapping[str, Any], where: Cluster, lengths: PairLengths, on_cpu: bool) -> Plan:
    return make_plan(settings, where, lengths, on_cpu=on_cpu)


def _same_model(settings: Mapping[str, Any], where: Cluster) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that change memory and time only, alone and together."""
    single: list[tuple[dict[str, Any], str]] = [
        ({"tokens_per_micro_batch": LEAST_BUDGET}, f"--tokens_per_micro_batch {LEAST_BUDGET}"),
    ]
    if not has_checkpointing(settings):
        single.append(({"gradient_checkpointing": True}, "--gradient_checkpointing"))
    if settings.get("max_grad_norm") == 0 and _may_step_in_backward(settings, where):
        single.append(({"optimizer_in_backward": True}, "--optimizer_in_backward"))
    if where.ranks > 1 and not settings.get("fsdp") and not settings.get("load_in_4bit"):
        shards = {"fsdp": "full_shard auto_wrap", "deepspeed": None}
        single.append((shards, "--fsdp 'full_shard auto_wrap'"))
    for chosen in range(1, 2 ** len(single)):
        picked = [one for place, one in enumerate(single) if chosen >> place & 1]
        changes = dict(settings)
        for change, _ in picked:
            changes |= change
        yield changes, " ".join(words for _, words in picked)


def _may_step_in_backward(settings: Mapping[str, Any], where: Cluster) -> bool:
    """Whether the optimizer can step in the backward pass, does not yet, and would free something."""
    known = str(settings.get("optim") or DEFAULT_OPTIMIZER) in ONE_WEIGHT_AT_A_TIME
    on_or_small = settings.get("optimizer_in_backward") or settings.get("use_peft")
    others = settings.get("fsdp") or settings.get("deepspeed") or settings.get("fp16")
    return where.ranks == 1 and known and not on_or_small and not others


def _more_gpus(settings: Mapping[str, Any], plan: Plan) -> Iterator[Change]:
    """Twice as many GPUs, and so on, with weights cut over them; pairs of a step as before, if possible."""
    where = plan.cluster
    sharded = dict(settings) | {
        "fsdp": "full_shard auto_wrap",
        "deepspeed": None,
        "gradient_checkpointing": True,
        "optimizer_in_backward": False,
    }
    ranks = where.ranks * 2
    while ranks <= MOST_RANKS:
        gpus = min(ranks, max(8, where.gpus))
        wider = Cluster(where.gpu, where.name, gpus, max(1, ranks // gpus), where.mfu)
        each = max(1, plan.pairs_per_step // ranks)
        if settings.get("dataloader_drop_last") and each * ranks > plan.lengths.num_pairs:
            return
        changes = sharded | {"per_device_train_batch_size": each, "gradient_accumulation_steps": 1}
        planned = lay_out(changes, plan.model, wider, plan.lengths, on_cpu=plan.setup.on_cpu)
        words = f"--gpus {gpus} --nodes {wider.nodes} --fsdp 'full_shard auto_wrap' --gradient_checkpointing"
        words += f" --per_device_train_batch_size {each}"
        words += " --optimizer_in_backward false" if settings.get("optimizer_in_backward") else ""
        if each * ranks != plan.pairs_per_step:
            words += f" ({each * ranks} pairs a step, not {plan.pairs_per_step})"
        yield Change(words, planned, True)
        if planned.fits:
            return
        ranks *= 2


def _other_model(settings: Mapping[str, Any], where: Cluster) -> Iterator[tuple[dict[str, Any], str]]:
    """Settings that train another model: no clipping, another optimizer, an adapter, quantized weights."""
    checked = dict(settings) | {"gradient_checkpointing": True}
    also = "" if has_checkpointing(settings) else " --gradient_checkpointing"
    if settings.get("max_grad_norm") != 0 and _may_step_in_backward(settings, where):
        unclipped = checked | {"optimizer_in_backward": True, "max_grad_norm": 0.0}
        yield unclipped, f"--optimizer_in_backward --max_grad_norm 0{also}"
    eight = {"optim": "adamw_bnb_8bit"}
    if "8bit" not in str(settings.get("optim")) and not settings.get("optimizer_in_backward"):
        yield checked | eight, f"--optim adamw_bnb_8bit{also}"
    if not settings.get("use_peft"):
        yield dict(settings) | {"use_peft": True}, "--use_peft (with a learning rate of 5e-5 to 2e-4)"
        yield checked | {"use_peft": True}, f"--use_peft{also} (with a learning rate of 5e-5 to 2e-4)"
    if not settings.get("load_in_4bit"):
        changes = checked | {"use_peft": True, "load_in_4bit": True, "fsdp": None}
        yield changes, f"--use_peft --load_in_4bit{also} (with a learning rate of 5e-5 to 2e-4)"
