"""`orpo export`: what is written computes what the run computes, and what is damaged is refused."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

import orpo
from orpo import cli
from orpo.errors import ConfigError, DataError, ModelError, RunError
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.export.check import LIMITS, Found, compare
from orpo.export.folder import write_folder
from orpo.export.job import export_run
from orpo.export.llama_cpp import post
from orpo.export.merged import merge_run
from orpo.export.ollama import turns_of
from orpo.export.reload import log_probs
from orpo.export.reload import main as reload
from orpo.run.checkpoints import run_recipe

pytestmark = pytest.mark.timeout(300)


def rows(number):
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus {n % 7}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + n % 7}, of course."}],
            "rejected": [{"role": "assistant", "content": "No, I will not say." + " Never!" * (n % 4)}],
        }
        for n in range(number)
    ]


def make_base(folder: Path, template="chatml", spare=0, dtype=torch.bfloat16, **changes) -> Path:
    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer) + spare,
        **sizes,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **changes,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    return folder


def trained(world: Path, name: str, base: Path, **settings) -> Path:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.03, "save_strategy": "no"}
    recipe = fixed | {"model_name_or_path": str(base), "dataset_name": str(world / "pairs.jsonl")} | settings
    with contextlib.redirect_stdout(io.StringIO()):
        orpo.train(recipe | {"output_dir": str(world / name), "report_to": "none"})
    return world / name


@pytest.fixture(scope="module")
def full_run(world) -> Path:
    return trained(world, "full", make_base(world / "base", spare=7))


@pytest.fixture(scope="module")
def lora_run(world) -> Path:
    base = make_base(world / "base-llama3", "llama3")
    return trained(
        world, "lora", base, use_peft=True, use_rslora=True, lora_r=8, lora_modules_to_save=["lm_head"]
    )


@pytest.fixture(scope="module")
def exported(full_run) -> tuple[Path, str]:
    """A full run exported by the command, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["export", str(full_run)]) == 0
    return full_run.with_name("full-export"), out.getvalue()


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def chat_ids(tokenizer, text="Hi"):
    asked = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]


# -------------------------------------------------------------------------------------- what is written


def test_a_full_run_is_saved_in_the_dtype_of_its_base_with_all_that_serving_needs(exported, full_run):
    folder, printed = exported
    assert dtypes(full_run) == {"F32"} and dtypes(folder) == {"BF16"}
    run, copy = load_file(full_run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert run.keys() == copy.keys()
    assert all(torch.equal(run[name].bfloat16(), copy[name]) for name in run)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(full_run).chat_template
    )
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == json.loads((full_run / "generation_config.json").read_text())["eos_token_id"]
    assert "bfloat16 weights" in printed and "checked in a new process" in printed
    assert f"vllm serve {folder} --served-model-name full-export" in printed
    assert "Ollama" not in printed  # there is no GGUF file


def test_the_card_says_what_it_was_made_of_how_it_was_checked_and_how_to_serve_it(exported):
    folder, _ = exported
    card = (folder / "README.md").read_text()
    for expected in (
        "# full-export",
        "## On held-out pairs",
        "| accuracy |",
        "Checked against the training run",
        "transformers serve full-export",
        "## Limits",
        "learning_rate: 0.03",
    ):
        assert expected in card
    assert str(folder.parent) not in card
    assert max(map(len, card.splitlines())) <= 120


def test_the_export_answers_through_a_pipeline(exported):
    folder, _ = exported
    ask = pipeline("text-generation", model=str(folder), device="cpu")
    turns = [{"role": "user", "content": "What is 3 plus 3?"}]
    said = ask(turns, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]
    assert said["role"] == "assistant"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([chat_ids(tokenizer, "What is 3 plus 3?")])
    by_hand = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert said["content"] == tokenizer.decode(by_hand, skip_special_tokens=True)


def test_an_export_is_evaluated_and_talked_to_as_its_run(exported, full_run, world):
    folder, _ = exported
    assert run_recipe(str(folder))["max_length"] == run_recipe(str(full_run))["max_length"]
    with contextlib.redirect_stdout(io.StringIO()):
        of_run, of_copy = (
            orpo.evaluate(str(one), world / "pairs.jsonl").evaluation for one in (full_run, folder)
        )
    gap = of_run.figures["chosen_logprob"].mean - of_copy.figures["chosen_logprob"].mean
    assert 0 < abs(gap) < 0.05
    assert ChatModel.load(str(folder)).answer("Hi", Sampling(temperature=0, max_tokens=3)) is not None


def test_an_adapter_becomes_a_model_that_computes_the_same(lora_run, world):
    done = export_run(str(lora_run), world / "merged", dtype="float32")
    assert not (done.folder / "adapter_config.json").exists()
    assert done.check.mean < 1e-5
    copy = AutoModelForCausalLM.from_pretrained(done.folder)
    base = AutoModelForCausalLM.from_pretrained(world / "base-llama3", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, lora_run)
    ids = torch.tensor([chat_ids(AutoTokenizer.from_pretrained(done.folder))])
    torch.testing.assert_close(copy(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (copy(ids).logits - adapted(ids).logits).abs().max() > 0.1
    end = AutoTokenizer.from_pretrained(done.folder).convert_tokens_to_ids("<|eot_id|>")
    assert end in copy.generation_config.eos_token_id


def test_the_base_of_an_adapter_that_moved_is_named(lora_run, world, tmp_path):
    shutil.copytree(world / "base-llama3", tmp_path / "moved")
    adapter = Path(shutil.copytree(lora_run, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "/gone/base"})
    )
    with pytest.raises(ModelError, match="/gone/base"):
        merge_run(str(adapter))
    assert merge_run(str(adapter), base=str(tmp_path / "moved")).dtype == torch.bfloat16
    card = (lora_run / "README.md").read_text()
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "lora")' in card
    assert "orpo export lora --base BASE" in card


# ------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def checked(full_run, tmp_path_factory):
    """A written folder with what it must answer; and `problems` of a copy of it, in this process."""
    merged = merge_run(str(full_run))
    folder = tmp_path_factory.mktemp("written")
    expected = write_folder(merged, folder, max_shard_size="40KB")

    def problems(copy: Path) -> str:
        request = copy.with_suffix(".request")
        asked = {"folder": str(copy), "trust_remote_code": False, **expected.questions()}
        request.write_text(json.dumps(asked))
        reload(str(request), str(copy.with_suffix(".answer")))
        found = Found(**json.loads(copy.with_suffix(".answer").read_text()))
        return "; ".join(compare(expected, found, LIMITS["bfloat16"]).problems)

    return folder, problems


def test_weights_are_sharded_and_pass(checked):
    folder, problems = checked
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert problems(folder) == ""


def flip_a_weight(folder: Path) -> None:
    name = "model.embed_tokens.weight"
    path = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name][3, 5] *= -1  # a token of no text: no log-prob shows it
    save_file(tensors, path, metadata={"format": "pt"})


def change_the_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))


def forget_a_stop_token(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))


def change_a_merge(folder: Path) -> None:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"] = state["model"]["merges"][:-60]
    path.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_a_weight, "the weights model.embed_tokens.weight are not those that were written"),
        (change_the_template, "the prompts of"),
        (forget_a_stop_token, "generation does not stop at <|im_end|>"),
        (change_a_merge, "texts get other token ids"),
    ],
)
def test_a_damaged_export_is_refused(checked, tmp_path, damage, expected):
    folder, problems = checked
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    assert expected in problems(copy)


def test_what_cannot_be_exported_leaves_nothing_behind(full_run, tmp_path):
    model = Path(shutil.copytree(full_run, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="too large for float16"):
        export_run(str(model), tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == [model]


@pytest.fixture
def barely_trained(full_run, world, tmp_path):
    """A run whose weights are so close to those of its bfloat16 base that rounding takes them back."""
    model = Path(shutil.copytree(full_run, tmp_path / "model"))
    tensors = load_file(world / "base" / "model.safetensors")
    tensors = {name: weight.float() * (1 + 2**-9 * 0.95) for name, weight in tensors.items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_what_rounding_would_undo_is_written_in_float32(
    full_run, barely_trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(LIMITS, "bfloat16", 1e-3)  # the model is small, and so is what rounding undoes
    exported = export_run(str(barely_trained), tmp_path / "out")
    assert exported.dtype == "float32" and dtypes(tmp_path / "out") == {"F32"}
    assert "rounding undoes changes as small as this run's; so it is written in float32" in (
        capsys.readouterr().out
    )
    with pytest.raises(RunError, match=r"\(limit 0\.001\), since rounding .*; --dtype float32 keeps them"):
        export_run(str(barely_trained), tmp_path / "bfloat16", dtype="bfloat16")
    assert not (tmp_path / "bfloat16").exists()


def test_mistakes_are_one_line_before_anything_is_loaded(full_run, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for words, error in (
        ({"output_dir": exported[0]}, "is there already"),
        ({"output_dir": full_run, "force": True}, "holds something else than an export"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"gguf": ["q4_k"]}, "expected f32, f16, bf16, q8_0"),
        ({"push": "no owner"}, "--push no owner"),
        ({"private": True}, "--private: nothing is uploaded without --push"),
        ({"max_shard_size": "x"}, "--max_shard_size x: expected a size"),
        ({"push": "name"}, "name the owner too"),
        ({"push": "owner/name"}, "nobody is logged in"),
    ):
        with pytest.raises(ConfigError, match=error):
            export_run(str(full_run), **({"output_dir": tmp_path / "out"} | words))
    with pytest.raises(ConfigError, match="is no adapter"):
        export_run(str(full_run), tmp_path / "out", base="x")
    with pytest.raises(DataError, match="/nope: neither a local file"):
        export_run(str(full_run), tmp_path / "out", data="/nope")


# --------------------------------------------------------------------------------------------------- parts


def test_log_probs_equal_the_plain_sum_over_the_vocabulary(full_run):
    model = AutoModelForCausalLM.from_pretrained(full_run)
    ids = list(range(5, 17))
    slow = []
    for place in range(4, len(ids)):
        logits = model(torch.tensor([ids[:place]])).logits[0, -1, :600].double()
        slow.append(float(logits[ids[place]] - torch.log(torch.exp(logits).sum())))
    assert log_probs(model, ids, 4, 600) == pytest.approx(slow, abs=1e-5)


@pytest.mark.parametrize(
    "shape", ["chatml", "think", "asks_to_think", "llama3", "gemma", "phi3", "zephyr", "mistral"]
)
def test_ollamas_template_writes_the_prompts_of_training_or_there_is_none(shape):
    from orpo.data.templates import prepare_template

    tokenizer = tiny_tokenizer(shape)
    template = prepare_template(tokenizer)
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    talks = [[user], [user, answer, user], [{"role": "system", "content": "Be brief."}, user]]
    turns = turns_of(tokenizer, template, talks)
    assert (turns is None) == (shape in {"gemma", "mistral"})  # they have no system turn of their own
    for talk in talks if turns is not None else []:
        text = template.render(tokenizer, talk, None, ask=True)
        assert turns.render(talk) == text.removeprefix(tokenizer.bos_token or "\0")


@pytest.mark.slow
def test_the_export_answers_through_transformers_serve(exported):
    """Needs the extras of `transformers serve`: fastapi, uvicorn, openai, rich."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    folder, port = exported[0], 8791
    main = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    words = [sys.executable, "-c", main, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            time.sleep(1)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
        body = {"model": str(folder), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        reply = post(f"http://localhost:{port}/v1/chat/completions", body)
    finally:
        server.kill()
        server.wait()
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["usage"]["prompt_tokens"] == len(chat_ids(AutoTokenizer.from_pretrained(folder)))
