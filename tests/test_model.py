"""A prepared model scores packed pairs as it would score each response alone, and is otherwise unchanged."""

import copy
import functools
import json

import pytest
import reference
import tiny_models
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama import modeling_llama

from orpo.engine.head import Denominators
from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.engine.steps import step_denominators
from orpo.errors import ModelError
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

PAIRS = tiny_models.mixed_pairs()
OBJECTIVE = Objective(preference_weight=0.7)
LAYOUTS = ["shared", "packed", "padded"]


def prepared(model, objective=OBJECTIVE, layout="shared"):
    """A prepared copy; the original stays what it was."""
    model = copy.deepcopy(model)
    prepare_model(model, layout=layout, probe=False)
    return model


def our_loss_and_gradients(model, pairs, objective=OBJECTIVE, layout="shared"):
    """Of a prepared model, on one micro-batch."""
    model.zero_grad()
    loss = model(batch=pack(pairs, objective, layout=layout)).loss
    loss.backward()
    return loss.item(), reference.gradients(model)


def assert_exact(ours, expected, tolerance=1e-5):
    assert ours[0] == pytest.approx(expected[0], rel=tolerance)
    assert reference.worst_gradient_error(ours[1], expected[1]) <= tolerance


# Exactness


@pytest.mark.parametrize("name", tiny_models.SHARING)
def test_loss_and_all_gradients_equal_separate_sequences(name):
    model = tiny_models.build(name)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    chosen = copy.deepcopy(model)
    preparation = prepare_model(chosen)
    assert (preparation.layout, preparation.notices) == ("shared", ())
    assert_exact(our_loss_and_gradients(chosen, PAIRS), expected)
    for layout in ("packed", "padded"):
        assert_exact(our_loss_and_gradients(prepared(model, layout=layout), PAIRS, layout=layout), expected)


@pytest.mark.parametrize("name", tiny_models.FALLING_BACK)
def test_a_model_that_cannot_follow_a_packed_micro_batch_falls_back_visibly_and_is_exact(name):
    model = tiny_models.build(name)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    preparation = prepare_model(model)
    assert preparation.layout != "shared"
    (notice,) = preparation.notices
    assert f"{type(model).__name__}: layout `{preparation.layout}`" in notice
    assert "\n" not in notice
    assert_exact(our_loss_and_gradients(model, PAIRS, layout=preparation.layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "objective",
    [
        Objective(preference_weight=0.3, nll_on="response"),
        Objective(preference_weight=0.3, nll_on="assistant", nll_reduction="pair"),
        Objective(preference_weight=0.3, nll_reduction="pair", nll_weight=0.5),
        Objective(nll_weight=0.0, scale=0.5),
        Objective(preference_weight=0.8, scale=2.0, compares="means", margin=0.5, nll_on="response"),
        Objective(preference_weight=0.0),
    ],
    ids=str,
)
def test_every_objective_equals_separate_sequences(objective, layout):  # peers 10, 24, 27
    model = tiny_models.build("Llama")
    expected = reference.loss_and_gradients(model, PAIRS, objective)
    ours = our_loss_and_gradients(prepared(model, objective, layout), PAIRS, objective, layout)
    assert_exact(ours, expected)


def test_logprobs_are_those_of_separate_sequences():  # peers 16, 41
    model = tiny_models.build("Llama")
    output = prepared(model)(batch=pack(PAIRS, OBJECTIVE))
    logprobs = reference.logprobs_of(copy.deepcopy(model).double())
    with torch.no_grad():
        for number, pair in enumerate(PAIRS):
            chosen = logprobs([*pair.prompt, *pair.chosen])
            response = chosen[len(pair.prompt) + pair.chosen_context - 1 :]
            assert output.pairs.chosen_logprob_P[number].item() == pytest.approx(
                response.mean().item(), rel=1e-5
            )
            assert output.pairs.nll_sum_P[number].item() == pytest.approx(-chosen.sum().item(), rel=1e-5)
            assert output.pairs.nll_weight_P[number].item() == len(chosen)
            assert output.pairs.nll_tokens_P[number].item() == len(chosen)
            expected = 0.0
            if pair.rejected:
                rejected = logprobs([*pair.prompt, *pair.rejected])
                expected = rejected[len(pair.prompt) + pair.rejected_context - 1 :].mean().item()
            assert output.pairs.rejected_logprob_P[number].item() == pytest.approx(expected, rel=1e-5)
    assert output.pairs.has_rejected_P.tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(
    "groups",
    [[[0], [1], [2], [3], [4]], [[4, 2], [0, 1, 3]], [[3, 1], [2], [0, 4]], [[4, 3, 2, 1, 0]]],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_micro_batches_add_up_to_the_step_for_any_grouping_and_order(groups, reduction):  # peers 6
    objective = Objective(preference_weight=0.7, nll_reduction=reduction)
    model = prepared(tiny_models.build("Llama"), objective)
    whole = pack(PAIRS, objective)
    expected = our_loss_and_gradients(model, PAIRS, objective)
    denominators = Denominators(whole.nll_weight, whole.num_preferences)
    model.zero_grad()
    total = 0.0
    for group in groups:
        loss = model(batch=pack([PAIRS[i] for i in group], objective), denominators=denominators).loss
        loss.backward()
        total += loss.item()
    assert_exact((total, reference.gradients(model)), expected, tolerance=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_adds_nothing(layout):
    model = prepared(tiny_models.build("Llama"), layout=layout)
    batch = pack(PAIRS[:1], OBJECTIVE, layout=layout, empty=True)
    output = model(batch=batch, denominators=Denominators(10, 2))
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(
        gradient is not None and gradient.abs().max() == 0
        for gradient in (weight.grad for weight in model.parameters())
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "OPT"])
def test_low_precision_is_no_worse_than_separate_sequences_in_low_precision(name):
    model = tiny_models.build(name).bfloat16()
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    naive_model = copy.deepcopy(model)
    naive_loss = reference.orpo_loss(reference.logprobs_of(naive_model), PAIRS, OBJECTIVE)
    naive_loss.backward()
    naive = reference.gradients(naive_model)
    loss, ours = our_loss_and_gradients(prepared(model), PAIRS)
    assert abs(loss - expected[0]) <= abs(naive_loss.item() - expected[0]) + 1e-2 * expected[0]

    def error(gradients):
        squares = [(gradients[k].double() - exact).square().sum() for k, exact in expected[1].items()]
        return torch.stack(squares).sum().sqrt().item()

    assert error(ours) <= 1.1 * error(naive)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "StableLm", "GPT2", "Gemma2"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    model = tiny_models.build(name)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    model = prepared(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    for _ in range(2):
        assert_exact(our_loss_and_gradients(model, PAIRS), expected)


def test_the_plain_model_trains_as_before_under_gradient_checkpointing():
    model = tiny_models.build("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.tensor([tiny_models.token_ids(9)])
    ours = prepared(model)
    ours(batch=pack(PAIRS, OBJECTIVE))
    model(input_ids=ids, labels=ids).loss.backward()
    ours(input_ids=ids, labels=ids).loss.backward()
    assert reference.worst_gradient_error(reference.gradients(ours), reference.gradients(model)) == 0


def test_tied_embeddings_get_the_gradient_of_both_ends():
    model = tiny_models.build("Llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    assert_exact(our_loss_and_gradients(prepared(model), PAIRS), expected)


def test_a_small_chunk_of_logits_changes_nothing():
    wide = tiny_models.build("Llama", vocab_size=60_000)
    expected = reference.loss_and_gradients(wide, PAIRS, OBJECTIVE)
    prepare_model(wide, logits_memory_mib=1, probe=False)  # four tokens together
    assert_exact(our_loss_and_gradients(wide, PAIRS), expected)


# LoRA


ADAPTERS = {
    "LoRA": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA on the vocabulary matrix": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    "DoRA on the vocabulary matrix": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "LoRA on the embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "vocabulary matrix in full": {"modules_to_save": ["lm_head"]},
    "vocabulary matrix and embeddings in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def adapted(name="Llama", target_modules="all-linear", **settings):
    """A model with a LoRA adapter that has already moved."""
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=target_modules, **settings)
    torch.manual_seed(0)
    model = get_peft_model(tiny_models.build(name), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_equal_separate_sequences(settings):
    model = adapted(**settings)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    assert all(gradient.abs().max() > 0 for gradient in expected[1].values())
    assert prepare_model(model).layout == "shared"
    assert_exact(our_loss_and_gradients(model, PAIRS), expected)
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert all(weight.grad is None for weight in frozen)  # peers 34


def test_adapters_active_together_add_up_on_the_vocabulary_matrix():
    model = adapted(target_modules=["q_proj", "lm_head"])
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    for name, weight in model.named_parameters():
        if "second" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    prepare_model(model, probe=False)
    assert_exact(our_loss_and_gradients(model, PAIRS), expected)


@pytest.mark.parametrize(
    ("name", "target_modules"), [("Qwen2", "all-linear"), ("Mamba", ["in_proj", "x_proj"])]
)
def test_adapters_on_tied_heads_and_fallbacks_equal_separate_sequences(name, target_modules):
    model = adapted(name, target_modules)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    layout = prepare_model(model).layout
    assert_exact(our_loss_and_gradients(model, PAIRS, layout=layout), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_train_under_gradient_checkpointing(use_reentrant):
    model = adapted()
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    prepare_model(model, probe=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    assert_exact(our_loss_and_gradients(model, PAIRS), expected)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_a_disabled_adapter_leaves_the_base_model(settings):
    base = tiny_models.build("Llama")
    expected = reference.loss_and_gradients(base, PAIRS, OBJECTIVE)[0]
    model = adapted(**settings)
    prepare_model(model, probe=False)
    with model.disable_adapter(), torch.no_grad():
        assert model(batch=pack(PAIRS, OBJECTIVE)).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS)
def test_a_merged_adapter_counts_once(settings):
    model = adapted(**settings)
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)[0]
    prepare_model(model, probe=False)
    model.merge_adapter()
    with torch.no_grad():
        assert model(batch=pack(PAIRS, OBJECTIVE)).loss.item() == pytest.approx(expected, rel=1e-5)


# The model is otherwise what it was


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GPT2", "Falcon", "Mamba"])
def test_without_a_batch_the_model_is_what_it_was(name):
    model = tiny_models.build(name)
    ours = copy.deepcopy(model)
    prepare_model(ours)
    ids = torch.tensor([tiny_models.token_ids(9, 1), tiny_models.token_ids(9, 2)])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    for arguments in ({}, {"attention_mask": mask}, {"labels": ids}, {"output_hidden_states": True}):
        expected, actual = model(input_ids=ids, **arguments), ours(input_ids=ids, **arguments)
        assert type(expected) is type(actual)
        assert torch.equal(expected.logits, actual.logits)
        if "labels" in arguments:
            assert torch.equal(expected.loss, actual.loss)
    assert torch.equal(model(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "GPTNeo"])
def test_generation_with_left_padding_is_what_it_was(name, cache):
    model = tiny_models.build(name)
    ids = torch.tensor([[0, 0, 0, *tiny_models.token_ids(5, 1)], tiny_models.token_ids(8, 2)])
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    settings |= {"disable_compile": True}
    expected = model.generate(ids, attention_mask=mask, **settings)
    layout = prepare_model(model).layout
    model(batch=pack(PAIRS, OBJECTIVE, layout=layout))
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)


def test_scoring_and_generating_may_alternate():
    model = tiny_models.build("Llama")
    ids = torch.tensor([tiny_models.token_ids(5)])
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    prepare_model(model)
    first = our_loss_and_gradients(model, PAIRS)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert_exact(our_loss_and_gradients(model, PAIRS), first, tolerance=0)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Falcon"])
def test_a_saved_model_does_not_mention_us_and_loads_as_itself(name, adapter, tmp_path):
    model = adapted(name) if adapter else tiny_models.build(name)
    plain = copy.deepcopy(model)
    layout = prepare_model(model).layout
    model(batch=pack(PAIRS, OBJECTIVE, layout=layout))
    model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "plain")
    for path in (tmp_path / "ours").glob("*.json"):
        assert "orpo" not in path.read_text()
        saved, expected = (json.loads((tmp_path / who / path.name).read_text()) for who in ("ours", "plain"))
        for settings in (saved, expected):
            settings.pop("target_modules", None)  # a set, written in any order
        assert saved == expected
    if not adapter:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        ids = torch.tensor([tiny_models.token_ids(6)])
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_preparing_leaves_no_trace_in_gradients_randomness_or_mode():
    model = tiny_models.build("Llama", attention_dropout=0.1).train()
    state = torch.get_rng_state()
    prepare_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_a_frozen_model_may_be_prepared_for_evaluation():
    model = tiny_models.build("Llama").requires_grad_(False)
    expected = reference.orpo_loss(reference.logprobs_of(copy.deepcopy(model).double()), PAIRS, OBJECTIVE)
    assert prepare_model(model).layout == "shared"
    assert model(batch=pack(PAIRS, OBJECTIVE)).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_may_be_prepared_again():
    model = tiny_models.build("Llama")
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    ids = torch.tensor([tiny_models.token_ids(7)])
    logits = model(ids).logits
    prepare_model(model)
    prepare_model(model, logits_memory_mib=1)
    assert_exact(our_loss_and_gradients(model, PAIRS), expected)
    assert torch.equal(model(ids).logits, logits)
    prepare_model(model, layout="padded")
    assert_exact(our_loss_and_gradients(model, PAIRS, layout="padded"), expected)
    assert model.config._attn_implementation == "sdpa"


def test_two_prepared_models_do_not_disturb_each_other():
    one, two = tiny_models.build("Llama"), tiny_models.build("Mistral")
    expected = [reference.loss_and_gradients(model, PAIRS, OBJECTIVE) for model in (one, two)]
    prepare_model(one)
    prepare_model(two)
    for _ in range(2):
        assert_exact(our_loss_and_gradients(one, PAIRS), expected[0])
        assert_exact(our_loss_and_gradients(two, PAIRS), expected[1])


def test_without_gradients_a_micro_batch_gives_the_same_numbers():
    model = prepared(tiny_models.build("Llama"))
    batch = pack(PAIRS, OBJECTIVE)
    expected = model(batch=batch)
    with torch.no_grad():
        output = model(batch=batch)
    assert expected.loss.requires_grad
    assert not output.loss.requires_grad
    torch.testing.assert_close(output.loss, expected.loss.detach())
    for ours, theirs in zip(output.pairs, expected.pairs, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_only_the_loss_carries_a_gradient():
    output = prepared(tiny_models.build("Llama"))(batch=pack(PAIRS, OBJECTIVE))
    assert output.loss.requires_grad
    assert not any(column.requires_grad for column in output.pairs)


# Guards


class BendsItsLogits(transformers.LlamaForCausalLM):
    """Does something to its logits that no setting tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.square()
        return output


class BendsItsHiddenStates(transformers.LlamaForCausalLM):
    """Does something between its backbone and its head."""

    def forward(self, *args, use_cache=None, **kwargs):
        hidden = self.model(*args, use_cache=use_cache, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden.tanh()))


@pytest.mark.parametrize("trained", [True, False])
def test_the_probe_refuses_a_model_that_does_something_unknown_to_its_logits(trained):
    model = BendsItsLogits(tiny_models.build("Llama").config).requires_grad_(trained)
    model.lm_head.weight.data *= 20
    with pytest.raises(ModelError, match="BendsItsLogits bends its logits"):
        prepare_model(model)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_what_stands_between_backbone_and_head_is_followed(layout):
    plain = BendsItsHiddenStates(tiny_models.build("Llama").config).eval()
    model = copy.deepcopy(plain)
    preparation = prepare_model(model, layout=layout)
    assert preparation.has_transform
    again = copy.deepcopy(plain)
    prepare_model(again, found=preparation)  # as the other ranks do
    expected = reference.loss_and_gradients(plain, PAIRS, OBJECTIVE)
    for each in (model, again):
        each.train()  # what checkpoints runs in the backward pass
        each.gradient_checkpointing_enable()
        loss = each(batch=pack(PAIRS, OBJECTIVE, layout=layout)).loss
        loss.backward()
        assert_exact((loss.item(), reference.gradients(each)), expected)


class DropsBeforeItsHead(transformers.LlamaForCausalLM):
    """Has a dropout between backbone and head, which only training shows."""

    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.5)

    def forward(self, *args, use_cache=None, **kwargs):
        hidden = self.model(*args, use_cache=use_cache, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(self.drop(hidden)))


def test_a_dropout_between_backbone_and_head_is_applied():
    model = DropsBeforeItsHead(tiny_models.build("Llama").config)
    state = torch.random.get_rng_state()
    assert prepare_model(model).has_transform
    assert torch.equal(torch.random.get_rng_state(), state)
    batch = pack(PAIRS, OBJECTIVE)
    still = [model.eval()(batch=batch).loss.item() for _ in range(2)]
    drawn = {model.train()(batch=batch).loss.item() for _ in range(3)}
    assert still[0] == still[1] and len(drawn) == 3
    model.drop.p = 0.0
    assert not prepare_model(model).has_transform
    assert model.train()(batch=batch).loss.item() == pytest.approx(still[0], rel=1e-5)


def test_a_batch_normalisation_is_refused():
    """In training it depends on what is packed together; a probe, which does not train, cannot see it."""
    model = tiny_models.build("Llama")
    model.model.layers[0].mlp.down_proj.register_module("norm", nn.BatchNorm1d(8))
    with pytest.raises(ModelError, match=r"down_proj.norm is a batch normalisation, which mixes"):
        prepare_model(model)


class AddsItsPredecessor(nn.Module):
    """A layer that mixes in the token before by a weight that is zero in a new model."""

    def __init__(self, layer, size):
        super().__init__()
        self.layer, self.share = layer, nn.Parameter(torch.zeros(size))

    def forward(self, hidden, **kwargs):
        before = nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
        return self.layer(hidden + self.share * before, **kwargs)


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_mixing_that_a_new_model_does_not_do_yet_is_found_in_any_layer(moved):
    """Its weight has a gradient at once, though no loss shows it."""
    plain = tiny_models.build("Llama")
    last = len(plain.model.layers) - 1
    plain.model.layers[last] = AddsItsPredecessor(plain.model.layers[last], plain.config.hidden_size)
    model = copy.deepcopy(plain)
    assert prepare_model(model).layout == "padded"
    for each in (model, plain):
        each.model.layers[last].share.data.fill_(moved)
    loss = model(batch=pack(PAIRS, OBJECTIVE, layout="padded")).loss
    loss.backward()
    assert_exact(
        (loss.item(), reference.gradients(model)), reference.loss_and_gradients(plain, PAIRS, OBJECTIVE)
    )


class AddsNothingYet(transformers.LlamaForCausalLM):
    """A module between backbone and head that is zero in a new model."""

    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, *args, use_cache=None, **kwargs):
        hidden = self.model(*args, use_cache=use_cache, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden + self.up(hidden)))


def test_a_module_that_would_never_train_is_refused():
    with pytest.raises(ModelError, match=r"a gradient differs by 1.0e\+00 of its norm"):
        prepare_model(AddsNothingYet(tiny_models.build("Llama").config))


class BoundsItsLogits(transformers.LlamaForCausalLM):
    """A bound that no setting tells and that small logits do not show."""

    how = "tanh"

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        bounded = {"tanh": lambda x: 30 * torch.tanh(x / 30), "clamp": lambda x: x.clamp(-50, 50)}
        output.logits = bounded[self.how](output.logits)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["tanh", "clamp"])
def test_a_bound_on_logits_that_is_not_reached_yet_is_found(how, dtype):
    model = BoundsItsLogits(tiny_models.build("Llama").config).to(dtype)
    model.how = how
    with pytest.raises(ModelError, match="BoundsItsLogits bends its logits"):
        prepare_model(model)


def test_what_the_end_of_a_turn_does_is_seen():
    model = tiny_models.build("Llama")
    model.config.eos_token_id = 5
    backbone = type(model.model)

    class Counts(backbone):
        def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
            turns = (input_ids == self.config.eos_token_id).cumsum(1)[..., None]
            return super().forward(inputs_embeds=self.embed_tokens(input_ids) + 0.3 * turns, **kwargs)

    model.model.__class__ = Counts
    assert prepare_model(model).layout == "padded"


def test_half_precision_does_not_hide_wrong_positions():
    """Rotary positions by the row, whatever it is told: in bfloat16, the gradient is a quarter off."""
    model = tiny_models.build("Llama").bfloat16()
    rotate = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: rotate(
        x, torch.arange(position_ids.shape[1])[None].expand_as(position_ids)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepare_model(model).layout == "packed"
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype == torch.bfloat16
        assert torch.equal(tensor, before[name])


class SeesWhatComes(transformers.LlamaForCausalLM):
    """Adds the mean of the whole text to every token."""

    share = 1.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + self.share * output.logits.mean(1, keepdim=True)
        return output


@pytest.mark.parametrize("share", [1.0, 1e-6])
def test_a_model_that_sees_what_comes_is_refused(share):
    """A share so small that rounding could explain it shows in the gradients."""
    model = SeesWhatComes(tiny_models.build("Llama").config)
    model.share = share
    with pytest.raises(ModelError, match="is no causal language model: what it says of a token depends on"):
        prepare_model(model)


class HalvesItsGradients(transformers.LlamaForCausalLM):
    """Has the loss we expect, and other gradients."""

    def forward(self, *args, **kwargs):
        hidden = self.model(*args, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.lm_head((hidden + hidden.detach()) / 2)
        )


def test_the_probe_refuses_a_model_with_other_gradients():
    model = HalvesItsGradients(tiny_models.build("Llama").config)
    with pytest.raises(ModelError, match="a gradient differs"):
        prepare_model(model)


def test_the_probe_refuses_an_adapter_on_the_vocabulary_matrix_that_we_do_not_know():
    targets = ["k_proj", "v_proj", "lm_head"]
    config = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])
    model = get_peft_model(tiny_models.build("Llama"), config)
    with pytest.raises(ModelError, match="IA3 cannot be trained here: on the vocabulary matrix"):
        prepare_model(model)


def deaf_attention(layer):
    """A layer's attention that reads its own idea of what is visible: everything before."""

    def forward(hidden_states, position_embeddings=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, layer.head_dim)
        query = layer.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = layer.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = layer.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return layer.o_proj(output.transpose(1, 2).flatten(2)), None

    return forward


@pytest.mark.parametrize("deaf_layers", [[0], [1], [0, 1]], ids=str)
def test_the_probe_falls_back_where_attention_ignores_the_segments(deaf_layers):
    model = tiny_models.build("Llama")
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)
    for number in deaf_layers:
        attention = model.model.layers[number].self_attn
        attention.forward = deaf_attention(attention)
    preparation = prepare_model(model)
    assert preparation.layout == "padded"
    assert len(preparation.notices) == 1
    assert_exact(our_loss_and_gradients(model, PAIRS, layout="padded"), expected)


def test_a_layer_that_stops_listening_to_the_segments_is_noticed_in_the_next_pass():
    model = tiny_models.build("Llama")
    prepare_model(model)
    attention = model.model.layers[1].self_attn
    attention.forward = deaf_attention(attention)
    with pytest.raises(ModelError, match=r"called our attention 1 times in a forward pass, 2 times"):
        model(batch=pack(PAIRS, OBJECTIVE))


def test_the_probe_is_longer_than_the_sliding_window():
    settings = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
    model = tiny_models.build("Qwen2", **settings)
    assert prepare_model(copy.deepcopy(model)).layout == "shared"
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # known to the model's masks alone
    assert prepare_model(model).layout == "padded"


@pytest.mark.parametrize(
    ("name", "reason"), [("Llama", "needs position_bias"), ("GPTNeo", "cannot be replaced")]
)
def test_without_a_probe_attention_that_we_do_not_know_is_refused_in_the_first_pass(name, reason):
    model = prepared(tiny_models.build(name))
    if name == "Llama":
        attention = model.model.layers[0].self_attn
        attention.forward = functools.partial(attention.forward, position_bias=torch.zeros(1))
    with pytest.raises(ModelError, match=reason):
        model(batch=pack(PAIRS, OBJECTIVE))


def test_a_model_that_mixes_neighbours_falls_back():
    model = tiny_models.build("Llama")
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda hidden: plain(hidden) + 0.5 * hidden.roll(1, 1).index_fill(1, torch.tensor([0]), 0)
    assert prepare_model(model).layout == "padded"


def test_a_layout_asked_for_that_is_not_exact_is_refused():
    with pytest.raises(ModelError, match="layout `shared`"):
        prepare_model(tiny_models.build("Bloom"), layout="shared")


MISMATCHES = [("packed", "shared"), ("padded", "shared"), ("padded", "packed"), ("shared", "padded")]


@pytest.mark.parametrize(("prepared_for", "layout"), MISMATCHES)
def test_a_micro_batch_of_another_layout_is_refused(prepared_for, layout):
    model = prepared(tiny_models.build("Llama"), layout=prepared_for)
    with pytest.raises(ModelError, match="layout"):
        model(batch=pack(PAIRS, OBJECTIVE, layout=layout))


def test_an_encoder_decoder_model_is_refused():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(ModelError, match="encoder-decoder"):
        prepare_model(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_a_language_model_head_is_refused():
    with pytest.raises(ModelError, match="no language-model head"):
        prepare_model(tiny_models.build("Llama").model)


def test_a_module_that_is_no_transformers_model_is_refused():
    with pytest.raises(ModelError, match="not a transformers model"):
        prepare_model(nn.Linear(2, 2))


# Mixtures of experts


def own_router_loss(model, batch_inputs):
    """The auxiliary loss as the plain model computes it, times its coefficient."""
    with torch.no_grad():
        return model.config.router_aux_loss_coef * model(**batch_inputs).aux_loss.item()


def mixture():
    return tiny_models.build("Mixtral", output_router_logits=True, router_aux_loss_coef=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_loss_of_a_micro_batch_is_the_models_own(layout):  # peers 22
    model = mixture()
    pair = TokenizedPair(tiny_models.token_ids(6), tiny_models.token_ids(5), [])
    ids = torch.tensor([[*pair.prompt, *pair.chosen]])
    own = own_router_loss(model, {"input_ids": ids})
    assert own > 0.1
    expected = reference.loss_and_gradients(model, [pair], OBJECTIVE)[0] + own
    ours, gradients = our_loss_and_gradients(prepared(model, layout=layout), [pair], layout=layout)
    assert ours == pytest.approx(expected, rel=1e-5)
    router = next(gradient for name, gradient in gradients.items() if "gate.weight" in name)
    assert router.abs().max() > 0


def test_router_loss_of_padded_pairs_leaves_padding_out():
    model = mixture()
    batch = pack(PAIRS, OBJECTIVE, layout="padded")
    own = own_router_loss(model, {"input_ids": batch.input_ids_BN, "attention_mask": batch.attention_mask_BN})
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)[0] + own
    assert our_loss_and_gradients(prepared(model, layout="padded"), PAIRS, layout="padded")[
        0
    ] == pytest.approx(expected, rel=1e-5)


def test_router_loss_of_a_shared_micro_batch_counts_every_stored_token_once():
    model = mixture()
    per_layer = []
    with torch.no_grad():
        for pair in PAIRS:
            for side, start in ((pair.chosen, 0), (pair.rejected, len(pair.prompt))):
                ids = torch.tensor([[*pair.prompt, *side]])
                per_layer.append(
                    [logits[start:] for logits in model(ids, output_router_logits=True).router_logits]
                )
        joined = tuple(torch.cat(layer) for layer in zip(*per_layer, strict=True))
        balancing = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
        own = 0.3 * balancing(joined, 4, 2).item()
    expected = reference.loss_and_gradients(model, PAIRS, OBJECTIVE)[0] + own
    assert our_loss_and_gradients(prepared(model), PAIRS)[0] == pytest.approx(expected, rel=1e-5)


def test_router_losses_of_micro_batches_are_weighted_by_their_pairs():
    model = prepared(mixture())
    plain = prepared(tiny_models.build("Mixtral"))
    batches = [pack(PAIRS[:1], OBJECTIVE), pack(PAIRS[1:3], OBJECTIVE)]
    denominators = Denominators(sum(batch.nll_weight for batch in batches), 3, 3)
    whole = [(model(batch=batch).loss - plain(batch=batch).loss).item() for batch in batches]
    split = [
        (
            model(batch=batch, denominators=denominators).loss
            - plain(batch=batch, denominators=denominators).loss
        ).item()
        for batch in batches
    ]
    assert split == pytest.approx([whole[0] / 3, 2 * whole[1] / 3], rel=1e-4)


def test_router_loss_is_there_without_a_rejected_side():
    """Where nothing is preferred, under `beta: 0` or for pairs with a chosen answer alone."""
    alone = [TokenizedPair(pair.prompt, pair.chosen, []) for pair in PAIRS[:3]]
    model, plain = prepared(mixture()), prepared(tiny_models.build("Mixtral"))
    batch = pack(alone, OBJECTIVE)
    counts = step_denominators(alone, OBJECTIVE)
    assert (model(batch=batch, denominators=counts).loss - plain(batch=batch, denominators=counts).loss) > 0.1


def test_router_loss_is_left_out_of_empty_micro_batches_and_of_evaluation():
    model, plain = prepared(mixture()), prepared(tiny_models.build("Mixtral"))
    empty = pack(PAIRS[:1], OBJECTIVE, empty=True)
    assert model(batch=empty, denominators=Denominators(1, 1)).loss.item() == 0
    with torch.no_grad():
        batch = pack(PAIRS, OBJECTIVE)
        assert torch.equal(model(batch=batch).loss, plain(batch=batch).loss)
