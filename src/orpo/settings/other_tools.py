"""Names that users of Axolotl, LLaMA-Factory, ms-swift and Unsloth bring, and what each comes to here.

A name is renamed, translated, without effect, or refused with the reason: what would train something else is
never left out quietly. Sets of data, which are described in blocks and files of their own: foreign_data.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Written = Mapping[str, Any]
"""Every key of the recipe and its value as written: what some keys mean depends on others."""
Translation = tuple[dict[str, Any], str]
"""Today's settings, and the rest of a printed line."""

RENAMED = {
    # model
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "model_id_or_path": "model_name_or_path",
    "model_path": "model_name_or_path",
    "pretrained_model_name_or_path": "model_name_or_path",
    "revision_of_model": "model_revision",
    "lora_model_dir": "adapter_name_or_path",
    # LoRA
    "lora_rank": "lora_r",
    "r": "lora_r",
    "target_regex": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    # data
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "template": "chat_template",
    "template_type": "chat_template",
    "dataset_processes": "dataset_num_proc",
    "dataset_config_name": "dataset_config",
    "dataset_split": "dataset_train_split",
    "buffer_size": "shuffle_buffer",
    "shuffle_buffer_size": "shuffle_buffer",
    # steps
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "random_state": "seed",
    "early_stop_interval": "early_stopping_patience",
    "wandb_name": "run_name",
}

_MODEL = "the model's own files say it"
_CACHE = "tokenized sets are kept and found again by themselves"
PACKED = "pairs of any length are packed together without padding"
_LENGTHS = "a prompt that does not fit loses its oldest turns, a response is never cut"
_KERNELS = "the engine has its own kernels"
_QUANTIZED = "the base under QLoRA is quantized twice, as NF4"
_NLL = "nll_on says which tokens the NLL is over: full, response or assistant"
_REWARDS = "there is no reward model, and no second copy of the model for a reference"
_OTHER_LOSS = "it belongs to another loss"
_PLACED = "the model is loaded onto the device that trains it"
_TRACKER = "name the tracker in report_to, and set it up by its own environment variables (env: in a recipe)"

NO_EFFECT = {
    **dict.fromkeys(["model_type", "tokenizer_type", "base_model_config", "use_fast_tokenizer"], _MODEL),
    **dict.fromkeys(["tokenizer_use_fast", "tokenizer_legacy", "lora_fan_in_fan_out", "eot_tokens"], _MODEL),
    **dict.fromkeys(["is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"], _MODEL),
    **dict.fromkeys(["is_falcon_derived_model", "processor_type", "cls_model_config"], _MODEL),
    **dict.fromkeys(["dataset_prepared_path", "tokenized_path", "overwrite_cache"], _CACHE),
    **dict.fromkeys(["load_from_cache_file", "preprocessing_batch_size", "lazy_tokenize"], _CACHE),
    **dict.fromkeys(["dataset_keep_in_memory", "skip_prepare_dataset", "download_mode"], _CACHE),
    **dict.fromkeys(["sample_packing", "eval_sample_packing", "pad_to_sequence_len", "neat_packing"], PACKED),
    **dict.fromkeys(["batch_flattening", "multipack_real_batches", "padding_side"], PACKED),
    **dict.fromkeys(["truncation_strategy", "excess_length_strategy", "max_prompt_len"], _LENGTHS),
    **dict.fromkeys(["use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels"], _KERNELS),
    **dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "tuner_backend"], _KERNELS),
    **dict.fromkeys(["xformers_attention", "flex_attention", "fast_inference"], _KERNELS),
    **dict.fromkeys(
        ["double_quantization", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype"], _QUANTIZED
    ),
    **dict.fromkeys(["train_on_inputs", "train_on_prompt", "mask_history", "loss_scale"], _NLL),
    **dict.fromkeys(["reward_model", "reward_model_adapters", "ref_model_quantization_bit"], _REWARDS),
    **dict.fromkeys(["desirable_weight", "undesirable_weight", "ld_alpha"], _OTHER_LOSS),
    **dict.fromkeys(["device_map", "max_memory", "gpu_memory_limit", "low_cpu_mem_usage"], _PLACED),
    **dict.fromkeys(["lora_on_cpu", "gpu_memory_utilization"], _PLACED),
    **dict.fromkeys(["use_wandb", "use_tensorboard", "use_mlflow", "use_swanlab"], _TRACKER),
    "dataset_dir": "it says where dataset_info.json is, which `dataset` and `eval_dataset` are looked up in",
    "media_dir": "there are no images, videos or sounds here",
    "shuffle_merged_datasets": "the pairs of all sets are shuffled together",
    "dataset_exact_deduplication": "repeated pairs are counted and named, and train as they are",
    "plot_loss": "the report page has the curves",
    "plugins": "plug-ins of other tools are not loaded",
    "load_args": "a run directory given in place of a recipe stands for its recipe",
    "ignore_args_error": "an unknown setting always stops the run",
    "loss_watchdog_threshold": "a run stops where its loss is not a number",
    "loss_watchdog_patience": "a run stops where its loss is not a number",
}

_TOKENS = "save the tokens in the model's tokenizer; resize_embeddings: true adds those of the template"
_SYSTEM = "write it into the rows, as a `system` column or turn"
_OTHER_ADAPTER = "only plain LoRA, DoRA and rsLoRA adapters are trained here; remove it"
_FROZEN = "layers cannot be frozen one by one; use_peft: true trains an adapter"
_PARALLEL = "a row is never divided over devices; deepspeed and fsdp divide the model"

REFUSED = {
    "max_samples": "no setting limits the rows; cut the file, or write dataset_train_split: train[:1000]",
    "betas": "write adam_beta1 and adam_beta2",
    "batch_size": "write per_device_train_batch_size (pairs) and gradient_accumulation_steps",
    "dataset_shuffle": "write the rows in any order: they are always shuffled, by data_seed",
    "interleave_probs": "give the sets weights: dataset_name: {a.jsonl: 0.7, b.jsonl: 0.3}",
    "interleave_prob": "give the sets weights: dataset_name: {a.jsonl: 0.7, b.jsonl: 0.3}",
    "tokenizer_config": "the tokenizer is read from model_name_or_path; save yours there",
    "tokenizer_name_or_path": "the tokenizer is read from model_name_or_path; save yours there",
    "tokenizer": "the tokenizer is read from model_name_or_path; save yours there",
    "tokenizer_name": "the tokenizer is read from model_name_or_path; save yours there",
    "rope_scaling": "write it into the model's config.json",
    "max_model_len": "write the model's window into its config.json; max_length is that of a side of a pair",
    "overrides_of_model_config": "write them into the model's config.json",
    "model_config": "write them into the model's config.json",
    "fp8": "weights and sums are bfloat16, float16 or float32; set bf16: true",
    "use_modelscope": "names are looked up on the Hugging Face hub; download the model and give its folder",
    "pretraining_dataset": "there is no pretraining here",
    "process_reward_model": "there are no reward models here",
    "cached_dataset": "sets that another tool has tokenized cannot be read; give the rows",
    "custom_register_path": "code of another tool is not run; write the rows in a known shape",
    "external_plugins": "code of another tool is not run; write the rows in a known shape",
    "custom_dataset_info": "name the file or the set in dataset_name",
    **dict.fromkeys(["special_tokens", "tokens", "added_tokens_overrides", "new_special_tokens"], _TOKENS),
    **dict.fromkeys(["add_tokens", "add_special_tokens", "resize_vocab"], _TOKENS),
    **dict.fromkeys(["resize_token_embeddings_to_32x", "new_special_tokens_config"], _TOKENS),
    **dict.fromkeys(["system", "default_system", "default_system_message"], _SYSTEM),
    **dict.fromkeys(
        ["lorap_lr_ratio", "lora_ga_batch_size", "loftq_config", "use_llama_pro"], _OTHER_ADAPTER
    ),
    **dict.fromkeys(["peft_layers_to_transform", "peft_layer_replication", "use_galore"], _OTHER_ADAPTER),
    **dict.fromkeys(["use_badam", "use_apollo", "relora", "relora_steps", "gptq"], _OTHER_ADAPTER),
    **dict.fromkeys(["unfrozen_parameters", "trainable_parameters"], _FROZEN),
    **dict.fromkeys(["sequence_parallel_degree", "sequence_parallel_size"], _PARALLEL),
    **dict.fromkeys(["context_parallel_size", "tensor_parallel_size"], _PARALLEL),
}

_NO_EFFECT_BY_PREFIX = {
    **dict.fromkeys(["wandb_", "mlflow_", "comet_", "swanlab_"], _TRACKER),
    **dict.fromkeys(["unsloth_", "liger_", "flash_attn_"], _KERNELS),
    **dict.fromkeys(["kto_", "ppo_", "grpo_"], _OTHER_LOSS),
    "sample_packing_": PACKED,
}
_REFUSED_BY_PREFIX = {
    **dict.fromkeys(["galore_", "badam_", "apollo_", "oft_", "pissa_", "loraplus_", "vera_"], _OTHER_ADAPTER),
    **dict.fromkeys(["adalora_", "boft_", "lisa_"], _OTHER_ADAPTER),
    "freeze_": _FROZEN,
}
# Settings of transformers that begin as a name of another tool does.
_OWN = {"liger_kernel_config"}


def translate(key: str, value: Any, written: Written) -> Translation | None:
    """What a name of another tool comes to; None where it is none of theirs.

    Raises:
        ValueError: It asks for what cannot be done; the message names it and what to do.
    """
    if key in TRANSLATED:
        return TRANSLATED[key](key, value, written)
    if reason := REFUSED.get(key) or _by_prefix(key, _REFUSED_BY_PREFIX):
        if not is_off(value):
            raise ValueError(f"{key}: {reason}")
        return {}, "no effect: it is off"
    if reason := NO_EFFECT.get(key) or _by_prefix(key, _NO_EFFECT_BY_PREFIX):
        return {}, f"no effect: {reason}"
    return None


def _by_prefix(key: str, table: Mapping[str, str]) -> str:
    return next((why for prefix, why in table.items() if key.startswith(prefix) and key not in _OWN), "")


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: null, false, none, 0, empty, or a mapping of such values."""
    if isinstance(value, Mapping):
        return all(is_off(item) for item in value.values())
    return not value or str(value).lower() in ("false", "no", "off", "none", "null", "0")


def written_as(entries: Mapping[str, Any]) -> str:
    """How a printed line says what a name was translated to."""
    return "now written " + ", ".join(f"{key}: {_plain(value)}" for key, value in entries.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _tuner(key: str, value: Any, written: Written) -> Translation:
    kind = str(value).lower()
    if is_off(value):
        return {}, "no effect: all weights train unless use_peft is set"
    if kind not in ("lora", "qlora", "full"):
        raise ValueError(f"{key}: {value} is not trained here; lora, qlora and full are")
    entries = {"use_peft": kind != "full"} | ({"load_in_4bit": True} if kind == "qlora" else {})
    return entries, written_as(entries) + "; what the recipe leaves open keeps the defaults of orpo"


def _held_out(key: str, value: Any, written: Written) -> Translation:
    try:
        share = 0.0 if is_off(value) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {value} is not a share; write eval_split: 0.1") from None
    if share >= 1:
        raise ValueError(f"{key}: {value} counts rows; write the share of the prompts, as in eval_split: 0.1")
    return {"eval_split": share}, "now called eval_split, and holds out prompts, not rows"


def _bits(key: str, value: Any, written: Written) -> Translation:
    if is_off(value):
        return {}, "no effect: it is off"
    if str(value) not in ("4", "8"):
        raise ValueError(f"{key}: {value} bits are not trained on here; load_in_4bit and load_in_8bit are")
    entries = {f"load_in_{value}bit": True}
    return entries, written_as(entries)


def _quantizer(key: str, value: Any, written: Written) -> Translation:
    if is_off(value) or str(value).lower() in ("bnb", "bitsandbytes", "nf4"):
        return {}, f"no effect: {_QUANTIZED}"
    raise ValueError(f"{key}: {value} is not trained on here; weights are quantized by bitsandbytes, as NF4")


def _names(value: Any) -> list[str]:
    """Names in a list, or in a text with commas."""
    texts = value if isinstance(value, list) else str(value).split(",")
    return [str(text).strip() for text in texts]


def _lora_targets(key: str, value: Any, written: Written) -> Translation:
    if is_off(value):
        return {}, "no effect: every linear layer gets an adapter unless lora_target_modules is set"
    names = _names(value)
    every = {"all", "all-linear", "all_linear"} & {name.lower() for name in names}
    return {"lora_target_modules": "all-linear" if every else names}, "now called lora_target_modules"


def _every_linear(key: str, value: Any, written: Written) -> Translation:
    """Axolotl's lora_target_linear: every linear layer, whatever lora_target_modules lists next to it."""
    if is_off(value):
        return {}, "no effect: it is off"
    if "lora_target_modules" in written:
        return {}, "makes lora_target_modules all-linear"
    return {"lora_target_modules": "all-linear"}, "now written lora_target_modules: all-linear"


def _listed_modules(key: str, value: Any, written: Written) -> Translation:
    if is_off(written.get("lora_target_linear")):
        return {key: value}, ""
    return {key: "all-linear"}, "now all-linear, since lora_target_linear is set"


def _saved_modules(key: str, value: Any, written: Written) -> Translation:
    return {
        "lora_modules_to_save": None if is_off(value) else _names(value)
    }, "now called lora_modules_to_save"


def _adapters(key: str, value: Any, written: Written) -> Translation:
    names = [] if is_off(value) else _names(value)
    if len(names) > 1:
        raise ValueError(
            f"{key}: {', '.join(names)}: training continues from one adapter; merge the others first"
        )
    return {"adapter_name_or_path": names[0] if names else None}, "now called adapter_name_or_path"


_ATTENTION = {
    "flash_attn": "flash_attention_2",
    "fa2": "flash_attention_2",
    "true": "flash_attention_2",
    "fa3": "flash_attention_3",
    "disabled": "eager",
}


def _attention(key: str, value: Any, written: Written) -> Translation:
    if is_off(value) or str(value).lower() == "auto":
        return {}, "no effect: attn_implementation is unset anyway"
    entries = {"attn_implementation": _ATTENTION.get(str(value).lower(), value)}
    return entries, written_as(entries)


_FLAGS: dict[str, dict[str, Any]] = {
    "sdp_attention": {"attn_implementation": "sdpa"},
    "eager_attention": {"attn_implementation": "eager"},
    "pure_bf16": {"dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "full_finetuning": {"use_peft": False},
    "disable_gradient_checkpointing": {"gradient_checkpointing": False},
}


def _flag(key: str, value: Any, written: Written) -> Translation:
    return ({}, "no effect: it is off") if is_off(value) else (_FLAGS[key], written_as(_FLAGS[key]))


def _bias(key: str, value: Any, written: Written) -> Translation:
    if is_off(value):
        return {}, "no effect: adapters have no biases"
    raise ValueError(f"{key}: {value}: biases are not trained under LoRA; remove the key")


def _per_epoch(key: str, value: Any, written: Written) -> Translation:
    """So many evaluations or checkpoints an epoch, as a share of the run."""
    what = "eval" if key.startswith("eval") else "save"
    if is_off(value):
        return {}, "no effect: it is off"
    epochs = written.get("num_epochs", written.get("num_train_epochs", 1))
    try:
        share = 1 / (float(value) * float(epochs))
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"{key}: {value} is not a number; write {what}_strategy: epoch") from None
    if str(value) == "1" or share >= 1:
        entries: dict[str, Any] = {f"{what}_strategy": "epoch"}
    else:
        entries = {f"{what}_strategy": "steps", f"{what}_steps": round(share, 6)}
    return entries, written_as(entries) + (", a share of the run" if f"{what}_steps" in entries else "")


def _hub(key: str, value: Any, written: Written) -> Translation:
    if not is_off(value):
        return {}, "no effect: names are looked up on the Hugging Face hub"
    raise ValueError(f"{key}: {value}: {REFUSED['use_modelscope']}")


def _mix(key: str, value: Any, written: Written) -> Translation:
    if is_off(value) or str(value) == "concat":
        return {}, "no effect: several sets are joined, unless dataset_name gives weights"
    raise ValueError(f"{key}: {value}: {REFUSED['interleave_probs']}")


def _or_auto(key: str, value: Any, written: Written) -> Translation:
    """bf16 and fp16, which other tools may set to auto."""
    if str(value).lower() == "auto":
        return {}, "no effect: bf16 is on where the hardware computes in it, unless it is set"
    return {key: value}, ""


def _checkpointing(key: str, value: Any, written: Written) -> Translation:
    if str(value).lower() in ("unsloth", "offload", "offload_disk"):
        return {"gradient_checkpointing": True}, "now written gradient_checkpointing: true"
    renamed = key != "gradient_checkpointing"
    return {"gradient_checkpointing": value}, "now called gradient_checkpointing" if renamed else ""


def _template(key: str, value: Any, written: Written) -> Translation:
    name = str(value)
    if name == "jinja" and "chat_template_jinja" in written:
        return {key: written["chat_template_jinja"]}, "the text in chat_template_jinja"
    if not name.startswith("tokenizer_default"):
        return {key: value}, ""
    fallback = name.removeprefix("tokenizer_default").removeprefix("_fallback_")
    ours = f"; for a model without one write chat_template: {fallback}" if fallback else ""
    return {}, f"no effect: the model's own template is used{ours}"


def _template_text(key: str, value: Any, written: Written) -> Translation:
    if is_off(value) or "chat_template" in written:
        return {}, "read where chat_template is jinja"
    return {"chat_template": value}, "now called chat_template"


TRANSLATED: dict[str, Callable[[str, Any, Written], Translation]] = {
    **dict.fromkeys(["adapter", "finetuning_type", "train_type", "tuner_type", "sft_type"], _tuner),
    **dict.fromkeys(["val_set_size", "val_size", "split_dataset_ratio", "test_split_size"], _held_out),
    **dict.fromkeys(["dataset_test_ratio"], _held_out),
    **dict.fromkeys(["quantization_bit", "quant_bits"], _bits),
    **dict.fromkeys(["quantization_method", "quant_method", "quantization_type"], _quantizer),
    **dict.fromkeys(["lora_target", "target_modules"], _lora_targets),
    **dict.fromkeys(["attn_impl", "flash_attn", "flash_attention"], _attention),
    **dict.fromkeys(_FLAGS, _flag),
    **dict.fromkeys(["bias", "lora_bias"], _bias),
    **dict.fromkeys(["evals_per_epoch", "saves_per_epoch"], _per_epoch),
    **dict.fromkeys(["bf16", "fp16"], _or_auto),
    **dict.fromkeys(["gradient_checkpointing", "use_gradient_checkpointing"], _checkpointing),
    "additional_target": _saved_modules,
    "adapters": _adapters,
    "use_hf": _hub,
    "mix_strategy": _mix,
    "chat_template": _template,
    "chat_template_jinja": _template_text,
    "lora_target_linear": _every_linear,
    "lora_target_modules": _listed_modules,
}
