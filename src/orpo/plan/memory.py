"""Memory of one rank: what it holds throughout, and what the three peaks of a step add to it.

A step peaks where the forward pass has ended and the head makes its gradients, where the backward ends and
every gradient is there, or where a sharded model gathers weights. What a layer keeps is measured
(engine/footprint.py); the rest are sizes of known tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orpo.engine.memory import GRADIENT_BYTES, head_bytes, optimizer_bytes
from orpo.engine.vocabulary import chunk_sizes
from orpo.plan.on_paper import PaperModel

Sharding = Literal["none", "ddp", "fsdp", "zero1", "zero2", "zero3"]
GATHERED = 2
"""Layers whose weights FSDP holds whole at a time: the one that computes, and the next one."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides over memory besides the model.

    Attributes:
        ranks: Processes, one for each GPU.
        sharding: What is cut over them.
        optim: Name of the optimizer.
        checkpointing: Whether layers keep their inputs only.
        half: Whether training computes in bfloat16.
        logits_memory_mib: Largest chunk of logits.
        on_cpu: Whether it runs on a CPU.
        in_backward: Whether the optimizer frees each gradient in the backward pass.
    """

    ranks: int
    sharding: Sharding
    optim: str
    checkpointing: bool
    half: bool
    logits_memory_mib: int
    on_cpu: bool = False
    in_backward: bool = False

    @property
    def cut(self) -> int:
        """Parts into which weights are cut."""
        return self.ranks if self.sharding in ("fsdp", "zero3") else 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, at the largest of its peaks.

    Attributes:
        weights: Weights, in the precision they are held in.
        gradients: Gradients, with the buckets they are exchanged in; of a step that frees each in the
            backward pass, the largest one.
        optimizer: State of the optimizer.
        activations: What the layers keep for backward, and what their backward needs.
        head: Logits and gradients of the head.
        gathered: Weights that a rank has whole for a while, and gradients before they are cut.
        peak: Most of all of them that is there at one time.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    gathered: float
    peak: float


def states(model: PaperModel, setup: Setup) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer of one rank, between two steps of training."""
    trained_size = model.trained_bytes / max(model.trained, 1)
    weights, gradients = model.weight_bytes, model.trained_bytes
    state = optimizer_bytes(setup.optim) * model.trained * trained_size / GRADIENT_BYTES
    if "8bit" in setup.optim or "4bit" in setup.optim:
        state = optimizer_bytes(setup.optim) * model.trained
    if setup.sharding.startswith(
        "zero"
    ):  # DeepSpeed: half-precision weights, and a float32 copy with the state
        half = 2 if setup.half else trained_size
        weights += model.trained * half - model.trained_bytes
        gradients = model.trained * half
        state = (optimizer_bytes(setup.optim) + 4 * setup.half) * model.trained / setup.ranks
        gradients /= 1 if setup.sharding == "zero1" else setup.ranks
        weights /= setup.cut
    elif setup.sharding == "fsdp":
        weights, gradients, state = (one / setup.ranks for one in (weights, gradients, state))
    if setup.sharding == "ddp":
        gradients *= 2  # DDP's buckets
    return weights, gradients, 0.0 if setup.optim.startswith("paged") and not setup.on_cpu else state


def memory_of(
    model: PaperModel, setup: Setup, num_tokens: float, *, later: float = 0.0, longest: float = 0.0
) -> Memory:
    """Memory of one rank in a step.

    Args:
        model: On paper.
        setup: What else decides.
        num_tokens: Of the first micro-batch of a step, which has the longest pairs.
        later: Of the largest of the others, which find gradients there already; 0 where there is one alone.
        longest: Tokens of the longest pair's two answers, whose logits are made together where they fit; 0
            where pairs are not compared.
    """
    weights, gradients, state = states(model, setup)
    usual, most = chunk_sizes(model.vocabulary, setup.logits_memory_mib * 2**20, on_cpu=setup.on_cpu)
    matrix = 4.0 * model.vocabulary * model.hidden * model.head_trained
    footprint = model.footprint
    casts = 0.0 if setup.cut > 1 else footprint.whatever_tokens(checkpointing=setup.checkpointing)
    whole = setup.half and model.trained == model.num_weights  # autocast keeps its casts while forward runs
    casts_at_head = footprint.fixed if whole and setup.cut == 1 else casts
    gathered = _gathered(model, setup)
    held = weights + state + gathered

    def batch(tokens: float, before: float) -> tuple[float, float, float]:
        """Activations, head and peak of a micro-batch that finds `before` bytes of gradients."""
        chunk = min(max(usual, min(most, longest)), tokens)
        head = head_bytes(
            tokens, model.hidden, model.vocabulary, chunk_tokens=int(chunk), trained=model.head_trained
        )
        kept = footprint.kept(checkpointing=setup.checkpointing) * tokens
        workspace = footprint.workspace(checkpointing=setup.checkpointing) * tokens
        at_head = held + before + kept + casts_at_head + head
        at_backward = held + before + kept + casts + workspace + head - 4.0 * chunk * model.vocabulary
        return kept + casts + workspace, head, max(at_head, at_backward)

    batches = [batch(num_tokens, gradients / 2 if setup.sharding == "ddp" else 0.0)]
    if later:
        batches.append(batch(later, gradients))
    if setup.in_backward and not later:  # no micro-batch before, whose gradients would be there
        gradients = min(gradients, matrix)
    at_end = held + gradients + matrix * ((later > 0) + model.tied)
    activations, head, _ = max(batches)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        head=head,
        gathered=gathered,
        peak=max(at_end, *(peak for _, _, peak in batches)),
    )


def _gathered(model: PaperModel, setup: Setup) -> float:
    """Bytes of what a rank has whole for a while, where weights are cut."""
    if setup.cut == 1:
        return 0.0
    size = 2.0 if setup.half else 4.0
    share = model.weight_bytes / max(model.num_weights, 1)
    size = min(size, max(share, 0.5))
    return size * (GATHERED * model.layer_weights + model.outside_weights) + size * model.layer_weights * (
        model.trained / model.num_weights
    )


def checkpoint_bytes(model: PaperModel, setup: Setup) -> float:
    """Bytes of one checkpoint on disk: what is trained, and the optimizer's state."""
    return model.trained_bytes + optimizer_bytes(setup.optim) * model.trained
