"""The settings of a run, defined once and light to import (no torch, no transformers).

`OrpoSettings` holds what this package adds to `transformers.TrainingArguments`; `orpo.ORPOConfig` inherits
from both, so a recipe and a Python script set the same flat keys. `Objective` is the resolved choice
of what is minimised. Reading a recipe: `orpo.settings.recipe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from orpo.errors import ConfigError

ObjectiveName = Literal["orpo", "response", "llamafactory", "tempered"]
NllOn = Literal["full", "response", "assistant"]
NllReduction = Literal["token", "pair"]
LayoutName = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: `nll_weight * NLL + beta * L_OR` (design of the objective: docs/objective.md).

    Attributes:
        beta: Weight of the odds-ratio term; the paper's lambda, at least 0; 0 is supervised fine-tuning.
        nll_weight: Weight of the NLL term, at least 0; 0 trains on the odds ratio alone.
        odds_scale: Factor on the log odds ratio inside the sigmoid; 1 in the paper.
        nll_on: Tokens in the NLL: `full` prompt and chosen answer, `response` the last answer alone,
            `assistant` every assistant turn of the chosen side.
        nll_reduction: `token` divides the NLL by the tokens of the whole optimizer step; `pair` takes each
            pair's token mean first and divides by the pairs.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    odds_scale: float = 1.0
    nll_on: NllOn = "full"
    nll_reduction: NllReduction = "token"


PRESETS: dict[ObjectiveName, Objective] = {
    "orpo": Objective(),
    "response": Objective(nll_on="response"),
    "llamafactory": Objective(nll_on="response", nll_reduction="pair"),
    "tempered": Objective(nll_weight=0.0, odds_scale=0.5),
}


@dataclass
class OrpoSettings:
    """Settings beyond those of `transformers.TrainingArguments`; every one is optional."""

    # Model
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or local folder."})
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a hub model."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights: float32, bfloat16, float16, auto. Unset: float32 master weights for full "
            "fine-tuning, bfloat16 (where the hardware has it) for a frozen base under LoRA."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention outside of training rows (generation, fallback)."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code shipped with a hub model."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of from_pretrained."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to 0."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja template, a file, or one of our named templates."}
    )
    resize_embeddings: bool = field(
        default=False,
        metadata={"help": "Add the template's special tokens to the vocabulary and train them."},
    )
    # LoRA
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"at_least": 1, "help": "LoRA rank."})
    lora_alpha: int = field(
        default=32, metadata={"at_least": 1, "help": "LoRA scale: updates are scaled by alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={"at_least": 0, "below": 1, "help": "Dropout on the adapter's input, in [0, 1)."},
    )
    lora_target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Module names that get an adapter."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights outside of linear layers that get one, as in experts stored as one tensor."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "Go on training this adapter."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: NF4 base weights (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit base weights (bitsandbytes)."})
    # Data
    dataset_name: str | list[str] | dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Hub name(s) or local jsonl, json, parquet, csv, arrow file(s); a mapping gives weights."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split of a hub data set to train on."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split of a hub data set to evaluate on."}
    )
    eval_dataset_name: str | list[str] | None = field(default=None, metadata={"help": "Held-out pairs."})
    eval_split: float = field(
        default=0.05,
        metadata={
            "at_least": 0,
            "below": 1,
            "help": "Share of the prompts held out where no evaluation data is given, in [0, 1); 0: none.",
        },
    )
    data_format: str | None = field(
        default=None, metadata={"help": "Name of the row format; unset: detected."}
    )
    columns: dict[str, str] | None = field(
        default=None, metadata={"help": "Our column name -> the data's column name."}
    )
    max_length: int | None = field(
        default=2048, metadata={"at_least": 2, "help": "Longest side, prompt + response, in tokens."}
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "What a malformed row does."}
    )
    sft_rows: Literal["drop", "use"] = field(
        default="drop", metadata={"help": "Rows without a rejected answer: `use` trains their NLL alone."}
    )
    max_dropped: float = field(
        default=0.1,
        metadata={
            "at_least": 0,
            "at_most": 1,
            "help": "Largest share of rows that may be dropped without stopping, in [0, 1].",
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"at_least": 1, "help": "Processes that tokenize."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as it comes; needs max_steps."})
    shuffle_buffer: int = field(
        default=10_000, metadata={"at_least": 1, "help": "Rows held for shuffling when streaming."}
    )
    # Objective
    objective: ObjectiveName = field(
        default="orpo", metadata={"help": "Named set of the five settings below."}
    )
    beta: float | None = field(
        default=None, metadata={"at_least": 0, "help": "Weight of the odds-ratio term (0.1 in `orpo`)."}
    )
    nll_weight: float | None = field(
        default=None, metadata={"at_least": 0, "help": "Weight of the NLL term (1)."}
    )
    odds_scale: float | None = field(
        default=None, metadata={"above": 0, "help": "Scale of the log odds ratio (1)."}
    )
    nll_on: NllOn | None = field(default=None, metadata={"help": "Tokens in the NLL (full)."})
    nll_reduction: NllReduction | None = field(
        default=None, metadata={"help": "How the NLL is averaged (token)."}
    )
    # Engine
    tokens_per_row: int | None = field(
        default=None,
        metadata={"at_least": 2, "help": "Token budget of one packed row; unset: from the memory there is."},
    )
    layout: LayoutName | None = field(
        default=None,
        metadata={"help": "Unset: shared, or what the start-up probe finds exact for the model."},
    )
    logits_memory_mib: int | None = field(
        default=None,
        metadata={"at_least": 1, "help": "Largest chunk of logits alive, in MiB (1024 on CUDA, else 128)."},
    )
    # Watching
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"at_least": 1, "help": "Stop after this many evaluations without improvement."},
    )
    num_samples: int = field(
        default=0,
        metadata={"at_least": 0, "help": "Answers generated from held-out prompts at each evaluation."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"at_least": 1, "help": "Tokens of a generated sample."}
    )
    generate_during_eval: bool = field(default=False, metadata={"help": "Same as num_samples: 4."})
    dry_run: bool = field(
        default=False, metadata={"help": "Check recipe, data and model, print the plan, stop."}
    )
    force: bool = field(default=False, metadata={"help": "Resume although the recipe has changed."})


_INHERITED_RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"at_least": 0},
    "num_train_epochs": {"above": 0},
    "per_device_train_batch_size": {"at_least": 1},
    "per_device_eval_batch_size": {"at_least": 1},
    "gradient_accumulation_steps": {"at_least": 1},
    "warmup_steps": {"at_least": 0},
    "weight_decay": {"at_least": 0},
    "max_grad_norm": {"at_least": 0},
    "label_smoothing_factor": {"at_least": 0, "at_most": 0},
}
_OBJECTIVE_KEYS = tuple(f.name for f in fields(Objective))


def resolve_objective(settings: OrpoSettings) -> tuple[Objective, list[str]]:
    """The preset named by `settings.objective`, with every explicit key put over it.

    Returns:
        The objective, and one line for each explicit key that differs from a preset other than `orpo`.

    Raises:
        ConfigError: The preset is unknown, or nothing would be trained.
    """
    if settings.objective not in PRESETS:
        raise ConfigError(f"objective: {settings.objective!r} is not one of {', '.join(PRESETS)}")
    preset = PRESETS[settings.objective]
    explicit = {key: value for key in _OBJECTIVE_KEYS if (value := getattr(settings, key)) is not None}
    notices = [
        f"{key}: {value} beats {getattr(preset, key)}, the value in objective: {settings.objective}"
        for key, value in explicit.items()
        if settings.objective != "orpo" and value != getattr(preset, key)
    ]
    objective = replace(preset, **explicit)
    if objective.beta == 0 and objective.nll_weight == 0:
        raise ConfigError("beta and nll_weight are both 0: nothing would be trained; raise one of them")
    return objective, notices


def check_settings(settings: OrpoSettings) -> None:
    """Check every range, and the combinations that cannot work. Reads inherited settings where there are any.

    Raises:
        ConfigError: Naming the key, its value and what is accepted.
    """
    limits = {f.name: dict(f.metadata) for f in fields(OrpoSettings)} | _INHERITED_RANGES
    for key, limit in limits.items():
        value = getattr(settings, key, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_range(key, value, limit)
    resolve_objective(settings)
    if settings.load_in_4bit and settings.load_in_8bit:
        raise ConfigError("load_in_4bit and load_in_8bit are both set; choose one")
    if (settings.load_in_4bit or settings.load_in_8bit) and not (
        settings.use_peft or settings.adapter_name_or_path
    ):
        raise ConfigError(
            "quantized weights cannot be trained; add use_peft: true, or drop load_in_4bit/8bit"
        )
    if settings.streaming and getattr(settings, "max_steps", 1) <= 0:
        raise ConfigError("streaming: the length of the data is not known; set max_steps")


def _check_range(key: str, value: float, limit: dict[str, Any]) -> None:
    tests = {
        "at_least": (value >= limit.get("at_least", value), "at least"),
        "above": (value > limit.get("above", value - 1), "above"),
        "at_most": (value <= limit.get("at_most", value), "at most"),
        "below": (value < limit.get("below", value + 1), "below"),
    }
    if not math.isfinite(value) or not all(passed for passed, _ in tests.values()):
        expected = " and ".join(f"{word} {limit[name]}" for name, (_, word) in tests.items() if name in limit)
        raise ConfigError(f"{key}: {value} is out of range; expected {expected or 'a finite number'}")
