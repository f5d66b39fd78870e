"""The optimizer's step within the backward pass: a weight moves as soon as its gradient is complete.

The gradient is freed at once, so that those of the whole model are never held together. The optimizer stays
one, with its groups, its schedule and its state in the usual form: only the call is cut into one for each
weight. What an ordinary step does to each weight by itself is the same to the bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from orpo.errors import ConfigError, RunError
from orpo.settings.config import check_processes
from orpo.training.arguments import ORPOConfig

_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 2**20
"""Of glibc's `mallopt`: blocks from so many bytes on are mapped one by one."""
Norms = dict[Tensor, Tensor]
"""Weight -> norm of the gradient with which it has moved."""


def check_in_backward(args: ORPOConfig) -> None:
    """Refuse what only a started process knows of; the rest is refused with the settings.

    Raises:
        ConfigError: There are several processes, or layers run a backward pass of their own.
    """
    check_processes(args, int(args.world_size))
    kwargs = args.gradient_checkpointing_kwargs
    if args.optimizer_in_backward and isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
        raise ConfigError(
            "optimizer_in_backward: under use_reentrant each layer has a backward pass of its own, so that"
            " nobody knows when a gradient is complete; leave use_reentrant out"
        )


def own_optimizers(args: ORPOConfig, optimizers: tuple[Any, Any]) -> tuple[Any, Any]:
    """The optimizer and schedule given; an optimizer that may need all gradients at once is refused.

    Raises:
        ConfigError: One is given with `optimizer_in_backward`.
    """
    if args.optimizer_in_backward and optimizers[0] is not None:
        raise ConfigError(
            f"optimizer_in_backward: whether the {type(optimizers[0]).__name__} given in `optimizers` can"
            " take one weight at a time is not known; choose one by `optim`"
        )
    return optimizers


def give_back_what_is_freed() -> None:
    """Have glibc map large blocks one by one, so that a gradient that is freed leaves the process.

    It would keep them for later. But torch's blocks are aligned, and a gap between moments, just as large as
    the gradient that was there, has no room for another one: the process ended up as large as with all of
    them. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


@contextlib.contextmanager
def stepping_in_backward(optimizer: Any, norms: Norms) -> Iterator[None]:
    """Within it, a backward pass has the optimizer use up each gradient as soon as it is complete.

    Gradients that micro-batches before have left behind are complete when this pass has added its own. A
    weight that has no part in the pass keeps its gradient for the ordinary step.

    Args:
        optimizer: Takes one weight at a time: what it does to a weight depends on no other.
        norms: Filled in, weight by weight.
    """
    groups = {
        weight: group
        for group in optimizer.param_groups
        for weight in group["params"]
        if weight.requires_grad
    }

    def step(weight: Tensor) -> None:
        if weight in norms:
            raise RunError(
                "optimizer_in_backward: a gradient came in two parts, and the weight has moved with one of"
                " them; go back to the last checkpoint, and leave optimizer_in_backward out for this model"
            )
        assert weight.grad is not None
        norms[weight] = torch.linalg.vector_norm(weight.grad)
        whole, optimizer.param_groups = optimizer.param_groups, [{**groups[weight], "params": [weight]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = whole
        weight.grad = None

    hooks = [weight.register_post_accumulate_grad_hook(step) for weight in groups]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradient_norm(model: nn.Module, norms: Norms) -> Tensor:
    """Norm over all gradients of a step: those used up, and those that are left for the ordinary step."""
    left = {
        weight: torch.linalg.vector_norm(weight.grad)
        for weight in model.parameters()
        if weight.grad is not None
    }
    found = norms | left
    norms_of_weights = [found[weight] for weight in model.parameters() if weight in found]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms_of_weights))
    return whole
