"""Where generation stops after training: generation_config, config and tokenizer, adapters included."""

import peft
import pytest
import tiny_models
import transformers
from tiny_tokenizer import tiny_tokenizer
from tiny_training import tiny_trainer

from orpo.data.source import SavedTemplate
from orpo.engine.generation_config import settle_generation_config
from orpo.engine.loading import load_model
from orpo.engine.stop_tokens import save_generation_config, saved_stop_token_ids, stop_token_ids
from orpo.errors import ModelError
from orpo.settings.config import OrpoSettings
from orpo.training.resolve import keep_template


def kept(tokenizer, end_token, *, known=2, adapter=False):
    """A model and its tokenizer after a run whose answers ended with a token."""
    model = tiny_models.build("Llama")
    model.generation_config = transformers.GenerationConfig(eos_token_id=known)
    if adapter:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    reader = SavedTemplate("{{ messages }}", end_token)
    keep_template(reader, tokenizer, model)
    return model


@pytest.mark.parametrize("known", [2, [2, 5], None])
def test_the_end_of_turn_joins_the_tokens_that_the_model_stops_at_already(known):
    tokenizer = tiny_tokenizer("gemma")
    end, eos = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id
    model = kept(tokenizer, "<end_of_turn>", known=known)
    own = [] if known is None else [known] if isinstance(known, int) else known
    assert model.generation_config.eos_token_id == [end, *own] == stop_token_ids(model)
    assert tokenizer.eos_token_id == eos, "Gemma keeps its EOS"
    assert tokenizer.chat_template == "{{ messages }}"


def test_where_chat_models_carry_the_end_of_turn_as_eos_the_tokenizer_does_too():
    tokenizer = tiny_tokenizer("llama3")
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")
    model = kept(tokenizer, "<|eot_id|>")
    assert tokenizer.eos_token == "<|eot_id|>" and model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == [end, 2, eos]


def test_an_adapter_folder_says_where_generation_stops(tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    model = kept(tokenizer, "<|eot_id|>", adapter=True)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "generation_config.json").exists(), "peft writes none"
    save_generation_config(tmp_path, model)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == stop_token_ids(model) and len(saved.eos_token_id) == 3


def test_an_adapter_folder_says_so_although_the_model_ships_settings_that_contradict_each_other(tmp_path):
    model = kept(tiny_tokenizer("llama3"), "<|eot_id|>", adapter=True)
    model.base_model.model.generation_config.update(do_sample=False, temperature=0.5)
    save_generation_config(tmp_path, model)
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == stop_token_ids(model)


def test_plain_text_leaves_everything_as_it_was():
    tokenizer = tiny_tokenizer("llama3")
    before = (tokenizer.chat_template, tokenizer.eos_token)
    model = tiny_models.build("Llama")
    stops = stop_token_ids(model)
    keep_template(SavedTemplate(None, None), tokenizer, model)
    assert (tokenizer.chat_template, tokenizer.eos_token) == before and stop_token_ids(model) == stops


def test_several_templates_are_all_kept():
    tokenizer = tiny_tokenizer("chatml")
    named = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    keep_template(SavedTemplate(named, "<|im_end|>"), tokenizer, None)
    assert tokenizer.chat_template == named and tokenizer.eos_token == "<|im_end|>"
    assert stop_token_ids(None) == []


# ------------------------------------------------------------------------------- what could not be saved


def model_with(**generation):
    model = tiny_models.build("Llama")
    for name, value in ({"eos_token_id": 2} | generation).items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    ("written", "said", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, "do_sample", {"do_sample": True, "top_p": 0.6}),
        ({"temperature": 0.9, "do_sample": False}, "temperature", {"do_sample": False, "temperature": None}),
        ({"early_stopping": True}, "early_stopping", {"do_sample": None, "early_stopping": None}),
        ({"temperature": 0.0}, "likeliest", {"do_sample": False, "temperature": None}),
        ({"temperature": 0.0, "do_sample": True}, "likeliest", {"do_sample": False, "temperature": None}),
    ],
)  # fmt: skip
def test_generation_settings_that_could_not_be_saved_are_repaired_before_the_first_step(
    tmp_path, capsys, written, said, kept
):
    trainer = tiny_trainer(tmp_path, model=model_with(**written), max_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "generation_config" in line]
    assert len(lines) == 1 and said in lines[0]
    trainer.train()
    trainer.save_model()
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(saved, name) for name in kept} == kept


@pytest.mark.parametrize(
    "written",
    [
        {"eos_token_id": "x"}, {"eos_token_id": [2, None]}, {"bos_token_id": 1.5}, {"temperature": "x"},
        {"temperature": -1.0, "do_sample": True}, {"temperature": float("nan"), "do_sample": True},
        {"repetition_penalty": "x"}, {"max_new_tokens": -4}, {"suppress_tokens": 3},
    ],
)  # fmt: skip
def test_generation_settings_that_mean_nothing_are_refused_before_the_first_step(tmp_path, written):
    with pytest.raises(ModelError, match=f"generation_config.json.*{next(iter(written))}|not iterable"):
        tiny_trainer(tmp_path, model=model_with(**written))


def test_settings_that_are_in_order_are_left_as_they_are():
    model = model_with(do_sample=True, temperature=0.5)
    assert settle_generation_config(model) == [] and model.generation_config.temperature == 0.5


def test_tokens_beyond_the_vocabulary_are_told():
    model = model_with(eos_token_id=[2, 10**6])
    (line,) = settle_generation_config(model)
    rows = len(model.get_input_embeddings().weight)
    assert line.startswith(
        f"generation_config.json: eos_token_id 1000000 is none of the model's {rows} tokens"
    )


@pytest.mark.parametrize("text", ['{"eos_token_id": 2', "[]"])
def test_a_damaged_file_is_not_passed_over(tmp_path, text):
    tiny_models.build("Llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    for load in (saved_stop_token_ids, lambda name: load_model(OrpoSettings(model_name_or_path=name))):
        with pytest.raises(ModelError, match=r"generation_config\.json: no JSON object"):
            load(str(tmp_path))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match="eos_token_id is 'x'"):
        saved_stop_token_ids(str(tmp_path))
