"""Load a model and its tokenizer as the settings ask: precision, quantisation, a new or an old adapter."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orpo.engine.gguf_model import (
    gguf_family,
    gguf_loading_arguments,
    load_gguf_tokenizer,
    settle_gguf_model,
)
from orpo.engine.scorer import refuse_encoder_decoder
from orpo.errors import ConfigError, ModelError, first_line
from orpo.run.directory import adapter_base, gguf_file, is_adapter
from orpo.settings.config import OrpoSettings

_UNLOADABLE = (OSError, ImportError, ValueError, RuntimeError, SafetensorError)
"""What loading raises for a name or a folder that is not what it should be."""


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter, by hub name, folder or GGUF file.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    if (path := gguf_file(name)) is not None:
        return load_gguf_tokenizer(path)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: no tokenizer could be loaded ({first_line(error)})") from error


def load_model(settings: OrpoSettings) -> PreTrainedModel:
    """Load `settings.model_name_or_path` for training, with an adapter where the settings ask for one.

    A folder that holds an adapter loads its base model with that adapter on top; a GGUF file is unpacked.
    Full fine-tuning gets float32 master weights, because a bfloat16 weight of 0.02 does not move under a
    learning rate of 5e-6; a frozen base is held in bfloat16 where the hardware computes in it.

    Raises:
        ConfigError: Settings that exclude each other.
        ModelError: The model or the adapter cannot be loaded, or is no causal language model.
    """
    name = settings.model_name_or_path
    if not name:
        raise ConfigError("model_name_or_path is not set; name a hub model or a local folder")
    adapter = settings.adapter_name_or_path or (name if is_adapter(name) else None)
    if adapter == name:
        name = adapter_base(name) or ""
        if not name:
            raise ModelError(
                f"{adapter}: the adapter does not name its base model; set model_name_or_path to that model"
            )
    if adapter and settings.use_peft:
        raise ConfigError(f"use_peft asks for a new adapter, but {adapter} is one already; drop use_peft")
    model = _load_base(name, settings, trains_adapter=bool(adapter or settings.use_peft))
    if adapter:
        from peft import PeftModel

        try:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)  # type: ignore[return-value]
        except _UNLOADABLE as error:
            raise ModelError(f"{adapter}: the adapter could not be loaded ({first_line(error)})") from error
    if settings.use_peft:
        return add_adapter(model, lora_config(settings))
    return model


def lora_config(settings: OrpoSettings) -> Any:
    """The `peft.LoraConfig` of the `lora_*` settings."""
    from peft import LoraConfig

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


def add_adapter(model: PreTrainedModel, peft_config: Any) -> PreTrainedModel:
    """Freeze `model` and put a new adapter on it; a quantised model is made trainable first."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        adapted: PreTrainedModel = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"the adapter does not fit {type(model).__name__}: {first_line(error)}") from error
    return adapted


def supports_bf16() -> bool:
    """Whether the accelerator, if there is one, computes in bfloat16; CPUs do so too slowly to be counted."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _load_base(name: str, settings: OrpoSettings, trains_adapter: bool) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
        "attn_implementation": settings.attn_implementation,
        "dtype": _dtype(settings, trains_adapter),
    }
    if isinstance(settings.model_init_kwargs, dict):
        arguments |= settings.model_init_kwargs
    if settings.load_in_4bit or settings.load_in_8bit:
        if not trains_adapter:
            raise ConfigError(
                "load_in_4bit and load_in_8bit freeze the weights; set use_peft: true to train LoRA on them"
            )
        arguments["quantization_config"] = _quantization(settings)
    if (path := gguf_file(name)) is not None:
        return _load_gguf(path, arguments)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
        refuse_encoder_decoder(config, name)
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except ModelError:
        raise
    except _UNLOADABLE as error:
        raise ModelError(f"{name}: the model could not be loaded ({first_line(error)})") from error


def _load_gguf(path: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    if "quantization_config" in arguments:
        raise ConfigError(f"{path} is unpacked when it is loaded; drop load_in_4bit and load_in_8bit")
    arguments = arguments | gguf_loading_arguments(path)
    dtype = arguments["dtype"]
    arguments["dtype"] = torch.float32 if dtype == "auto" else dtype  # blocks have no dtype to take over
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path.parent, config=config, **arguments)
    except _UNLOADABLE as error:
        raise ModelError(
            f"{path}: transformers cannot read this {gguf_family(path)} file ({first_line(error)}); "
            "convert it to a folder of safetensors first, or take the folder that it was made from"
        ) from error
    settle_gguf_model(model, path)
    return model


def _dtype(settings: OrpoSettings, trains_adapter: bool) -> torch.dtype | str:
    if settings.dtype == "auto":
        return "auto"
    if settings.dtype is not None:
        dtype = getattr(torch, settings.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype: {settings.dtype!r} is none of float32, bfloat16, float16, auto")
        return dtype
    return torch.bfloat16 if trains_adapter and supports_bf16() else torch.float32


def _quantization(settings: OrpoSettings) -> Any:
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if supports_bf16() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # a float storage can be sharded by FSDP2, uint8 cannot
    )
