"""A plan in words: a few lines for a terminal, and the same as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from orpo.plan.advice import Change
from orpo.plan.machine import RESERVE_GIB
from orpo.plan.plan import GIB, Plan

_NAMES = {
    "none": "one process", "ddp": "whole on every GPU (DDP)", "fsdp": "cut over all GPUs (FSDP)",
    "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3",
}  # fmt: skip


def plan_lines(plan: Plan, changes: Sequence[Change]) -> list[str]:
    """What to print."""
    return [*_what(plan), "", *_memory(plan), "", *_work(plan), "", *_verdict(plan, changes)]


def _what(plan: Plan) -> Iterator[str]:
    model, where, setup = plan.model, plan.cluster, plan.setup
    adapter = "" if model.trained == model.num_weights else f", {_number(model.trained)} trained"
    yield f"model      {model.name}: {_number(model.num_weights)} weights{adapter}"
    nodes = f" in {where.nodes} nodes" if where.nodes > 1 else ""
    yield f"machine    {where.ranks} x {where.name}{nodes}; weights {_NAMES[setup.sharding]}"
    precision = "bfloat16" if setup.half else "float32"
    again = ", layers recomputed" if setup.checkpointing else ""
    yield f"training   in {precision}{again}, {setup.optim}, {plan.pairs_per_step:,} pairs a step"
    held = f", {plan.lengths.num_held_out:,} held out" if plan.lengths.num_held_out else ""
    yield f"data       {plan.lengths.num_pairs:,} pairs{held} ({plan.lengths.source})"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        (
            "activations",
            memory.activations,
            f"{plan.largest:,.0f} tokens in a micro-batch, attention included",
        ),
        ("head", memory.head, "logits a chunk at a time, gradients of the vocabulary"),
    ]
    if memory.gathered:
        rows.append(("gathered", memory.gathered, "layers that are whole while they compute"))
    yield "GiB on each GPU"
    for name, size, note in rows:
        yield f"  {name:<12}{size / GIB:9.2f}" + (f"  {note}" if note else "")
    yield (
        f"  {'peak':<12}{memory.peak / GIB:9.2f}  of {plan.room / GIB:.1f}"
        f" ({RESERVE_GIB:.0f} are left to CUDA and to gaps); not all of them at one time"
    )
    yield f"checkpoint {plan.checkpoint / GIB:.1f} GiB on disk"


def _work(plan: Plan) -> Iterator[str]:
    work, where = plan.work, plan.cluster
    saved = 1 - work.tokens / work.separate_tokens
    read = {
        "shared": f"what is shared read once ({saved:.0%} fewer than with each side apart)",
        "packed": "each side apart (layout: packed)",
        "padded": f"each side apart, {-saved:.0%} more of padding (layout: padded)",
    }[plan.layout]
    yield f"a pair     {work.tokens:,.0f} tokens, {read}; {work.training / 1e12:,.1f} TFLOP"
    yield (
        f"a step     {plan.micro_batches:.1f} micro-batches of at most {plan.budget:,} tokens,"
        f" {plan.step_seconds:.2f} s; each GPU sends {plan.talk_bytes / 1e9:,.2f} GB"
        f" in {plan.talk_bytes / where.bandwidth:.2f} s meanwhile"
    )
    yield f"the run    {plan.steps:,} steps, {plan.num_evaluations} evaluations, {plan.operations:.2e} FLOP"
    yield (
        f"hours      {plan.hours:.2f} at {where.mfu:.0%} of {where.gpu.tflops:,.0f} TFLOP/s;"
        f" ${plan.cost:,.0f} at ${where.gpu.price:.2f} a GPU and hour"
    )


def _verdict(plan: Plan, changes: Sequence[Change]) -> Iterator[str]:
    if plan.fits:
        yield f"fits: {(plan.room - plan.memory.peak) / GIB:.1f} GiB to spare on each GPU"
        return
    yield f"does not fit: {(plan.memory.peak - plan.room) / GIB:.1f} GiB too much on each GPU"
    for change in changes:
        kind = "try" if change.same_model else "or, another training,"
        peak, hours = change.plan.memory.peak / GIB, change.plan.hours
        yield f"{kind} {change.words}: {peak:.1f} GiB, {hours:.2f} hours, ${change.plan.cost:,.0f}"
    if not changes:
        yield "no setting that is known here makes it fit; choose a GPU with more memory, or more of them"


def plan_json(plan: Plan, changes: Sequence[Change]) -> dict[str, Any]:
    """The same as plain values; bytes, seconds, hours, dollars."""
    return {
        "model": plan.model.name,
        "num_weights": plan.model.num_weights,
        "num_trained": plan.model.trained,
        "gpu": plan.cluster.name,
        "num_gpus": plan.cluster.ranks,
        "sharding": plan.setup.sharding,
        "bytes": {name: round(getattr(plan.memory, name)) for name in plan.memory.__slots__},
        "checkpoint_bytes": round(plan.checkpoint),
        "layout": plan.layout,
        "tokens_of_pair": plan.work.tokens,
        "pairs_per_step": plan.pairs_per_step,
        "steps": plan.steps,
        "operations": plan.operations,
        "step_seconds": plan.step_seconds,
        "bytes_sent_in_step": round(plan.talk_bytes),
        "hours": plan.hours,
        "cost": plan.cost,
        "fits": plan.fits,
        "changes": [
            {"words": one.words, "cost": one.plan.cost, "same_model": one.same_model} for one in changes
        ],
    }


def _number(count: float) -> str:
    """`7.24 billion`."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.2f}{word}"
    return f"{count:,.0f}"
