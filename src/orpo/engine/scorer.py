"""A model that scores micro-batches of packed pairs: the loss and the scores of the pairs come out.

A `Scorer` gives a causal language model two things, in place: our attention (registered with transformers,
so no model code is touched) and a `forward` that scores a `PackedBatch`. Scoring happens inside `forward`
because DDP, FSDP and DeepSpeed hook the call of the module they wrap. Called without a batch, the model is
what it was.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.generic import ModelOutput

from orpo.engine.attention import attend
from orpo.engine.head import Denominators, Head, PairScores, score_batch
from orpo.engine.packing import PackedBatch
from orpo.engine.segments import SEGMENTS, Segments
from orpo.errors import ModelError
from orpo.settings.config import LayoutName, Objective

ATTENTION = "orpo_segments"
"""Name under which our attention is registered with transformers."""


CPU_CHUNK_TOKENS = 256
"""Scored tokens per chunk on a CPU: measured fastest at V = 32,000, where more fall out of its caches."""


@dataclass
class ORPOOutput(ModelOutput):
    """What scoring a micro-batch returns; a ModelOutput, so that FSDP and DDP find the tensors in it.

    Attributes:
        loss: Its share of the step's loss; a scalar, the only tensor with a gradient.
        pairs: The scores of its pairs.
    """

    loss: Tensor | None = None
    pairs: PairScores | None = None


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT, DDP and torch.compile wrappers.

    Raises:
        ModelError: There is none, or it is an encoder-decoder model.
    """
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif not isinstance(inner, PreTrainedModel) and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            break
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"{type(inner).__name__} is not a transformers model; pass a PreTrainedModel or its name"
        )
    refuse_encoder_decoder(inner.config, type(inner).__name__)
    return inner


def num_embeddings(model: nn.Module) -> int:
    """Tokens that a model has an embedding for; 0 where its weights are sharded and nobody can tell."""
    return len(base_model(model).get_input_embeddings().weight)  # type: ignore[arg-type]


def refuse_encoder_decoder(config: Any, name: str) -> None:
    """Refuse a model whose answers do not continue its prompts; `name` is what to call it."""
    if config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder model; ORPO here trains causal language models")


class Scorer:
    """Holds what a prepared model needs besides its weights; one per model, reached from its `forward`."""

    def __init__(self, model: PreTrainedModel, objective: Objective, logits_memory_mib: int) -> None:
        self.model = model
        self.objective = objective
        self.chunk_bytes = logits_memory_mib * 2**20
        self.layout: LayoutName = "shared"
        self.plain_forward = model.forward
        self.configs = _attention_configs(model)
        self.plain_attention = [config._attn_implementation for config in self.configs]
        self.num_attention_calls: int | None = None
        self.router_loss = True
        self.attention = SEGMENTS

    def install(self) -> None:
        """Give the model a `forward` that takes a micro-batch."""
        scorer = self

        def forward(
            self: PreTrainedModel,
            *args: Any,
            batch: PackedBatch | None = None,
            denominators: Denominators | None = None,
            **kwargs: Any,
        ) -> Any:
            if batch is None:
                return scorer.plain_forward(*args, **kwargs)
            own = Denominators(batch.nll_weight, batch.num_preferences, max(batch.num_pairs, 1))
            return scorer.score(batch, denominators or own)

        forward.__signature__ = _joined_signature(self.plain_forward, forward)  # type: ignore[attr-defined]
        self.model.forward = MethodType(forward, self.model)

    def use_layout(self, layout: LayoutName) -> None:
        """Switch to `layout`; our attention serves all but the padded one."""
        self.layout = layout
        self.num_attention_calls = None

    def attend_to(self, segments: Segments | None) -> None:
        """Give the layers our attention over `segments`, or with None their own again, for generation."""
        _active.segments = segments
        for number, config in enumerate(self.configs):
            if segments is None:
                config._attn_implementation = self.plain_attention[number]
            elif config._attn_implementation != ATTENTION:
                self.plain_attention[number] = config._attn_implementation
                config._attn_implementation = ATTENTION

    def score(self, batch: PackedBatch, denominators: Denominators) -> ORPOOutput:
        """Run a micro-batch through the model and its head."""
        self._check_layout(batch)
        segments = Segments(batch.runs)
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask_BN, "use_cache": False}
        if self.layout != "padded":
            inputs["position_ids"] = batch.position_ids_BN
            self.attend_to(segments)
        try:
            outputs = _backbone(self.model)(batch.input_ids_BN, **inputs, **self._router_inputs())
        finally:
            self.attend_to(None)
        self._check_attention(segments)
        self.attention = segments.backend
        hidden_ND = outputs.last_hidden_state.flatten(0, 1)
        loss, pairs = score_batch(hidden_ND, self._head(hidden_ND), batch, self.objective, denominators)
        loss = loss + self._router_loss(outputs, batch, denominators)
        if self.layout != "padded" and loss.requires_grad:
            loss = _AttendInBackward.apply(loss, self, segments)
        return ORPOOutput(loss, pairs)

    def _head(self, hidden_ND: Tensor) -> Head:
        """The vocabulary projection as the model applies it now (LoRA on it included) to these states."""
        weight, bias = _weight_and_bias(self.model.get_output_embeddings(), hidden_ND)
        config = self.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        most = max(1, self.chunk_bytes // (4 * weight.shape[0]))
        return Head(
            weight, bias, scale, getattr(config, "final_logit_softcapping", None),
            chunk_tokens=min(CPU_CHUNK_TOKENS, most) if weight.device.type == "cpu" else most,
            max_chunk_tokens=most,
        )  # fmt: skip

    def _check_layout(self, batch: PackedBatch) -> None:
        """A micro-batch that the model cannot follow would be scored wrongly, in silence."""
        shares = any(run.rejected for run in batch.runs)
        found: LayoutName = "padded" if not batch.runs else "shared" if shares else "packed"
        if found != self.layout and (found, self.layout) != ("packed", "shared"):
            raise ModelError(
                f"the batch has layout `{found}`, {type(self.model).__name__} was prepared for "
                f"`{self.layout}`; pass layout={self.layout!r} to pack()"
            )

    def _check_attention(self, segments: Segments) -> None:
        """Every micro-batch must pass through our attention as often as the probe's did."""
        if self.layout == "padded":
            return
        if segments.num_calls == 0:
            raise NotOnTheInterfaceError("its attention cannot be replaced")
        if self.num_attention_calls is None:
            self.num_attention_calls = segments.num_calls
        if segments.num_calls != self.num_attention_calls:
            raise ModelError(
                f"{type(self.model).__name__} called our attention {segments.num_calls} times in a forward "
                f"pass, {self.num_attention_calls} times in the one before; set layout: padded"
            )

    def _router_inputs(self) -> dict[str, bool]:
        return {"output_router_logits": True} if _has_router_loss(self.model) else {}

    def _router_loss(self, outputs: Any, batch: PackedBatch, denominators: Denominators) -> Tensor | float:
        """The load-balancing loss of a mixture of experts as the model defines it, for this batch's share."""
        if not (self.router_loss and _has_router_loss(self.model)) or not torch.is_grad_enabled():
            return 0.0
        config = self.model.config.get_text_config()
        balancing = sys.modules[type(self.model).__module__].load_balancing_loss_func
        experts = getattr(config, "num_experts", None) or config.num_local_experts
        balance = balancing(
            outputs.router_logits, experts, config.num_experts_per_tok, batch.attention_mask_BN
        )
        share = batch.num_pairs / denominators.examples
        loss: Tensor = config.router_aux_loss_coef * share * balance
        return loss


class NotOnTheInterfaceError(ModelError):
    """The model never called our attention."""


def _joined_signature(plain: Callable[..., Any], ours: Callable[..., Any]) -> inspect.Signature:
    """The parameters of both: generation reads there what a model takes."""
    first, _, *added = inspect.signature(ours).parameters.values()
    named = [
        parameter
        for parameter in inspect.signature(plain).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in {new.name for new in added}
    ]
    return inspect.Signature([first, *named, *added])


class _AttendInBackward(torch.autograd.Function):
    """Identity on the loss; in its backward, layers under gradient checkpointing attend once more."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scorer: Scorer, segments: Segments) -> Tensor:
        ctx.scorer, ctx.segments = scorer, segments
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.scorer.attend_to(ctx.segments)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: ctx.scorer.attend_to(None))
        return grad_outputs[0], None, None


class _Active:
    """The segments being computed; attention layers have no other way to learn them."""

    segments: Segments | None = None


_active = _Active()


def _segments_attention_forward(  # noqa: PLR0913 - the signature transformers calls
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form transformers calls it: [1, H, N, D] in, [1, N, H, D] out."""
    segments = _active.segments
    if segments is None:
        raise ModelError("the packed attention was called without a packed batch")
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if attention_mask is not None or unknown:
        raise NotOnTheInterfaceError(f"its attention needs {', '.join(unknown) or 'a mask'}")
    segments.num_calls += 1
    output = attend(
        query, key, value, segments, scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout
    )
    return output, None


_HARMLESS = {
    "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "return_dict", "past_key_values",
}  # fmt: skip

# Compiled into a layer it would be compiled again for the lengths of every micro-batch.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_segments_attention_forward))


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object a layer may read its attention implementation from."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _backbone(model: PreTrainedModel) -> nn.Module:
    """The model below its vocabulary projection."""
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    return backbone


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


def _has_router_loss(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))
