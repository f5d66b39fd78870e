"""Recipes: the files and command lines other tools' users have load unchanged; a mistake is named clearly."""

import dataclasses
import math
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers.trainer_utils import IntervalStrategy

from orpo.errors import ConfigError
from orpo.run.directory import dump_yaml
from orpo.settings.config import (
    FACTS,
    OWN,
    PRESETS,
    Objective,
    OrpoSettings,
    check_recipe,
    check_settings,
    inherited_by_evaluation,
    resolve_objective,
)
from orpo.settings.inherited import INHERITED
from orpo.settings.kinds import convert, describe
from orpo.settings.recipe import Recipe, load_recipe
from orpo.settings.reference import json_schema, settings_markdown
from orpo.settings.renamed import MEANT, NO_EFFECT, RENAMED, current_entries
from orpo.settings.schema import _class_fields, _training_arguments, known_settings

ROOT = Path(__file__).parent.parent

TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)

# The keys of alignment-handbook's ORPO recipes: zephyr-141b-A35b, and below the older form and LoRA.
ZEPHYR_141B = f"""
# Model arguments
model_name_or_path: mistral-community/Mixtral-8x22B-v0.1
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2

# Data training arguments
chat_template: {yaml.safe_dump(TEMPLATE, default_style='"', width=10_000).strip()}
dataset_name: argilla/distilabel-capybara-dpo-7k-binarized
dataset_train_split: train
dataset_num_proc: 8

# ORPOTrainer arguments
bf16: true
beta: 0.05
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
hub_model_id: zephyr-orpo-141b-A35b
learning_rate: 5.0e-6
log_level: info
logging_steps: 10
lr_scheduler_type: inverse_sqrt
max_length: 2048
max_prompt_length: 1792
num_train_epochs: 3
optim: adamw_bnb_8bit
output_dir: data/zephyr-orpo-141b-A35b
per_device_train_batch_size: 1
push_to_hub: true
report_to:
- tensorboard
- wandb
save_strategy: "no"
seed: 42
warmup_steps: 100
"""
QLORA_OF_2024 = """
model_name_or_path: mistralai/Mistral-7B-v0.1
torch_dtype: bfloat16
use_flash_attention_2: true
load_in_4bit: true
use_peft: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
- q_proj
- k_proj
dataset_mixer:
  argilla/distilabel-capybara-dpo-7k-binarized: 1.0
dataset_splits:
- train
- test
preprocessing_num_workers: 12
evaluation_strategy: steps
hub_private_repo: true
lr_scheduler_type: cosine
overwrite_output_dir: true
optim: paged_adamw_8bit
report_to: none
save_strategy: no
warmup_ratio: 0.1
"""


def load_text(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_the_zephyr_141b_recipe_of_alignment_handbook_loads_unchanged(tmp_path):
    recipe = load_text(tmp_path, ZEPHYR_141B)
    check_recipe(recipe.settings)
    written = yaml.safe_load(ZEPHYR_141B)
    assert recipe.settings["dtype"] == "bfloat16"
    assert recipe.settings["learning_rate"] == 5e-6
    assert recipe.settings["chat_template"] == TEMPLATE
    assert len(recipe.notices) == 2  # torch_dtype, max_prompt_length
    same = written.keys() - {"torch_dtype", "max_prompt_length"}
    assert {key: recipe.settings[key] for key in same} == {key: written[key] for key in same}


def test_recipes_of_2024_load_with_one_line_for_each_renamed_key(tmp_path):
    recipe = load_text(tmp_path, QLORA_OF_2024)
    check_recipe(recipe.settings)
    expected = {
        "attn_implementation": "flash_attention_2",
        "dataset_name": "argilla/distilabel-capybara-dpo-7k-binarized",
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "dataset_num_proc": 12,
        "eval_strategy": "steps",
        "warmup_steps": 0.1,
        "save_strategy": "no",
        "report_to": "none",
        "lora_dropout": 0.05,
    }
    assert {key: recipe.settings[key] for key in expected} == expected
    lines = [notice.split()[0] for notice in recipe.notices]
    assert lines == [
        "torch_dtype",
        "use_flash_attention_2",
        "dataset_mixer",
        "dataset_splits",
        "preprocessing_num_workers",
        "evaluation_strategy",
        "overwrite_output_dir",
        "warmup_ratio",
    ]
    assert recipe.idle == ["hub_private_repo: no effect without push_to_hub: true"]
    assert all("\n" not in notice for notice in recipe.notices)


def test_trl_command_lines_are_understood():
    words = shlex.split(
        "--dataset_name trl-internal-testing/hh-rlhf-helpful-base-trl-style --model_name_or_path=gpt2 "
        "--per_device_train_batch_size 4 --max_steps 1000 --learning_rate 8e-5 --eval_strategy steps "
        "--gradient_accumulation_steps 1 --eval_steps 500 --warmup_steps 150 --report_to wandb --bf16 "
        "--logging_first_step --no_remove_unused_columns --use_peft --lora_r=16 --max_prompt_length 128"
    )
    settings = load_recipe(None, words).settings
    assert settings["learning_rate"] == 8e-5
    assert settings["max_steps"] == 1000
    assert settings["bf16"] is True
    assert settings["logging_first_step"] is True
    assert settings["use_peft"] is True
    assert settings["report_to"] == "wandb"
    assert "max_prompt_length" not in settings


def test_settings_that_wait_for_another_are_named():
    recipe = load_recipe(None, ["--hub_model_id", "me/it", "--lora_r", "8", "--lora_alpha", "32"])
    assert recipe.idle == [
        "hub_model_id: no effect without push_to_hub: true",
        "lora_r: no effect without use_peft: true",
    ]
    assert not load_recipe(None, ["--lora_r", "8", "--use_peft"]).idle
    words = ["--gradient_checkpointing_kwargs", "{use_reentrant: true}"]
    waiting = "gradient_checkpointing_kwargs: no effect without gradient_checkpointing: true"
    assert load_recipe(None, words).idle == [waiting]
    if "activation_checkpointing" in known_settings():  # not in transformers 5.17
        assert not load_recipe(None, [*words, "--activation_checkpointing"]).idle
    words = ["--save_steps", "5", "--max_completion_length", "9"]
    assert load_recipe(None, [*words, "--save_strategy", "epoch"]).idle == [
        "save_steps: no effect without save_strategy: steps",
        "max_completion_length: no effect without generate_during_eval: true",
    ]
    assert not load_recipe(None, [*words, "--num_samples", "2"]).idle


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "with lr_scheduler_type: constant"),
        ({"dataloader_prefetch_factor": 2}, "without dataloader_num_workers above 0"),
        ({"dataloader_multiprocessing_context": "fork"}, "without dataloader_num_workers above 0"),
        ({"model_revision": "foo", "model_name_or_path": "/"}, "on /, which is not on the hub"),
        (
            {"dataset_config": "foo", "dataset_name": [__file__]},
            f"on {[__file__]}, which is not on the hub",
        ),
        ({"num_train_epochs": 5, "max_steps": 10}, "with max_steps"),
        ({"save_total_limit": 5, "save_strategy": "no"}, "with save_strategy: no"),
        ({"eval_split": 0.2, "eval_dataset_name": "me/it"}, "with eval_dataset_name"),
    ],
)
def test_settings_that_another_leaves_without_effect_are_named(given, line):
    words = [f"--{name}={value if isinstance(value, str) else str(value)}" for name, value in given.items()]
    assert load_recipe(None, words).idle == [f"{next(iter(given))}: no effect {line}"]


@pytest.mark.parametrize(
    "words",
    [
        ["--warmup_steps=5"],
        ["--warmup_steps=5", "--lr_scheduler_type=constant_with_warmup"],
        ["--dataloader_prefetch_factor=2", "--dataloader_num_workers=1"],
        ["--model_revision=foo", "--model_name_or_path=me/it"],
        ["--dataset_config=foo", "--dataset_name=me/it"],
        ["--dataset_config=foo", f"--dataset_name={__file__}", "--eval_dataset_name=me/it"],
        ["--dataset_config=foo", "--dataset_name=/"],
        ["--do_train", "true"],
        ["--do_eval", "true"],
        ["--num_train_epochs=5", "--max_steps=-1"],
    ],
)
def test_settings_that_have_an_effect_are_not_named(words):
    recipe = load_recipe(None, words)
    assert not recipe.idle and not recipe.notices


def test_a_run_that_is_told_not_to_train_says_that_it_does():
    (line,) = load_recipe(None, ["--do_train", "false"]).notices
    assert line.startswith("do_train (command line): no effect: `orpo train` always trains")
    (line,) = load_recipe(None, ["--train_sampling_strategy", "sequential"]).notices
    assert "pairs are always shuffled, by data_seed" in line


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"objective": "dpo", "nll_reduction": "pair"}, ["nll_reduction: no effect with nll_weight: 0"]),
        ({"objective": "simpo", "nll_on": "assistant"}, ["nll_on: no effect with nll_weight: 0"]),
        ({"nll_weight": 0.0, "nll_on": "response"}, ["nll_on: no effect with nll_weight: 0"]),
        ({"objective": "dpo", "nll_on": "full"}, []),
        ({"nll_on": "response"}, []),
    ],
)
def test_settings_of_an_nll_that_weighs_nothing_are_named(settings, lines):
    assert resolve_objective(OrpoSettings(**settings))[1] == lines


def test_trl_environment_section_is_kept_apart(tmp_path):
    recipe = load_text(tmp_path, "env:\n  WANDB_MODE: offline\nbeta: 0.1\n")
    assert recipe.environment == {"WANDB_MODE": "offline"}
    assert recipe.settings == {"beta": 0.1}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "src" / "orpo" / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_load_without_a_notice(path):
    recipe = load_recipe(path)
    check_recipe(recipe.settings)
    assert recipe.notices == ()
    assert "iterature" in path.read_text()  # where the values come from


@pytest.mark.parametrize(
    "words",
    [
        ["--learning_rate", "1e-5"],
        ["--learning-rate", "1e-5"],
        ["--learning_rate=1e-5"],
        ["learning_rate=1e-5"],
        ["learning_rate=0.00001"],
    ],
)
def test_the_command_line_beats_the_recipe(tmp_path, words):
    assert load_text(tmp_path, "learning_rate: 5e-6\nbeta: 0.2", *words).settings == {
        "learning_rate": 1e-5,
        "beta": 0.2,
    }


def test_the_command_line_beats_the_recipe_under_an_old_name_too(tmp_path):
    assert load_text(tmp_path, "torch_dtype: bfloat16", "--dtype", "float32").settings == {"dtype": "float32"}
    assert load_text(tmp_path, "dtype: bfloat16", "--torch_dtype", "float32").settings == {"dtype": "float32"}


def test_configurations_that_are_no_names_are_one_line(tmp_path):
    """A list of mappings ended in a TypeError. (Found by fuzzing.)"""
    for value in ("[{a: b}]", "[[1], 2]"):
        with pytest.raises(ConfigError, match="dataset_config"):
            check_recipe(load_text(tmp_path, f"dataset_configs: {value}").settings)


def test_the_current_name_beats_the_old_one_beside_it(tmp_path):
    recipe = load_text(tmp_path, "warmup_ratio: 0.1\nwarmup_steps: 100")
    assert recipe.settings == {"warmup_steps": 100}
    assert "ignored" in recipe.notices[0]


def test_the_recipe_may_stand_anywhere_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.2")
    for words in (
        [str(path), "--bf16"],
        ["--bf16", str(path)],
        ["--bf16", "--config", str(path)],
        ["--report_to", "none", "--bf16", str(path)],
        ["bf16=true", str(path)],
    ):
        settings = load_recipe(None, words).settings
        assert (settings["beta"], settings["bf16"]) == (0.2, True), words


def test_a_run_directory_stands_for_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("beta: 0.2\noutput_dir: somewhere/else")
    assert load_recipe(tmp_path).settings == {"beta": 0.2, "output_dir": str(tmp_path)}


def test_what_is_printed_loads_as_the_same_recipe(tmp_path):
    settings = load_text(tmp_path, ZEPHYR_141B).settings
    again = load_text(tmp_path, dump_yaml(settings))
    assert again.settings == settings
    assert again.notices == ()


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--bf16", {"bf16": True}),
        ("--no_bf16", {"bf16": False}),
        ("--no-bf16", {"bf16": False}),
        ("--bf16 false", {"bf16": False}),
        ("--bf16=True", {"bf16": True}),
        ("--report_to tensorboard wandb", {"report_to": ["tensorboard", "wandb"]}),
        ("--report_to tensorboard,wandb", {"report_to": ["tensorboard", "wandb"]}),
        ("--report_to none", {"report_to": "none"}),
        ("--lora_target_modules q_proj v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        (r"--lora_target_modules .*(q|v)_proj{1,2}", {"lora_target_modules": r".*(q|v)_proj{1,2}"}),
        ("--max_steps -1", {"max_steps": -1}),
        ("--max_length none", {"max_length": None}),
        ("--max_length 1e3", {"max_length": 1000}),
        ("--save_steps 0.1", {"save_steps": 0.1}),
        ("--run_name 12", {"run_name": "12"}),
        ("--lr_scheduler_kwargs.num_cycles 2", {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ('--lr_scheduler_kwargs {"min_lr":1e-6}', {"lr_scheduler_kwargs": {"min_lr": 1e-6}}),
        ("--deepspeed zero2.json", {"deepspeed": "zero2.json"}),
        ("--dataset_name a.jsonl b.jsonl", {"dataset_name": ["a.jsonl", "b.jsonl"]}),
        ("--columns.chosen good --columns.rejected bad", {"columns": {"chosen": "good", "rejected": "bad"}}),
        ("--lambda 0.3", {"beta": 0.3}),
        ("--no_cuda", {"use_cpu": True}),
        ("--packing --beta 0.1", {"beta": 0.1}),
    ],
)
def test_typed_values_become_what_their_key_takes(words, expected):
    assert load_recipe(None, words.split()).settings == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate: 5e-6", 5e-6),  # PyYAML alone reads a text
        ("learning_rate: 5.0e-6", 5e-6),
        ("learning_rate: '5e-6'", 5e-6),
        ("learning_rate: 1_000e-9", 1e-6),
        ("save_strategy: no", "no"),  # PyYAML reads false
        ("eval_strategy: off", "no"),
        ("num_train_epochs: 3", 3),
        ("max_length: null", None),
        ("dataset_name: {a.jsonl: 1, b.jsonl: '0.5'}", {"a.jsonl": 1, "b.jsonl": 0.5}),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("lora_modules_to_save: lm_head", ["lm_head"]),
        ("max_length: 0100", 100),  # PyYAML reads 64
        ("beta: 010", 10),
        ("model_revision: 0100", "0100"),
        ("seed: 0x10", 16),
        ("learning_rate: .5", 0.5),
        ("template_date: 2026-11-27", "2026-11-27"),  # PyYAML reads a date
        ("stages: [{beta: '1e-1', share: '1.0'}]", [{"beta": 0.1, "share": 1.0}]),
        ("stages: [{beta: many}]", [{"beta": "many"}]),  # for resolve_stages to refuse
        ("stages: []", []),
    ],
)
def test_yaml_values_become_what_their_key_takes(tmp_path, text, expected):
    assert list(load_text(tmp_path, text).settings.values()) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "learning_rat: 1e-5",
            "recipe.yaml:1: unknown setting 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("\n\nbeta_: 1", "recipe.yaml:3: unknown setting 'beta_'; did you mean 'beta'?"),
        ("max_prompt_lenght: 3", "did you mean 'max_prompt_length'?"),
        (
            "per_device_batch_size: 3",
            "did you mean 'per_device_train_batch_size'?",
        ),
        ("epochs: 3", "did you mean 'num_train_epochs'?"),
        ("data: x", "did you mean 'dataset_name'?"),
        ("output: x", "did you mean 'output_dir'?"),
        ("peft: true", "did you mean 'use_peft'?"),
        ("max_seq_len: 3", "did you mean 'max_length'?"),
        ("hub_repo: x", "did you mean 'hub_model_id'?"),
        ("orpo_beta: 1", "did you mean 'beta'?"),
        ("warmup: 1", "did you mean 'warmup_steps'?"),
        ("max_steps: true", "quote it"),
        ("learning_rate: fast", 'recipe.yaml:1: learning_rate: "fast" is not usable; expected a number'),
        ("max_steps: 1.5", "max_steps: 1.5 is not usable; expected a whole number"),
        ("max_steps: .inf", "max_steps: inf is not usable; expected a whole number"),
        ("seed: 12:30", 'recipe.yaml:1: seed: "12:30" is not usable; expected a whole number'),  # PyYAML: 750
        ("seed: 0b11", 'seed: "0b11" is not usable'),
        ("bf16: maybe", 'bf16: "maybe" is not usable; expected true or false'),
        ("lr_scheduler_type: cosin", "expected one of linear, cosine,"),
        ("on_bad_row: ignore", "expected one of stop, skip"),
        ("objective: paper", "expected one of orpo, sft, tempered_odds, simpo"),
        ("report_to: no", "quote it"),
        ("beta: 1\nbeta: 2", "recipe.yaml:2: 'beta' is set twice; first at recipe.yaml:1"),
        ("dataset_name:\n  a: 2\n  a: 1", "recipe.yaml:3: 'a' is set twice; first at recipe.yaml:2"),
        ("stages: [{share: 1, share: 1}]", "recipe.yaml:1: 'share' is set twice; first at recipe.yaml:1"),
        ('lr_scheduler_kwargs: \'{"a": 1, "a": 2}\'', "lr_scheduler_kwargs: 'a' is set twice in {"),
        ("<<: 5", "expected a mapping or list of mappings for merging"),
        ("beta: [1", "not valid YAML"),
        ("- beta", "a recipe is a mapping"),
        ("beta.x: 1", "unknown setting 'beta.x'"),
        ("is_encoder_decoder: true", "encoder-decoder models cannot be trained here"),
        ("dataset_splits: [train, validation]", "one split to train on"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_what_is_expected(tmp_path, text, expected):
    with pytest.raises(ConfigError) as error:
        load_text(tmp_path, text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_name", '{"a.jsonl": 2, "a.jsonl": 0.5}'),
        ("stages", "[{objective: sft, objective: simpo}]"),
        ("lr_scheduler_kwargs", "{x: {num_cycles: 1, num_cycles: 2}}"),
    ],
)
def test_a_name_that_is_there_twice_is_refused_on_the_command_line_too(key, value):
    with pytest.raises(ConfigError, match=f"^command line: {key}: '.*' is set twice in "):
        load_recipe(overrides=[f"--{key}", value])


def test_a_merged_mapping_is_read_and_what_stands_beside_it_beats_it(tmp_path):
    recipe = load_text(tmp_path, "<<: {beta: 0.2, seed: 3}\nseed: 4\nlr_scheduler_kwargs: {<<: {a: 1}, a: 2}")
    assert recipe.settings == {"beta": 0.2, "seed": 4, "lr_scheduler_kwargs": {"a": 2}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 0}, "max_steps: 0 makes no step; write -1"),
        ({"max_steps": -7}, "max_steps: -7 makes no step"),
        ({"num_train_epochs": 1e300}, "at most 1000000"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha: -1 is out of range"),
        ({"neftune_noise_alpha": 10**39}, "and at most 1000000"),
        ({"dataloader_prefetch_factor": -5}, "dataloader_prefetch_factor: -5 is out of range"),
        ({"ddp_bucket_cap_mb": -5}, "ddp_bucket_cap_mb: -5 is out of range"),
        ({"optim_args": "momentum=0.9, momentum=0.5"}, "optim_args: 'momentum' is set twice"),
        ({"parallelism_config": {"tp_size": 2}}, "parallelism_config: {'tp_size': 2}: rows and layers"),
        ({"save_steps": -3}, "save_steps: -3 is out of range"),
        ({"eval_steps": -3}, "eval_steps: -3 is out of range"),
        ({"logging_steps": -3}, "logging_steps: -3 is out of range"),
        ({"gradient_checkpointing_kwargs": 5}, "gradient_checkpointing_kwargs: 5 is no mapping"),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": "maybe"}},
            "use_reentrant: 'maybe' is not usable",
        ),
        *(
            [({"activation_checkpointing_kwargs": {"offload": 1}}, "offload: 1 is not usable")]
            if "activation_checkpointing_kwargs" in known_settings()
            else []  # not in transformers 5.17
        ),
        ({"lr_scheduler_kwargs": {"num_cycles": math.nan}}, "lr_scheduler_kwargs: num_cycles: nan is out of"),
        ({"lr_scheduler_kwargs": "cosine"}, "lr_scheduler_kwargs: 'cosine' is no mapping"),
        ({"model_init_kwargs": "{bad"}, "model_init_kwargs: '{bad' is no JSON"),
        ({"accelerator_config": "5"}, "accelerator_config: 5 is no file; name a JSON file"),
        ({"accelerator_config": 5}, "accelerator_config: 5 is no mapping"),
        ({"log_level": "foo"}, "log_level: 'foo' is not one of detail, debug"),
        ({"fsdp": "full_shardd"}, "fsdp: 'full_shardd' is not one of full_shard, "),
        ({"fsdp": ["full_shard", "autowrap"]}, "fsdp: 'autowrap' is not one of"),
        ({"optim_args": "eps=nan"}, "optim_args: eps: nan is out of range"),
        ({"optim_args": "lr=5"}, "optim_args: lr is a setting; write learning_rate: 5"),
        ({"optim_args": "foo"}, "optim_args: 'foo' is no name=value"),
        ({"stages": [{}]}, "stages: stage 1 names no objective"),
        ({"stages": [{"share": 1.0}]}, "stages: stage 1 names no objective"),
    ],
)
def test_values_that_nothing_else_refuses_are_one_line_in_a_recipe_and_in_python(
    settings, expected, tmp_path
):
    from orpo import ORPOConfig

    for check in (check_recipe, lambda given: ORPOConfig(output_dir=str(tmp_path), **given)):
        with pytest.raises(ConfigError) as error:
            check(settings)
        assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1, "neftune_noise_alpha": 5.0, "optim_args": "momentum=0.9, dampening=1"},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2}},
        {"lr_scheduler_kwargs": '{"num_cycles": 2}', "accelerator_config": {"even_batches": True}},
        {"stages": [{"objective": "sft", "share": 0.5}, {"beta": None, "nll_weight": 2}]},
        {"optim_args": "", "fsdp": ""},
    ],
)
def test_values_that_can_be_used_pass(settings, tmp_path):
    from orpo import ORPOConfig

    check_recipe(settings | {"fsdp": settings.get("fsdp", "full_shard auto_wrap")})
    ORPOConfig(output_dir=str(tmp_path), **settings)


def test_every_mistake_of_a_recipe_is_named_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"learning_rat.*max_steps.*foo"):
        load_text(tmp_path, "learning_rat: 1\nmax_steps: x\n", "--foo", "1")


def test_an_option_without_its_value_is_named():
    with pytest.raises(ConfigError, match="learning_rate: nothing is not usable; expected a number"):
        load_recipe(None, ["--learning_rate", "--bf16"])


@pytest.mark.parametrize("words", [["nonsense"], ["--beta", "1", "nonsense"], ["a.yaml", "b.yaml"]])
def test_a_stray_word_is_refused(words):
    with pytest.raises(ConfigError, match=r"nonsense|one recipe"):
        load_recipe(None, words)


# ---------------------------------------------------------------------------------------- what is known


def test_names_types_and_defaults_read_from_source_are_those_of_training_arguments():
    import transformers

    read = _training_arguments()
    real = {f.name: f for f in dataclasses.fields(transformers.TrainingArguments) if f.init}
    assert read.keys() == real.keys()
    for name, known in read.items():
        default = real[name].default
        if isinstance(default, (int, float, str, type(None))) and name not in ("optim", "project"):
            assert known.default == default or isinstance(known.default, str), name
        if default is not None and default is not dataclasses.MISSING:
            convert(default, known.kind)  # every default is accepted as a value


def test_the_settings_of_orpo_config_are_known_with_their_defaults():
    from orpo import ORPOConfig

    known = known_settings()
    real = {f.name: f for f in dataclasses.fields(ORPOConfig) if f.init}
    assert known.keys() == real.keys() - NO_EFFECT.keys() - {"is_encoder_decoder"}
    for name, setting in known.items():
        if setting.own and real[name].default is not dataclasses.MISSING:
            assert setting.default == real[name].default, name


def test_no_name_is_both_current_and_old():
    old = {**RENAMED, **NO_EFFECT}
    assert not old.keys() & known_settings().keys()
    assert set(RENAMED.values()) <= known_settings().keys()
    assert not RENAMED.keys() & NO_EFFECT.keys()


def test_recipes_with_our_own_old_name_of_a_setting_still_load(tmp_path):
    recipe = load_text(tmp_path, "tokens_per_row: 4096\n")
    assert recipe.settings == {"tokens_per_micro_batch": 4096}
    assert recipe.notices == ("tokens_per_row (recipe.yaml:1): now called tokens_per_micro_batch",)


def test_every_key_of_trl_is_known_and_each_different_default_has_its_reason():
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent
    theirs = _training_arguments()
    for file, name in (
        ("trainer/base_config.py", "_BaseConfig"),
        ("experimental/orpo/orpo_config.py", "ORPOConfig"),
        ("trainer/model_config.py", "ModelConfig"),
        ("scripts/utils.py", "ScriptArguments"),
    ):
        theirs |= dict(_class_fields(folder / file, name, {}))
    ours = known_settings()
    different = set()
    for name, setting in theirs.items():
        current, _ = current_entries(name, setting.default)
        assert current.keys() <= ours.keys(), name
        if name in ours and ours[name].default != setting.default:
            different.add(name)
            assert FACTS[name].trl is not None, f"{name}: say why it differs from TRL's {setting.default}"
            assert FACTS[name].trl.value == setting.default
    assert different == {name for name, facts in FACTS.items() if facts.trl is not None}


def test_the_facts_of_inherited_settings_are_of_settings_that_exist():
    theirs = _training_arguments()
    trl_only = {"max_prompt_length", "truncation_mode", "padding_value", "label_pad_token_id"}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than transformers 5.17
    assert INHERITED.keys() - theirs.keys() - newer == trl_only | {"is_encoder_decoder"}


def test_splits_of_a_recipe_s_own_data_are_not_those_of_other_data(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset_name: a/b\ndataset_train_split: train_prefs\ndataset_test_split: test_prefs\n")
    other = load_recipe(path, ["--dataset_name", "pairs.jsonl"])
    assert other.settings == {"dataset_name": "pairs.jsonl"}
    assert other.notices == (
        "dataset_train_split, dataset_test_split: of a/b in the recipe, not of the data on the command line",
    )
    named = load_recipe(path, ["--dataset_name", "c/d", "--dataset_test_split", "test"])
    assert named.settings == {"dataset_name": "c/d", "dataset_test_split": "test"}
    same = load_recipe(path, ["--dataset_name", "a/b", "--beta", "0.2"])
    assert same.settings["dataset_test_split"] == "test_prefs" and not same.notices


def test_what_orpo_eval_takes_from_a_run_is_what_decides_a_score():
    recipe = {"beta": 0.3, "nll_on": "response", "max_length": None, "learning_rate": 1e-3, "eval_split": 0.1}
    assert inherited_by_evaluation(recipe) == {"beta": 0.3, "nll_on": "response"}


def test_the_settings_reference_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == settings_markdown(), "run `make docs`"


def test_the_schema_lists_every_setting_and_its_choices():
    schema = json_schema()
    assert schema["properties"].keys() == known_settings().keys()
    assert schema["properties"]["on_bad_row"]["enum"] == ["stop", "skip"]
    assert schema["properties"]["learning_rate"]["type"] == "number"


def test_loading_a_recipe_imports_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(ZEPHYR_141B)
    code = (
        "import sys; from orpo.settings.recipe import load_recipe; "
        "from orpo.settings.config import check_recipe; "
        f"check_recipe(load_recipe({str(path)!r}).settings); "
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - begin < 5


# --------------------------------------------------------------------------------- objective and ranges


def test_presets_are_those_of_the_objective_document():
    paper = Objective(preference_weight=0.1, nll_weight=1.0, scale=1.0, nll_on="full", nll_reduction="token")
    assert PRESETS["orpo"] == Objective() == paper
    assert PRESETS["response"] == Objective(nll_on="response")
    assert PRESETS["llamafactory"] == Objective(nll_on="response", nll_reduction="pair")


def test_an_explicit_key_beats_the_preset_in_a_printed_line():
    objective, notices = resolve_objective(OrpoSettings(objective="tempered_odds", beta=0.3, nll_weight=0))
    assert objective == dataclasses.replace(PRESETS["tempered_odds"], scale=0.3)
    assert notices == ["beta: 0.3 beats 0.5, the value in objective: tempered_odds"]
    assert resolve_objective(OrpoSettings(beta=0.3, nll_on="assistant")) == (
        Objective(preference_weight=0.3, nll_on="assistant"),
        [],
    )


@pytest.mark.parametrize(
    ("key", "bad", "good"),
    [
        ("beta", -0.1, 0.0),
        ("beta", math.nan, 10.0),
        ("beta", math.inf, 1.0),
        ("nll_weight", -1.0, 0.0),
        ("odds_scale", 0.0, 0.2),
        ("eval_split", 1.0, 0.0),
        ("eval_split", -0.1, 0.99),
        ("lora_dropout", 1.0, 0.0),
        ("lora_r", 0, 1),
        ("max_length", 1, None),
        ("max_dropped", 1.1, 1.0),
        ("tokens_per_micro_batch", 0, 512),
        ("learning_rate", -1e-6, 0.0),
        ("warmup_steps", -1, 0),
        ("num_train_epochs", 0, 0.5),
        ("per_device_train_batch_size", 0, 1),
        ("gradient_accumulation_steps", 0, 1),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, bad, good):
    check_recipe({key: good})
    with pytest.raises(ConfigError, match=rf"{key}: .* is out of range"):
        check_recipe({key: bad})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.0, "nll_weight": 0.0}, "nothing would be trained"),
        ({"objective": "sft", "nll_weight": 0.0}, "nothing would be trained"),
        ({"load_in_4bit": True}, "add use_peft: true"),
        ({"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, "choose one"),
        ({"streaming": True}, "set max_steps"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        check_recipe(settings)


def test_an_evaluation_that_is_turned_off_is_none():
    recipe = load_recipe(None, ["--do_eval", "false"])
    assert recipe.settings == {"eval_strategy": "no"}
    assert recipe.notices == ("do_eval (command line): now written eval_strategy: no",)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor: 0.1: .* set label_smoothing"):
        check_recipe({"label_smoothing_factor": 0.1})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(OrpoSettings)])
def test_a_value_of_any_type_is_taken_or_refused_in_one_line(name):
    """In Python nothing converts a value first; no setting may end in another error than ours."""
    stages = (
        [{"objective": [1]}],
        [{1: 2}],
        [{"share": "much"}],
        [{"objective": "sft", "beta": None}],
        [{"beta": 10**400}],
    )
    for value in ([1], {"a": 1}, object(), 3.5, -1, 10**400, True, b"x", "x", "", math.nan, *stages):
        said = ""
        try:
            check_settings(OrpoSettings(**{name: value}))
        except ConfigError as error:
            said = str(error)
        assert "\n" not in said


def test_python_scripts_are_checked_as_recipes_are():
    with pytest.raises(ConfigError, match="eval_split: 1 is out of range"):
        check_settings(OrpoSettings(eval_split=1))


def test_a_model_under_the_home_folder_is_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    typed = ["--model_name_or_path", "~/model", "--adapter_name_or_path=~/adapter"]
    assert load_recipe(overrides=typed).settings == {
        "model_name_or_path": str(tmp_path / "model"), "adapter_name_or_path": str(tmp_path / "adapter"),
    }  # fmt: skip


def test_what_settings_may_be_meant_by_are_settings():
    for names in MEANT.values():
        assert set(names) <= known_settings().keys()


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_script_gives_values_of_the_right_type_or_one_line_says_what_is_expected(name, tmp_path):
    """As a recipe does: a misspelled choice, a number that is none, a switch that is no switch."""
    from orpo import ORPOConfig

    kind = known_settings()[name].kind
    for value in ("zzz", object(), 1.5, [object()], "0.25"):
        try:
            convert(value, kind)
        except ValueError:
            expected = rf"{name}: .* is not usable; expected {re.escape(describe(kind))}"
            with pytest.raises(ConfigError, match=expected):
                ORPOConfig(output_dir=str(tmp_path), **{name: value})
            with pytest.raises(ConfigError, match=expected):
                OrpoSettings.from_recipe({name: value})


def test_values_of_python_are_taken_as_a_recipe_writes_them(tmp_path):
    from orpo import ORPOConfig

    made = ORPOConfig(
        output_dir=str(tmp_path), beta=np.float32(0.5), max_length=np.int64(64), dtype=torch.bfloat16,
        dataset_name=tmp_path / "pairs.jsonl", learning_rate="1e-5", eval_strategy=IntervalStrategy.NO,
        lora_target_modules=("q_proj", "v_proj"),
    )  # fmt: skip
    assert (made.beta, made.max_length, made.dtype, made.learning_rate) == (0.5, 64, "torch.bfloat16", 1e-5)
    assert made.dataset_name == str(tmp_path / "pairs.jsonl")
    assert made.lora_target_modules == ["q_proj", "v_proj"]
    within = ORPOConfig(
        output_dir=str(tmp_path), dataset_name={tmp_path / "a.jsonl": np.float32(0.5)}, use_peft=1, bf16=0,
        eval_dataset_name=[tmp_path / "b.jsonl"], lora_target_modules={"v_proj", "q_proj"},
    )  # fmt: skip
    assert within.dataset_name == {str(tmp_path / "a.jsonl"): 0.5} and within.use_peft is True
    assert within.eval_dataset_name == [str(tmp_path / "b.jsonl")] and within.bf16 is False
    assert within.lora_target_modules == ["q_proj", "v_proj"]
    kept = ORPOConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": torch.bfloat16})
    assert kept.model_init_kwargs == {"dtype": torch.bfloat16}
