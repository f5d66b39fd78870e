"""The settings of a run, defined once and light to import (no torch, no transformers).

`OrpoSettings` holds what this package adds to `transformers.TrainingArguments`; `orpo.trainer.ORPOConfig`
inherits from both, so a recipe and a Python script set the same flat keys. `Objective` is the resolved choice of
what is minimised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ObjectiveName = Literal["orpo", "response", "llamafactory", "tempered"]
NllOn = Literal["full", "response", "assistant"]
NllReduction = Literal["token", "pair"]
LayoutName = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: `nll_weight * NLL + beta * L_OR` (design of the objective: docs/objective.md).

    Attributes:
        beta: Weight of the odds-ratio term; the paper's lambda. At least 0; 0 is plain supervised fine-tuning.
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
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Weights: float32, bfloat16, float16, auto. Unset: float32 master weights for full "
                  "fine-tuning, bfloat16 (where the hardware has it) for a frozen base under LoRA."},
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
        default=False, metadata={"help": "Add the template's special tokens to the vocabulary and train them."}
    )
    # LoRA
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale: updates are scaled by alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    lora_target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Module names that get an adapter."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full beside the adapter."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on training this adapter."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: NF4 base weights (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit base weights (bitsandbytes)."})
    # Data
    dataset_name: str | list[str] | dict[str, float] | None = field(
        default=None,
        metadata={"help": "Hub name(s) or local jsonl, json, parquet, csv, arrow file(s); a mapping gives weights."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split of a hub data set to evaluate on."})
    eval_dataset_name: str | list[str] | None = field(default=None, metadata={"help": "Held-out pairs."})
    eval_split: float = field(
        default=0.05,
        metadata={"help": "Share of the prompts held out where no evaluation data is given, in [0, 1); 0: none."},
    )
    data_format: str | None = field(default=None, metadata={"help": "Name of the row format; unset: detected."})
    columns: dict[str, str] | None = field(
        default=None, metadata={"help": "Our column name -> the data's column name."}
    )
    max_length: int | None = field(default=2048, metadata={"help": "Longest side, prompt + response, in tokens."})
    on_bad_row: Literal["stop", "skip"] = field(default="stop", metadata={"help": "What a malformed row does."})
    sft_rows: Literal["drop", "use"] = field(
        default="drop", metadata={"help": "Rows without a rejected answer: `use` trains their NLL alone."}
    )
    max_dropped: float = field(
        default=0.1, metadata={"help": "Largest share of rows that may be dropped without stopping, in [0, 1]."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    streaming: bool = field(default=False, metadata={"help": "Read the data as it comes; needs max_steps."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Rows held for shuffling when streaming."})
    # Objective
    objective: ObjectiveName = field(default="orpo", metadata={"help": "Named set of the five settings below."})
    beta: float | None = field(default=None, metadata={"help": "Weight of the odds-ratio term (0.1 in `orpo`)."})
    nll_weight: float | None = field(default=None, metadata={"help": "Weight of the NLL term (1)."})
    odds_scale: float | None = field(default=None, metadata={"help": "Scale of the log odds ratio (1)."})
    nll_on: NllOn | None = field(default=None, metadata={"help": "Tokens in the NLL (full)."})
    nll_reduction: NllReduction | None = field(default=None, metadata={"help": "How the NLL is averaged (token)."})
    # Engine
    tokens_per_row: int | None = field(
        default=None, metadata={"help": "Token budget of one packed row; unset: from the memory there is."}
    )
    layout: LayoutName | None = field(
        default=None, metadata={"help": "Unset: shared, or what the start-up probe finds exact for the model."}
    )
    logits_memory_mib: int = field(default=128, metadata={"help": "Largest chunk of logits alive, in MiB."})
    # Watching
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without improvement."}
    )
    num_samples: int = field(default=0, metadata={"help": "Answers generated from held-out prompts at each evaluation."})
    max_completion_length: int | None = field(default=None, metadata={"help": "Tokens of a generated sample."})
    generate_during_eval: bool = field(default=False, metadata={"help": "Same as num_samples: 4."})
    dry_run: bool = field(default=False, metadata={"help": "Check recipe, data and model, print the plan, stop."})
    force: bool = field(default=False, metadata={"help": "Resume although the recipe has changed."})
