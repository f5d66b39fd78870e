"""Windows and chunks that a layer has in its mask alone are found, whatever they come from."""

import copy

import pytest
import reference
import tiny_models
import torch
import transformers
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from orpo.engine.masks import limit_of
from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

OBJECTIVE = Objective(preference_weight=0.7)


def pair(*lengths):
    draw = torch.Generator().manual_seed(sum(lengths))
    return TokenizedPair(*(torch.randint(1, 97, (n,), generator=draw).tolist() for n in lengths))


@pytest.mark.parametrize("size", [1, 7, 99])
def test_what_a_mask_hides_is_found_by_its_function(size):
    chunked = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    assert limit_of(sliding_window_causal_mask_function(size), 100) == (
        ("sliding window", size) if size > 1 else ("attention in chunks", 1)
    )
    assert limit_of(chunked, 100) == ("attention in chunks", size)
    for hides_nothing in (causal_mask_function, sliding_window_causal_mask_function(100)):
        assert limit_of(hides_nothing, 100) is None
    assert limit_of(sliding_window_causal_mask_function(size), size) is None
    assert limit_of(chunked, size) is None


class Windowed(transformers.LlamaModel):
    """The window of some layers, from a setting of any name; `told` layers get it as an argument too."""

    windowed, told = (0, 1), ()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1])[None]
        config = copy.copy(self.config)
        config.sliding_window = self.config.local_span
        about = {
            "config": config,
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": None,
            "position_ids": position_ids,
        }
        masks = create_causal_mask(**about), create_sliding_window_causal_mask(**about)
        positions = self.rotary_emb(hidden, position_ids=position_ids)
        for number, layer in enumerate(self.layers):
            window = {"sliding_window": self.config.local_span} if number in self.told else {}
            hidden = layer(
                hidden,
                attention_mask=masks[number in self.windowed],
                position_embeddings=positions,
                position_ids=position_ids,
                **window,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def windowed(local_span, layers, told):
    model = tiny_models.build("Llama")
    model.config.local_span = local_span
    model.model.__class__ = Windowed
    model.model.windowed, model.model.told = layers, told
    return model


@pytest.mark.parametrize(
    ("layers", "told", "shares"),
    [((0, 1), (), False), ((1,), (), False), ((0, 1), (0,), False), ((0, 1), (0, 1), True), ((), (), True)],
)
def test_a_window_that_a_layer_is_not_told_of_falls_back_and_is_exact(layers, told, shares):
    pairs = [pair(60, 30, 20), pair(20, 9, 60), pair(3, 4, 5)]
    plain = windowed(32, layers, told)
    model = copy.deepcopy(plain)
    preparation = prepare_model(model)
    assert (preparation.layout == "shared") == shares
    loss = model(batch=pack(pairs, OBJECTIVE, layout=preparation.layout)).loss
    loss.backward()
    expected = reference.loss_and_gradients(plain, pairs, OBJECTIVE)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    assert reference.worst_gradient_error(reference.gradients(model), expected[1]) <= 1e-5


def test_a_window_that_no_side_reaches_does_not_matter():
    assert prepare_model(windowed(32, (0, 1), ()), longest=32).layout == "shared"
    assert prepare_model(windowed(32, (0, 1), ()), longest=33).layout == "padded"
