"""Chunks of logits on a GPU: products that keep float32, and element-wise work in one pass over memory.

On a GPU the vocabulary projection of a small model is bound by memory, not by arithmetic. Half-precision
operands can give a float32 product without a rounded copy in between, and the softmax and its gradient are
compiled into one kernel each. Where the compiler is missing or fails, the same functions run as they stand,
and a line says so.

Shape suffixes: T = scored tokens, V = vocabulary size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orpo.console import say
from orpo.errors import first_line

DAMAGED = "its weights are damaged, or too large for its dtype; try dtype: float32"
"""What to say where a model's logits are not numbers."""
_UNLIKELY = 1e-30
"""Probabilities below this are near the smallest that float32 holds with all its digits."""


def are_numbers(logits: Tensor) -> bool:
    """Whether no logit is NaN or plus infinity; what a model rules out may be minus infinity."""
    return bool(logits.amax() < torch.inf)  # the maximum of what has a NaN is one


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product, in `dtype` if that is float32 and the device makes it without rounding in between.

    Elsewhere the product has the dtype of its operands.
    """
    if dtype == torch.float32 != left.dtype and left.is_cuda and _keeps_float32(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return left @ right


@functools.cache
def _keeps_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of `dtype` can be multiplied into float32; tried, since builds and devices differ."""
    left = torch.linspace(-1, 1, 16 * 32, device=device).view(16, 32).to(dtype)
    right = left.T[:, :8]
    expected = left.float() @ right.float()
    try:
        products = [
            torch.mm(left, right, out_dtype=torch.float32),
            torch.mm(left.T.contiguous().T, right.contiguous(), out_dtype=torch.float32),
        ]
    except (RuntimeError, TypeError):
        return False
    return all(torch.allclose(product, expected, rtol=1e-3, atol=1e-3) for product in products)


class OnePass:
    """An element-wise function, compiled for GPUs when first called there."""

    def __init__(self, function: Callable[..., Any], *, anywhere: bool = False) -> None:
        """Wrap `function`, to be compiled on CUDA devices, or `anywhere`."""
        functools.update_wrapper(self, function)
        self.function = function
        self.anywhere = anywhere
        self.compiled: Callable[..., Any] | None = None
        self.broken = False

    def __call__(self, logits_TV: Tensor, *args: Any) -> Any:
        """Call the function on tensors whose first dimension, T, varies from chunk to chunk."""
        if self.broken or not (logits_TV.is_cuda or self.anywhere):
            return self.function(logits_TV, *args)
        if self.compiled is None:
            self.compiled = torch.compile(self.function)
        for tensor in (logits_TV, *args):
            if isinstance(tensor, Tensor):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self.compiled(logits_TV, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way
            self.broken = True
            reason = f"{type(error).__name__}: {first_line(error)}"
            say(f"logits: not compiled, slower: {reason}")
            return self.function(logits_TV, *args)


def plain_logprobs(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """Log-probability of each target, differentiable. [T].

    By log-sum-exp, since torch's log-softmax of a vocabulary loses digits on a CPU (`softmax_minus_target`).
    """
    return logits_TV.gather(1, target_T[:, None])[:, 0] - logits_TV.logsumexp(1)


def softmax_minus_target(logits_TV: Tensor, target_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into minus the slopes of the targets' log-probabilities, times their sums, in place.

    A nearly certain target has a probability p whose distance from 1 float32 cannot hold. The sum of the
    others' probabilities can: it gives both log p = log(1 - others) and the slope, minus itself.

    On a CPU, `torch.softmax` adds a vocabulary up in a few running sums. Where one token's probability is
    near 1, others are lost in the same sum, and the line comes to as much as 1 + 1e-4
    (findings/torch_log_softmax_vocabulary.sh). What it comes to is known here. The caller divides slopes by
    it, one number a line.

    Args:
        logits_TV: Logits; become their softmax, with minus the sum of the others at the target.
        target_T1: Target ids. Shape [T, 1].

    Returns:
        Log-probability of each target, and what each line's softmax adds up to. Both [T].
    """
    target_logit_T1, largest_T1 = logits_TV.gather(1, target_T1), logits_TV.amax(1, keepdim=True)
    torch.softmax(logits_TV, 1, out=logits_TV)
    probability_T1 = logits_TV.gather(1, target_T1)
    logits_TV.scatter_(1, target_T1, 0.0)
    others_T1 = logits_TV.sum(1, keepdim=True)
    total_T1 = others_T1 + probability_T1
    logprob_T1 = torch.where(
        others_T1 < 0.5, torch.log1p(-others_T1 / total_T1), (probability_T1 / total_T1).log()
    )
    unlikely_T1 = probability_T1 < _UNLIKELY
    if unlikely_T1.any():  # too small to be held exactly
        log_largest_T1 = (torch.maximum(logits_TV.amax(1, keepdim=True), probability_T1) / total_T1).log()
        logprob_T1 = torch.where(unlikely_T1, target_logit_T1 - largest_T1 + log_largest_T1, logprob_T1)
    logits_TV.scatter_(1, target_T1, -others_T1)
    return logprob_T1[:, 0], total_T1[:, 0]


@OnePass
def token_logprobs(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target; the largest logit of its line; log-sum-exp of the logits minus that.

    All [T].
    With the sum of the others' exponentials, log p = -log(1 + others / its own) keeps the digits of a nearly
    certain target. The log-sum-exp of a line is not one number, since large logits would round it.
    """
    id_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    hit_TV = id_V == target_T[:, None]
    largest_T = logits_TV.amax(1)
    others_T = torch.exp(logits_TV - largest_T[:, None]).masked_fill(hit_TV, 0.0).sum(1)
    above_T = logits_TV.gather(1, target_T[:, None])[:, 0] - largest_T
    own_T = above_T.exp()
    logsumexp_T = torch.log(others_T + own_T)
    logprob_T = torch.where(others_T < own_T, -torch.log1p(others_T / own_T), above_T - logsumexp_T)
    return logprob_T, largest_T, logsumexp_T


@OnePass
def logprob_slopes(
    logits_TV: Tensor,
    logprob_T: Tensor,
    largest_T: Tensor,
    logsumexp_T: Tensor,
    target_T: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Minus the derivative of each target's log-probability in the logits before their soft cap. [T, V].

    Args:
        logits_TV: Logits, soft-capped.
        logprob_T: What `token_logprobs` returned, with the next two.
        largest_T: The same.
        logsumexp_T: The same.
        target_T: Target ids.
        softcap: Bound of the logits, or None.
        dtype: Of the result.
    """
    id_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    softmax_TV = torch.exp(logits_TV - largest_T[:, None] - logsumexp_T[:, None])
    slope_TV = torch.where(id_V == target_T[:, None], torch.expm1(logprob_T)[:, None], softmax_TV)
    if softcap is not None:
        slope_TV = slope_TV * (1 - (logits_TV / softcap).square())
    return slope_TV.to(dtype)
