"""Whether a run may go on from a checkpoint: only with the settings and the data that made it.

A resumed run equals an uninterrupted one, so a change that could move a weight is refused, with the list of
differences; `force` lets it pass.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orpo.arguments import ORPOConfig
from orpo.dataset import TokenizedDataset
from orpo.errors import RunError

_HARMLESS_PREFIXES = (
    "output_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "push_to_hub", "hub_", "save_",
    "disable_tqdm", "dataloader_num_workers", "dataloader_prefetch", "dataloader_pin", "dataloader_persistent",
    "dataloader_multiprocessing", "resume_from", "force", "dry_run", "num_samples", "max_completion_length",
    "generate_during_eval", "dataset_num_proc", "do_", "debug", "skip_memory_metrics", "include_", "eval_",
    "load_best", "metric_for_best", "greater_is_better", "prediction_loss_only", "per_device_eval", "batch_eval",
    "early_stopping", "restore_callback", "local_rank", "ddp_", "remove_unused", "label_names", "on_bad_row",
    "max_dropped", "length_column", "average_tokens",
)  # fmt: skip
_HARMLESS = {
    # How a step is cut into rows and ranks; `pairs_per_step` stands for their product.
    "per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_row", "layout", "logits_memory_mib",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_empty_cache_steps", "use_cache", "auto_find_batch_size",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "fsdp", "fsdp_config", "deepspeed", "use_cpu",
    "accelerator_config", "parallelism_config", "attn_implementation", "trust_remote_code", "ignore_data_skip",
    # What the data is made from; a checksum of the pairs stands for it, and the preset's settings for its name.
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "data_format", "columns",
    "sft_rows", "objective", "model_name_or_path", "dtype", "max_prompt_length", "truncation_mode", "padding_value",
    "label_pad_token_id", "is_encoder_decoder",
}  # fmt: skip


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
