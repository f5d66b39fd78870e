"""What a micro-batch keeps for its backward, in bytes a token: from one forward pass of a few tokens.

Autograd says which tensors it keeps, so the layers of any family are measured as they are, with adapters, in
the precision of the pass, on real, fake and meta tensors all the same. The token budget of a micro-batch and
`orpo plan` take their numbers from here. The head is ours and needs no pass: its bytes are a formula.

Shape suffixes: H = heads, N = tokens, D = size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from orpo.engine.packing import pair_segments
from orpo.engine.precision import compute_dtype
from orpo.engine.scorer import Scorer, attention_configs, base_model
from orpo.engine.segments import Segments

ON_PAPER = "orpo_on_paper"
"""Name of an attention that computes nothing and keeps what the kernel of a GPU keeps."""
PAIRS = ((4, 8, 8), (8, 16, 16))
"""Tokens of prompt, chosen and rejected of the two passes whose difference is taken: in the proportions of
UltraFeedback's pairs."""
LAYER_WORKSPACE = 3.3
"""Tensors as large as the largest kept that a layer's backward holds besides: of Llama's SwiGLU (LOG.md)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the layers of a model take besides weights, gradients and optimizer.

    Attributes:
        layers: Bytes a token that all layers together keep for backward.
        num_layers: How many they are.
        inputs: Bytes a token of one layer's input, which is all that gradient checkpointing keeps of it.
        widest: Bytes a token of the largest tensor that is kept.
        fixed: Bytes kept for any number of tokens: weights in the precision of autocast, adapted weights.
    """

    layers: float
    num_layers: int
    inputs: float
    widest: float
    fixed: float = 0.0

    def kept(self, *, checkpointing: bool = False) -> float:
        """Bytes a token when a forward pass has ended."""
        return self.num_layers * self.inputs if checkpointing else self.layers

    def workspace(self, *, checkpointing: bool = False) -> float:
        """Bytes a token that the backward of a layer adds; under checkpointing it runs forward once more."""
        again = self.layers / self.num_layers if checkpointing else 0.0
        return again + LAYER_WORKSPACE * self.widest

    def per_token(self, *, trains: bool = True, checkpointing: bool = False) -> float:
        """Bytes a token at the peak of a forward and backward pass; of a forward pass alone, one layer's."""
        if not trains:
            return self.layers / self.num_layers
        return self.kept(checkpointing=checkpointing) + self.workspace(checkpointing=checkpointing)

    def whatever_tokens(self, *, checkpointing: bool = False) -> float:
        """Bytes at the peak for any number of tokens."""
        return self.fixed / self.num_layers if checkpointing else self.fixed


def measure_footprint(model: nn.Module, *, by_kernel: bool | None = None) -> Footprint:
    """Run a few tokens through the layers of a model and read off what autograd keeps.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        by_kernel: Whether attention keeps what the kernel of a GPU keeps, or what attention by segments
            does; None: as attention goes on the model's device.

    Raises:
        Exception: Of any kind, where the family cannot run such tokens, for example on fake tensors.
    """
    inner = base_model(model)
    few, more = (_kept(model, Scorer(inner, 1), pair, by_kernel) for pair in PAIRS)
    tokens = sum(PAIRS[1]) - sum(PAIRS[0])
    slopes = {place: (more[place] - size) / tokens for place, size in few.items() if place in more}
    total = (sum(more.values()) - sum(few.values())) / tokens
    config = inner.config.get_text_config()
    size = compute_dtype(torch.device("cpu"), next(model.parameters()).dtype).itemsize
    return Footprint(
        layers=total,
        num_layers=config.num_hidden_layers,
        inputs=config.hidden_size * max(size, next(model.parameters()).dtype.itemsize),
        widest=max(slopes.values(), default=0.0),
        fixed=max(0.0, sum(few.values()) - total * sum(PAIRS[0])),
    )


def _kept(
    model: nn.Module, scorer: Scorer, lengths: tuple[int, int, int], by_kernel: bool | None
) -> dict[int, int]:
    """Bytes of each tensor that autograd keeps, numbered in the order in which it first keeps them."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.setdefault(storage._cdata, storage)  # held, so that no other gets its address
        return tensor

    device, (prompt, chosen, rejected) = next(model.parameters()).device, lengths
    positions = [*range(prompt + chosen), *range(prompt, prompt + rejected)]
    inputs = {
        "input_ids": torch.ones(1, len(positions), dtype=torch.long, device=device),
        "position_ids": torch.tensor([positions], device=device),
        "attention_mask": None,
        "use_cache": False,
    }
    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _as_trained(model, scorer, Segments(pair_segments([lengths])), by_kernel), torch.enable_grad(), kept:
        scorer.backbone(**inputs)
    return {place: storage.nbytes() for place, storage in enumerate(storages.values())}


@contextmanager
def _as_trained(
    model: nn.Module, scorer: Scorer, segments: Segments, by_kernel: bool | None
) -> Iterator[None]:
    """Attention as in training, in evaluation mode: without dropout, and without checkpoints."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    scorer.attend_to(segments)
    for config in attention_configs(scorer.model) if by_kernel else ():
        config._attn_implementation = ON_PAPER
    try:
        yield
    finally:
        scorer.attend_to(None)
        for module in training:
            module.training = True


class _OnPaper(torch.autograd.Function):
    """Keeps query, key, value, output and the logarithm of the normaliser, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> Tensor:
        output = query_NHD.new_zeros(*query_NHD.shape[:3], value_NHD.shape[3])
        normaliser = query_NHD.new_zeros(query_NHD.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query_NHD, key_NHD, value_NHD, output, normaliser)
        return output


def _attend_on_paper(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it: [1, H, N, D] in, [1, N, H, D] out."""
    dtype = compute_dtype(query.device, query.dtype)
    output: Tensor = _OnPaper.apply(*(x.to(dtype).transpose(1, 2) for x in (query, key, value)))
    return output, None


AttentionInterface.register(ON_PAPER, _attend_on_paper)
