"""Models and tokenizers load as the settings say, and what cannot be loaded is named in one line."""

import importlib
import json
import shutil

import pytest
import tiny_models
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from tiny_training import tiny_trainer

from orpo.data.token_ids import checked_token_ids
from orpo.engine import loading
from orpo.engine.loading import add_adapter, is_adapter, load_model, load_tokenizer, lora_config
from orpo.errors import ConfigError, DataError, ModelError
from orpo.evaluation.generation import this_device
from orpo.pairs import TokenizedPair
from orpo.settings.config import OrpoSettings
from orpo.training.resolve import add_template_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama in bfloat16, with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_models.build("Llama").bfloat16().save_pretrained(path)
    tiny_tokenizer("chatml").save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter of that model, that has moved."""
    path = tmp_path_factory.mktemp("adapter")
    model = load_model(OrpoSettings(model_name_or_path=folder, use_peft=True, lora_r=3))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    return str(path)


def load(folder, **settings):
    return load_model(OrpoSettings(model_name_or_path=folder, **settings))


def dtypes(model, trained=True):
    return {weight.dtype for weight in model.parameters() if weight.requires_grad == trained}


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([tiny_models.token_ids(7)])).logits.float()


def test_full_fine_tuning_gets_float32_master_weights(folder):
    model = load(folder)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert dtypes(model) == {torch.float32}
    assert dtypes(model, trained=False) == set()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("auto", torch.bfloat16),
    ],
)
def test_an_explicit_dtype_is_obeyed(folder, dtype, expected):
    assert dtypes(load(folder, dtype=dtype)) == {expected}


@pytest.mark.parametrize("dtype", ["float33", "Tensor", "int", ""])
def test_an_unknown_dtype_is_refused(folder, dtype):
    with pytest.raises(ConfigError, match="dtype"):
        load(folder, dtype=dtype)


@pytest.mark.parametrize(("has_bf16", "frozen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_frozen_base_is_held_in_bf16_where_the_hardware_has_it_and_lora_in_float32(
    folder, monkeypatch, has_bf16, frozen
):
    monkeypatch.setattr(loading, "supports_bf16", lambda: has_bf16)
    model = load(folder, use_peft=True)
    assert dtypes(model, trained=False) == {frozen}
    assert dtypes(model) == {torch.float32}
    assert dtypes(load(folder)) == {torch.float32}


def test_lora_settings_reach_the_adapter(folder):
    model = load(
        folder,
        use_peft=True,
        lora_r=5,
        lora_alpha=11,
        lora_dropout=0.25,
        lora_target_modules=["q_proj", "up_proj"],
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 11, 0.25)
    assert (config.use_rslora, config.use_dora, config.task_type) == (True, True, "CAUSAL_LM")
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained if ".lora_" in name} == {
        "q_proj",
        "up_proj",
    }
    assert any("lm_head.modules_to_save" in name for name in trained)


def test_by_default_lora_is_on_every_linear_layer_but_the_vocabulary_matrix(folder):
    model = load(folder, use_peft=True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers, linear layers in each, matrices A and B
    assert not any("lm_head" in name for name in trained)


def test_a_new_adapter_starts_as_the_base_model(folder):
    torch.testing.assert_close(logits(load(folder, use_peft=True)), logits(load(folder)))


def test_adapter_modules_that_do_not_exist_are_said(folder):
    with pytest.raises(ModelError, match=r"adapter does not fit LlamaForCausalLM.*no_such_module") as error:
        load(folder, use_peft=True, lora_target_modules=["no_such_module"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["as the model", "next to the model"])
def test_an_adapter_folder_goes_on_training(folder, adapter, how):
    model = load(adapter) if how == "as the model" else load(folder, adapter_name_or_path=adapter)
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"].r == 3
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert (logits(model) - logits(load(folder))).abs().max() > 1e-2


def test_an_adapter_folder_is_told_from_a_model(folder, adapter, tmp_path):
    assert is_adapter(adapter)
    assert not is_adapter(folder)
    assert not is_adapter(str(tmp_path / "nothing"))


def test_a_new_adapter_on_an_adapter_is_refused(folder, adapter):
    for settings in (
        {"model_name_or_path": adapter},
        {"model_name_or_path": folder, "adapter_name_or_path": adapter},
    ):
        with pytest.raises(ConfigError, match="use_peft"):
            load_model(OrpoSettings(**settings, use_peft=True))


def test_an_adapter_may_be_added_to_a_model_in_hand():
    model = add_adapter(tiny_models.build("Llama"), lora_config(OrpoSettings(lora_r=2)))
    assert isinstance(model, PeftModel)
    assert 0 < sum(w.numel() for w in model.parameters() if w.requires_grad) < 5000


def test_no_name_is_refused():
    with pytest.raises(ConfigError, match="model_name_or_path is not set"):
        load_model(OrpoSettings())


@pytest.mark.parametrize("load_it", [load, load_tokenizer], ids=["model", "tokenizer"])
def test_a_missing_folder_is_said_in_one_line(load_it, tmp_path):
    name = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"could be loaded|could not be loaded") as error:
        load_it(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load_it", [load, load_tokenizer], ids=["model", "tokenizer"])
def test_an_empty_folder_is_said_in_one_line(load_it, tmp_path):
    with pytest.raises(ModelError, match="loaded") as error:
        load_it(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_weight_file_is_said_in_one_line(folder, tmp_path):
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="could not be loaded") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def changed(folder, path, tensors=lambda found: found, **config):
    """A copy of a model with other tensors, or another config."""
    shutil.copytree(folder, path)
    weights = tensors(load_file(path / "model.safetensors"))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | config))
    return str(path)


def without(part):
    return lambda found: {name: tensor for name, tensor in found.items() if part not in name}


GPT2 = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4).to_dict()
INCOMPLETE = {
    "a tensor": ({"tensors": without("layers.1.mlp.up_proj")}, "lacks 1 tensors .*layers.1.mlp.up_proj"),
    "a layer": ({"num_hidden_layers": 3}, r"lacks 9 tensors .*layers\.2.* and 6 more\)"),
    "the head": ({"tensors": without("lm_head")}, r"lacks 1 tensors .*\(lm_head.weight\)"),
    "a reward model": (
        {"tensors": lambda found: without("lm_head")(found) | {"score.weight": torch.zeros(1, 32)}},
        r"\(lm_head.weight\) and has 1 that do not belong to it \(score.weight\)",
    ),
    "all": (GPT2, "lacks 27 tensors of GPT2LMHeadModel"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_model_that_lacks_weights_is_refused_with_their_names(folder, tmp_path, capfd, what):
    changes, message = INCOMPLETE[what]
    transformers.logging.set_verbosity_warning()
    try:
        with pytest.raises(ModelError, match=message) as error:
            load(changed(folder, tmp_path / "model", **changes))
    finally:
        transformers.logging.set_verbosity_error()
    assert "\n" not in str(error.value) and "LOAD REPORT" not in capfd.readouterr().err


def test_weights_that_have_no_place_are_said(folder, tmp_path, capsys):
    load(changed(folder, tmp_path / "model", num_hidden_layers=1))
    assert "9 tensors have no place in LlamaForCausalLM and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Qwen2", "GPT2", "Bloom", "DeepseekV3", "Mamba"])
def test_tied_weights_and_buffers_are_not_missed(tmp_path, name):
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert all(torch.equal(loaded.get_parameter(own), weight) for own, weight in model.named_parameters())


def test_an_adapter_that_lacks_weights_is_refused(adapter, tmp_path):
    path = shutil.copytree(adapter, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file(without("layers.0.mlp.up_proj")(load_file(path)), path)
    with pytest.raises(ModelError, match=r"lacks weights .*layers\.0\.mlp\.up_proj"):
        load(str(path.parent))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_as_such(folder, tmp_path, value):
    spoil = lambda found: found | {"model.norm.weight": found["model.norm.weight"] * value}
    with pytest.raises(
        ModelError, match=r"1 of its tensors hold values that are not finite \(model.norm.weight"
    ):
        load(changed(folder, tmp_path / "model", spoil))


def test_large_finite_weights_are_finite():
    assert loading._is_finite(torch.full((9,), 6e4, dtype=torch.float16)), "though their sum is not"
    assert not loading._is_finite(torch.tensor([float("inf"), float("-inf")]))


def test_whole_numbers_are_no_weights(folder, tmp_path):
    quantized = lambda found: {n: (w * 9).to(torch.int8) if w.ndim > 1 else w for n, w in found.items()}
    with pytest.raises(ModelError, match=r"stored as whole numbers \(I8\).*quantization_config"):
        load(changed(folder, tmp_path / "model", quantized))


def test_a_token_without_an_embedding_is_refused_with_its_pair(tmp_path):
    pairs = [TokenizedPair([1, 2], [3], [4], source="p:1"), TokenizedPair([1], [2, 97], [4], source="p:2")]
    with pytest.raises(ModelError, match=r"p:2: token 97 \(.*\) has no embedding in the model, which has 97"):
        tiny_trainer(tmp_path, train=pairs)
    trainer = tiny_trainer(tmp_path, train=pairs[:1])
    with pytest.raises(ModelError, match="p:2: token 97"):
        trainer.evaluate(pairs)
    stream = checked_token_ids(iter(pairs), 97, tiny_tokenizer())
    assert next(stream) == pairs[0]
    with pytest.raises(ModelError, match="p:2: token 97"):
        next(stream)


def test_an_adapter_whose_base_is_gone_names_the_base(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match="gone"):
        load(str(tmp_path / "adapter"))


def test_an_adapter_that_names_no_base_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        load(str(tmp_path / "adapter"))


def test_a_model_under_the_home_folder_is_found_from_python(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "model")
    trainer = tiny_trainer(tmp_path / "run", model="~/model")
    assert trainer.args.model_name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize("text", ["", '{"a":'])
def test_a_damaged_adapter_configuration_is_named_by_whoever_loads_it(folder, adapter, tmp_path, text):
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    (copy / "adapter_config.json").write_text(text)
    for load_it in (load_tokenizer, load, lambda name: load(folder, adapter_name_or_path=name)):
        with pytest.raises(DataError, match=r"adapter_config\.json:1: not valid JSON"):
            load_it(str(copy))


def test_a_tokenizer_that_is_missing_for_want_of_a_base_is_said_so(adapter, tmp_path):
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name its base model"):
        load_tokenizer(str(copy))
    tiny_tokenizer("chatml").save_pretrained(copy)
    assert load_tokenizer(str(copy)).chat_template  # for export --base


def test_a_missing_adapter_is_said_in_one_line(folder, tmp_path):
    with pytest.raises(ModelError, match="nowhere") as error:
        load(folder, adapter_name_or_path=str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)


def test_an_encoder_decoder_model_is_refused(tmp_path):
    transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(str(tmp_path))


def test_quantised_weights_without_an_adapter_are_refused(folder):
    with pytest.raises(ConfigError, match="use_peft"):
        load(folder, load_in_4bit=True)


def test_an_added_token_that_is_read_under_another_id_is_said(folder, tmp_path, capsys):
    """See findings/tokenizers_added_token_ids.sh."""
    load_tokenizer(folder)
    assert "states id" not in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    saved = json.loads(file.read_text())
    last = max(saved["added_tokens"], key=lambda token: token["id"])
    last["id"] += 7
    file.write_text(json.dumps(saved))
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    read = tokenizer.convert_tokens_to_ids(last["content"])
    assert (
        f"states id {last['id']} for {last['content']!r}, which is read as {read}" in capsys.readouterr().out
    )


def test_a_quantisation_that_nobody_knows_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "x"}})
    )
    with pytest.raises(ModelError, match="quantized by 'x', which transformers does not know"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantisation_asks_for_its_library_in_one_line(folder, bits, monkeypatch):
    module = importlib.import_module(f"transformers.quantizers.quantizer_bnb_{bits[8]}bit")
    monkeypatch.setattr(module, "is_bitsandbytes_available", lambda *_, **__: False)
    with pytest.raises(ModelError, match="bitsandbytes") as error:
        load(folder, use_peft=True, **{bits: True})
    assert "\n" not in str(error.value)


def test_weights_packed_into_a_float_type_are_no_numbers():
    """Every byte of 4-bit weights is two codes; bitsandbytes itself is not imported, which takes seconds."""
    model = tiny_models.build("Llama")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="1 of its tensors hold values that are not finite"):
        loading._refuse_not_finite(model, "m")
    model.model.layers[0].mlp.up_proj.weight.quant_state = object()
    loading._refuse_not_finite(model, "m")


def test_qlora_trains_the_adapter_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = tiny_models.build("Llama", hidden_size=64, intermediate_size=128)  # 4 bits come in blocks of 64
    with (
        torch.no_grad()
    ):  # two times the largest code in a byte: as numbers of the float type it is stored in, NaN
        wide.model.layers[0].mlp.up_proj.weight.fill_(0.01)
    wide.save_pretrained(tmp_path / "wide")
    model = load(str(tmp_path / "wide"), use_peft=True, load_in_4bit=True)
    assert model.get_base_model().is_loaded_in_4bit
    packed = model.get_base_model().model.layers[0].mlp.up_proj.weight
    assert packed.dtype.is_floating_point and packed.isnan().all()
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)
    before = torch.cat([w.detach().flatten() for w in model.parameters() if w.requires_grad])
    trainer = tiny_trainer(tmp_path, model=model, max_steps=2)
    trainer.train()
    assert trainer._preparation().layout == "shared", "the probe finds 4-bit layers exact"
    after = torch.cat([w.detach().flatten() for w in model.parameters() if w.requires_grad])
    assert (after != before).any() and after.isfinite().all()


def test_a_build_for_gpus_on_a_machine_without_one_uses_the_cpu(monkeypatch):
    """What `pip install torch` gives on a laptop."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert this_device() == torch.device("cpu")


def test_further_arguments_reach_from_pretrained(folder):
    model = load(folder, model_init_kwargs={"attn_implementation": "eager"})
    assert model.config._attn_implementation == "eager"


def test_a_tokenizer_loads_with_its_template(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == tiny_tokenizer("chatml").chat_template


def test_resize_embeddings_adds_the_tokens_of_the_template_and_their_rows():
    tokenizer = tiny_tokenizer(None, special_tokens=False)
    model = tiny_models.build("Llama", vocab_size=len(tokenizer))
    rows = len(tokenizer)
    (line,) = add_template_tokens(model, tokenizer, "chatml")
    assert "<|im_start|>" in line and "<|im_end|>" in line
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == rows + 2
    assert add_template_tokens(model, tokenizer, "chatml") == []
