"""Adapters: which weights carry one by default, what is said about it, and which kinds cannot train here.

`lora_target_modules: all-linear` means every linear layer and the stacked weights of experts, the same on
every family. Routers are left out: a router that moves sends tokens to other experts, which nobody asked for.
PEFT's own reading of `all-linear` adapts experts and routers on some families and neither on others.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo.console import say
from orpo.engine.precision import HALF
from orpo.errors import ConfigError, ModelError, raised_as
from orpo.settings.config import OrpoSettings

ALL_LINEAR = "all-linear"
_MOST_NAMES = 12
"""Names that an error lists."""


def lora_config(settings: OrpoSettings) -> Any:
    """The `peft.LoraConfig` of the `lora_*` settings."""
    from peft import LoraConfig

    with raised_as(ConfigError, "the lora_ settings cannot be used"):
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_target_modules,
            target_parameters=settings.lora_target_parameters,
            modules_to_save=settings.lora_modules_to_save,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
        )


def add_adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    """Freeze `model` and put a new adapter on it; a quantised model is made trainable first.

    Raises:
        ConfigError: It is no configuration of PEFT, or a setting of the adapter names nothing that the model
            has.
        ModelError: The adapter does not fit the model.
    """
    from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training

    if not isinstance(peft_config, PeftConfig):
        kind = type(peft_config).__name__
        raise ConfigError(f"peft_config is a {kind}; expected a configuration of PEFT, as LoraConfig(r=16)")
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    _resolve_all_linear(model, peft_config)
    asked = _names_asked_for(peft_config)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    weights = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with raised_as(ModelError, f"the adapter does not fit {type(model).__name__}", "see lora_target_modules"):
        adapted: Any = get_peft_model(model, peft_config)
    for setting, wanted in asked.items():
        if _names_asked_for(peft_config).get(setting) == wanted:  # PEFT translates names of old families
            _check_names(setting, wanted, modules, weights, type(model).__name__)
    return train_in_float32(adapted)


# ---------------------------------------------------------------------------------------- targets


def _resolve_all_linear(model: PreTrainedModel, config: Any) -> None:
    """Replace `all-linear` in a LoRA configuration by the names of what carries an adapter."""
    asked = getattr(config, "target_modules", None)
    if getattr(config.peft_type, "value", None) != "LORA" or str(asked).lower() != ALL_LINEAR:
        return
    experts = sorted({_suffix(name) for name, _ in stacked_experts(model)})
    if experts and config.target_parameters is None:
        _refuse_on_experts(model, config)
        config.target_parameters = experts
    config.target_modules = sorted(_linear_layers(model)) or asked


def _refuse_on_experts(model: PreTrainedModel, config: Any) -> None:
    """PEFT has neither dropout nor DoRA for weights outside of linear layers."""
    for setting, value in (("lora_dropout", config.lora_dropout), ("use_dora", config.use_dora)):
        if value:
            leaves = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
            raise ConfigError(
                f"{setting}: PEFT cannot apply it to the experts of {type(model).__name__}; drop {setting}, "
                f"or leave the experts out with lora_target_modules: [{', '.join(leaves)}]"
            )


def _names_asked_for(config: Any) -> dict[str, set[str]]:
    """Setting -> the names it lists; an expression or nothing lists none."""
    settings = ("target_modules", "target_parameters", "modules_to_save", "exclude_modules")
    asked = {setting: getattr(config, setting, None) for setting in settings}
    return {name: set(value) for name, value in asked.items() if isinstance(value, (list, set, tuple))}


def _check_names(setting: str, wanted: set[str], modules: list[str], weights: list[str], model: str) -> None:
    """Refuse a setting of which nothing is there; say what of it is not.

    A list for several families, some of whose names a model has not, is common.
    """
    kind, names = ("weight", weights) if setting == "target_parameters" else ("module", modules)
    dot = "" if setting == "modules_to_save" else "."  # as PEFT compares them
    missing = sorted(one for one in wanted if not any(f".{name}".endswith(dot + one) for name in names))
    if not missing:
        return
    line = f"lora_{setting}: {model} has no {kind} called {' or '.join(missing)}"
    if len(missing) < len(wanted):
        say(line)
        return
    of_weights = (name.split(".")[-2:] for name in weights)
    there = dict.fromkeys(".".join(parts[: 2 if kind == "weight" else 1]) for parts in of_weights)
    raise ConfigError(f"{line}; there are {', '.join(list(there)[:_MOST_NAMES])}")


def _linear_layers(model: PreTrainedModel) -> Iterator[str]:
    """Full names of the linear layers, without vocabulary, routers, and what fused kernels read past LoRA."""
    head = model.get_output_embeddings()
    routers = {id(router) for router in _routers(model)}
    own_code = type(model).__module__
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or module is head or id(module) in routers:
            continue
        if type(module).__module__ == own_code and type(module).forward is not nn.Linear.forward:
            continue  # the model's own kind of layer, which does more than multiply
        mixer = model.get_submodule(name.rpartition(".")[0])
        if hasattr(mixer, "A_log") and getattr(mixer, "out_proj", None) is module:
            continue  # Mamba's kernels read this weight themselves
        yield name


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """Numbers of experts that the configuration names, and their sums: some are routed to and do nothing."""
    settings = vars(model.config.get_text_config()).items()
    named = [value for name, value in settings if "expert" in name and type(value) is int and value > 0]
    return {value for value in named if value > 1} | {a + b for a, b in itertools.combinations(named, 2)}


def stacked_experts(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights that hold all experts of a layer in one tensor [experts, ...]."""
    counts = _expert_counts(model)
    for name, weight in model.named_parameters():
        if weight.ndim == 3 and weight.shape[0] in counts and weight.is_floating_point():
            yield name, weight


def _routers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that choose experts: one output each, next to the experts."""
    counts = _expert_counts(model)
    blocks = {name.rpartition(".")[0].rpartition(".")[0] for name, _ in stacked_experts(model)}
    blocks |= {
        name.removesuffix(".experts") for name, m in model.named_modules() if name.endswith(".experts")
    }
    for block in blocks:
        for module in model.get_submodule(block).modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] in (counts | {1}):
                yield module


def _suffix(name: str) -> str:
    """`model.layers.0.mlp.experts.down_proj` -> `experts.down_proj`, the same in every layer."""
    return ".".join(name.split(".")[-2:])


def adapter_lines(model: Any) -> list[str]:
    """What carries an adapter and which share of the weights that is, with the setting that changes it."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    leaves: dict[str, int] = {}
    carried: dict[int, int] = {}
    layers = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            target = _target(module)
            if target is None:
                continue
            leaf = getattr(module, "parameter_name", None) or name.rpartition(".")[2]
            leaves[leaf] = leaves.get(leaf, 0) + 1
            carried[id(target)] = target.numel()  # a tied one counts once
            layers |= {part for part in name.split(".") if part.isdigit()}
    if not leaves:
        return []
    base = model.get_base_model()
    total = sum(w.numel() for name, w in base.named_parameters() if "lora_" not in name)
    share = sum(carried.values()) / total
    experts = [weight for _, weight in stacked_experts(base)]
    on_experts = any(getattr(module, "parameter_name", None) for module in model.modules())
    say = f"; experts: {'yes' if on_experts else 'no (lora_target_parameters adds them)'}" if experts else ""
    return [
        f"adapter on {', '.join(sorted(leaves))}: {share:.0%} of the weights carry one{say}"
        "; lora_target_modules changes it"
    ]


def _target(module: Any) -> Tensor | None:
    """The weight that an adapter layer changes."""
    if hasattr(module, "get_param"):
        weight = module.get_param()
    else:
        weight = getattr(module.get_base_layer(), "weight", None)
    return weight if isinstance(weight, Tensor) else None


# ---------------------------------------------------------------------------------------- precision


def train_in_float32(model: Any) -> Any:
    """Hold what is trained in full next to an adapter in float32: a bfloat16 weight of 0.02 does not move.

    The copies that `modules_to_save` trains keep taking and giving the precision of the module they replace.
    """
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        for trained in copies.values() if isinstance(copies, nn.ModuleDict) else ():
            if any(w.requires_grad and w.dtype in HALF for w in trained.parameters()):
                trained.float()
                _between(trained, next(module.original_module.parameters()))
    for weight in model.parameters():
        if weight.requires_grad and weight.dtype in HALF:
            weight.data = weight.data.float()
    return model


def _between(module: nn.Module, replaced: nn.Parameter) -> None:
    """Let a float32 module take and give tensors of the precision that the weight it replaces has by then."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(value, torch.float32) for value in inputs)

    def narrow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return _cast(output, replaced.dtype)

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# ---------------------------------------------------------------------------------------- refusals


def refuse_adapters(model: nn.Module, inner: PreTrainedModel) -> None:
    """Refuse the kinds of adapter that packed micro-batches or our head cannot train.

    Raises:
        ModelError: Naming the kind and the reason.
    """
    head = inner.get_output_embeddings()
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ModelError(
            "the adapter is merged into the weights, where it cannot train; call unmerge_adapter()"
        )
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or config.is_adaption_prompt:
            reason = (
                "it puts tokens or keys of its own in front of every sequence, and packed pairs have no front"
            )
        elif getattr(config, "alora_invocation_tokens", None):
            kind = "aLoRA"
            reason = "it looks for its invocation tokens in whole sequences, and would train nothing here"
        elif kind == "ADALORA":
            reason = "its loss has a penalty and its ranks a schedule, which only its own forward adds"
        elif kind == "POLY":
            reason = "it asks for the task of each sequence, and pairs have none"
        elif kind == "XLORA":
            reason = "it runs the model twice, to weigh its adapters by whole sequences"
        elif (on_head := _head_problem(head, config, kind)) is not None:
            reason = on_head
        else:
            continue
        raise ModelError(f"{kind} cannot be trained here: {reason}; use LoRA")


_ON_HEAD = ("LORA", "LOHA", "LOKR", "FOURIERFT")
"""Kinds of adapter whose change to the vocabulary matrix is added to it."""


def _head_problem(head: Any, config: Any, kind: str) -> str | None:
    """Why an adapter on the vocabulary matrix cannot be scored."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(head, BaseTunerLayer):
        return None
    if kind == "LORA" and getattr(config, "lora_bias", False):
        return "lora_bias on the vocabulary matrix is not known to the head, which scores without logits"
    if kind == "TRAINABLE_TOKENS":
        return (
            "the vocabulary matrix is tied to the embeddings, and would give these tokens no gradient;"
            " trainable_token_indices of LoRA trains them"
        )
    if kind not in _ON_HEAD:
        return "on the vocabulary matrix it does not add to the weight; leave that out of its target modules"
    return None
