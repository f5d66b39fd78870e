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


@OnePass
def token_logprobs(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the log-sum-exp of its line. Both [T]."""
    logsumexp_T = logits_TV.logsumexp(1)
    return logits_TV.gather(1, target_T[:, None])[:, 0] - logsumexp_T, logsumexp_T


@OnePass
def logprob_slopes(
    logits_TV: Tensor, logsumexp_T: Tensor, target_T: Tensor, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """Minus the derivative of each target's log-probability in the logits before their soft cap. [T, V].

    Args:
        logits_TV: Logits, soft-capped.
        logsumexp_T: What `token_logprobs` returned.
        target_T: Target ids.
        softcap: Bound of the logits, or None.
        dtype: Of the result.
    """
    id_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    hit_TV = (id_V == target_T[:, None]).to(logits_TV.dtype)
    slope_TV = torch.exp(logits_TV - logsumexp_T[:, None]) - hit_TV
    if softcap is not None:
        slope_TV = slope_TV * (1 - (logits_TV / softcap).square())
    return slope_TV.to(dtype)
