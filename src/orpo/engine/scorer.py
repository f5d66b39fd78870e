"""A model that scores micro-batches of packed pairs: the loss and the scores of the pairs come out.

A `Scorer` gives a causal language model two things, in place: our attention (registered with transformers,
so no model code is touched) and a `forward` that scores a `PackedBatch`. Scoring happens inside `forward`
because DDP, FSDP and DeepSpeed hook the call of the module they wrap. Called without a batch, the model is
what it was.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils.generic import ModelOutput

from orpo.engine.attention import attend
from orpo.engine.head import Denominators, PairScores, score_batch
from orpo.engine.lengths import mask_chunk, mask_window, may_share, pass_limits, reset_dynamic_rope
from orpo.engine.masks import Limit
from orpo.engine.noise import noisy_embeddings
from orpo.engine.packing import SHARE_FROM, PackedBatch
from orpo.engine.passes import Pass, split_passes
from orpo.engine.router import RouterLoss
from orpo.engine.segments import SEGMENTS, Segments
from orpo.engine.vocabulary import backbone_of, head_of, reading
from orpo.errors import ModelError
from orpo.settings.config import LayoutName

ATTENTION = "orpo_segments"
"""Name under which our attention is registered with transformers."""


@dataclass
class ORPOOutput(ModelOutput):
    """What scoring a micro-batch returns; a ModelOutput, so that FSDP and DDP find the tensors in it.

    Attributes:
        loss: Its share of the step's loss; a scalar, the only tensor with a gradient.
        pairs: The scores of its pairs.
        router_loss: The part of `loss` that balances a mixture of experts; detached, or None.
    """

    loss: Tensor | None = None
    pairs: PairScores | None = None
    router_loss: Tensor | None = None


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


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _passed_over(function: _Function) -> _Function:
    """Not compiled under torch_compile, unlike what it calls: the way to the backbone."""
    return cast(_Function, torch.compiler.disable(function, recursive=False))


def _eager(function: _Function) -> _Function:
    """Not compiled under torch_compile, nor what it calls: no list of lengths is compiled for itself."""
    return cast(_Function, torch.compiler.disable(function))


class Scorer:
    """Holds what a prepared model needs besides its weights; one per model, reached from its `forward`."""

    def __init__(self, model: PreTrainedModel, logits_memory_mib: int) -> None:
        self.model = model
        self.backbone = backbone_of(model)
        self.chunk_bytes = logits_memory_mib * 2**20
        self.layout: LayoutName = "shared"
        self.plain_forward = model.forward
        self.configs = attention_configs(model)
        self.plain_attention = [config._attn_implementation for config in self.configs]
        self.num_attention_calls: int | None = None
        self.router_loss: RouterLoss | None = None
        self.logit_scale = 1.0
        self.has_transform = False
        self.limits = pass_limits(model.config.get_text_config())
        self.longest: int | None = None
        self.attention = SEGMENTS
        self.untold: list[Limit] = []

    @property
    def share_from(self) -> int | None:
        """What `pack` is to be told."""
        return SHARE_FROM if may_share(self.model.config.get_text_config()) else None

    def install(self) -> None:
        """Give the model a `forward` that takes a micro-batch."""
        scorer = self

        @_passed_over
        def forward(
            self: PreTrainedModel,
            *args: Any,
            batch: PackedBatch | None = None,
            denominators: Denominators | None = None,
            noise: float | None = None,
            **kwargs: Any,
        ) -> Any:
            if batch is None:
                return scorer.plain_forward(*args, **kwargs)
            own = Denominators(batch.nll_weight, batch.num_preferences, max(batch.num_pairs, 1))
            return scorer.score(batch, denominators or own, noise)

        forward.__signature__ = _joined_signature(self.plain_forward, forward)  # type: ignore[attr-defined]
        self.model.forward = MethodType(forward, self.model)

    def use_layout(self, layout: LayoutName, longest: int | None = None) -> None:
        """Switch to `layout`; our attention serves all but the padded one.

        Args:
            layout: How micro-batches come.
            longest: Longest side there will be, in tokens; None: any.
        """
        self.layout = layout
        self.longest = longest
        self.num_attention_calls = None

    @_eager
    def attend_to(self, segments: Segments | None) -> None:
        """Give the layers our attention over `segments`, or with None their own again, for generation."""
        _active.segments = segments
        for number, config in enumerate(self.configs):
            if segments is None:
                config._attn_implementation = self.plain_attention[number]
            elif config._attn_implementation != ATTENTION:
                self.plain_attention[number] = config._attn_implementation
                config._attn_implementation = ATTENTION

    @_passed_over
    def score(self, batch: PackedBatch, denominators: Denominators, noise: float | None = None) -> ORPOOutput:
        """Run a micro-batch through the model and its head; `noise` is NEFTune's alpha."""
        passes, batch = self._begin(batch)
        outputs = []
        for each in passes:
            segments, inputs = self._enter(each)
            try:
                with noisy_embeddings(self.model.get_input_embeddings(), each, noise):
                    output = self._run(each.input_ids_BN, inputs)
            finally:
                self.attend_to(None)
            outputs.append(self._leave(output, segments))
        return self._finish(outputs, passes, batch, denominators)

    @_passed_over
    def _run(self, input_ids_BN: Tensor, inputs: dict[str, Any]) -> Any:
        """What the backbone returns, with the hidden states that meet the vocabulary matrix.

        Where layers stand in between, the whole model runs, and its vocabulary matrix hands on what it reads.
        """
        if not self.has_transform:
            return self.backbone(input_ids_BN, **inputs)
        with reading(self.backbone, self.model.get_output_embeddings(), None) as found:
            self.plain_forward(input_ids=input_ids_BN, **inputs)
        output = found.output
        output.last_hidden_state = found.entering
        return output

    @_eager
    def _begin(self, batch: PackedBatch) -> tuple[list[Pass], PackedBatch]:
        """The passes of a micro-batch that the model can follow."""
        self._check_layout(batch)
        return split_passes(batch, self.limits)

    @_eager
    def _enter(self, each: Pass) -> tuple[Segments, dict[str, Any]]:
        """What the backbone reads in a pass besides ids; its layers attend by our segments from here."""
        segments = Segments(each.tree)
        inputs: dict[str, Any] = {"attention_mask": each.attention_mask_BN, "use_cache": False}
        if self.router_loss is not None:
            inputs["output_router_logits"] = True
        if self.limits.alone:
            reset_dynamic_rope(self.backbone)
        for tensor in (each.input_ids_BN, each.position_ids_BN):
            torch._dynamo.maybe_mark_dynamic(
                tensor, 1
            )  # under torch_compile no length is compiled for itself
        if self.layout != "padded":
            inputs["position_ids"] = each.position_ids_BN
            self.attend_to(segments)
        return segments, inputs

    @_eager
    def _leave(self, output: Any, segments: Segments) -> Any:
        """Check that the layers attended by our segments, and let them do so again in the backward."""
        if self.layout != "padded":
            self._check_attention(segments)
            self.attention = segments.backend
            hidden = output.last_hidden_state
            if hidden.requires_grad:
                output.last_hidden_state = _AttendInBackward.apply(hidden, self, segments)
        return output

    @_eager
    def _finish(
        self, outputs: list[Any], passes: list[Pass], batch: PackedBatch, denominators: Denominators
    ) -> ORPOOutput:
        """The head, over the hidden states of all passes."""
        hidden = [output.last_hidden_state.flatten(0, 1) for output in outputs]
        hidden_ND = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        head = head_of(self.model, hidden_ND, self.logit_scale, self.chunk_bytes)
        loss, pairs = score_batch(hidden_ND, head, batch, denominators)
        router_loss = self._router_loss(outputs, passes, batch, denominators)
        if router_loss is not None:
            loss, router_loss = loss + router_loss, router_loss.detach()
        return ORPOOutput(loss, pairs, router_loss)

    def _check_layout(self, batch: PackedBatch) -> None:
        """A micro-batch that the model cannot follow would be scored wrongly, in silence."""
        shares = any(segment.shared for segment in batch.tree)
        found: LayoutName = "padded" if not batch.tree else "shared" if shares else "packed"
        if found != self.layout and (found, self.layout) != ("packed", "shared"):
            raise ModelError(
                f"the batch has layout `{found}`, {type(self.model).__name__} was prepared for "
                f"`{self.layout}`; pass layout={self.layout!r} to pack()"
            )

    def _check_attention(self, segments: Segments) -> None:
        """Every pass must go through our attention as often as the probe's did."""
        if segments.num_calls == 0:
            raise NotOnTheInterfaceError("its attention cannot be replaced")
        for what, length in self._untold(segments):
            if self.longest is None or max(self.longest, segments.longest()) > length:
                raise NotOnTheInterfaceError(f"its {what} of {length:,} tokens is known to its masks alone")
        if self.num_attention_calls is None:
            self.num_attention_calls = segments.num_calls
        if segments.num_calls != self.num_attention_calls:
            raise ModelError(
                f"{type(self.model).__name__} called our attention {segments.num_calls} times in a forward "
                f"pass, {self.num_attention_calls} times in the one before; set layout: padded"
            )

    def _untold(self, segments: Segments) -> Iterator[tuple[str, int]]:
        """What limits attention by masks that do not reach our attention, and from which length on."""
        config = self.model.config.get_text_config()
        window, chunk = mask_window(config), mask_chunk(config)
        if window is not None and window not in segments.windows:
            yield "sliding window", window
        if chunk is not None:
            yield "attention in chunks", chunk
        yield from self.untold

    def _router_loss(
        self, outputs: list[Any], passes: list[Pass], batch: PackedBatch, denominators: Denominators
    ) -> Tensor | None:
        """The load-balancing loss of a mixture of experts as the model defines it, for this batch's share."""
        if self.router_loss is None or not torch.is_grad_enabled():
            return None
        layers = zip(*(output.router_logits for output in outputs), strict=True)
        masks = [each.attention_mask_BN for each in passes if each.attention_mask_BN is not None]
        mask = (
            masks[0] if len(masks) == 1 else torch.cat([m.flatten() for m in masks])[None] if masks else None
        )
        balance = self.router_loss(
            [torch.cat(layer) if len(layer) > 1 else layer[0] for layer in layers], mask
        )
        return batch.num_pairs / denominators.examples * balance


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
    """Identity on hidden states; in their backward, layers under gradient checkpointing attend once more."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scorer: Scorer, segments: Segments) -> Tensor:
        ctx.scorer, ctx.segments = scorer, segments
        return hidden.view_as(hidden)

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
    s_aux: Tensor | None = None,
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
    segments.windows.add(sliding_window)
    output = attend(
        query, key, value, segments,
        scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout, sinks_H=s_aux,
    )  # fmt: skip
    return output, None


_HARMLESS = {
    "position_ids", "cache_position", "is_causal", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "return_dict", "past_key_values",
}  # fmt: skip

# Compiled into a layer it would be compiled again for the lengths of every micro-batch.
AttentionInterface.register(ATTENTION, torch.compiler.disable(_segments_attention_forward))


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """Every configuration object a layer may read its attention implementation from."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]
