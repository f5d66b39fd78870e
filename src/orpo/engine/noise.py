"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings while training.

The noise of a token is at most alpha / sqrt(tokens of its text x hidden size). transformers takes the tokens
of what the embeddings are given at once, which here are many texts in one line, as many as fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orpo.engine.passes import Pass


@contextmanager
def noisy_embeddings(embeddings: nn.Module, each: Pass, alpha: float | None) -> Iterator[None]:
    """Add noise to what a model's embeddings return in a pass; with None, or 0, none."""
    if not alpha:
        yield
        return

    def add(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        bound = alpha / (each.side_lengths_BN * output.shape[-1]).sqrt()[..., None]
        return output + (torch.rand_like(output) * 2 - 1) * bound.to(output.dtype)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
