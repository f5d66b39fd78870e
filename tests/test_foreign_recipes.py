"""Recipes in the shape of Axolotl, LLaMA-Factory, ms-swift and Unsloth: each key is understood or refused."""

import json
import shlex

import pytest
import torch

from orpo.data.preferences import read_preferences
from orpo.errors import ConfigError
from orpo.settings import other_tools
from orpo.settings.config import check_recipe
from orpo.settings.recipe import Recipe, load_recipe
from orpo.settings.renamed import current_entries, current_keywords, takes_as
from orpo.settings.schema import known_settings

AXOLOTL = """
base_model: some/base-7b
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_4bit: true
adapter: qlora
rl: orpo
orpo_alpha: 0.2
chat_template: tokenizer_default
datasets:
  - path: some/pairs
    type: chat_template.argilla
    split: train_prefs
dataset_prepared_path: prepared
val_set_size: 0.1
sequence_len: 4096
sample_packing: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules: [q_proj, v_proj]
wandb_project:
wandb_name: first
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: offload
flash_attention: true
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens:
  pad_token:
"""
LLAMA_FACTORY = """
model_name_or_path: some/instruct-4b
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: orpo
dataset: pairs_en
template: chatml
cutoff_len: 1024
preprocessing_num_workers: 16
plot_loss: true
output_dir: saves/orpo
per_device_train_batch_size: 1
num_train_epochs: 3.0
val_size: 0.05
"""
SHAREGPT = {
    "file_name": "pairs.json",
    "ranking": True,
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a recipe in a working folder whose data/dataset_info.json holds `described`."""
    monkeypatch.chdir(tmp_path)

    def load(text: str = "", words: str = "", described: dict | None = None, folder: str = "data") -> Recipe:
        if described is not None:
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "dataset_info.json").write_text(json.dumps(described))
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", shlex.split(words))

    return load


def refusal(load, *given, **described) -> str:
    with pytest.raises(ConfigError) as error:
        load(*given, **described)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_axolotl_recipe_loads_unchanged(load):
    recipe = load(AXOLOTL)
    check_recipe(recipe.settings)
    assert recipe.settings == {
        "model_name_or_path": "some/base-7b",
        "load_in_4bit": True,
        "use_peft": True,
        "beta": 0.2,
        "dataset_name": "some/pairs",
        "dataset_train_split": "train_prefs",
        "eval_split": 0.1,
        "max_length": 4096,
        "lora_r": 32,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_modules": "all-linear",
        "run_name": "first",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 2,
        "optim": "adamw_bnb_8bit",
        "lr_scheduler_type": "cosine",
        "learning_rate": 2e-4,
        "gradient_checkpointing": True,
        "attn_implementation": "flash_attention_2",
        "eval_strategy": "steps",
        "eval_steps": 0.125,
        "save_strategy": "epoch",
    }
    assert not any("ignored" in notice for notice in recipe.notices)
    named = {notice.split()[0].rstrip(":") for notice in recipe.notices}
    same = {"load_in_4bit", "lora_r", "lora_alpha", "lora_dropout", "learning_rate"}
    assert named == {line.split(":")[0] for line in AXOLOTL.splitlines() if line[:1].strip()} - same - {
        "gradient_accumulation_steps"
    }


def test_a_llama_factory_recipe_loads_unchanged(load):
    recipe = load(LLAMA_FACTORY, described={"pairs_en": SHAREGPT})
    check_recipe(recipe.settings)
    assert recipe.settings == {
        "model_name_or_path": "some/instruct-4b",
        "do_train": True,
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": "all-linear",
        "beta": 0.1,
        "objective": "llamafactory",
        "dataset_name": "data/pairs.json",
        "data_format": "sharegpt",
        "columns": NO_MORE,
        "chat_template": "chatml",
        "max_length": 1024,
        "dataset_num_proc": 16,
        "output_dir": "saves/orpo",
        "per_device_train_batch_size": 1,
        "num_train_epochs": 3.0,
        "eval_split": 0.05,
    }


def test_an_ms_swift_command_line_is_understood(load):
    words = (
        "--rlhf_type orpo --model some/7b --train_type lora --dataset a.jsonl some/pairs "
        "--torch_dtype bfloat16 --split_dataset_ratio 0.01 --lora_rank 8 --target_modules q_proj v_proj "
        "--attn_impl flash_attn --max_length 2048 --quant_bits 4 --quant_method bnb --warmup_ratio 0.05"
    )
    settings = load("", words).settings
    check_recipe(settings)
    assert settings == {
        "model_name_or_path": "some/7b",
        "use_peft": True,
        "dataset_name": ["a.jsonl", "some/pairs"],
        "dtype": "bfloat16",
        "eval_split": 0.01,
        "lora_r": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "attn_implementation": "flash_attention_2",
        "max_length": 2048,
        "load_in_4bit": True,
        "warmup_steps": 0.05,
    }


def test_unsloth_names_are_understood(load):
    text = "model_name: some/7b\nmax_seq_length: 2048\nr: 16\nbias: none\nrandom_state: 3407\n"
    text += "use_gradient_checkpointing: unsloth\nfull_finetuning: false\ntarget_modules: [q_proj]"
    assert load(text).settings == {
        "model_name_or_path": "some/7b",
        "max_length": 2048,
        "lora_r": 16,
        "seed": 3407,
        "gradient_checkpointing": True,
        "lora_target_modules": ["q_proj"],
    }


SIMPO = {"objective": "simpo", "beta": 2, "simpo_gamma": 1}
CPO = {"objective": "cpo_simpo", "nll_on": "response"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapter: qlora", {"use_peft": True, "load_in_4bit": True}),
        ("adapter:", {}),
        ("finetuning_type: full", {"use_peft": False}),
        ("lora_target: q_proj,v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
        ("target_modules: [all-linear]", {"lora_target_modules": "all-linear"}),
        ("lora_target_linear: true", {"lora_target_modules": "all-linear"}),
        ("lora_target_linear: false\nlora_target_modules: [k_proj]", {"lora_target_modules": ["k_proj"]}),
        ("additional_target: embed_tokens,lm_head", {"lora_modules_to_save": ["embed_tokens", "lm_head"]}),
        ("adapters: [runs/one]", {"adapter_name_or_path": "runs/one"}),
        ("quantization_bit: 8", {"load_in_8bit": True}),
        ("flash_attn: fa2", {"attn_implementation": "flash_attention_2"}),
        ("flash_attn: auto", {}),
        ("sdp_attention: true", {"attn_implementation": "sdpa"}),
        ("pure_bf16: true", {"dtype": "bfloat16"}),
        ("bf16: true", {"bf16": True}),
        ("saves_per_epoch: 2\nmax_length: 9", {"max_length": 9, "save_strategy": "steps", "save_steps": 0.5}),
        ("val_set_size: 0", {"eval_split": 0.0}),
        ("special_tokens:\n  pad_token:\n  eos_token:", {}),
        ("max_samples:", {}),
        ("use_galore: false", {}),
        ("chat_template: tokenizer_default_fallback_chatml", {}),
        ("chat_template: jinja\nchat_template_jinja: '{{ x }}'", {"chat_template": "{{ x }}"}),
        ("chat_template_jinja: '{{ x }}'", {"chat_template": "{{ x }}"}),
        ("rl: orpo\nstage: dpo\nloss_type: orpo", {}),
        ("rl: dpo\nrl_beta: 0.3", {"objective": "dpo", "beta": 0.3}),
        ("rlhf_type: dpo\nrpo_alpha: 0.5", {"objective": "dpo", "nll_weight": 0.5, "nll_on": "response"}),
        ("rlhf_type: cpo\nloss_type: sigmoid", {"objective": "cpo"}),
        ("rlhf_type: simpo", {"objective": "cpo_simpo", "beta": 2.0, "simpo_gamma": 1.0}),
        ("loss_type: simpo", {"objective": "cpo_simpo", "beta": 0.1, "simpo_gamma": 0.5}),
        ("loss_type: simpo\ncpo_alpha: 0\nbeta: 2\nsimpo_gamma: 1", SIMPO),
        ("loss_type: simpo\ncpo_alpha: 3\nbeta: 2\nsimpo_gamma: 1", SIMPO | CPO | {"nll_weight": 3}),
        ("loss_type: [sigmoid]", {"objective": "dpo"}),
        ("loss_type: sigmoid\ncpo_alpha: 3", CPO | {"objective": "cpo", "nll_weight": 3}),
        ("stage: dpo", {"objective": "dpo"}),
        ("pref_loss: sigmoid\npref_ftx: 3", CPO | {"objective": "dpo", "nll_weight": 3}),
        ("stage: dpo\ndpo_label_smoothing: 0.2", {"objective": "dpo", "label_smoothing": 0.2}),
        ("stage: dpo\npref_loss: simpo\npref_beta: 2", {"objective": "simpo", "beta": 2, "simpo_gamma": 0.5}),
        ("stage: sft", {"objective": "sft", "nll_on": "response", "sft_rows": "use"}),
        ("objective: cpo_simpo\ncpo_alpha: 3", CPO | {"nll_weight": 3}),
        ("cpo_alpha: 0.5\nref_model: other", {}),
        ("model_name_or_path: a\nrl: dpo\nref_model: a", {"model_name_or_path": "a", "objective": "dpo"}),
    ],
)  # fmt: skip
def test_what_means_the_same_is_translated(load, text, expected):
    recipe = load(text)
    assert recipe.settings == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_samples: 1000", "dataset_train_split: train[:1000]"),
        ("batch_size: 8", "per_device_train_batch_size"),
        ("rl: kto", "kto is not trained here; objective says what is"),
        ("pref_loss: hinge", "hinge is not trained here"),
        ("stage: rm", "rm is not trained here"),
        ("ref_model: other\nrl: dpo", "the reference is the model as it is before training"),
        ("adapter: ia3", "ia3 is not trained here; lora, qlora and full are"),
        ("train_type: adalora", "adalora is not trained here"),
        ("val_set_size: 500", "write the share of the prompts"),
        ("quantization_bit: 2", "2 bits"),
        ("quantization_method: hqq", "hqq"),
        ("adapters: [one, two]", "merge the others first"),
        ("special_tokens:\n  pad_token: <pad>", "resize_embeddings"),
        ("unfrozen_parameters: ['lm_head']", "use_peft: true"),
        ("freeze_trainable_layers: 4", "use_peft: true"),
        ("galore_rank: 8", "only plain LoRA"),
        ("sequence_parallel_degree: 4", "never divided over devices"),
        ("system: Be kind.", "`system` column"),
        ("use_hf: false", "Hugging Face hub"),
        ("mix_strategy: interleave_under", "weights"),
        ("lora_bias: all", "biases"),
        ("evals_per_epoch: often", "eval_strategy: epoch"),
    ],
)
def test_what_would_train_something_else_is_refused_with_a_way_out(load, text, says):
    message = refusal(load, text)
    assert message.startswith(f"recipe.yaml:1: {text.split(':')[0]}: ")
    assert says in message


NAMES = """
lora_rank max_samples base_model dataset datasets micro_batch_size val_set_size lora_model_dir sequence_len
cutoff_len adapter finetuning_type rl stage pref_loss num_epochs optimizer lr_scheduler lora_target_linear
template train_type model target_modules eval_dataset val_dataset dataset_dir split_dataset_ratio
wandb_project sample_packing flash_attention special_tokens attn_impl random_state lora_target overwrite_cache
plot_loss template_type sft_type quantization_bit rlhf_type r
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_a_name_of_another_tool_is_understood(name):
    assert name not in known_settings()
    current, notice = current_entries(name, None)
    assert notice
    assert name not in current


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("lora_ranks", "lora_r"),
        ("max_sample", "max_samples"),
        ("base_modle", "model_name_or_path"),
        ("datasett", "dataset"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("train_batch_size", "per_device_train_batch_size"),
        ("learningrate", "learning_rate"),
        ("Max-Prompt-Lenght", "max_prompt_length"),
        *[
            (name, None)
            for name in ("num_train_samples", "save_model", "adam_beta3", "adam_epsilon2", "sampless")
        ],
        *[(name, None) for name in ("load_in_16bit", "local_ranking", "evaluation_steps", "max_sequences")],
    ],
)
def test_a_hint_is_made_of_the_words_that_were_typed(load, typed, hint):
    message = refusal(load, f"{typed}: 1")
    assert (f"did you mean {hint!r}?" in message) if hint else ("did you mean" not in message)


def test_names_of_other_tools_lead_to_settings_and_hide_none():
    known = known_settings()
    assert set(other_tools.RENAMED.values()) <= known.keys()
    assert {takes_as(name) for name in other_tools.RENAMED} <= known.keys()
    assert not known.keys() & (other_tools.RENAMED.keys() | other_tools.NO_EFFECT.keys())
    assert not known.keys() & other_tools.REFUSED.keys()
    tables = (other_tools.RENAMED, other_tools.NO_EFFECT, other_tools.REFUSED, other_tools.TRANSLATED)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    for name in known:  # no prefix swallows a setting
        assert other_tools.translate(name, None, {}) is None or name in other_tools.TRANSLATED


# ------------------------------------------------------------------------------- data of LLaMA-Factory

NO_MORE = {"system": None, "tools": None}
"""Columns that LLaMA-Factory does not read where others are named and these are not."""
ALPACA = {"prompt": "question", "query": "extra", "chosen": "good", "rejected": "bad", "system": "system"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (SHAREGPT, {"dataset_name": "data/pairs.json", "data_format": "sharegpt", "columns": NO_MORE}),
        (
            {"hf_hub_url": "some/pairs", "ranking": True, "split": "en", "subset": "v2", "columns": ALPACA},
            {
                "dataset_name": "some/pairs",
                "dataset_train_split": "en",
                "dataset_config": "v2",
                "data_format": "instruction",
                "columns": {
                    "instruction": "question", "input": "extra", "chosen": "good", "rejected": "bad",
                    "history": None, "tools": None,
                },
            },
        ),
        ({"file_name": "b", "ranking": True}, {"dataset_name": "data/b", "data_format": "instruction"}),
        (
            {
                **SHAREGPT,
                "columns": {"messages": "turns", "chosen": "chosen", "rejected": "worse"},
                "tags": {"role_tag": "speaker", "content_tag": "content", "user_tag": "user"},
            },
            {
                "dataset_name": "data/pairs.json",
                "data_format": "messages",
                "columns": {"messages": "turns", "rejected": "worse", "role": "speaker", **NO_MORE},
            },
        ),
    ],
)  # fmt: skip
def test_an_entry_of_dataset_info_becomes_settings_that_read_it(load, entry, expected):
    assert load("dataset: mine", described={"mine": entry}).settings == expected


def test_the_folder_and_several_sets_of_dataset_info(load):
    described = {"one": SHAREGPT, "two": {**SHAREGPT, "file_name": "more.json"}}
    recipe = load(
        "dataset: one, two\neval_dataset: two\ndataset_dir: sets", described=described, folder="sets"
    )
    assert recipe.settings == {
        "dataset_name": ["sets/pairs.json", "sets/more.json"],
        "data_format": "sharegpt",
        "columns": NO_MORE,
        "eval_dataset_name": "sets/more.json",
    }


def test_several_sets_leave_out_the_columns_that_all_of_them_leave_out(load):
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    described = {
        "plain": {"file_name": "a.json", "ranking": True, "columns": columns},
        "more": {"file_name": "b.json", "ranking": True, "columns": {**columns, "query": "input"}},
        "all": {"file_name": "c.json", "ranking": True},
    }
    recipe = load("dataset: plain, more\neval_dataset: more", described=described)
    assert recipe.settings["columns"] == {"history": None, "system": None, "tools": None}
    assert recipe.settings["eval_dataset_name"] == "data/b.json"
    assert "columns" not in load("dataset: plain, all").settings


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({**SHAREGPT, "ranking": False}, "not marked `ranking: true`"),
        (
            {**SHAREGPT, "num_samples": 5, "columns": {"images": "image"}},
            "for num_samples, images; remove them",
        ),
        ({"ms_hub_url": "some/pairs", "ranking": True}, "only hf_hub_url and file_name"),
        ({**SHAREGPT, "formatting": "other"}, "formatting other is not known"),
        ({**SHAREGPT, "tags": {"user_tag": "customer"}}, "user_tag: turns of 'customer' are not known; name"),
        ({**SHAREGPT, "tags": {"user_tag": "gpt", "assistant_tag": "human"}}, "user_tag: turns of 'gpt' are"),
        ({**SHAREGPT, "tags": {"rank_tag": "x"}}, "no counterpart here for rank_tag"),
    ],
)
def test_an_entry_that_has_no_counterpart_is_named(load, entry, says):
    assert says in refusal(load, "dataset: mine", described={"mine": entry})


def test_a_set_that_nothing_describes_is_named(load):
    assert "set dataset_dir to the folder" in refusal(load, "stage: dpo\ndataset: mine")
    described = {"other": SHAREGPT}
    assert "'mine' is not in data/dataset_info.json; it has other" in refusal(
        load, "stage: dpo\ndataset: mine", described=described
    )


def test_sets_that_are_read_in_two_ways_are_refused(load):
    described = {"one": SHAREGPT, "two": {"file_name": "b.json", "ranking": True}}
    assert "data/pairs.json and data/b.json differ in data_format" in refusal(
        load, "dataset: one,two", described=described
    )


def test_an_evaluation_set_is_read_as_the_training_data_is(load):
    described = {"one": SHAREGPT, "two": {"file_name": "b.json", "ranking": True}}
    message = refusal(load, "dataset: one\neval_dataset: two", described=described)
    assert "eval_dataset: data/pairs.json and data/b.json differ in data_format" in message


def test_a_broken_dataset_info_is_named(load, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text("{")
    assert "cannot read data/dataset_info.json" in refusal(load, "dataset: mine")


def test_a_file_that_is_there_is_read_whatever_its_name(load, tmp_path):
    for name in ("a:b.jsonl", "pairs"):
        (tmp_path / name).touch()
        assert load(f"stage: dpo\ndataset: '{name}'").settings == {"objective": "dpo", "dataset_name": name}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"one": SHAREGPT}))
    assert load("stage: dpo\ndataset: pairs").settings == {"objective": "dpo", "dataset_name": "pairs"}
    assert load("datasets: [{path: data, data_files: [x.json]}]").settings == {"dataset_name": "data/x.json"}


def test_names_with_a_subset_or_a_count(load):
    assert load("", "--dataset some/pairs:en").settings == {
        "dataset_name": "some/pairs",
        "dataset_config": "en",
    }
    assert "dataset_train_split: train[:500]" in refusal(load, "dataset: some/pairs#500")


# --------------------------------------------------------------------------------------- data of Axolotl


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{path: a.jsonl, ds_type: json}", {"dataset_name": "a.jsonl"}),
        ("{path: json, data_files: [a.jsonl]}", {"dataset_name": "a.jsonl"}),
        (
            "{path: some/pairs, name: en, split: train, type: chatml.intel}",
            {
                "dataset_name": "some/pairs",
                "dataset_train_split": "train",
                "data_format": "instruction",
                "dataset_config": "en",
                "chat_template": "chatml",
            },
        ),
        ("{path: a, chat_template: tokenizer_default}", {"dataset_name": "a"}),
        ("{path: a, chat_template: chatml}", {"dataset_name": "a", "chat_template": "chatml"}),
        ("{path: a, type: llama3.ultra}", {"dataset_name": "a", "chat_template": "llama3"}),
        ("{path: a, type: chat_template.argilla_chat}", {"dataset_name": "a"}),
        (
            "{path: a, type: chat_template.default, field_messages: turns, field_chosen: better, "
            "field_rejected: rejected, message_property_mappings: {role: from, content: value}, "
            "roles: {user: [human]}}",
            {
                "dataset_name": "a",
                "data_format": "messages",
                "columns": {"messages": "turns", "chosen": "better", "role": "from", "content": "value"},
            },
        ),
        (
            "{path: a, type: {field_prompt: q, field_chosen: y, field_system: s, prompt_format: '{prompt}'}}",
            {"dataset_name": "a", "data_format": "standard", "columns": {"prompt": "q", "chosen": "y"}},
        ),
    ],
)  # fmt: skip
def test_a_block_of_data_becomes_settings_that_read_it(load, block, expected):
    assert load(f"datasets:\n  - {block}").settings == expected


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("{path: a, shards: 4, revision: main}", "no counterpart here for shards, revision"),
        ("{path: a, type: alpaca}", "type alpaca is for other rows than pairs"),
        ("{path: some/pairs, data_files: [x.json]}", "data_files of a hub set"),
        ("{path: a, type: {field_prompt: q, prompt_format: 'Q: {prompt}'}}", "type.prompt_format"),
        ("{path: a, message_property_mappings: {thinking: reasoning}}", "thinking"),
        ("{type: chat_template.argilla}", "needs a path"),
        ("a.jsonl", "expected a list of mappings"),
    ],
)
def test_a_block_that_has_no_counterpart_is_named(load, block, says):
    assert says in refusal(load, f"datasets:\n  - {block}")


def test_several_blocks_and_their_test_data(load):
    text = "datasets: [{path: a.jsonl}, {path: b.jsonl}]\ntest_datasets: [{path: c.jsonl, split: test}]"
    assert load(text).settings == {
        "dataset_name": ["a.jsonl", "b.jsonl"],
        "eval_dataset_name": "c.jsonl",
        "dataset_test_split": "test",
    }
    assert "a and b differ in split" in refusal(load, "datasets: [{path: a, split: x}, {path: b, split: y}]")


def test_data_on_the_command_line_replaces_all_that_the_file_says_of_its_own(load):
    described = {"mine": SHAREGPT}
    recipe = load(
        LLAMA_FACTORY.replace("pairs_en", "mine"), "--dataset_name other.jsonl", described=described
    )
    assert recipe.settings["dataset_name"] == "other.jsonl"
    assert "data_format" not in recipe.settings
    assert not any(notice.startswith("dataset ") for notice in recipe.notices)
    assert load("dataset_name: a.jsonl", "--dataset b.jsonl").settings == {"dataset_name": "b.jsonl"}
    assert load("dataset_name: a.jsonl\ndataset: b.jsonl").settings == {"dataset_name": "a.jsonl"}


def test_a_description_next_to_the_name_of_other_data_has_no_effect(load):
    described = {"one": SHAREGPT}
    recipe = load("dataset_name: a.jsonl\ndataset: one", described=described)
    assert recipe.settings == {"dataset_name": "a.jsonl"}
    assert recipe.notices == ("dataset (recipe.yaml:2): no effect: dataset_name is set too",)
    recipe = load("eval_dataset_name: a.jsonl\neval_dataset: one")
    assert recipe.settings == {"eval_dataset_name": "a.jsonl"}
    assert recipe.notices == ("eval_dataset (recipe.yaml:2): no effect: eval_dataset_name is set too",)


def test_two_names_of_one_thing_that_agree_are_not_reported_as_ignored(load):
    text = "model_name_or_path: some/7b\nbase_model: some/7b\n"
    text += "chat_template: jinja\nchat_template_jinja: '{{ x }}'"
    recipe = load(text)
    assert recipe.settings == {"model_name_or_path": "some/7b", "chat_template": "{{ x }}"}
    assert not any("ignored" in notice for notice in recipe.notices)
    assert "ignored" in load("model_name_or_path: some/7b\nbase_model: other").notices[0]


def test_a_name_on_the_command_line_beats_other_names_of_the_same_in_the_file(load):
    assert load(AXOLOTL, "--lora_target_modules k_proj").settings["lora_target_modules"] == "k_proj"
    text = "chat_template: jinja\nchat_template_jinja: '{{ x }}'"
    assert load(text, "--template llama3").settings == {"chat_template": "llama3"}


USER = {"role": "user", "content": "Name a colour."}
TURNS = {
    "conversations": [{"from": "human", "value": "Name a colour."}],
    "chosen": {"from": "gpt", "value": "Red."},
    "rejected": {"from": "gpt", "value": "A dog."},
}


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("dataset: mine", TURNS),
        ("dataset: renamed",
         {"turns": TURNS["conversations"], "good": TURNS["chosen"], "bad": TURNS["rejected"]}),
        ("dataset: questions", {"question": "Name a colour.", "good": "Red.", "bad": "A dog."}),
        ("datasets: [{path: data/rows.json, type: chatml.intel}]",
         {"question": "Name a colour.", "chosen": "Red.", "rejected": "A dog."}),
        ("datasets: [{path: data/rows.json, type: chatml.icr}]",
         {"input": "Name a colour.", "chosen": "Red.", "rejected": "A dog."}),
        ("datasets: [{path: data/rows.json, type: chatml.prompt_pairs}]",
         {"prompt": "Name a colour.", "chosen": "Red.", "rejected": "A dog."}),
        ("datasets: [{path: data/rows.json, type: chat_template.default, field_messages: turns, "
         "message_property_mappings: {role: who, content: said}}]",
         {"turns": [{"who": "user", "said": "Name a colour."}],
          "chosen": {"who": "assistant", "said": "Red."},
          "rejected": {"who": "assistant", "said": "A dog."}}),
        ("datasets: [{path: data/rows.json, type: chat_template.argilla}]",
         {"prompt": "Name a colour.", "chosen": [USER, {"role": "assistant", "content": "Red."}],
          "rejected": [USER, {"role": "assistant", "content": "A dog."}]}),
    ],
)  # fmt: skip
def test_rows_are_read_as_the_other_tool_reads_them(load, tmp_path, text, row):
    base = {"file_name": "rows.json", "ranking": True}
    columns = {"messages": "turns", "chosen": "good", "rejected": "bad"}
    asked = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    described = {
        "mine": {**SHAREGPT, "file_name": "rows.json"},
        "renamed": {**base, "formatting": "sharegpt", "columns": columns},
        "questions": {**base, "columns": asked},
    }
    settings = load(text, described=described).settings
    (tmp_path / "data" / "rows.json").write_text(json.dumps([row]))
    reading = {key: settings.get(key) for key in ("data_format", "columns")}
    (pair,) = read_preferences(settings["dataset_name"], **reading).pairs
    assert pair.prompt == [USER]
    assert [side[0]["content"] for side in (pair.chosen, pair.rejected)] == ["Red.", "A dog."]


# ---------------------------------------------------------------------------------------------- Python


def test_old_keywords_become_todays_with_a_line_each():
    given = {
        "output_dir": "runs/one",
        "evaluation_strategy": "steps",
        "warmup_ratio": 0.1,
        "torch_dtype": torch.bfloat16,
        "max_seq_length": 1024,
        "logging_dir": "logs",
        "gradient_checkpointing": "unsloth",
        "beta": 0.1,
    }
    settings, lines = current_keywords(given)
    assert settings == {
        "output_dir": "runs/one",
        "eval_strategy": "steps",
        "warmup_steps": 0.1,
        "dtype": "bfloat16",
        "max_length": 1024,
        "gradient_checkpointing": True,
        "beta": 0.1,
    }
    assert [line.split(":")[0] for line in lines] == [
        "evaluation_strategy",
        "warmup_ratio",
        "torch_dtype",
        "max_seq_length",
        "logging_dir",
        "gradient_checkpointing",
    ]
    assert lines[1] == "warmup_ratio: now called warmup_steps"


def test_a_keyword_under_todays_name_beats_the_old_one():
    settings, lines = current_keywords({"warmup_ratio": 0.1, "warmup_steps": 100})
    assert settings == {"warmup_steps": 100}
    assert lines == ["warmup_ratio: now called warmup_steps; ignored, since warmup_steps is set too"]
    assert current_keywords({"warmup_steps": 100, "warmup_ratio": 0.1})[0] == {"warmup_steps": 100}


def test_keywords_the_class_takes_itself_are_passed_on():
    given = {"max_prompt_length": 128, "remove_unused_columns": False, "padding_value": 0, "bf16": "auto"}
    settings, lines = current_keywords(given, accepted={"max_prompt_length", "remove_unused_columns", "bf16"})
    assert settings == {"max_prompt_length": 128, "remove_unused_columns": False}
    assert [line.split(":")[0] for line in lines] == ["padding_value", "bf16"]


def test_an_unknown_keyword_is_left_for_the_class_to_refuse():
    assert current_keywords({"learning_rat": 1e-5}) == ({"learning_rat": 1e-5}, [])


def test_a_keyword_that_asks_for_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="max_samples: no setting limits the rows"):
        current_keywords({"max_samples": 10})


def test_a_mixture_of_the_alignment_handbook_is_understood(load):
    mixture = {
        "datasets": [
            {"id": "some/pairs", "config": "default", "split": "train_prefs", "weight": 0.5},
            {"id": "other/pairs", "config": "default", "split": "train_prefs", "columns": ["chosen"]},
        ],
        "test_split_size": 0.02,
        "seed": 0,
    }
    recipe = load(json.dumps({"dataset_mixture": mixture}))
    check_recipe(recipe.settings)
    assert any("its seed has no effect" in notice for notice in recipe.notices)
    assert recipe.settings == {
        "dataset_name": {"some/pairs": 0.5, "other/pairs": 1.0},
        "dataset_config": "default",
        "dataset_train_split": "train_prefs",
        "eval_split": 0.02,
    }
    mixture["datasets"][1]["split"] = "train_sft"
    with pytest.raises(ConfigError, match="differ in split"):
        load(json.dumps({"dataset_mixture": mixture}))
    with pytest.raises(ConfigError, match="no counterpart here for shards"):
        load(json.dumps({"dataset_mixture": mixture | {"shards": 3}}))
