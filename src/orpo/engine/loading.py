"""Load a model and its tokenizer as the settings ask: precision, quantisation, a new or an old adapter."""

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from orpo.console import say
from orpo.engine.adapters import add_adapter, lora_config, train_in_float32
from orpo.engine.base_weights import other_base
from orpo.engine.generation_config import check_generation_file
from orpo.engine.gguf_model import (
    gguf_family,
    gguf_loading_arguments,
    load_gguf_tokenizer,
    no_bar_in_a_file,
    settle_gguf_model,
)
from orpo.engine.scorer import refuse_encoder_decoder
from orpo.errors import LONGEST, ConfigError, ModelError, raised_as
from orpo.run.directory import adapter_base, gguf_file, is_adapter, read_json
from orpo.settings.config import OrpoSettings


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or adapter, by hub name, folder or GGUF file.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    if (path := gguf_file(name)) is not None:
        return load_gguf_tokenizer(path)
    adapter_base(name)  # names the file where it is damaged
    with raised_as(ModelError, f"{name}: no tokenizer could be loaded"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except Exception:
            if is_adapter(name):
                base_of(name)  # transformers looks for it too, and says something else where it is not told
            raise
        tokenizer("a")  # some settings are looked at only now
        for line in _misplaced_tokens(Path(name), tokenizer):
            say(line)
        return tokenizer


def _misplaced_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """A line about added tokens that get another id than tokenizer.json states, as the library lets them."""
    stated = read_json(folder / "tokenizer.json", {}).get("added_tokens") or []
    ids = {token["content"]: token["id"] for token in stated}
    wrong = {text: number for text, number in ids.items() if tokenizer.convert_tokens_to_ids(text) != number}
    if not wrong:
        return []
    text, number = next(iter(wrong.items()))
    found = tokenizer.convert_tokens_to_ids(text)
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return [f"{folder}: tokenizer.json states id {number} for {text!r}, which is read as {found}{others}"]


def load_model(settings: OrpoSettings) -> PreTrainedModel:
    """Load `settings.model_name_or_path` for training, with an adapter where the settings ask for one.

    A folder that holds an adapter loads its base model with that adapter on top; a GGUF file is unpacked.
    Full fine-tuning gets float32 master weights, because a bfloat16 weight of 0.02 does not move under a
    learning rate of 5e-6; a frozen base is held in bfloat16 where the hardware computes in it.

    Raises:
        ConfigError: Settings that exclude each other.
        ModelError: Model or adapter cannot be loaded, lack weights, or are no causal language model.
    """
    name = settings.model_name_or_path
    if not name:
        raise ConfigError("model_name_or_path is not set; name a hub model or a local folder")
    adapter = settings.adapter_name_or_path or (name if is_adapter(name) else None)
    if adapter == name:
        name = base_of(name)
    if adapter and settings.use_peft:
        raise ConfigError(f"use_peft asks for a new adapter, but {adapter} is one already; drop use_peft")
    model = _load_base(name, settings, trains_adapter=bool(adapter or settings.use_peft))
    if adapter:
        model = train_in_float32(_load_adapter(model, adapter))
    elif settings.use_peft:
        model = add_adapter(model, lora_config(settings))
    return model


def base_of(adapter: str) -> str:
    """Name of the model that an adapter folder was trained on.

    Raises:
        DataError: Its adapter_config.json is damaged.
        ModelError: It does not say.
    """
    if base := adapter_base(adapter):
        return base
    raise ModelError(
        f"{adapter}: the adapter does not name its base model; set model_name_or_path to that model"
    )


def _load_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from peft import PeftModel

    adapter_base(adapter)  # names the file where it is damaged
    with (
        raised_as(ModelError, f"{adapter}: the adapter could not be loaded"),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        adapted: Any = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ModelError(
                f"{adapter}: the adapter lacks weights that its configuration asks for, which would be random"
                f" ({str(warning.message)[:LONGEST]})"
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    _refuse_not_finite(adapted, adapter)
    if (line := other_base(Path(adapter), adapted)) is not None:
        say(line)
    return adapted  # type: ignore[no-any-return]


def supports_bf16() -> bool:
    """Whether the accelerator, if there is one, computes in bfloat16; CPUs do so too slowly to be counted."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _load_base(name: str, settings: OrpoSettings, trains_adapter: bool) -> PreTrainedModel:
    arguments: dict[str, Any] = {
        "revision": settings.model_revision,
        "trust_remote_code": settings.trust_remote_code,
        "attn_implementation": settings.attn_implementation,
        "dtype": weights_dtype(settings, trains_adapter, supports_bf16()),
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
    check_generation_file(name)
    with raised_as(ModelError, f"{name}: the model could not be loaded"):
        config = AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
        refuse_encoder_decoder(config, name)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if layers < 1:
            raise ModelError(f"{name}: config.json says that it has {layers} layers")
        _refuse_unknown_quantization(name, config)
        with _no_load_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    model, report = loaded
    _check_load_report(name, model, report)
    _refuse_whole_numbers(name, model, config, settings.model_revision)
    _refuse_not_finite(model, name)
    return model  # type: ignore[no-any-return]


def _refuse_unknown_quantization(name: str, config: Any) -> None:
    """Refuse weights quantized in a way that transformers does not know: it would read them as plain ones."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"{name}: config.json says that its weights are quantized by {method!r}, which transformers does"
            " not know; give the model in plain weights, or take quantization_config out if they are plain"
        )


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Without the table that transformers logs of tensors that do not fit, which are said in a line here."""
    logger = logging.getLogger("transformers.modeling_utils")

    def hide(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(hide)
    try:
        yield
    finally:
        logger.removeFilter(hide)


def _check_load_report(name: str, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuse a model with weights that are not in its files, which were drawn at random."""
    kind, unused = type(model).__name__, report.get("unexpected_keys") or ()
    if missing := report.get("missing_keys"):
        left = f" and has {len(unused)} that do not belong to it ({_some(unused)})" if unused else ""
        raise ModelError(
            f"{name}: lacks {len(missing)} tensors of {kind} ({_some(missing)}){left}; these weights would be"
            " random, so give a whole causal language model"
        )
    if unused:
        say(f"{name}: {len(unused)} tensors have no place in {kind} and are left out ({_some(unused)})")


def _refuse_whole_numbers(name: str, model: PreTrainedModel, config: Any, revision: str | None) -> None:
    """Refuse quantized weights without the configuration that says how to read them."""
    if getattr(config, "quantization_config", None) is not None:
        return
    floats = {own for own, weight in model.named_parameters() if weight.is_floating_point()}
    for path in _weight_files(name, revision):
        with safe_open(path, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - no mapping
                stored = str(file.get_slice(tensor).get_dtype())
                if tensor in floats and not stored.startswith(("F", "BF")):
                    raise ModelError(
                        f"{name}: {tensor} is stored as whole numbers ({stored}), as quantized weights are,"
                        " but no quantization_config says how to read them; give the model as it was before"
                    )


def _weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files of a local or a downloaded model."""
    folder = Path(name)
    if not folder.is_dir():
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    return sorted(folder.glob("*.safetensors"))


def _refuse_not_finite(model: torch.nn.Module, name: str) -> None:
    """Refuse weights that are NaN or infinite; those on no device, or of no float type, pass.

    So do weights of 4 bits: two of them in each byte, stored as numbers of a float type that mean nothing.
    """
    bad = [
        weight_name
        for weight_name, weight in model.named_parameters()
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and weight.device.type != "meta"
        and not hasattr(weight, "quant_state")
        and not _is_finite(weight.detach())
    ]
    if bad:
        raise ModelError(
            f"{name}: {len(bad)} of its tensors hold values that are not finite ({_some(bad)}); the model is"
            " damaged, or was saved from a run that had failed"
        )


def _is_finite(weight: torch.Tensor) -> bool:
    weight = weight.to_local() if hasattr(weight, "to_local") else weight
    # A sum needs no memory. It may be infinite for finite weights, never finite for others.
    return bool(weight.sum().isfinite().item()) or bool(weight.isfinite().all().item())


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _load_gguf(path: Path, arguments: dict[str, Any]) -> PreTrainedModel:
    if "quantization_config" in arguments:
        raise ConfigError(f"{path} is unpacked when it is loaded; drop load_in_4bit and load_in_8bit")
    arguments = arguments | gguf_loading_arguments(path)
    dtype = arguments["dtype"]
    arguments["dtype"] = torch.float32 if dtype == "auto" else dtype  # blocks have no dtype to take over
    refused = f"{path}: transformers cannot read this {gguf_family(path)} file"
    then = "convert it to a folder of safetensors first, or take the folder that it was made from"
    with raised_as(ModelError, refused, then), _no_load_report(), no_bar_in_a_file():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent, config=config, output_loading_info=True, **arguments
        )
    model: PreTrainedModel = loaded[0]
    _check_load_report(str(path), model, loaded[1])
    _refuse_not_finite(model, str(path))
    settle_gguf_model(model, path)
    return model


def weights_dtype(settings: OrpoSettings, trains_adapter: bool, has_bf16: bool) -> torch.dtype | str:
    """In which precision weights are held, or `auto`: as they are stored.

    Args:
        settings: Of the recipe; `dtype` decides where it is set.
        trains_adapter: Whether an adapter is trained, and the weights are frozen.
        has_bf16: Whether the hardware computes in bfloat16.

    Raises:
        ConfigError: `dtype` is none.
    """
    if settings.dtype == "auto":
        return "auto"
    if settings.dtype is not None:
        dtype = getattr(torch, settings.dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConfigError(f"dtype: {settings.dtype!r} is none of float32, bfloat16, float16, auto")
        return dtype
    return torch.bfloat16 if trains_adapter and has_bf16 else torch.float32


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
