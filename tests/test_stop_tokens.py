"""Where generation stops after training: generation_config, config and tokenizer, adapters included."""

import peft
import pytest
import tiny_models
import transformers
from tiny_tokenizer import tiny_tokenizer

from orpo.data.source import SavedTemplate
from orpo.engine.stop_tokens import save_generation_config, stop_token_ids
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
