"""What TRL's own tests of its ORPO trainer exercise, with models and data made here."""

import copy
import dataclasses
import importlib
import importlib.resources
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo import ORPOConfig, ORPOTrainer
from orpo.errors import ConfigError, DataError, ModelError
from orpo.pairs import TokenizedPair

NUMBERS = range(17)
SIZE = len(NUMBERS)


def _user(n):
    return [{"role": "user", "content": f"Is {n} better than {n + 1}?"}]


def _assistant(text):
    return [{"role": "assistant", "content": text}]


ROWS = {
    "standard_preference": lambda n: {
        "prompt": f"{n} is better",
        "chosen": f" than {n + 1}.",
        "rejected": f" than the {n} moon.",
    },
    "standard_implicit_prompt_preference": lambda n: {
        "chosen": f"Row {n} is better than nothing.",
        "rejected": f"Row {n} is better than the moon.",
    },
    "conversational_preference": lambda n: {
        "prompt": _user(n),
        "chosen": _assistant(f"Yes, {n}."),
        "rejected": _assistant("It is the moon."),
    },
    "conversational_implicit_prompt_preference": lambda n: {
        "chosen": _user(n) + _assistant(f"Yes, {n}."),
        "rejected": _user(n) + _assistant("It is the moon."),
    },
}


def zen(name, number=SIZE):
    return Dataset.from_list([ROWS[name](n) for n in range(number)])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml", pad_is_eos=True)


@pytest.fixture
def model(tokenizer):
    return tiny_models.build("Qwen2", vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def model_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.build("Qwen2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_and_compare(trainer, only=""):
    """Train; every weight whose name contains `only` has moved."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    for name, weight in before.items():
        if only in name and weight.sum() != 0:
            assert not torch.equal(weight, trainer.model.get_parameter(name)), name


@pytest.mark.parametrize("name", ["standard_preference", "conversational_preference"])
def test_full_fine_tuning(model, tokenizer, tmp_path, name):
    args = ORPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        remove_unused_columns=False,
        gradient_accumulation_steps=1,
        learning_rate=9e-1,
        eval_strategy="steps",
        beta=0.1,
        report_to="none",
    )
    trainer = ORPOTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=zen(name), eval_dataset=zen(name, 2)
    )
    train_and_compare(trainer)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_lora(model, tokenizer, tmp_path, name, bf16):
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    args = ORPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=3,
        gradient_accumulation_steps=4,
        learning_rate=9e-1,
        eval_strategy="steps",
        beta=0.1,
        report_to="none",
        bf16=bf16,
    )
    trainer = ORPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=zen(name),
        eval_dataset=zen(name, 2),
        peft_config=adapter,
    )
    train_and_compare(trainer, only="lora")


def test_saved_adapter_is_an_ordinary_one(model_folder, tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2)
    trainer = ORPOTrainer(
        model_folder, args, train_dataset=zen("conversational_preference"), peft_config=LoraConfig(r=2)
    )
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    # and training continues from it
    args = ORPOConfig(output_dir=str(tmp_path / "more"), max_steps=2, learning_rate=1e-2)
    more = ORPOTrainer(str(tmp_path), args, train_dataset=zen("conversational_preference"))
    train_and_compare(more, only="lora")


def test_adapters_of_adapters_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(ModelError, match="adapter already"):
        ORPOTrainer(
            get_peft_model(model, LoraConfig()),
            ORPOConfig(output_dir=str(tmp_path)),
            train_dataset=zen("standard_preference"),
            processing_class=tokenizer,
            peft_config=LoraConfig(),
        )


def test_processing_class_is_found_with_the_model(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    args = ORPOConfig(output_dir=str(tmp_path), max_steps=1)
    trainer = ORPOTrainer(model=model, args=args, train_dataset=zen("standard_preference"))
    assert trainer.processing_class is not None
    trainer.train()


def test_compute_metrics(model, tokenizer, tmp_path):
    args = ORPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        do_eval=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        max_steps=3,
    )
    trainer = ORPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=zen("standard_preference"),
        eval_dataset=zen("standard_preference", 2),
        compute_metrics=lambda *a, **k: {"test": 0.0},
    )
    trainer.train()
    assert trainer.state.log_history[-2]["eval_test"] == 0.0


def test_model_dtype(model_folder, tmp_path):
    args = ORPOConfig(
        output_dir=str(tmp_path), model_init_kwargs={"dtype": torch.float16}, learning_rate=0.1, max_steps=2
    )
    trainer = ORPOTrainer(model_folder, args, train_dataset=zen("standard_preference"))
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float16}
    train_and_compare(trainer, only="proj.weight")


def test_evaluation_comes_first_in_the_log(model_folder, tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=3)
    data = DatasetDict(train=zen("standard_preference"), test=zen("standard_preference", 2))
    trainer = ORPOTrainer(model_folder, args, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    assert trainer.state.log_history[0]["eval_loss"] is not None


@pytest.mark.parametrize("peft", [False, True])
def test_gradient_checkpointing_gives_the_same_weights(model_folder, tmp_path, peft):
    finals = []
    for on in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            args = ORPOConfig(
                output_dir=str(tmp_path),
                learning_rate=1e-2,
                gradient_checkpointing=on,
                max_steps=2,
                optim="sgd",
            )
        adapter = LoraConfig(r=2, init_lora_weights=False) if peft else None
        trainer = ORPOTrainer(
            model_folder, args, train_dataset=zen("standard_preference"), peft_config=adapter
        )
        train_and_compare(trainer, only="lora" if peft else "proj.weight")
        finals.append([weight.detach() for weight in trainer.model.parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other)


def test_tags(model_folder, tmp_path):
    for adapter in (None, LoraConfig()):
        args = ORPOConfig(output_dir=str(tmp_path))
        trainer = ORPOTrainer(
            model_folder, args, train_dataset=zen("standard_preference"), peft_config=adapter
        )
        assert {"orpo", "trl"} <= set(trainer.model.model_tags)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"
class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def test_trust_remote_code(tokenizer, tmp_path):
    llama = tiny_models.build("Llama", vocab_size=len(tokenizer))
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "remote.py").write_text(REMOTE)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "remote_llama",
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {"processing_class": tokenizer, "train_dataset": zen("standard_preference")}
    with pytest.raises(ValueError, match="custom code"):
        ORPOTrainer(str(tmp_path), ORPOConfig(output_dir=str(tmp_path / "run")), **arguments)
    args = ORPOConfig(output_dir=str(tmp_path / "run"), trust_remote_code=True)
    assert type(ORPOTrainer(str(tmp_path), args, **arguments).model).__name__ == "RemoteForCausalLM"


# ------------------------------------------------------------------------------------------ what TRL's cannot


def test_no_arguments_at_all(model_folder, tmp_path, monkeypatch):
    """peers 8: args=None raised AttributeError."""
    monkeypatch.chdir(tmp_path)
    trainer = ORPOTrainer(model_folder, train_dataset=zen("standard_preference"))
    assert trainer.args.output_dir == "orpo_output"


def test_model_init(model_folder, tokenizer, tmp_path):
    """peers 8: the model_init path raised AttributeError."""
    args = ORPOConfig(output_dir=str(tmp_path), max_steps=1, learning_rate=0.1)

    def make():
        return AutoModelForCausalLM.from_pretrained(model_folder)

    trainer = ORPOTrainer(
        model_init=make, args=args, train_dataset=zen("standard_preference"), processing_class=tokenizer
    )
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
    assert losses[0] == losses[1], "each train starts from a new model"


SCRIPT = ["--dataset_name", "pairs", "--model_name_or_path", "base", "--lora_r", "4", "--use_peft"]


@pytest.mark.parametrize("parser_name", ["HfArgumentParser", "TrlParser"])
def test_the_arguments_of_trl_s_scripts_are_parsed(tmp_path, monkeypatch, parser_name):
    """As trl/scripts parse: what its classes have in common with ours is theirs."""
    import transformers
    import trl

    theirs = trl.ScriptArguments, trl.ModelConfig
    for one in theirs:
        monkeypatch.setitem(sys.modules, one.__module__, importlib.import_module(one.__module__))
    parser = getattr(trl, parser_name, None) or getattr(transformers, parser_name)
    for classes in ((theirs[0], ORPOConfig, theirs[1]), (ORPOConfig, *theirs)):
        words = [*SCRIPT, "--beta", "0.3", "--output_dir", str(tmp_path)]
        parsed = parser(classes).parse_args_into_dataclasses(words)
        config, script, model = sorted(
            parsed, key=lambda one: ("ORPO", "Scri", "Mode").index(type(one).__name__[:4])
        )
        assert type(config) is ORPOConfig and config.beta == 0.3 and config.output_dir == str(tmp_path)
        assert (script.dataset_name, model.model_name_or_path, model.lora_r) == ("pairs", "base", 4)
        assert trl.get_peft_config(model).r == 4
        assert config.dataset_name is None and not config.use_peft
    full = dataclasses.replace(ORPOConfig(output_dir="x", dataset_name="pairs"), beta=0.2)
    assert full.dataset_name == "pairs" and full.to_dict()["dataset_name"] == "pairs", "objects keep all"
    for one in theirs:
        monkeypatch.delitem(sys.modules, one.__module__)
    (config,) = transformers.HfArgumentParser(ORPOConfig).parse_args_into_dataclasses(
        [*SCRIPT, "--output_dir", "x"]
    )
    assert config.dataset_name == "pairs" and config.use_peft


@pytest.mark.parametrize("name", ["standard_preference", "conversational_preference"])
def test_items_of_the_training_data_read_as_trl_s_rows(model, tokenizer, tmp_path, name):
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(output_dir=str(tmp_path), report_to="none"),
        processing_class=tokenizer,
        train_dataset=zen(name),
    )
    item = trainer.train_dataset[0]
    assert "chosen_input_ids" in item and "prompt" not in item
    assert set(trainer.train_dataset.column_names) == set(item) == set(dict(item))
    for side, answer in (("chosen", item.chosen), ("rejected", item.rejected)):
        ids, labels = item[f"{side}_input_ids"], item[f"{side}_labels"]
        assert ids == item["prompt_input_ids"] + answer and len(labels) == len(ids)
        assert item[f"{side}_attention_mask"] == [1] * len(ids)
        assert labels == [-100] * len(item["prompt_input_ids"]) + answer
    assert item["prompt_input_ids"] == item.prompt and item["prompt_attention_mask"] == [1] * len(item.prompt)
    with pytest.raises(KeyError):
        item["prompt_labels"]
    alone = TokenizedPair([1, 2], [3, 4, 5], [], chosen_context=2)
    assert alone["chosen_labels"] == [-100] * 4 + [5] and "rejected_labels" not in alone


@pytest.mark.parametrize("name", ["standard_preference", "conversational_preference"])
def test_streaming(model, tokenizer, tmp_path, name):
    """peers 8: TypeError."""
    stream = IterableDataset.from_generator(lambda: (ROWS[name](n) for n in NUMBERS))
    args = ORPOConfig(
        output_dir=str(tmp_path), max_steps=5, learning_rate=0.1, eval_strategy="steps", shuffle_buffer=4
    )
    trainer = ORPOTrainer(
        model, args, train_dataset=stream, eval_dataset=stream.take(3), processing_class=tokenizer
    )
    train_and_compare(trainer)
    assert len(trainer.eval_dataset) == 3
    with pytest.raises(ConfigError, match="max_steps"):
        ORPOTrainer(
            model, ORPOConfig(output_dir=str(tmp_path)), train_dataset=stream, processing_class=tokenizer
        )


def test_a_stream_that_is_named_needs_no_held_out_data(model_folder, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(ROWS["standard_preference"](n)) + "\n" for n in NUMBERS))
    settings = {"dataset_name": str(file), "streaming": True, "max_steps": 1}
    trainer = ORPOTrainer(model_folder, ORPOConfig(output_dir=str(tmp_path / "run"), **settings))
    trainer.train()
    assert trainer.args.eval_strategy == "no"


def test_a_stream_says_how_its_rows_are_read_and_what_became_of_them(model_folder, tmp_path, capsys):
    """What a whole set says at once, a stream says of its first rows, and of the others at the end."""
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"{n}, ok.", "rejected": f"no {n}", "by": "x"}
        for n in range(400)
    ]
    rows[300]["chosen"] = " "
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset_name": str(file), "streaming": True, "max_steps": 30, "shuffle_buffer": 1}
    args = ORPOConfig(output_dir=str(tmp_path / "run"), chat_template="chatml", logging_steps=30, **settings)
    trainer = ORPOTrainer(model_folder, args)
    trainer.train()
    printed = capsys.readouterr()
    said = printed.out + printed.err
    for words in (
        "train, first 256 rows of the stream: using 256 of 256 rows",
        "columns not used: by",
        "texts are read as a user turn and an answer, through the chat template",
        "<|im_start|>user\\nWhat is 0?",
        "dropped 1: empty chosen answer (first:",
    ):
        assert words in said.replace("⏎", "\\n"), words
    assert trainer.args.text_rows == "chat"

    rows[3]["chosen"] = 7
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"pairs.jsonl:4"):
        ORPOTrainer(model_folder, args)


def test_named_data_and_model(model_folder, tmp_path):
    rows = [json.dumps(ROWS["conversational_preference"](n)) + "\n" for n in NUMBERS]
    for name, some in (("train", rows[:12]), ("held_out", rows[11:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    args = ORPOConfig(
        output_dir=str(tmp_path / "run"),
        model_name_or_path=model_folder,
        dataset_name=str(tmp_path / "train.jsonl"),
        max_steps=2,
        eval_dataset_name=str(tmp_path / "held_out.jsonl"),
        max_dropped=0.2,
    )
    trainer = ORPOTrainer(args=args)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (12, 5), "held out means held out"
    trainer.train()
    assert trainer.state.best_model_checkpoint


def test_tools_enter_the_prompt(model, tokenizer, tmp_path):
    """peers 4: the column was ignored without a word."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    schema = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
    rows = [ROWS["conversational_preference"](n) | {"tools": [schema]} for n in NUMBERS]
    trainer = ORPOTrainer(
        model,
        ORPOConfig(output_dir=str(tmp_path), max_steps=1),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert "weather" in tokenizer.decode(trainer.train_dataset[0].prompt)
    trainer.train()


def test_unused_arguments_are_named_in_one_line(model, tokenizer, tmp_path, capsys):
    ORPOTrainer(
        model,
        ORPOConfig(output_dir=str(tmp_path)),
        data_collator=lambda rows: rows,
        train_dataset=zen("standard_preference"),
        processing_class=tokenizer,
        preprocess_logits_for_metrics=lambda logits, labels: logits,
    )
    printed = capsys.readouterr().out
    assert (
        "data_collator has no effect: " in printed
        and "preprocess_logits_for_metrics has no effect: " in printed
    )


def test_names_of_other_years_are_understood_in_python_too(model, tokenizer, tmp_path, capsys):
    args = ORPOConfig(
        output_dir=str(tmp_path), evaluation_strategy="no", warmup_ratio=0.1, torch_dtype=torch.float32,
        max_seq_length=64, group_by_length=True, per_device_train_batch_size=2,
    )  # fmt: skip
    assert (args.warmup_steps, args.dtype, args.max_length) == (0.1, "float32", 64)
    rows = [ROWS["conversational_preference"](n) for n in NUMBERS]
    trainer = ORPOTrainer(model=model, args=args, train_dataset=rows, tokenizer=tokenizer)
    assert trainer.processing_class is tokenizer
    printed = capsys.readouterr().out
    for name in ("evaluation_strategy", "warmup_ratio", "torch_dtype", "max_seq_length", "group_by_length"):
        assert printed.count(f"{name}: ") == 1, name
    with pytest.raises(TypeError, match="no_such_setting"):
        ORPOConfig(output_dir=str(tmp_path), no_such_setting=1)


def test_optimizers_and_dtypes_of_the_user(model, tokenizer, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ORPOTrainer(
        model,
        ORPOConfig(output_dir=str(tmp_path), max_steps=1),
        train_dataset=zen("standard_preference"),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    with pytest.raises(ConfigError, match="ORPOConfig"):
        ORPOTrainer(
            model, {"beta": 0.1}, train_dataset=zen("standard_preference"), processing_class=tokenizer
        )


def test_model_is_never_spread_over_devices_by_us(model_folder, tmp_path, monkeypatch):
    """peers 12: with model_init_kwargs, device_map became "auto"."""
    seen = {}
    plain = AutoModelForCausalLM.from_pretrained

    def watch(*arguments, **settings):
        seen.update(settings)
        return plain(*arguments, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    args = ORPOConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "float32"})
    ORPOTrainer(model_folder, args, train_dataset=zen("standard_preference"))
    assert seen["dtype"] == "float32" and seen.get("device_map") is None


@pytest.mark.slow
def test_torch_compile(model, tokenizer, tmp_path):
    args = ORPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        torch_compile=True,
        torch_compile_backend="eager",
        learning_rate=0.1,
    )
    train_and_compare(
        ORPOTrainer(model, args, train_dataset=zen("standard_preference"), processing_class=tokenizer)
    )


def test_malformed_rows_stop_with_their_place(model, tokenizer, tmp_path):
    rows = [ROWS["standard_preference"](n) for n in NUMBERS]
    rows[5]["rejected"] = 7
    with pytest.raises(DataError, match="row:5"):
        ORPOTrainer(
            model, ORPOConfig(output_dir=str(tmp_path)), train_dataset=rows, processing_class=tokenizer
        )


# ------------------------------------------------------------------------------------------ parity


def hh_rows(number):
    """Real pairs as text: the common dialogue up to the last "Assistant:", and the two answers."""
    lines = (Path(__file__).parent / "data" / "hh_excerpt.jsonl").read_text().splitlines()
    rows = []
    for line in lines[:number]:
        sides = {
            side: text.rpartition("\n\nAssistant:")
            for side, text in json.loads(line).items()
            if side in ("chosen", "rejected")
        }
        if sides["chosen"][0] == sides["rejected"][0]:
            prompt = sides["chosen"][0] + sides["chosen"][1]
            rows.append({"prompt": prompt, "chosen": sides["chosen"][2], "rejected": sides["rejected"][2]})
    return rows


CPO = {"beta": 0.2, "nll_weight": 0.7, "label_smoothing": 0.1}
SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}
THEIRS = {
    "orpo": ("ORPO", {"beta": 0.3}, {"beta": 0.3}),
    "simpo": ("CPO", {**SIMPO, "cpo_alpha": 0.0}, {}),
    "cpo_simpo": ("CPO", {**SIMPO, "cpo_alpha": 1.0}, {}),
    "cpo": ("CPO", {"beta": 0.2, "cpo_alpha": 0.7, "label_smoothing": 0.1}, CPO),
}
"""Objective -> their trainer, its settings, and ours."""


@pytest.mark.parametrize("objective", THEIRS)
def test_loss_of_a_full_batch_is_trl_s(tmp_path, objective):
    """Eight real HH pairs, tokenized by either package, through the same weights."""
    pytest.importorskip("trl", minversion="1.16")
    name, their_settings, our_settings = THEIRS[objective]
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    TheirConfig, TheirTrainer = getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")

    tokenizer = tiny_tokenizer("zephyr")
    model = tiny_models.build("Llama", vocab_size=len(tokenizer), max_position_embeddings=4096)
    rows = hh_rows(16)[:8]
    assert len(rows) == 8
    theirs = TheirTrainer(
        model,
        TheirConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            max_length=4000,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            **their_settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(theirs.get_train_dataloader()))
    model.eval()
    loss, metrics = theirs.get_batch_loss_metrics(model, batch)
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()

    args = ORPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_length=4000,
        objective=objective,
        **our_settings,
        data_format="standard",
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ours = ORPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    ours.train()
    line = ours.state.log_history[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in ours.model.named_parameters():
        torch.testing.assert_close(before[name] - weight, gradients[name], rtol=1e-4, atol=2e-6)
    if objective != "orpo":  # their CPOTrainer counts in sums, or in beta
        return
    assert line["nll_loss"] == pytest.approx(float(metrics["nll_loss"]), rel=1e-5)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "log_odds_chosen",
    ):
        assert line[name] == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6), name
    assert -line["odds_ratio_loss"] == pytest.approx(float(metrics["log_odds_ratio"]), rel=1e-4)


def dpo_of_trl(folder, model, reference, rows, tokenizer, adapter):
    """Their trainer, on a batch of all rows."""
    trl = pytest.importorskip("trl", minversion="1.16")
    args = trl.DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=len(rows), max_length=None, beta=0.3,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
    )  # fmt: skip
    data = Dataset.from_list(rows)
    return trl.DPOTrainer(
        model, reference, args, train_dataset=data, processing_class=tokenizer, peft_config=adapter
    )


def disturbed(model):
    """Trained weights moved a little away from where they are, the same way for every caller."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight += (0.1 if "lora_B" in name else 0.02 * weight.std()) * torch.randn_like(weight)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])])
def test_dpo_of_a_full_batch_is_trl_s(tmp_path, adapter):
    """The demo's model, all of it or an adapter, against itself a little earlier, on real pairs of text."""
    demo = Path(str(importlib.resources.files("orpo"))) / "demo"
    lines = (demo / "data" / "politeness" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:6]]
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    before = AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32)
    copies = copy.deepcopy(before), None if adapter else copy.deepcopy(before)
    theirs = dpo_of_trl(tmp_path, *copies, rows, tokenizer, adapter)
    disturbed(theirs.model)
    batch = next(iter(theirs.get_train_dataloader()))
    loss = theirs.compute_loss(theirs.model.eval(), batch)
    loss.backward()
    trained = {name: weight for name, weight in theirs.model.named_parameters() if weight.requires_grad}
    rewards = {name: values[-1] for name, values in theirs._metrics["eval"].items() if "rewards" in name}

    args = ORPOConfig(
        output_dir=str(tmp_path / "ours"), per_device_train_batch_size=6, objective="dpo", beta=0.3,
        text_rows="plain", data_format="standard", max_steps=1, optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0,
    )  # fmt: skip
    ours = ORPOTrainer(before, args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    ours._ask_reference(0)
    ours.model.load_state_dict({name: weight.data for name, weight in trained.items()}, strict=False)
    ours.train()
    line = ours.state.log_history[0]
    assert abs(line["loss"] - math.log(2)) > 1e-3
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    moved = {
        name: trained[name].data - weight for name, weight in ours.model.named_parameters() if name in trained
    }
    assert moved.keys() == trained.keys()
    for name, weight in trained.items():
        error = (moved[name] - weight.grad).norm() / max(weight.grad.norm(), 1e-3)
        assert error < 1e-5 or (moved[name] - weight.grad).abs().max() < 2e-6, name
    assert rewards
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert line[name] == pytest.approx(rewards[name], rel=1e-4, abs=1e-5), name
