"""What this package makes of the settings that `transformers.TrainingArguments` defines: a light table.

`ORPOConfig` takes its defaults from here, and the recipe reader reads the same table without importing torch.
A setting that is not named keeps its default and may not change when a run is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orpo.settings.facts import Facts, TrlDefault, setting
from orpo.settings.renamed import NO_EFFECT

UNCHANGED = object()
"""The default of a setting that keeps the one of `TrainingArguments`."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A setting of `TrainingArguments`.

    Attributes:
        facts: Its facts; an empty text keeps the help of `TrainingArguments`.
        default: Our default where it differs; None makes "not set" a value, to be filled in later.
    """

    facts: Facts
    default: Any = UNCHANGED


def _default(value: Any, help_text: str, **facts: Any) -> Inherited:
    return Inherited(Facts(help_text, **facts), value)


_FREE = (
    "auto_find_batch_size", "ddp_backend", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout",
    "debug", "deepspeed", "disable_tqdm", "do_predict", "do_train", "fsdp", "greater_is_better",
    "ignore_data_skip", "include_num_input_tokens_seen", "local_rank", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "metric_for_best_model", "output_dir", "parallelism_config",
    "prediction_loss_only", "project", "push_to_hub", "report_to", "resume_from_checkpoint", "run_name",
    "save_on_each_node", "save_only_model", "save_strategy", "skip_memory_metrics", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "use_cache", "use_cpu",
)  # fmt: skip
"""Where and how a run computes, logs, evaluates and saves: none of these changes what a step does."""

_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
_WAITING = {
    **dict.fromkeys(
        ["hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"], ("push_to_hub",)
    ),
    **dict.fromkeys(["hub_strategy", "hub_token"], ("push_to_hub",)),
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "dataloader_multiprocessing_context": ("dataloader_num_workers",),
    "fsdp_config": ("fsdp",),
    "liger_kernel_config": ("use_liger_kernel",),
}
"""Setting -> those of which one has to be on for it to have an effect."""

_WITHOUT_WARM_UP = tuple(
    f"lr_scheduler_type: {schedule}" for schedule in ("constant", "reduce_lr_on_plateau", "greedy")
)

INHERITED: dict[str, Inherited] = {
    **{name: Inherited(Facts(resume="free")) for name in _FREE},
    **{name: Inherited(Facts(resume="free", only_with=others)) for name, others in _WAITING.items()},
    **{
        name: Inherited(Facts(resume="free", in_recipe="never"))
        for name in ("activation_checkpointing", "dataloader_pin_memory", "do_eval")
    },
    "activation_checkpointing_kwargs": Inherited(
        Facts(resume="free", in_recipe="never", only_with=_CHECKPOINTING)
    ),
    "learning_rate": _default(
        5e-6,
        "Peak learning rate; 1e-6, TRL's default, hardly moves a base model.",
        at_least=0,
        in_recipe="always",
        trl=TrlDefault(
            1e-6, "1e-6 hardly moves a base model in one stage; the published runs use 5e-6 and more"
        ),
    ),
    "bf16": _default(
        None, "bfloat16 autocast. Unset: where the accelerator computes in it.", in_recipe="always"
    ),
    "gradient_checkpointing": Inherited(
        Facts(
            resume="free",
            trl=TrlDefault(True, "without padding and logits much less memory is needed"),
        )
    ),
    "logging_steps": _default(
        10,
        "Steps between two lines of metrics.",
        at_least=0,
        resume="free",
        only_with=("logging_strategy: steps",),
    ),
    "logging_first_step": _default(
        True,
        "Log the first step by itself.",
        resume="free",
        trl=TrlDefault(False, "the first line appears right away, not after ten steps"),
    ),
    "logging_nan_inf_filter": _default(
        False,
        "Leave off: it prints a loss of 0 where the loss is not a number.",
        resume="free",
        trl=TrlDefault(True, "the filter prints a loss of 0 where it is not a number; such a run stops here"),
    ),
    "eval_strategy": _default(
        None,
        "no, steps or epoch. Unset: as often as checkpoints, where there is data for it.",
        resume="free",
        trl=TrlDefault("no", "unset: held-out pairs are scored as often as checkpoints are written"),
    ),
    "eval_on_start": _default(
        None,
        "Evaluate before the first step. Unset: where evaluation is on.",
        resume="free",
        trl=TrlDefault(False, "unset: the state before training is what the result is compared with"),
    ),
    "save_steps": _default(
        0.1,
        "Steps between checkpoints; below 1: share of the run.",
        at_least=0,
        resume="free",
        only_with=("save_strategy: steps",),
        trl=TrlDefault(500, "a tenth of the run, whatever its length"),
    ),
    "save_total_limit": _default(
        2,
        "Checkpoints kept: the best and the last ones.",
        resume="free",
        not_with=("save_strategy: no",),
        trl=TrlDefault(
            None, "a checkpoint of a full fine-tuning is six times the model; best and last are kept"
        ),
    ),
    "load_best_model_at_end": _default(
        None,
        "End with the best checkpoint. Unset: where each checkpoint is evaluated.",
        resume="free",
        trl=TrlDefault(False, "unset: on where every checkpoint is evaluated"),
    ),
    "restore_callback_states_from_checkpoint": _default(
        True,
        "Resume the patience of early stopping too.",
        resume="free",
        trl=TrlDefault(False, "a resumed run keeps its patience for early stopping"),
    ),
    "remove_unused_columns": _default(False, NO_EFFECT["remove_unused_columns"], resume="free"),
    "ddp_find_unused_parameters": _default(
        False,
        "Every trained parameter takes part in every micro-batch.",
        resume="free",
        trl=TrlDefault(None, "every trained parameter takes part in every micro-batch"),
    ),
    # Keywords of TRL's configuration that do nothing here.
    **{
        name: _default(None, NO_EFFECT[name], resume="free")
        for name in ("max_prompt_length", "truncation_mode", "padding_value", "label_pad_token_id")
    },
    "is_encoder_decoder": _default(None, "Encoder-decoder models are refused.", resume="free"),
    "num_train_epochs": Inherited(
        Facts(above=0, at_most=1_000_000, in_recipe="always", not_with=("max_steps",))
    ),
    "per_device_train_batch_size": Inherited(Facts(at_least=1, resume="derived", in_recipe="always")),
    "gradient_accumulation_steps": Inherited(Facts(at_least=1, resume="derived", in_recipe="always")),
    "warmup_steps": Inherited(Facts(at_least=0, in_recipe="always", not_with=_WITHOUT_WARM_UP)),
    "weight_decay": Inherited(Facts(at_least=0, in_recipe="always")),
    "max_grad_norm": Inherited(Facts(at_least=0, in_recipe="always")),
    **{name: Inherited(Facts(in_recipe="always")) for name in ("lr_scheduler_type", "max_steps")},
    "optim": Inherited(Facts(resume="built in", in_recipe="always")),
    **{name: Inherited(Facts(resume="built in")) for name in ("optim_args", "optim_target_modules")},
    "seed": Inherited(Facts(at_least=0, below=2**32, in_recipe="always")),
    "data_seed": Inherited(Facts(at_least=0, below=2**32)),
    "neftune_noise_alpha": Inherited(Facts(at_least=0, at_most=1_000_000)),
    "ddp_bucket_cap_mb": Inherited(Facts(at_least=1, resume="free")),
    "dataloader_prefetch_factor": Inherited(
        Facts(at_least=1, resume="free", only_with=("dataloader_num_workers",))
    ),
    **{
        name: Inherited(Facts(at_least=0, resume="free")) for name in ("dataloader_num_workers", "eval_delay")
    },
    "eval_steps": Inherited(Facts(at_least=0, resume="free", only_with=("eval_strategy: steps",))),
}
"""Setting -> what we make of it."""


def inherited(name: str) -> Any:
    """The dataclass field of a setting with another default than `TrainingArguments` has."""
    return setting(INHERITED[name].default, INHERITED[name].facts)
