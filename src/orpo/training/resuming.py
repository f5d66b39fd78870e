"""Whether a run may go on from a checkpoint: only with the settings and the data that made it.

A resumed run equals an uninterrupted one, so a change that could move a weight is refused, with the list of
differences; `force` lets it pass.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.dataset import TokenizedDataset
from orpo.errors import RunError
from orpo.training.arguments import ORPOConfig

_HARMLESS_PREFIXES = (
    "logging_", "log_", "report_to", "run_name", "project", "trackio_", "output_dir", "save_", "push_to_hub",
    "hub_", "disable_tqdm", "debug", "include_", "dataloader_num", "dataloader_pre", "dataloader_pin",
    "dataloader_per", "dataloader_mul", "skip_memory", "dry_run", "force", "resume_from", "do_", "eval_",
    "per_device_eval", "batch_eval", "prediction_loss", "load_best", "metric_for_best", "greater_is",
    "early_stopping", "restore_callback", "num_samples", "max_completion", "generate_during", "dataset_num",
    "ddp_", "local_rank", "remove_unused", "label_names", "length_column", "average_tokens", "on_bad_row",
    "max_dropped", "torch_compile", "gradient_checkpointing", "activation_checkpointing",
)  # fmt: skip
_HARMLESS = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_row", "layout",
    "logits_memory_mib", "use_cpu", "use_cache", "torch_empty_cache_steps", "auto_find_batch_size", "fsdp",
    "fsdp_config", "deepspeed", "accelerator_config", "parallelism_config", "attn_implementation",
    "trust_remote_code", "ignore_data_skip", "is_encoder_decoder", "max_prompt_length", "truncation_mode",
    "padding_value", "label_pad_token_id", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "data_format", "columns", "sft_rows", "objective", "model_name_or_path", "dtype",
}  # fmt: skip
"""Settings that cannot change the mathematics, or that something else stands for: `pairs_per_step` for the
cut of a step, a checksum of the tokens for the data, the checkpoint's weights for the model, the resolved
numbers for the preset."""


def run_identity(args: ORPOConfig, pairs: Any) -> dict[str, Any]:
    """Everything that decides where a run goes, as values JSON can hold."""
    settings = {
        name: value
        for name, value in args.plain_settings().items()
        if name not in _HARMLESS and not name.startswith(_HARMLESS_PREFIXES)
    }
    identity = settings | {"pairs_per_step": args.pairs_per_step}
    if isinstance(pairs, TokenizedDataset):
        identity |= {
            "num_pairs": len(pairs),
            "pairs_checksum": zlib.crc32(np.ascontiguousarray(pairs.tokens).data),
        }
    return identity


def refuse_changes(checkpoint: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Stop where the run that made `checkpoint` was another one; a checkpoint that does not tell is let pass.

    Raises:
        RunError: With the list of differences.
    """
    changes = [
        f"{name}: {before[name]} -> {now[name]}"
        for name in sorted(now.keys() & (before or {}).keys())
        if before is not None and before[name] != now[name]
    ]
    if changes:
        raise RunError(
            f"{checkpoint} was made with other settings ({'; '.join(changes)}); set them back, name another"
            " output_dir for a fresh run, or set force: true"
        )
