"""A model on paper: built from its configuration on fake tensors, which have shapes and no memory.

The only module that knows torch's fake tensors. Its configuration comes from a folder, from the cache of the
hub, from a small table of ours, or from the hub. What its layers keep is measured as on a real model
(engine/footprint.py); experts, which look at their input to route it, have a stand-in that multiplies by the
same number of weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from orpo.engine.adapters import add_adapter, lora_config, stacked_experts
from orpo.engine.footprint import Footprint, measure_footprint
from orpo.engine.lengths import mask_window, may_share
from orpo.engine.loading import weights_dtype
from orpo.engine.scorer import base_model, refuse_encoder_decoder
from orpo.errors import ConfigError, ModelError, raised_as
from orpo.run.directory import MODEL_CONFIG, adapter_base, is_adapter
from orpo.settings.config import OrpoSettings

NF4_BYTES, INT8_BYTES = 0.516, 1.01
"""Bytes of a weight under bitsandbytes: 4 or 8 bits, and its share of the scales of its block."""
TRIED = 1
"""Layers that are run on paper; a family whose layers are unlike each other is judged by its last one."""
_EXPERTS = "orpo_on_paper"
NOT_MEASURED = Footprint(0.0, 1, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class PaperModel:
    """What planning needs to know of a model.

    Attributes:
        name: Its name.
        num_weights: Weights, adapters included.
        trained: Those that are trained.
        weight_bytes: Bytes of all weights as they are loaded.
        trained_bytes: Bytes of those that are trained.
        hidden: Size of a hidden state.
        vocabulary: Size of the vocabulary.
        tied: Whether embeddings and vocabulary projection are one matrix.
        head_trained: Whether the vocabulary projection is trained.
        layers: Number of layers.
        layer_weights: Weights of the largest layer.
        outside_weights: Weights outside of the layers.
        products: Weights that each token is multiplied by, without the vocabulary projection.
        trained_products: Those of them that are trained.
        not_again: Those of them that checkpointing does not multiply by again: nothing is kept after them.
        attention: Heads times their size: half the products of a query and a key, in all layers.
        window: Sliding window of most layers with one, and the share of layers that have it.
        footprint: What the layers keep for backward, a token.
        shares: Whether pairs may share tokens with each other.
    """

    name: str
    num_weights: int
    trained: int
    weight_bytes: float
    trained_bytes: float
    hidden: int
    vocabulary: int
    tied: bool
    head_trained: bool
    layers: int
    layer_weights: int
    outside_weights: int
    products: float
    trained_products: float
    not_again: float
    attention: int
    window: tuple[int | None, float]
    footprint: Footprint = NOT_MEASURED
    shares: bool = True


def paper_model(settings: OrpoSettings, *, has_bf16: bool, autocast: bool, by_kernel: bool) -> PaperModel:
    """Build the model of a recipe on paper, with its adapter, and measure it.

    Args:
        settings: The recipe's; `model_name_or_path` is needed.
        has_bf16: Whether the machine computes in bfloat16, which decides the precision of a frozen base.
        autocast: Whether training computes in bfloat16 whatever the weights are in.
        by_kernel: Whether attention goes by the kernel of a GPU.

    Raises:
        ModelError: There is no configuration of that name, or it cannot be built.
    """
    name = str(settings.model_name_or_path)
    if is_adapter(name):
        name = adapter_base(name) or name
    config = architecture(name, settings.model_revision, settings.trust_remote_code)
    adapted = bool(
        settings.use_peft or settings.adapter_name_or_path or is_adapter(str(settings.model_name_or_path))
    )
    dtype = weights_dtype(settings, adapted, has_bf16)
    dtype = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    with raised_as(ModelError, f"{name}: cannot be planned"):
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        whole = _described(name, model, settings if adapted else OrpoSettings())
        few = _few_layers(model, TRIED)
        if adapted:
            model = add_adapter(model, lora_config(settings))
            whole = _with_adapter(whole, model, few)
        footprint = _footprint(model, whole.layers, autocast=autocast, by_kernel=by_kernel)
    return replace(whole, footprint=footprint)


def _few_layers(model: PreTrainedModel, number: int) -> int:
    """Leave the last `number` layers of a model; returns how many are left."""
    layers = _layers(model)
    del layers[: max(0, len(layers) - number)]
    model.config.get_text_config().num_hidden_layers = len(layers)
    return len(layers)


def _with_adapter(whole: PaperModel, model: Any, few: int) -> PaperModel:
    """The whole model with the adapter that its last `few` layers have here."""
    inner, more = base_model(model), whole.layers / few
    in_layers = {id(weight) for weight in _layers(inner).parameters()}
    counted = [(w, more if id(w) in in_layers else 1.0) for w in model.parameters() if w.requires_grad]
    trained = sum(share * weight.numel() for weight, share in counted)
    nbytes = sum(share * weight.nbytes for weight, share in counted)
    return replace(
        whole,
        num_weights=whole.num_weights + round(trained),
        trained=round(trained),
        weight_bytes=whole.weight_bytes + nbytes,
        trained_bytes=nbytes,
        head_trained=any(weight.requires_grad for weight in inner.get_output_embeddings().parameters()),
        products=whole.products + trained,
        trained_products=trained,
    )


def _footprint(model: Any, number: int, *, autocast: bool, by_kernel: bool) -> Footprint:
    """What `number` layers keep: of the last one, and of what is kept without any; each takes its time."""
    inner = base_model(model)
    config, layers = inner.config.get_text_config(), _layers(inner)
    if hasattr(inner, "set_experts_implementation"):
        with contextlib.suppress(ValueError):
            inner.set_experts_implementation(_EXPERTS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _off_meta(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = measure_footprint(model, by_kernel=by_kernel)
            kept, config.num_hidden_layers = list(layers), 0
            del layers[:]
            outside = measure_footprint(model, by_kernel=by_kernel).layers
            layers.extend(kept)
    each = (found.layers - outside) / len(kept)
    fixed = found.fixed * number / len(kept)
    return replace(found, layers=outside + number * each, fixed=fixed, num_layers=number)


def _off_meta(model: nn.Module) -> None:
    """Put weights and buffers on the CPU of the fake mode that is on: autocast knows no meta device."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_weight = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = moved[id(tensor)]


def architecture(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model: of a folder, of the hub's cache, of our table, or of the hub.

    Raises:
        ModelError: There is none, or it is no causal language model.
    """
    known = architectures()
    cached = (
        try_to_load_from_cache(name, MODEL_CONFIG, revision=revision) if not Path(name).exists() else None
    )
    if name in known and not isinstance(cached, str):
        config = AutoConfig.for_model(**known[name])
    else:
        with raised_as(
            ModelError, f"{name}: no configuration could be read", "name a folder that has config.json"
        ):
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    refuse_encoder_decoder(config, name)
    return config


def architectures() -> Mapping[str, Mapping[str, Any]]:
    """Shapes of public models that recipes name, so that these can be planned without a network."""
    text = (files("orpo") / "plan" / "architectures.json").read_text(encoding="utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)
    return known


def _described(name: str, model: Any, settings: OrpoSettings) -> PaperModel:
    """A model whose weights are all trained; `settings` say how those of its layers are quantized."""
    inner = base_model(model)
    config, head = inner.config.get_text_config(), _plain(inner.get_output_embeddings())
    layers = _layers(inner)
    num_weights = sum(weight.numel() for weight in model.parameters())
    weight_bytes = float(sum(weight.nbytes for weight in model.parameters()))
    products = dict(_products(inner, head.weight))
    each = NF4_BYTES if settings.load_in_4bit else INT8_BYTES if settings.load_in_8bit else None
    if each is not None:
        flat = [weight for weight, _ in products.values() if weight.ndim == 2]  # stacked experts stay whole
        weight_bytes += sum((each - weight.itemsize) * weight.numel() for weight in flat)
    multiplied = sum(share * weight.numel() for weight, share in products.values())
    in_layers = sum(weight.numel() for layer in layers for weight in layer.parameters())
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or []
    window = mask_window(config)
    share = kinds.count("sliding_attention") / len(kinds) if kinds else float(window is not None)
    return PaperModel(
        name=name,
        num_weights=num_weights,
        trained=num_weights,
        weight_bytes=weight_bytes,
        trained_bytes=weight_bytes,
        hidden=config.hidden_size,
        vocabulary=len(head.weight),
        tied=head.weight is _plain(inner.get_input_embeddings()).weight,
        head_trained=True,
        layers=len(layers),
        layer_weights=max(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        outside_weights=num_weights - in_layers,
        products=multiplied,
        trained_products=multiplied,
        not_again=sum(_last_product(layer) for layer in layers),
        attention=heads * size * len(layers),
        window=(window, share if window is not None else 0.0),
        shares=may_share(config),
    )


def _last_product(layer: nn.Module) -> int:
    """Weights of the last linear layer; none in a layer with experts, which are followed by more."""
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    stacked = any(weight.ndim == 3 for weight in layer.parameters())
    return linear[-1].weight.numel() if linear and not stacked else 0


def _plain(module: Any) -> Any:
    """The layer itself where an adapter or a trained copy is around it."""
    module = module.modules_to_save["default"] if hasattr(module, "modules_to_save") else module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The longest list of modules of a model: its layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of layers that could be planned")
    found: nn.ModuleList = max(lists, key=lambda one: sum(w.numel() for w in one.parameters()))
    return found


def _products(model: PreTrainedModel, head: Tensor) -> Iterator[tuple[int, tuple[Tensor, float]]]:
    """Matrices that tokens are multiplied by, each with the share of tokens that it gets."""
    config = model.config.get_text_config()
    experts = {id(weight): weight for _, weight in stacked_experts(model)}
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    for weight in experts.values():
        yield id(weight), (weight, min(1.0, chosen / len(weight)))
    for module in model.modules():
        matrix: Any = getattr(module, "weight", None)
        multiplies = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if multiplies and isinstance(matrix, Tensor) and matrix is not head:
            yield id(matrix), (matrix, 1.0)


def _experts_on_paper(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts as grouped products run them, all tokens by the first one: the same tensors are kept."""
    number = top_k_index.shape[-1]
    picked = torch.arange(len(hidden_states) * number, device=hidden_states.device) // number
    first = self.gate_up_proj if self.has_gate else self.up_proj
    states = _multiplied(hidden_states[picked], first[0], self.is_transposed)
    states = self._apply_gate(states) if self.has_gate else self.act_fn(states)
    states = _multiplied(states, self.down_proj[0], self.is_transposed)
    states = states * top_k_weights.reshape(-1, 1).to(states.dtype)
    summed: Tensor = states.view(len(hidden_states), number, -1).sum(1)
    return summed.to(hidden_states.dtype)


def _multiplied(states: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return states @ weight if transposed else nn.functional.linear(states, weight)


ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_on_paper)
