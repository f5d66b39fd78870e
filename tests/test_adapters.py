"""Which weights carry an adapter, what is said about it, which kinds are refused and why."""

import peft
import pytest
import tiny_families
import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer
from tiny_training import random_pairs, tiny_config, tiny_trainer

from orpo import ORPOTrainer
from orpo.engine.adapters import adapter_lines, add_adapter, lora_config
from orpo.engine.loading import load_model
from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.errors import ConfigError, ModelError
from orpo.settings.config import Objective, OrpoSettings

OBJECTIVE = Objective(preference_weight=0.7)


def adapted(family, model=None, **settings):
    return add_adapter(
        tiny_families.build(family, num_hidden_layers=2) if model is None else model,
        lora_config(OrpoSettings(lora_r=2, **settings)),
    )


def trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "phimoe", "deepseek_v3"])
def test_by_default_experts_carry_an_adapter_and_routers_do_not(family):
    model = adapted(family)
    assert any(".experts." in name for name in trained(model))
    assert not [name for name in trained(model) if "router" in name or ".gate." in name]
    (line,) = adapter_lines(model)
    assert "experts: yes" in line and "% of the weights" in line and "lora_target_modules" in line
    assert prepare_model(model).layout


def test_the_router_on_request_and_experts_left_out():
    model = adapted("mixtral", lora_target_modules=["q_proj"], lora_target_parameters=["gate.weight"])
    assert any("mlp.gate" in name for name in trained(model))
    assert "experts: yes" not in adapter_lines(adapted("mixtral", lora_target_modules=["q_proj"]))[0]
    assert (
        "experts: no (lora_target_parameters adds them)"
        in adapter_lines(adapted("mixtral", lora_target_modules=["q_proj"]))[0]
    )


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1", "nemotron_h"])
def test_the_default_fits_mamba(family):
    kinds = ["linear_attention", "full_attention", "moe", "linear_attention"]
    settings = {"layers_block_type": kinds} if family == "nemotron_h" else {}
    model = adapted(family, tiny_families.build(family, **settings))
    assert any("in_proj" in name for name in trained(model))
    assert not any("out_proj" in name for name in trained(model))


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ({"lora_modules_to_save": ["nope"]}, "no module called nope; there are embed_tokens, q_proj"),
        ({"lora_modules_to_save": ["nope", "no"]}, "no module called no or nope"),
        (
            {"lora_target_parameters": ["nope.weight"]},
            "no weight called nope.weight; there are embed_tokens.w",
        ),
    ],
)
def test_a_setting_that_names_nothing_is_refused(settings, there):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}: LlamaForCausalLM has {there}"):
        adapted("llama", tiny_models.build("Llama"), **settings)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("lora_target_modules", ["q_proj", "nope"]),
        ("lora_modules_to_save", ["lm_head", "nope"]),
        ("lora_target_parameters", ["q_proj.weight", "nope"]),
    ],
)
def test_of_several_names_that_which_is_not_there_is_said(setting, names, capsys):
    targets = {} if setting == "lora_target_modules" else {"lora_target_modules": ["k_proj"]}
    adapted("llama", tiny_models.build("Llama"), **targets | {setting: names})
    kind = "weight" if setting == "lora_target_parameters" else "module"
    assert capsys.readouterr().out == f"{setting}: LlamaForCausalLM has no {kind} called nope\n"
    adapted("llama", tiny_models.build("Llama"), **targets | {setting: names[:1]})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("setting", [{"lora_dropout": 0.05}, {"use_dora": True}], ids=["dropout", "dora"])
def test_what_experts_cannot_have_names_the_way_out(setting):
    with pytest.raises(ConfigError, match=r"lora_target_modules: \[k_proj, o_proj, q_proj, v_proj\]"):
        adapted("mixtral", **setting)
    assert adapted("mixtral", lora_target_modules=["k_proj", "q_proj"], **setting)


def test_an_expert_adapter_is_saved_and_goes_on(tmp_path):
    base = tiny_families.build("mixtral", num_hidden_layers=2)
    base.save_pretrained(tmp_path / "base")
    model = adapted("mixtral", base)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([tiny_models.token_ids(9)])
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    fresh = type(base).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_run_says_what_carries_an_adapter(tmp_path, capsys):
    tiny_models.build("Mixtral").save_pretrained(tmp_path / "model")
    tiny_trainer(tmp_path, model=str(tmp_path / "model"), use_peft=True)
    assert "adapter on down_proj, gate_up_proj, k_proj" in capsys.readouterr().out


def test_modules_trained_in_full_next_to_a_bfloat16_base_are_float32():
    model = adapted(
        "llama", tiny_models.build("Llama").bfloat16(), lora_modules_to_save=["embed_tokens", "lm_head"]
    )
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert prepare_model(model).layout == "shared"
    ids = torch.tensor([tiny_models.token_ids(9)])
    assert model(ids).logits.dtype == torch.bfloat16
    before = {n: w.detach().clone() for n, w in model.named_parameters() if "modules_to_save" in n}
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    model(batch=pack(tiny_models.mixed_pairs(), OBJECTIVE)).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    moved = [(after[name] != weight).float().mean() for name, weight in before.items()]
    assert min(moved) > 0.5  # in bfloat16 a step this small moves nearly nothing


SIZES = {"task_type": "CAUSAL_LM"}
REFUSED = {
    "PROMPT_TUNING": (peft.PromptTuningConfig(num_virtual_tokens=3, **SIZES), "tokens or keys of its own"),
    "PREFIX_TUNING": (peft.PrefixTuningConfig(num_virtual_tokens=3, **SIZES), "tokens or keys of its own"),
    "P_TUNING": (peft.PromptEncoderConfig(num_virtual_tokens=3, **SIZES), "tokens or keys of its own"),
    "ADALORA": (
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, tinit=1, tfinal=2, **SIZES),
        "penalty",
    ),
    "aLoRA": (
        peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3, 4], **SIZES),
        "invocation tokens",
    ),
    "OFT": (
        peft.OFTConfig(target_modules=["lm_head"], oft_block_size=4, **SIZES),
        "on the vocabulary matrix",
    ),
    "POLY": (peft.PolyConfig(target_modules=["q_proj"], n_tasks=2, **SIZES), "the task of each sequence"),
    "TRAINABLE_TOKENS": (
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3], **SIZES),
        "tied to the embeddings",
    ),
    "LORA": (peft.LoraConfig(target_modules=["lm_head"], lora_bias=True, **SIZES), "lora_bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_of_adapter_that_cannot_train_here_is_refused_for_its_reason(kind):
    config, reason = REFUSED[kind]
    base = tiny_models.build("Llama", tie_word_embeddings=kind == "TRAINABLE_TOKENS")
    model = peft.get_peft_model(base, config)
    with pytest.raises(ModelError, match=f"{kind} cannot be trained here: .*{reason}") as error:
        prepare_model(model)
    assert "\n" not in str(error.value)


def test_an_adapter_on_another_base_than_its_own_is_said(tmp_path, capsys):
    base, run = tmp_path / "base", tmp_path / "run"
    tiny_models.build("Llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    settings = {"model_name_or_path": str(base), "use_peft": True, "max_steps": 1, "save_strategy": "steps"}
    ORPOTrainer(args=tiny_config(run, **settings), train_dataset=random_pairs()).train()
    said = "its base model has other weights than the one that the adapter was trained on"

    def lines(dtype):
        capsys.readouterr()
        load_model(OrpoSettings(model_name_or_path=str(run / "checkpoint-1"), dtype=dtype))
        return capsys.readouterr().out

    for dtype in ("float32", "bfloat16", "float16"):
        assert said not in lines(dtype)
    for scale, dtypes in ((1.001, ("float32",)), (1.1, ("float32", "bfloat16", "float16"))):
        model = tiny_models.build("Llama")
        for weight in model.parameters():
            weight.data *= scale
        model.save_pretrained(base)
        assert all(said in lines(dtype) for dtype in dtypes)


def with_adapters(*names, **config):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | config)
    model = peft.get_peft_model(tiny_models.build("Llama"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def test_an_adapter_that_would_not_be_the_one_that_is_saved_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"trains its adapter mine; what is saved.* called 'default'"):
        tiny_trainer(tmp_path, model=with_adapters("mine"))
    several = with_adapters("default", "mine")
    several.set_adapter("mine")
    with pytest.raises(ModelError, match="trains its adapter mine;"):
        tiny_trainer(tmp_path, model=several)
    several.set_adapter("default")
    tiny_trainer(tmp_path, model=several, max_steps=1).train()


def test_an_adapter_that_is_not_of_peft_is_refused(tmp_path):
    model = tiny_models.build("Llama")
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 asks for PEFT 0.22 there
        pytest.skip(str(error))
    with pytest.raises(ModelError, match=r"added by its own add_adapter, not by PEFT; pass the model"):
        tiny_trainer(tmp_path, model=model)


def test_a_merged_adapter_is_refused_for_its_reason(tmp_path):
    model = with_adapters("default")
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into the weights, where it cannot train; call unmerge"):
        tiny_trainer(tmp_path, model=model, max_steps=1).train()


def test_a_tied_weight_that_carries_an_adapter_counts_once():
    base = tiny_models.build("Qwen2", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    (line,) = adapter_lines(peft.get_peft_model(base, config))
    assert int(line.partition("%")[0].rpartition(" ")[2]) <= 100
