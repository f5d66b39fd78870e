"""The vocabulary projection of a transformers model as the head (head.py) computes it.

PEFT may have put adapters or a trained copy on it, and FSDP2 may have cut it. What a model does to its hidden
states and logits besides differs by family (Cohere and Falcon-H1 multiply, Granite divides, muP does so
before the projection), so the factor is measured and not known by name.

Shape suffixes: N = tokens, D = hidden size, V = vocabulary size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo.engine.head import Head

CPU_CHUNK_TOKENS = 256
"""Scored tokens per chunk on a CPU: measured fastest at V = 32,000, where more fall out of its caches."""

_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The model below its vocabulary projection: what `base_model_prefix` names, or what reads ids."""
    named = getattr(model, model.base_model_prefix, None)
    if isinstance(named, nn.Module):
        return named
    embeddings = model.get_input_embeddings()
    return next(child for child in model.children() if any(m is embeddings for m in child.modules()))


@dataclass(slots=True)
class Reading:
    """What passed in a forward pass of the plain model.

    Attributes:
        output: What the backbone returned.
        entering: Hidden states that met the vocabulary matrix; None where its module was not called.
        product: Of these and the matrix, with its bias.
    """

    output: Any = None
    entering: Tensor | None = None
    product: Tensor | None = None


@contextmanager
def reading(backbone: nn.Module, projection: Any, factor: float | None = 1.0) -> Iterator[Reading]:
    """Keep what the backbone returns and what the vocabulary matrix reads.

    Args:
        backbone: Of the model.
        projection: Its output embeddings.
        factor: What the product is multiplied by; None: there is no product, the projection hands on what it
            reads.
    """
    found = Reading()

    def keep_output(module: nn.Module, inputs: object, output: Any) -> None:
        found.output = output

    def keep_entering(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.entering = hidden
        if factor is None:
            return hidden
        found.product = plain(hidden, *args, **kwargs)
        return factor * found.product

    plain, own = projection.forward, projection.__dict__.get("forward")
    hook = backbone.register_forward_hook(keep_output)
    projection.forward = keep_entering
    try:
        yield found
    finally:
        hook.remove()
        if own is None:
            del projection.forward
        else:
            projection.forward = own


@torch.no_grad()
def is_transformed(hidden: Tensor, entering: Tensor) -> bool:
    """Whether more than a factor stands between the backbone and the vocabulary matrix."""
    if hidden.shape != entering.shape:
        return hidden.shape[:-1] == entering.shape[:-1]
    ours, theirs = hidden.double().flatten(), entering.double().flatten()
    factor = (ours @ theirs) / (ours @ ours).clamp_min(1e-30)
    return bool((theirs - factor * ours).norm() > 0.02 * theirs.norm())


def head_of(model: PreTrainedModel, hidden_ND: Tensor, scale: float, chunk_bytes: int) -> Head:
    """The projection as the model applies it now, adapters included, to these hidden states.

    Args:
        model: With the projection as its output embeddings.
        hidden_ND: Hidden states of the backbone.
        scale: Factor on the logits, as `measured_scale` found it.
        chunk_bytes: Largest chunk of logits.
    """
    weight, bias = _weight_and_bias(model.get_output_embeddings(), hidden_ND)
    usual, most = chunk_sizes(len(weight), chunk_bytes, on_cpu=weight.device.type == "cpu")
    return Head(weight, bias, scale, soft_cap(model), chunk_tokens=usual, max_chunk_tokens=most)


def chunk_sizes(vocabulary: int, chunk_bytes: int, *, on_cpu: bool) -> tuple[int, int]:
    """Scored tokens whose logits are made together: usually, and at most, for the sake of a long pair."""
    most = max(1, chunk_bytes // (4 * vocabulary))
    return min(CPU_CHUNK_TOKENS, most) if on_cpu else most, most


def soft_cap(model: PreTrainedModel) -> float | None:
    """Bound of the logits, or None."""
    config = model.config.get_text_config()
    return next((cap for name in _SOFT_CAPS if (cap := getattr(config, name, None)) is not None), None)


@torch.no_grad()
def measured_scale(model: PreTrainedModel, plain: Tensor, hidden_ND: Tensor, precise: bool) -> float:
    """The factor between a model's logits, before their soft cap, and its projection of `hidden_ND`.

    Args:
        model: The transformers model.
        plain: Its own logits of the same tokens. Shape [N, V].
        hidden_ND: The hidden states of its backbone.
        precise: Whether rounding is that of float32.

    Returns:
        1, or the number in the configuration (or one over it) that is measured up to rounding, or what was
        measured. Where the logits are no multiple of the projection, the probe finds that out.
    """
    weight, bias = _weight_and_bias(model.get_output_embeddings(), hidden_ND)
    ours = (hidden_ND.to(weight.dtype) @ weight.T).double()
    if bias is not None:
        ours += bias.double()
    scale = factor_between(model, plain, ours)
    known = min(_known_factors(model), key=lambda factor: abs(scale / factor - 1))
    return known if abs(scale / known - 1) < (1e-4 if precise else 1e-2) else scale


def factor_between(model: PreTrainedModel, logits: Tensor, product: Tensor) -> float:
    """The factor between a model's logits, before their soft cap, and a product; 1 where there is none."""
    theirs, ours, cap = logits.double(), product.double(), soft_cap(model)
    if cap is not None:
        theirs = cap * torch.atanh((theirs / cap).clamp(-0.999, 0.999))
    square = ours.square().sum().item()
    scale = (ours * theirs).sum().item() / square if square > 0 else 1.0
    return scale if math.isfinite(scale) and scale != 0 else 1.0


@torch.no_grad()
def are_bent(model: PreTrainedModel, logits: Tensor, product: Tensor, precise: bool) -> bool:
    """Whether logits are not `product` under the soft cap that the configuration tells.

    Args:
        model: The transformers model.
        logits: Its own, large ones.
        product: What its vocabulary matrix gave for them, with the factor on logits.
        precise: Whether rounding is that of float32.
    """
    expected, cap = product.double(), soft_cap(model)
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    difference = (logits.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return not difference <= (1e-3 if precise else 3e-2)


def _known_factors(model: PreTrainedModel) -> Iterator[float]:
    yield 1.0
    for value in vars(model.config.get_text_config()).values():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < abs(value) < 1e6:
            yield from (float(value), 1 / value)


def _weight_and_bias(module: Any, hidden_ND: Tensor) -> tuple[Tensor, Tensor | None]:
    """The vocabulary matrix and its bias as `module` applies them now, PEFT adapters included."""
    disabled: bool = getattr(module, "disable_adapters", False)
    module = _trained_copy(module, disabled)
    _gather_shards(module, hidden_ND)
    weight, bias = module.weight, getattr(module, "bias", None)
    if not disabled and hasattr(module, "get_delta_weight") and not module.merged:
        weight = _adapted_weight(module)
    return weight, bias


def _trained_copy(module: Any, disabled: bool) -> Any:
    """The copy that PEFT's `modules_to_save` trains in full, where there is one, or the module itself."""
    if not hasattr(module, "modules_to_save"):
        return module
    return module.original_module if disabled else module.modules_to_save[module.active_adapters[0]]


def _gather_shards(module: Any, hidden_ND: Tensor) -> None:
    """Give a module that FSDP2 shards its whole weight, as FSDP2 does for the module's own forward."""
    if hasattr(module, "unshard"):
        with torch.no_grad():  # a unit of norm and head has run only when both were called
            module(hidden_ND[:1])
        module.unshard()


def _adapted_weight(module: Any) -> Tensor:
    """The weight under the active adapters of a LoRA layer, one added to the other."""
    base: Tensor = module.weight
    weight = base
    for adapter in module.active_adapters:
        delta = module.get_delta_weight(adapter)
        if adapter in getattr(module, "lora_magnitude_vector", ()):  # DoRA
            delta = _dora_delta(base, delta, module.lora_magnitude_vector[adapter].weight)
        weight = weight + delta
    return weight


def _dora_delta(base_VD: Tensor, delta_VD: Tensor, magnitude_V: Tensor) -> Tensor:
    """What DoRA adds to a weight: its norm, a constant to the gradient, is replaced by a trained one."""
    moved_VD = base_VD + delta_VD
    factor_V: Tensor = magnitude_V / moved_VD.detach().norm(dim=1)
    return factor_V[:, None] * moved_VD - base_VD
