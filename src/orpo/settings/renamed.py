"""Names in recipes and scripts that are not, or no longer, settings here.

Each is understood, in one printed line: renamed, translated, or without effect and why. Here are those of
TRL, transformers, alignment-handbook and the authors' code; those of further tools are in other_tools.py and
foreign_data.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from orpo.errors import ConfigError
from orpo.settings import foreign_objective, other_tools
from orpo.settings.foreign_data import EVALUATION, TRAINING, evaluation_data, training_data
from orpo.settings.other_tools import PACKED

RENAMED = other_tools.RENAMED | {
    "evaluation_strategy": "eval_strategy",
    "torch_dtype": "dtype",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "hub_model_revision": "hub_revision",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_streaming": "streaming",
    "max_seq_length": "max_length",
    "tokens_per_row": "tokens_per_micro_batch",
    "alpha": "beta",
    "lambda": "beta",
    "lambda_orpo": "beta",
    "lambda_or": "beta",
    "orpo_alpha": "beta",
    "pref_beta": "beta",
    "rl_beta": "beta",
    "model_name": "model_name_or_path",
    "lr": "learning_rate",
    "data_name": "dataset_name",
    "num_proc": "dataset_num_proc",
    "response_max_length": "max_length",
    "save_dir": "output_dir",
}

MEANT = {
    "data": ["dataset_name"],
    "hub_repo": ["hub_model_id"],
    "max_len": ["max_length"],
    "max_seq_len": ["max_length"],
    "orpo_beta": ["beta"],
    "per_device_batch_size": ["per_device_train_batch_size"],
}
"""Names that no tool has and people write -> the settings that they may mean, where no word tells."""

_LENGTHS = "a prompt that does not fit loses its oldest turns, a response is never cut"
_POSITIONS = "the tokens that are scored are listed, nothing is masked by an id"
_GONE = "transformers 5 has no such setting"
_PACKED_EVALUATION = "an evaluation packs pairs as training does, and keeps a few numbers of each"

NO_EFFECT = other_tools.NO_EFFECT | {
    "max_prompt_length": _LENGTHS,
    "max_target_length": _LENGTHS,
    "prompt_max_length": _LENGTHS,
    "truncation_mode": _LENGTHS,
    "truncation_side": _LENGTHS,
    "padding_value": _POSITIONS,
    "label_pad_token_id": _POSITIONS,
    "padding_free": PACKED,
    "packing": PACKED,
    "group_by_length": PACKED,
    "length_column_name": PACKED,
    "train_sampling_strategy": f"pairs are always shuffled, by data_seed; {PACKED}",
    "remove_unused_columns": "columns that are not needed are never read",
    "label_names": "the loss is computed inside the model's call, from no label column",
    **dict.fromkeys(["per_device_eval_batch_size", "per_gpu_eval_batch_size"], _PACKED_EVALUATION),
    **dict.fromkeys(["eval_batch_size", "eval_accumulation_steps"], _PACKED_EVALUATION),
    **dict.fromkeys(["eval_do_concat_batches", "eval_use_gather_object"], _PACKED_EVALUATION),
    "batch_eval_metrics": _PACKED_EVALUATION,
    **dict.fromkeys(["bf16_full_eval", "fp16_full_eval"], "an evaluation computes in what training does"),
    "include_for_metrics": "compute_metrics receives per-pair log-probs",
    "torch_empty_cache_steps": "micro-batches are planned to fit into the memory there is",
    "accelerator_config": "steps are dealt to the processes here, not by accelerate's loaders",
    "dataloader_persistent_workers": "each epoch has workers of its own, which know its order",
    "dataloader_in_order": "steps always come in their order",
    "average_tokens_across_devices": "the loss is always divided by the counts of the whole step",
    "precompute_ref_log_probs": "what the reference says is always computed once, before training",
    "logging_dir": "TensorBoard writes under output_dir/runs; the variable TENSORBOARD_LOGGING_DIR moves it",
    "overwrite_output_dir": "a run is resumed where it stopped; name another output_dir for a fresh one",
    "save_safetensors": "weights are always saved as safetensors",
    "include_tokens_per_second": "tokens_per_second is always logged",
    "include_inputs_for_metrics": "compute_metrics receives per-pair log-probs",
    "bnb_4bit_quant_type": "the base under QLoRA is quantized as NF4",
    "use_bnb_nested_quant": "the base under QLoRA is always quantized twice",
    "bnb_4bit_quant_storage": "the storage type is the one FSDP can shard",
    "lora_task_type": "the model is always a causal language model",
    "auto_insert_empty_system_msg": "the chat template decides",
    "ignore_bias_buffers": "it was a workaround for an old PyTorch",
    "push_to_hub_organization": "write it into hub_model_id: organisation/name",
    "cache_dir": "the variable HF_HOME says where downloads lie",
    "text_column": "there is no continued pretraining here",
    **dict.fromkeys(
        ["fp16_backend", "fp16_opt_level", "half_precision_backend", "jit_mode_eval", "mp_parameters"], _GONE
    ),
    **dict.fromkeys(
        ["past_index", "ray_scope", "torchdynamo", "tpu_metrics_debug", "tpu_num_cores", "use_ipex"], _GONE
    ),
    **dict.fromkeys(
        ["use_legacy_prediction_loop", "use_mps_device", "dispatch_batches", "split_batches"], _GONE
    ),
}

_DATA = dict.fromkeys(TRAINING, training_data) | dict.fromkeys(EVALUATION, evaluation_data)
_OBJECTIVE = (
    dict.fromkeys(foreign_objective.NAMES, foreign_objective.objective_named)
    | dict.fromkeys(foreign_objective.WEIGHTS, foreign_objective.nll_weight)
    | dict.fromkeys(foreign_objective.OF_DPO, foreign_objective.of_dpo)
    | dict.fromkeys(foreign_objective.REFERENCE, foreign_objective.reference)
)
_SEVERAL = {*_DATA, "target_modules", "lora_target", "adapters"}
"""Names whose values may be several words on the command line, next to those that RENAMED maps to a list."""
ONE_THING = (
    {*TRAINING, "dataset_name", "dataset_mixer"},
    {*EVALUATION, "eval_dataset_name"},
    {"lora_target_modules", "lora_target_linear", "lora_target", "target_modules", "target_regex"},
    {"chat_template", "chat_template_jinja", "template", "template_type"},
)
"""Several names of one thing: on the command line, one of them beats all that a file has of them."""


def current_entries(
    key: str, value: Any, written: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """Today's keys and values for a key as written, and what to tell the user about it.

    Args:
        key: As written.
        value: As written.
        written: All keys and values written with it, for those whose meaning depends on others.

    Returns:
        The entries to set, none where the key has no effect, and the rest of a printed line, empty where
        there is nothing to say.

    Raises:
        ValueError: The key asks for what cannot be done; the message names it.
    """
    written = {key: value} if written is None else written
    if key in _TRANSLATED:
        return _TRANSLATED[key](value)
    if key in _DATA:
        return _DATA[key](key, value, written)
    if key in _OBJECTIVE:
        return _OBJECTIVE[key](key, value, written)
    if key in RENAMED:
        return {RENAMED[key]: value}, f"now called {RENAMED[key]}"
    if key in NO_EFFECT:
        return {}, f"no effect: {NO_EFFECT[key]}"
    return other_tools.translate(key, value, written) or ({key: value}, "")


def understood_names() -> set[str]:
    """Every name that is not a setting and is understood all the same."""
    tables: list[Collection[str]] = [RENAMED, NO_EFFECT, _TRANSLATED, _DATA, _OBJECTIVE]
    return set().union(*tables, other_tools.TRANSLATED, other_tools.REFUSED)


def takes_as(key: str) -> str:
    """The setting whose values `key` takes on the command line: itself, or what it is now called."""
    return "dataset_name" if key in _SEVERAL else RENAMED.get(key, key)


def current_keywords(
    given: Mapping[str, Any], accepted: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of a Python script under today's names.

    Args:
        given: Keyword -> value; a name that is not understood is passed on, for the class to refuse.
        accepted: Keywords the class takes itself, among them some without effect: passed on as they are.

    Returns:
        The settings, and a line for each keyword that was renamed, translated or left out. A keyword under
        today's name beats an old one.

    Raises:
        ConfigError: A keyword asks for what cannot be done.
    """
    own = {key for key in given if key in accepted and key not in other_tools.TRANSLATED}
    settings = {key: given[key] for key in own}
    lines = []
    for key, value in given.items():
        if key in own:
            continue
        try:
            current, notice = current_entries(key, _plain_dtype(value), given)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        ignored = [name for name in current if name != key and name in given and given[name] != current[name]]
        settings |= {name: item for name, item in current.items() if name == key or name not in given}
        notice += f"; ignored, since {', '.join(ignored)} is set too" if ignored else ""
        lines += [f"{key}: {notice}"] if notice else []
    return settings, lines


def _plain_dtype(value: Any) -> Any:
    """`torch.bfloat16` -> "bfloat16", without importing torch."""
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _truth(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes", "on")


def _dataset_mixer(value: Any) -> tuple[dict[str, Any], str]:
    if isinstance(value, dict) and len(value) == 1:
        [(name, weight)] = value.items()
        if weight == 1:
            return {"dataset_name": str(name)}, f"now called dataset_name: {name}"
    return {"dataset_name": value}, "now called dataset_name"


def _dataset_splits(value: Any) -> tuple[dict[str, Any], str]:
    names = [str(name) for name in (value if isinstance(value, list) else [value])]
    entries: dict[str, Any] = {}
    for name in names:
        entries.setdefault("dataset_test_split" if "test" in name else "dataset_train_split", name)
    if len(entries) < len(names):
        raise ValueError(
            f"dataset_splits: {', '.join(names)}: one split to train on and one to test on; "
            "list further data under dataset_name and eval_dataset_name"
        )
    return entries, "now written " + ", ".join(f"{name}: {split}" for name, split in entries.items())


def _dataset_configs(value: Any) -> tuple[dict[str, Any], str]:
    names = value if isinstance(value, list) else [value]
    if len({str(name) for name in names}) != 1:
        raise ValueError("dataset_configs: one configuration for all data sets; use dataset_config")
    return {"dataset_config": names[0]}, "now called dataset_config"


def _flash_attention(value: Any) -> tuple[dict[str, Any], str]:
    if _truth(value):
        return {
            "attn_implementation": "flash_attention_2"
        }, "now written attn_implementation: flash_attention_2"
    return {}, "no effect: attn_implementation is unset anyway"


def _warmup_ratio(value: Any) -> tuple[dict[str, Any], str]:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0  # no number: refused under the name it has now
    if share > 1:
        raise ValueError(f"warmup_ratio: {value} is no share of a run; for steps write warmup_steps: {value}")
    return {"warmup_steps": value}, "now called warmup_steps"


def _adafactor(value: Any) -> tuple[dict[str, Any], str]:
    return ({"optim": "adafactor"} if _truth(value) else {}), "now written optim: adafactor"


def _encoder_decoder(value: Any) -> tuple[dict[str, Any], str]:
    if value is not None and _truth(value):
        raise ValueError(
            "is_encoder_decoder: encoder-decoder models cannot be trained here; use a causal model"
        )
    return {}, "no effect: every model is a causal language model"


def _denied(value: Any) -> bool:
    return str(value).lower() in ("false", "0", "no", "off")


def _do_train(value: Any) -> tuple[dict[str, Any], str]:
    if _denied(value):
        return {}, "no effect: `orpo train` always trains; `orpo eval` scores a model without training"
    return {"do_train": value}, ""


def _do_eval(value: Any) -> tuple[dict[str, Any], str]:
    if _denied(value):
        return {"eval_strategy": "no"}, "now written eval_strategy: no"
    return {"do_eval": value}, ""


_TRANSLATED: dict[str, Callable[[Any], tuple[dict[str, Any], str]]] = {
    "dataset_mixer": _dataset_mixer,
    "dataset_splits": _dataset_splits,
    "dataset_configs": _dataset_configs,
    "use_flash_attention_2": _flash_attention,
    "flash_attention_2": _flash_attention,
    "adafactor": _adafactor,
    "do_train": _do_train,
    "do_eval": _do_eval,
    "warmup_ratio": _warmup_ratio,
    "is_encoder_decoder": _encoder_decoder,
}
