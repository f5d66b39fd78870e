"""From a recipe and a cluster to a plan: what a rank holds, what a run computes, its hours and its cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo.engine.memory import default_logits_memory_mib, most_tokens, token_budget
from orpo.engine.packing import SHARE_FROM, find_sharing, runs_rejected
from orpo.engine.planning import (
    BatchPlan,
    Sharing,
    pair_cost,
    pair_sizes,
    pair_tokens,
    plan_epoch,
    plan_step,
    stored_tokens,
)
from orpo.errors import ConfigError
from orpo.pairs import TokenizedPair
from orpo.plan.lengths import Int64, PairLengths
from orpo.plan.machine import RESERVE_GIB, Cluster
from orpo.plan.memory import Memory, Setup, Sharding, checkpoint_bytes, memory_of, states
from orpo.plan.on_paper import PaperModel, paper_model
from orpo.plan.work import Work, mean_work, work_of
from orpo.settings.config import LayoutName, Objective, OrpoSettings, check_processes, resolve_stages
from orpo.settings.schema import known_settings
from orpo.training.cadence import (
    MOST,
    SCORING,
    checkpoint_cost,
    evaluations,
    steps_in_epoch,
    steps_of_run,
)

STEPS_TRIED = 16
"""Optimizer steps whose micro-batches are laid out."""
GIB = 2**30
DEFAULT_OPTIMIZER = "adamw_torch_fused"
"""What `TrainingArguments` takes where a recipe names none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run on paper.

    Attributes:
        model: The model.
        cluster: Where it would run.
        setup: Sharding, optimizer, precision.
        lengths: Of its pairs.
        layout: Of its micro-batches.
        work: Of an average pair.
        memory: Of each rank.
        pairs_per_step: Pairs of a step, over all ranks.
        steps: Optimizer steps of the run.
        budget: Most tokens of a micro-batch.
        micro_batches: Of a rank in a step, on average.
        largest: Tokens of the largest micro-batch that was laid out.
        balance: Mean work of the ranks of a step over the largest, in (0, 1].
        num_evaluations: Evaluations of the held-out pairs.
        step_seconds: Seconds of a step.
        talk_bytes: Bytes that each rank sends in a step.
        hours: Of the whole run, evaluations included.
    """

    model: PaperModel
    cluster: Cluster
    setup: Setup
    lengths: PairLengths
    layout: LayoutName
    work: Work
    memory: Memory
    pairs_per_step: int
    steps: int
    budget: int
    micro_batches: float
    largest: float
    balance: float
    num_evaluations: int
    step_seconds: float
    talk_bytes: float
    hours: float

    @property
    def room(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return (self.cluster.gpu.memory_gib - RESERVE_GIB * (not self.setup.on_cpu)) * GIB

    @property
    def fits(self) -> bool:
        """Whether a rank's peak fits into its GPU."""
        return self.memory.peak <= self.room

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.hours * self.cluster.ranks * self.cluster.gpu.price

    @property
    def operations(self) -> float:
        """Floating-point operations of the run's training."""
        return self.work.training * self.pairs_per_step * self.steps

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint."""
        return checkpoint_bytes(self.model, self.setup)


def make_plan(
    settings: Mapping[str, Any], where: Cluster, lengths: PairLengths, *, on_cpu: bool = False
) -> Plan:
    """Plan a run.

    Args:
        settings: Of its recipe, by key.
        where: The cluster.
        lengths: Of its pairs.
        on_cpu: Whether the ranks are CPUs, whose attention goes by segments.

    Raises:
        OrpoError: The settings cannot be planned, or there is no configuration of the model.
    """
    own = OrpoSettings.from_recipe(settings)
    half = _computes_in_bf16(settings, where)
    model = paper_model(own, has_bf16=where.gpu.has_bf16, autocast=half, by_kernel=half and not on_cpu)
    return lay_out(settings, model, where, lengths, on_cpu=on_cpu)


def lay_out(
    settings: Mapping[str, Any],
    model: PaperModel,
    where: Cluster,
    lengths: PairLengths,
    *,
    on_cpu: bool = False,
) -> Plan:
    """Plan a run of a model that is on paper already; arguments as those of `make_plan`."""
    own = OrpoSettings.from_recipe(settings)
    check_processes(own, where.ranks)
    get = _Settings(settings)
    setup = Setup(
        ranks=where.ranks,
        sharding=_sharding(settings, where.ranks),
        optim=str(settings.get("optim") or DEFAULT_OPTIMIZER),
        checkpointing=has_checkpointing(settings),
        half=_computes_in_bf16(settings, where),
        logits_memory_mib=own.logits_memory_mib or default_logits_memory_mib(on_cpu=on_cpu),
        on_cpu=on_cpu,
        in_backward=own.optimizer_in_backward,
    )
    pairs_per_step = (
        int(get("per_device_train_batch_size")) * int(get("gradient_accumulation_steps")) * where.ranks
    )
    drop_last = bool(get("dataloader_drop_last"))
    in_epoch = steps_in_epoch(lengths.num_pairs, pairs_per_step, drop_last=drop_last)
    steps = steps_of_run(in_epoch, int(get("max_steps")), float(get("num_train_epochs")))
    stages = resolve_stages(own)
    compares = any(runs_rejected(stage.objective, None) for stage in stages)
    budget = own.tokens_per_micro_batch or _budget(model, setup, where, compares=compares)
    layout: LayoutName = own.layout or "shared"
    seed = get("seed") if get("data_seed") is None else get("data_seed")
    shown = _first_steps(lengths, pairs_per_step, seed=int(seed), drop_last=drop_last)
    laid_out = [
        _laid_out(lengths, shown, stage.objective, where.ranks, budget, layout, shares=model.shares)
        for stage in stages
    ]
    work = mean_work(
        [
            work_of(
                model,
                lengths.tokens,
                stage.objective,
                checkpointing=setup.checkpointing,
                layout=layout,
                read=laid.read,
            )
            for stage, laid in zip(stages, laid_out, strict=True)
        ],
        [stage.share for stage in stages],
    )
    memory, laid = max(
        ((memory_of(model, setup, one.first, later=one.later, longest=one.longest), one) for one in laid_out),
        key=lambda found: found[0].peak,
    )
    talk = _talk_bytes(model, setup, laid.micro_batches)
    rate = where.gpu.tflops * 1e12 * where.mfu
    in_step = min(pairs_per_step, lengths.num_pairs)
    compute = work.training * in_step / where.ranks / laid.balance / rate
    step_seconds = max(compute, talk / where.bandwidth)
    checkpoint = checkpoint_cost(model.trained / model.num_weights, where.ranks, on_cpu=on_cpu)
    number = _num_evaluations(get, lengths, pairs_per_step, steps, in_epoch, checkpoint)
    evaluation = work.forward * lengths.num_held_out / where.ranks / rate
    return Plan(
        model=model,
        cluster=where,
        setup=setup,
        lengths=lengths,
        layout=layout,
        work=work,
        memory=memory,
        pairs_per_step=pairs_per_step,
        steps=steps,
        budget=budget,
        micro_batches=laid.micro_batches,
        largest=max(laid.first, laid.later),
        balance=laid.balance,
        num_evaluations=number,
        step_seconds=step_seconds,
        talk_bytes=talk,
        hours=(steps * step_seconds + number * evaluation) / 3600,
    )


class _Settings:
    """Settings of a recipe, with the defaults of those it leaves out."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    def __call__(self, name: str) -> Any:
        value = self.given.get(name)
        return known_settings()[name].default if value is None else value


def _computes_in_bf16(settings: Mapping[str, Any], where: Cluster) -> bool:
    asked = settings.get("bf16")
    return where.gpu.has_bf16 and not settings.get("fp16") if asked is None else bool(asked)


def has_checkpointing(settings: Mapping[str, Any]) -> bool:
    """Whether layers keep their inputs only, by any name that transformers and FSDP have."""
    of_fsdp = settings.get("fsdp_config")
    return bool(
        settings.get("gradient_checkpointing")
        or settings.get("activation_checkpointing")
        or (settings.get("fsdp") and isinstance(of_fsdp, Mapping) and of_fsdp.get("activation_checkpointing"))
    )


def _sharding(settings: Mapping[str, Any], ranks: int) -> Sharding:
    """What is cut over the ranks."""
    deepspeed = settings.get("deepspeed")
    if ranks == 1:
        return "none"
    if deepspeed:
        stage = _deepspeed_stage(deepspeed)
        return "zero1" if stage <= 1 else "zero2" if stage == 2 else "zero3"
    return "fsdp" if settings.get("fsdp") else "ddp"


def _deepspeed_stage(config: Any) -> int:
    if isinstance(config, str) and not config.lstrip().startswith("{"):
        path = Path(config)
        if not path.is_file():
            raise ConfigError(f"deepspeed: {config} is no file; name a JSON file of DeepSpeed's settings")
        config = path.read_text(encoding="utf-8")
    found = json.loads(config) if isinstance(config, str) else config
    return int(found.get("zero_optimization", {}).get("stage", 0))


def _budget(model: PaperModel, setup: Setup, where: Cluster, *, compares: bool) -> int:
    """The tokens of a micro-batch that training would choose: engine/memory.py, with what is free there."""
    weights, gradients, state = states(model, setup)
    fixed = 0.0 if setup.cut > 1 else model.footprint.whatever_tokens(checkpointing=setup.checkpointing)
    gradients *= not setup.in_backward
    room = where.gpu.memory_gib * GIB - weights - gradients - state - fixed
    per_token = model.footprint.per_token(checkpointing=setup.checkpointing)
    return token_budget(room, per_token, most_tokens(on_cpu=setup.on_cpu, compares=compares))


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a few steps are laid out.

    Attributes:
        micro_batches: Of a rank in a step, on average.
        first: Tokens of the largest first micro-batch.
        later: Tokens of the largest other one.
        longest: Tokens of the longest two answers of a pair.
        balance: Mean work of the ranks of a step over the largest, in (0, 1].
        read: Tokens that a pair of all takes on average, padding included and what is shared once.
    """

    micro_batches: float
    first: float
    later: float
    longest: float
    balance: float
    read: float


def _first_steps(lengths: PairLengths, pairs_per_step: int, *, seed: int, drop_last: bool) -> list[Int64]:
    """Numbers of the pairs of each of training's first steps; drawn ones stand for more than there are."""
    number = len(lengths.tokens)
    steps = plan_epoch(
        min(lengths.num_pairs, max(number, pairs_per_step)),
        pairs_per_step,
        seed=seed,
        epoch=0,
        drop_last=drop_last,
        prompts=lengths.prompts,
    )
    return [step % number for step in steps[:STEPS_TRIED]]


def _laid_out(
    lengths: PairLengths,
    steps: Sequence[Int64],
    objective: Objective,
    ranks: int,
    budget: int,
    layout: LayoutName = "shared",
    *,
    shares: bool,
) -> _Layout:
    """Micro-batches of some steps as training lays them out; `shares`: whether pairs may share tokens."""
    with_rejected = runs_rejected(objective, None)
    tokens = lengths.tokens * (1, 1, with_rejected)
    pairs = lengths.pairs if shares and layout == "shared" else None
    laid = [
        _laid_out_step(
            tokens[step],
            None if pairs is None else [pairs[int(number)] for number in step],
            ranks,
            budget,
            layout,
            with_rejected=with_rejected,
        )
        for step in steps
    ]
    sizes = [of_rank for ranked, _ in laid for of_rank in ranked]
    looked_at = np.concatenate(steps)
    alone = pair_tokens(tokens, layout)
    return _Layout(
        micro_batches=float(np.mean([len(of_rank) for of_rank in sizes])),
        first=max(of_rank[0] for of_rank in sizes),
        later=max((size for of_rank in sizes for size in of_rank[1:]), default=0),
        longest=int(tokens[looked_at, 1:].sum(1).max()) if with_rejected else 0,
        balance=sum(sum(costs) for _, costs in laid) / ranks / sum(max(costs) for _, costs in laid),
        read=float(alone.mean()) * sum(map(sum, sizes)) / float(alone[looked_at].sum()),
    )


def _laid_out_step(
    lengths: Int64,
    pairs: Sequence[TokenizedPair] | None,
    ranks: int,
    budget: int,
    layout: LayoutName,
    *,
    with_rejected: bool,
) -> tuple[list[list[int]], list[float]]:
    """Tokens of each rank's micro-batches in a step, padding included, and the cost of each rank.

    Args:
        lengths: Of the pairs of the step. Shape [n, 3].
        pairs: The pairs themselves, to see what they share; None: nothing.
        ranks: Processes.
        budget: Most tokens of a micro-batch.
        layout: Of a micro-batch.
        with_rejected: Whether rejected sides are run.
    """

    def sharing(places: Sequence[int]) -> Sharing | None:
        own = None if pairs is None else [pairs[place] for place in places]
        return None if own is None else find_sharing(own, SHARE_FROM, with_rejected=with_rejected)

    def size(batch: BatchPlan) -> int:
        if batch.empty:
            return 0
        found, own = sharing(batch.pairs), lengths[list(batch.pairs)]
        lines, width = pair_sizes(own, layout).T
        return int(lines.sum() * width.max()) if found is None else stored_tokens(own, found)

    ranked = plan_step(
        lengths,
        num_ranks=ranks,
        tokens_per_micro_batch=budget,
        layout=layout,
        sharing=sharing(range(len(lengths))),
    )
    sizes = [[size(batch) for batch in batches] for batches in ranked]
    attended = pair_cost(lengths, layout) - pair_tokens(lengths, layout)
    costs = [
        sum(of_rank) + sum(attended[pair] for batch in batches if not batch.empty for pair in batch.pairs)
        for of_rank, batches in zip(sizes, ranked, strict=True)
    ]
    return sizes, costs


def _talk_bytes(model: PaperModel, setup: Setup, micro_batches: float) -> float:
    """Bytes that a rank sends in a step: gradients once, and weights wherever these are cut."""
    if setup.ranks == 1:
        return 0.0
    part = (setup.ranks - 1) / setup.ranks
    size = 2.0 if setup.half else 4.0
    gradients = model.trained_bytes if setup.sharding in ("ddp", "none") else size * model.trained
    if setup.cut == 1:
        return 2 * part * gradients
    weights = min(size * model.num_weights, model.weight_bytes)
    return part * micro_batches * (2 * weights + gradients)


def _num_evaluations(
    get: _Settings, lengths: PairLengths, pairs_per_step: int, steps: int, in_epoch: int, checkpoint: float
) -> int:
    """Evaluations of a run: as often as its settings say, or as training/cadence.py settles it.

    Args:
        get: Its settings.
        lengths: Of its pairs.
        pairs_per_step: Pairs of a step.
        steps: Of the run.
        in_epoch: Steps of an epoch.
        checkpoint: Cost of a checkpoint, in tokens of training.
    """
    strategy, saving = get("eval_strategy"), get("save_strategy")
    if not lengths.num_held_out:
        return 0
    asked = get("eval_on_start")
    at_start = strategy != "no" if asked is None else bool(asked)
    delay = float(get("eval_delay") or 0)
    ends: list[float] = []
    if "epoch" in (strategy, saving if strategy is None else None):
        ends = [min(epoch, steps / in_epoch) for epoch in range(1, math.ceil(steps / in_epoch) + 1)]
    elif strategy != "no":
        default = known_settings()["save_steps"].default
        every = get("eval_steps") or (strategy is None and get("save_steps")) or get("logging_steps")
        if strategy is None and saving == "steps" and every == get("save_steps") == default:
            trained = float(lengths.tokens.sum(1).mean()) * pairs_per_step * steps
            number = evaluations(trained, lengths.held_out_tokens * SCORING, checkpoint, on_start=True)
            every = math.ceil(steps / number) if number < MOST else every
        every = max(1, math.ceil(steps * every) if every < 1 else every)
        ends = [*np.arange(every, steps, every).tolist(), steps]
    # Where none is due after the last step, its weights are evaluated all the same.
    return at_start + max(1, sum(end >= delay for end in ends))
