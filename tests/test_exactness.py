"""No family trains wrongly in silence: what shares, what falls back, and where lengths change the model."""

import copy

import pytest
import reference
import tiny_families
import torch
import transformers
from tiny_models import build as build_tiny
from tiny_training import logged, random_pairs, tiny_trainer

from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.errors import ConfigError, ModelError
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

OBJECTIVE = Objective(preference_weight=0.7)


def pair(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed + sum(lengths))
    return TokenizedPair(*(torch.randint(1, 97, (n,), generator=draw).tolist() for n in lengths))


PAIRS = [pair(7, 9, 4), pair(3, 5, 12, seed=1), pair(11, 2, 6, seed=2)]
PAIRS += [
    TokenizedPair(PAIRS[2].prompt, PAIRS[2].chosen, [5, 6]),
    TokenizedPair(PAIRS[2].prompt, [5, 6], PAIRS[2].rejected),
    TokenizedPair([*PAIRS[2].prompt[:8], 3], [7], [9, 9, 9]),
]
"""Three apart; then two that share prompt and answers with the third, and one that begins like these."""


def alone(model):
    """Log-probabilities by a fresh copy each time: some models remember the longest sequence they saw."""
    twin = copy.deepcopy(model).double()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the default has no float64
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    seen = {id(m): m.max_seq_len_cached for m in twin.modules() if hasattr(m, "max_seq_len_cached")}

    def logprobs(ids):
        for module in twin.modules():
            if id(module) in seen:
                module.max_seq_len_cached = seen[id(module)]
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            twin.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
        return reference.logprobs_of(twin)(ids)

    return twin, logprobs


def assert_exact(plain, pairs, tolerance=2e-5, **settings):
    """Prepare a copy, compare loss and every gradient with those of `plain`; returns the preparation."""
    twin, logprobs = alone(plain)
    expected = reference.orpo_loss(logprobs, pairs, OBJECTIVE)
    expected.backward()
    model = copy.deepcopy(plain)
    preparation = prepare_model(model, **settings)
    share_from = None if preparation.share_from is None else 1
    loss = model(batch=pack(pairs, OBJECTIVE, layout=preparation.layout, share_from=share_from)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    error = reference.worst_gradient_error(reference.gradients(model), reference.gradients(twin))
    assert error <= 100 * tolerance
    return preparation


SHARE = ["llama", "qwen3_moe", "deepseek_v3", "gemma3_text", "gpt2", "hyperclovax", "phi3"]
SHARE += ["gpt_oss", "granite_swa", "mimo_v2_flash", "flint"]  # with sinks, in all layers or in some
SHARE += ["modernbert-decoder", "bert"]  # with layers between backbone and vocabulary matrix
FALL_BACK = ["roberta", "jamba", "minimax", "zamba2", "bamba", "falcon_h1", "olmo_hybrid", "phimoe"]


@pytest.mark.parametrize("family", [*SHARE, *FALL_BACK])
def test_a_family_shares_or_falls_back_and_is_exact(family):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    layout = assert_exact(tiny_families.build(family), PAIRS).layout
    assert (layout == "shared") == (family in SHARE)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["jamba", "minimax", "zamba2", "olmo_hybrid", "falcon_h1", "bamba"])
def test_bfloat16_does_not_let_a_state_leak_into_the_next_side(family, adapted):
    """At the usual scale of new weights, where losses and gradients agree within what bfloat16 rounds."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_families.config_of(family)).bfloat16()
    if adapted:
        from orpo.engine.adapters import add_adapter, lora_config
        from orpo.settings.config import OrpoSettings

        model = add_adapter(model, lora_config(OrpoSettings(lora_r=2)))
    preparation = prepare_model(model)
    assert preparation.layout == "padded"
    assert "depend on its neighbours" in preparation.notices[0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "gpt2"])
def test_bfloat16_raises_no_false_alarm(family):
    assert prepare_model(tiny_families.build(family).bfloat16()).layout == "shared"


# Lengths that change the model


LONG = {"rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 4.0}
ROPES = {
    "longrope": LONG | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
MIXED = [
    [pair(40, 9, 8), pair(5, 6, 7)],
    [pair(28, 20, 2)],
    [pair(28, 2, 20), pair(4, 4, 4), pair(33, 5, 6)],
    [pair(30, 2, 2), pair(40, 2, 9), pair(41, 9, 2)],
]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("pairs", MIXED, ids=["mixed", "straddling", "several", "at the limit"])
@pytest.mark.parametrize("rope", ROPES)
def test_sides_on_either_side_of_a_rope_switch_never_share_a_pass(rope, pairs, layout):
    settings = {"rope_parameters": ROPES[rope], "max_position_embeddings": 128 if rope == "longrope" else 32}
    assert_exact(build_tiny("Llama", **settings), pairs, layout=layout)


def test_pairs_share_nothing_where_the_length_of_a_pass_changes_the_model():
    """A later turn is beyond the switch, the earlier one below it: their common tokens are not the same."""
    earlier = pair(16, 6, 5)
    later = TokenizedPair([*earlier.prompt, *earlier.chosen, *([5] * 20)], [7, 8, 9], [9, 7])
    model = build_tiny("Llama", rope_parameters=ROPES["longrope"], max_position_embeddings=128)
    assert assert_exact(model, [earlier, later]).share_from is None
    prepare_model(model)
    with pytest.raises(ModelError, match="pass share_from=None"):
        model(batch=pack([earlier, later], OBJECTIVE))
    assert prepare_model(build_tiny("Llama")).share_from is not None


def test_checkpointed_layers_see_the_segments_of_their_own_pass():
    plain = build_tiny("Llama", rope_parameters=ROPES["longrope"])
    twin, logprobs = alone(plain)
    reference.orpo_loss(logprobs, MIXED[2], OBJECTIVE).backward()
    prepare_model(plain, layout="shared", probe=False)
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    plain.train()
    plain(batch=pack(MIXED[2], OBJECTIVE)).loss.backward()
    assert reference.worst_gradient_error(reference.gradients(plain), reference.gradients(twin)) < 1e-4


def llama4(**settings):
    sizes = {"num_hidden_layers": 4, "attention_chunk_size": 400, "floor_scale": 40, "attn_scale": 0.5}
    return tiny_families.build("llama4_text", **(sizes | settings))


def test_rows_of_llama4_never_exceed_what_its_temperature_leaves_exact():
    pairs = [pair(20, 9, 8), pair(5, 16, 17), pair(33, 5, 6), pair(6, 4, 50)]
    assert assert_exact(llama4(), pairs, longest=100).layout == "shared"


def test_chunks_that_no_side_exceeds_do_not_matter_and_others_fall_back():
    model = llama4(attention_chunk_size=24)
    pairs = [pair(12, 9, 8), pair(5, 6, 17)]
    assert assert_exact(model, pairs, longest=24).layout == "shared"
    assert assert_exact(model, [pair(30, 9, 8)]).layout == "padded"
    prepare_model(model, longest=24)
    with pytest.raises(ModelError, match="attention in chunks of 24 tokens is known to its masks alone"):
        model(batch=pack([pair(30, 9, 8)], OBJECTIVE))


@pytest.mark.parametrize("window", [20, 520])
@pytest.mark.parametrize("family", ["phimoe", "qwen2_moe"])
def test_a_window_that_only_the_masks_know_falls_back_at_any_length(family, window):
    settings = {"qwen2_moe": {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}}.get(
        family, {}
    )
    model = tiny_families.build(
        family, sliding_window=window, num_hidden_layers=2, max_position_embeddings=1024, **settings
    )
    preparation = prepare_model(copy.deepcopy(model.bfloat16()))
    assert preparation.layout == "padded"
    assert f"sliding window of {window} tokens is known to its masks alone" in preparation.notices[0]
    assert prepare_model(model, longest=window).layout == "shared"


class ScalesItsLogits(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


class ScalesItsHiddenStates(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(0.3 * hidden))


@pytest.mark.parametrize(("kind", "factor"), [(ScalesItsLogits, 1.5), (ScalesItsHiddenStates, 0.3)])
def test_a_factor_on_logits_or_hidden_states_is_measured(kind, factor):
    model = kind(build_tiny("Llama").config)
    assert assert_exact(model, PAIRS).logit_scale == pytest.approx(factor, rel=1e-6)


# What is refused or said before training


def test_pairs_beyond_a_table_of_positions_are_refused_and_beyond_a_rotary_window_said(tmp_path, capsys):
    long = [*random_pairs(), TokenizedPair([5] * 100, [6] * 29, [7] * 9, source="long")]
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel knows 128 positions .* set max_length: 128"):
        tiny_trainer(tmp_path, model=build_tiny("GPT2"), train=long)
    with pytest.raises(ConfigError, match="OPTForCausalLM knows 128 positions"):
        tiny_trainer(tmp_path, model=build_tiny("OPT"), train=long)
    tiny_trainer(tmp_path, model=build_tiny("GPT2"))
    assert "extrapolates" not in capsys.readouterr().out
    tiny_trainer(tmp_path, train=long)
    assert "up to 129 tokens a side; beyond the 128 positions" in capsys.readouterr().out


def test_gradient_checkpointing_that_a_model_has_not_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="gradient_checkpointing: CTRLLMHeadModel has none"):
        tiny_trainer(tmp_path, model=tiny_families.build("ctrl"), gradient_checkpointing=True, max_length=64)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_a_model_changes_in_place_may_be_frozen(tied):
    """CTRL multiplies them where they stand; the probe, which asks for their slope, must not forbid that."""
    model = tiny_families.build("ctrl", tie_word_embeddings=tied)
    model.get_input_embeddings().requires_grad_(False)
    assert prepare_model(model).layout == "shared"


def test_a_model_that_fails_its_own_assertion_is_refused_in_one_line():
    """As Reformer does wherever a gradient is asked for; the probe asks in evaluation mode."""

    class Asserts(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            assert not torch.is_grad_enabled(), "train me in training mode"
            return super().forward(*args, **kwargs)

    model = build_tiny("Llama")
    model.__class__ = Asserts
    with pytest.raises(ModelError, match=r"AssertionError: train me in training mode"):
        prepare_model(model)


def test_dropout_that_layers_read_from_the_configuration_is_turned_off(tmp_path):
    model = tiny_families.build("persimmon", attention_dropout=0.5)
    trainer = tiny_trainer(tmp_path, model=model)
    assert model.config.attention_dropout == 0.5
    trainer._preparation()
    model.train()
    batch = pack(PAIRS, OBJECTIVE, layout=trainer._preparation().layout)
    assert torch.equal(model(batch=batch).loss, model(batch=batch).loss)


@pytest.mark.parametrize("name", ["opt", "xglm", "bart"])
def test_layers_that_are_left_out_at_random_are_turned_off_as_dropout_is(name, tmp_path):
    model = tiny_families.build(name)
    drops = {key for module in model.modules() for key in vars(module) if "layerdrop" in key}
    assert drops
    for module in model.modules():
        for key in drops & vars(module).keys():
            setattr(module, key, 0.5)
    trainer = tiny_trainer(tmp_path, model=model)
    layout = trainer._preparation().layout
    model.train()
    batch = pack(PAIRS, OBJECTIVE, layout=layout)
    assert len({model(batch=batch).loss.item() for _ in range(6)}) == 1


def test_layers_that_may_be_left_out_at_random_train_in_padded_rows(tmp_path):
    """Where that is asked for: pairs that share a pass are of its layers, and no attention is looked for."""
    model = tiny_families.build("opt")
    model.model.decoder.layerdrop = 0.5
    trainer = tiny_trainer(tmp_path, model=model, disable_dropout=False, max_steps=6)
    preparation = trainer._preparation()
    assert preparation.layout == "padded"
    assert "decoder leaves layers out at random (layerdrop: 0.5)" in preparation.notices[-1]
    trainer.train()
    with pytest.raises(ModelError, match=r"leaves layers out at random \(layerdrop: 0.5\); disable_dropout"):
        prepare_model(model, layout="shared")
    assert prepare_model(model, trains=False).layout == "shared"


def test_an_encoder_is_refused_for_what_it_is():
    model = tiny_families.build("bert", is_decoder=False)
    with pytest.raises(ModelError, match=r"BertLMHeadModel is no causal .*`is_decoder` being false"):
        prepare_model(model)


def test_a_router_loss_that_cannot_be_computed_is_refused():
    """It was swallowed once, and training went on without that loss."""
    model = build_tiny("Mixtral", output_router_logits=True)
    model.num_experts_per_tok = 1  # unlike its configuration
    with pytest.raises(ModelError, match=r"its router loss is .* as computed here; set output_router_logits"):
        prepare_model(model)


def test_a_router_loss_that_a_model_lacks_is_said_and_others_are_reported_apart(tmp_path, capsys):
    model = tiny_families.build("deepseek_v3", num_hidden_layers=2, output_router_logits=True)
    trainer = tiny_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert (
        "output_router_logits has no effect: DeepseekV3ForCausalLM has no router loss"
        in capsys.readouterr().out
    )
    assert not logged(trainer, "router_loss")
    losses = []
    for asked in (True, False):
        model = build_tiny("Mixtral", output_router_logits=asked, router_aux_loss_coef=0.5)
        trainer = tiny_trainer(tmp_path, model=model, max_steps=1)
        trainer.train()
        losses.append(logged(trainer)[0])
        assert bool(logged(trainer, "router_loss")) == asked
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_under_torch_compile_new_lengths_are_not_compiled_again(tmp_path):
    torch._dynamo.reset()
    graphs = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    trainer = tiny_trainer(
        tmp_path, model=build_tiny("Llama", num_hidden_layers=1), train=random_pairs(16), max_steps=4,
        per_device_train_batch_size=4, tokens_per_micro_batch=60, torch_compile=True,
        torch_compile_backend="eager", arguments={"callbacks": [Count()]},
    )  # fmt: skip
    trainer.train()
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]
