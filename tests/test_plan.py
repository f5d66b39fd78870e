"""`orpo plan`: what it counts equals what is there; it plans every recipe; its advice makes a run fit."""

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files

import numpy as np
import pytest
import tiny_models
import torch
from tiny_training import random_pairs, tiny_trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import orpo
from orpo.cli import main
from orpo.engine.footprint import Footprint, measure_footprint
from orpo.engine.head import Denominators
from orpo.engine.memory import default_tokens_per_micro_batch, head_bytes, optimizer_bytes, token_budget
from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.engine.planning import plan_epoch
from orpo.engine.steps import BatchSettings, build_step
from orpo.errors import ConfigError, ModelError
from orpo.pairs import TokenizedPair
from orpo.plan import plan as planning
from orpo.plan.advice import _tried, cheapest_changes
from orpo.plan.lengths import PairLengths, drawn_lengths, read_lengths
from orpo.plan.lines import plan_json, plan_lines
from orpo.plan.machine import GPUS, cluster
from orpo.plan.memory import Setup, memory_of, states
from orpo.plan.on_paper import NF4_BYTES, paper_model
from orpo.plan.plan import (
    _first_steps,
    _laid_out,
    _num_evaluations,
    _Settings,
    has_checkpointing,
    lay_out,
    make_plan,
)
from orpo.plan.work import attended, work_of
from orpo.settings.config import Objective, OrpoSettings
from orpo.settings.recipe import load_recipe
from orpo.settings.shipped import shipped
from orpo.training.cadence import checkpoint_cost

GIB = 2**30
PUBLISHED = {
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "google/gemma-3-1b-pt": 999_885_952,
    "HuggingFaceTB/SmolLM3-3B-Base": 3_075_098_624,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "microsoft/phi-2": 2_779_683_840,
    "mistral-community/Mixtral-8x22B-v0.1": 140_620_634_112,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
}
"""Weights of public models, as their pages state them."""
UF = "149/304/304"


@cache
def paper(name, **settings):
    return paper_model(
        OrpoSettings(model_name_or_path=name, **settings), has_bf16=True, autocast=True, by_kernel=True
    )


@pytest.fixture
def on_paper(monkeypatch):
    """Each model is put on paper once for all tests: it takes a third of a second."""

    def once(settings, *, has_bf16, autocast, by_kernel):
        asked = {key: getattr(settings, key) for key in ("use_peft", "load_in_4bit", "lora_r", "dtype")}
        return paper(settings.model_name_or_path, **asked)

    monkeypatch.setattr(planning, "paper_model", once)


def lengths(recipe, pairs=2000, means=UF):
    return drawn_lengths(means, pairs, recipe)


# ------------------------------------------------------------------------------------------ the recipes


@pytest.mark.parametrize(
    "recipe", [one for one in shipped() if "/" not in one.name], ids=lambda one: one.name
)
def test_every_recipe_resolves_and_plans(recipe, tmp_path, on_paper):
    path = tmp_path / f"{recipe.name}.yaml"
    path.write_text(recipe.text)
    settings = load_recipe(path).settings
    plan = make_plan(settings, cluster("h100-80", 8, 4), lengths(settings))
    assert plan.fits and plan.hours > 0, plan_lines(plan, [])
    known = PUBLISHED.get(settings["model_name_or_path"])
    if known is not None and not settings.get("use_peft"):
        assert plan.model.num_weights == known
    assert recipe.title.endswith((".", "'.")) and "# Source: " in recipe.text
    keys = [line.split(":")[0] for line in recipe.text.splitlines() if line and line[0] not in "# -"]
    assert set(keys) == set(settings), "a key twice, or a notice"


# ------------------------------------------------------------------------------------------ on paper


def test_a_layer_keeps_what_its_formulas_say():
    """Of Llama in float32, by hand: both norms, queries, keys, values, attention by segments, SwiGLU."""
    hidden, wide, heads, layers = 64, 192, 4, 3
    config = LlamaConfig(
        vocab_size=50, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    footprint = measure_footprint(LlamaForCausalLM(config))
    norm = 3 * hidden + 1  # input, normalised input, output; one over the root mean square
    copied = (
        3 / 5
    )  # keys and values of prompt and rejected answer, put next to each other: 8 of 20 tokens, and 4
    attention = 3 * hidden + hidden + heads + hidden + 2 * copied * hidden
    of_layer = 2 * norm + attention + 4 * wide
    of_end = norm - hidden  # the output is the head's
    rotary = 2 * hidden / heads
    expected = 4 * (layers * of_layer + of_end + rotary)
    assert footprint.layers == pytest.approx(expected, rel=0.01)
    assert (footprint.widest, footprint.inputs, footprint.num_layers) == (4 * wide, 4 * hidden, layers)
    assert footprint.fixed == pytest.approx(0, abs=1)


def test_measuring_leaves_a_model_as_it_was():
    model = tiny_models.build("Llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    measure_footprint(model)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == implementation
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "OPT"])
def test_a_model_on_paper_keeps_what_the_real_one_keeps(name, tmp_path):
    """From its last layer, on fake tensors; rotary tables, which layers share, count for each."""
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path)
    found = paper_model(
        OrpoSettings(model_name_or_path=str(tmp_path)), has_bf16=False, autocast=False, by_kernel=False
    )
    real = measure_footprint(model)
    assert found.footprint.layers == pytest.approx(real.layers, rel=0.06)
    assert found.num_weights == sum(weight.numel() for weight in model.parameters())
    assert found.layers == model.config.num_hidden_layers


def test_adapters_and_quantized_weights_on_paper():
    """41,943,040 is what PEFT counts for rank 16 on every linear layer of Mistral-7B."""
    lora, qlora = (paper("mistralai/Mistral-7B-v0.1", use_peft=True, load_in_4bit=q) for q in (False, True))
    assert lora.trained == qlora.trained == 41_943_040
    whole = PUBLISHED[lora.name]
    assert lora.num_weights == whole + lora.trained and not lora.head_trained
    assert lora.weight_bytes == 2 * whole + 4 * lora.trained
    in_layers = sum(32 * 4096 * wide for wide in (4096, 1024, 1024, 4096, 14336, 14336, 14336))
    assert qlora.weight_bytes == pytest.approx(lora.weight_bytes - (2 - NF4_BYTES) * in_layers)
    assert qlora.footprint.layers == lora.footprint.layers


def test_experts_count_for_the_tokens_they_get():
    mixtral = paper("mistral-community/Mixtral-8x22B-v0.1")
    attention = 6144 * (6144 + 1024 + 1024 + 6144)
    experts = 3 * 6144 * 16384
    assert mixtral.products == pytest.approx(56 * (attention + 2 * experts + 8 * 6144), rel=1e-3)
    assert mixtral.layer_weights == pytest.approx(attention + 8 * experts, rel=1e-3)


def test_a_name_without_a_configuration_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no configuration could be read"):
        paper_model(
            OrpoSettings(model_name_or_path=str(tmp_path)), has_bf16=True, autocast=True, by_kernel=True
        )


# ------------------------------------------------------------------------------------------ memory


def setup(**changes):
    plain = Setup(1, "none", "adamw_torch_fused", False, True, 1024)
    return replace(plain, **changes)


def test_states_of_a_rank_are_what_each_way_of_sharding_leaves():
    model = paper("mistralai/Mistral-7B-v0.1")
    weights = float(model.num_weights)
    assert states(model, setup()) == (4 * weights, 4 * weights, 8 * weights)
    assert states(model, setup(ranks=8, sharding="ddp")) == (4 * weights, 8 * weights, 8 * weights)
    assert states(model, setup(ranks=8, sharding="fsdp")) == (weights / 2, weights / 2, weights)
    zero2 = states(model, setup(ranks=8, sharding="zero2"))
    assert zero2 == pytest.approx((2 * weights, 2 * weights / 8, 12 * weights / 8))
    assert states(model, setup(ranks=8, sharding="zero3"))[0] == pytest.approx(2 * weights / 8)
    assert states(model, setup(optim="adamw_bnb_8bit"))[2] == 2 * weights
    assert states(model, setup(optim="paged_adamw_8bit"))[2] == 0, "it may leave the GPU"


def test_peaks_of_a_step():
    """By hand, with layers that keep nothing: what is there when the head runs, and when backward ends."""
    model = replace(paper("mistralai/Mistral-7B-v0.1"), footprint=Footprint(0.0, 32, 0.0, 0.0))
    weights, matrix = 4.0 * model.num_weights, 4.0 * 32000 * 4096
    head = 4 * (100 * 32000 + 100 * 4096) + matrix
    one = memory_of(model, setup(), 100)
    assert one.head == head and one.peak == weights + 2 * weights + weights
    several = memory_of(model, setup(), 100, later=90)
    smaller = 4 * (90 * 32000 + 90 * 4096) + matrix
    assert several.peak == 4 * weights + max(matrix, smaller) and several.head == head
    together = memory_of(model, setup(on_cpu=True), 2000, longest=700)  # logits of 128 MiB hold 1,048 tokens
    assert together.head == 4 * (700 * 32000 + 2000 * 4096) + matrix
    alone = memory_of(model, setup(on_cpu=True), 2000, longest=100)
    assert alone.head == 4 * (256 * 32000 + 2000 * 4096) + matrix
    tied = memory_of(replace(model, tied=True), setup(), 100)
    assert tied.peak == 4 * weights + matrix
    freed = setup(in_backward=True)
    alone = memory_of(model, freed, 100)
    assert alone.gradients == matrix and alone.peak == 3 * weights + head, (
        "the head's peak, then one gradient"
    )
    assert memory_of(replace(model, tied=True), freed, 9).peak == 3 * weights + 2 * matrix
    assert memory_of(model, freed, 100, later=90) == several, "micro-batches before leave their gradients"
    kept = replace(model, footprint=Footprint(32e6, 32, 1e5, 1e5))
    plain, checked = (memory_of(kept, setup(checkpointing=c), 100).activations for c in (False, True))
    assert plain == pytest.approx(100 * (32e6 + 3.3e5)) and checked == pytest.approx(
        100 * (3.2e6 + 1e6 + 3.3e5)
    )


def test_training_and_planning_choose_the_same_micro_batches(monkeypatch):
    """One owner: the default budget of a run, and the one that is planned for the memory it then has."""
    from orpo.engine import memory

    model = tiny_models.build("Llama")
    footprint = measure_footprint(model)
    weights = sum(weight.numel() for weight in model.parameters())
    room = 1500 * 2 * footprint.per_token()
    monkeypatch.setattr(memory, "free_memory", lambda device: int(room + 12 * weights))
    assert default_tokens_per_micro_batch(model, torch.device("cpu")) == 1280
    assert token_budget(room, footprint.per_token(), 2048) == 1280
    assert token_budget(1e15, 1.0, 2048) == 2048 and token_budget(0, 1.0, 2048) == 1024
    assert token_budget(1e9, 0.0, 2048) == 2048, "only the vocabulary matrix is trained"


@pytest.mark.parametrize(
    ("objective", "tokens"),
    [
        ({"objective": "orpo"}, 2048),
        ({"objective": "dpo"}, 2048),
        ({"objective": "sft"}, 1024),
        ({"stages": [{"objective": "sft", "share": 0.5}, {"objective": "orpo"}]}, 2048),
    ],
    ids=str,
)
def test_where_nothing_is_compared_micro_batches_are_smaller(objective, tokens, tmp_path, monkeypatch):
    """On a CPU, by the trainer and on paper."""
    monkeypatch.setattr("orpo.engine.memory.free_memory", lambda device: 2**36)
    model = str(files("orpo") / "demo" / "model")
    settings = {"model_name_or_path": model, "dataset_name": "demo"} | objective
    plan = make_plan(settings, cluster("h100-80", 1), drawn_lengths(UF, 16, settings), on_cpu=True)
    trainer = tiny_trainer(tmp_path, **objective)
    trainer.get_train_dataloader()
    assert plan.budget == trainer._tokens_per_micro_batch == tokens


def test_optimizers_by_name():
    sizes = {"adamw_torch": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "lion_8bit": 1, "x": 8}
    assert {name: optimizer_bytes(name) for name in sizes} == sizes


# ------------------------------------------------------------------------------------------ work


PAIRS = [TokenizedPair([1] * p, [2] * c, [3] * r) for p, c, r in ((5, 9, 4), (11, 3, 8), (2, 6, 6))]
TOKENS = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in PAIRS])


@pytest.mark.parametrize(
    ("layout", "checkpointing"), [("shared", False), ("shared", True), ("packed", False), ("padded", True)]
)
def test_operations_are_those_that_torch_counts(layout, checkpointing, tmp_path):
    """Attention apart, since the counter knows no causal one; nor does it know products added in place."""
    model = tiny_models.build("Llama", num_hidden_layers=6).train()
    model.save_pretrained(tmp_path)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    prepare_model(model, layout=layout, probe=False)
    with FlopCounterMode(display=False) as counter:
        batch = pack(PAIRS, Objective(), layout=layout)
        model(batch=batch, denominators=Denominators(10.0, 3.0)).loss.backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in counted.items() if "mm" in str(operation))
    settings = OrpoSettings(model_name_or_path=str(tmp_path))
    described = paper_model(settings, has_bf16=False, autocast=False, by_kernel=False)
    work = work_of(
        replace(described, attention=0), TOKENS, Objective(), checkpointing=checkpointing, layout=layout,
        read=batch.num_tokens / len(PAIRS),
    )  # fmt: skip
    of_matrix = 2 * tiny_models.VOCAB * described.hidden * work.scored
    assert len(PAIRS) * (work.training - of_matrix) == pytest.approx(products, rel=1e-3)


@pytest.mark.parametrize("window", [None, 4, 7, 100])
def test_attended_pairs_are_those_of_a_mask(window):
    def visible(queries, keys):
        offset = keys - queries
        return sum(
            1
            for q in range(queries)
            for k in range(keys)
            if k <= q + offset and (window is None or q + offset - k < window)
        )

    expected = np.mean([visible(p + c, p + c) + visible(r, p + r) for p, c, r in TOKENS])
    described = replace(paper("mistralai/Mistral-7B-v0.1"), window=(window, 1.0 if window else 0.0))
    assert attended(described, *TOKENS.T) == pytest.approx(expected)
    apart = np.mean([visible(p + c, p + c) + visible(p + r, p + r) for p, c, r in TOKENS])
    assert attended(described, *TOKENS.T, "packed") == pytest.approx(apart)
    padded = np.mean([2 * visible(p + max(c, r), p + max(c, r)) for p, c, r in TOKENS])
    assert attended(described, *TOKENS.T, "padded") == pytest.approx(padded)


def test_sharing_and_the_objective_decide_what_is_computed():
    model = paper("mistralai/Mistral-7B-v0.1")
    whole = work_of(model, TOKENS, Objective(), checkpointing=False)
    assert whole.tokens == TOKENS.sum() / 3
    assert whole.separate_tokens == whole.tokens + TOKENS[:, 0].mean()
    assert whole.scored == whole.tokens - 1
    answers = work_of(model, TOKENS, Objective(nll_on="response"), checkpointing=False)
    assert answers.scored == TOKENS[:, 1:].sum() / 3
    chosen = work_of(model, TOKENS, Objective(preference_weight=0.0), checkpointing=False)
    assert chosen.tokens == TOKENS[:, :2].sum() / 3


# ------------------------------------------------------------------------------------------ the plan


FULL = {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "per_device_train_batch_size": 8}


def plan_of(settings, *where, pairs=2000, **options):
    return make_plan(settings, cluster(*where, **options), lengths(settings, pairs))


def test_steps_hours_and_cost_follow_from_pairs_and_rates(on_paper):
    plan = plan_of(FULL | {"num_train_epochs": 2, "eval_strategy": "no"}, "h100-80", 8)
    assert (plan.pairs_per_step, plan.steps, plan.num_evaluations) == (64, 64, 0)
    rate = 8 * 989e12 * 0.4 * plan.balance
    assert plan.step_seconds == pytest.approx(64 * plan.work.training / rate)
    assert plan.hours == pytest.approx(64 * plan.step_seconds / 3600)
    assert plan.cost == pytest.approx(plan.hours * 8 * GPUS["h100-80"].price)
    slow = plan_of(FULL | {"num_train_epochs": 2, "eval_strategy": "no"}, "h100-80", 8, mfu=0.2, price=10.0)
    assert slow.hours == pytest.approx(2 * plan.hours) and slow.cost == pytest.approx(8 * plan.cost)


def test_what_ranks_send(on_paper):
    """A ring sends each number twice but for one rank's share; cut weights are gathered twice."""
    weights = PUBLISHED["mistralai/Mistral-7B-v0.1"]
    assert plan_of(FULL, "h100-80").talk_bytes == 0
    assert plan_of(FULL, "h100-80", 4).talk_bytes == pytest.approx(2 * 3 / 4 * 4 * weights)
    cut = plan_of(FULL | {"fsdp": "full_shard auto_wrap", "tokens_per_micro_batch": 10**6}, "h100-80", 4)
    assert cut.micro_batches == 1 and cut.talk_bytes == pytest.approx(3 / 4 * 3 * 2 * weights)
    assert cut.cluster.bandwidth == 450e9 and cluster("h100-80", 8, 4).bandwidth == 8 * 50e9
    network = plan_of(FULL | {"fsdp": "full_shard auto_wrap"}, "a10-24", 1, 8)
    assert network.step_seconds == pytest.approx(network.talk_bytes / 3e9), (
        "the network is slower than the GPU"
    )


def test_advice_makes_a_run_fit_and_is_the_cheapest(on_paper):
    plan = plan_of(FULL, "h100-80", 8)
    assert not plan.fits and plan.setup.sharding == "ddp"
    kept, *other = cheapest_changes(FULL, plan)
    assert kept.words == "--fsdp 'full_shard auto_wrap'" and kept.plan.fits and kept.same_model
    assert all(change.plan.fits and change.plan.cost < kept.plan.cost for change in other)
    assert plan_lines(plan, [kept])[-1].startswith("try --fsdp")
    alone = plan_of(FULL, "rtx4090-24")
    wider, adapter = cheapest_changes(FULL, alone)
    assert wider.plan.cluster.ranks == 8 and "--gpus 8 --nodes 1" in wider.words
    assert "--use_peft" in adapter.words and not adapter.same_model


def test_a_step_within_the_backward_is_planned_and_advised_for_one_process(on_paper):
    one = FULL | {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "bf16": False}
    plan = plan_of(one, "h200-141")
    freed = {"optimizer_in_backward": True, "max_grad_norm": 0.0}
    ours = plan_of(one | freed, "h200-141")
    assert ours.micro_batches == 1 and ours.memory.peak < plan.memory.peak - 0.8 * plan.memory.gradients
    assert ours.budget > plan.budget, "the memory of gradients is there for tokens"
    with pytest.raises(ConfigError, match="optimizer_in_backward: 8 processes"):
        plan_of(one | freed, "h100-80", 8)
    tried = {change.words: change for change in _tried(one, plan)}
    clipped = tried["--optimizer_in_backward --max_grad_norm 0"]
    assert clipped.plan.setup.in_backward and not clipped.same_model
    unclipped = {change.words: change for change in _tried(one | {"max_grad_norm": 0.0}, plan)}
    assert unclipped["--optimizer_in_backward"].same_model
    wider = [words for words in (c.words for c in _tried(one | freed, ours)) if words.startswith("--gpus")]
    assert wider and all("--optimizer_in_backward false" in words for words in wider)


def test_deepspeed_settings_say_what_is_cut(on_paper, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert plan_of(FULL | {"deepspeed": str(file)}, "h100-80", 8).setup.sharding == "zero2"
    with pytest.raises(ConfigError, match=r"none\.json is no file"):
        plan_of(FULL | {"deepspeed": "none.json"}, "h100-80", 8)


def test_lengths_around_means():
    found = lengths({"max_length": 600}, 100_000)
    assert found.tokens.shape == (4096, 3) and found.num_pairs == 95_000 and found.num_held_out == 5000
    assert (found.tokens[:, 0] + found.tokens[:, 1:].max(1)).max() <= 601
    free = lengths({"max_length": None, "eval_strategy": "no"}, 100_000)
    assert free.tokens.mean(0) == pytest.approx([149, 304, 304], rel=0.03) and free.num_pairs == 100_000


def test_lengths_of_real_data(tmp_path):
    model = files("orpo") / "demo" / "model"
    rows = [
        {"prompt": f"Say {n}.", "chosen": "yes " * n, "rejected": "no " * (n % 3 + 1)} for n in range(1, 41)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = read_lengths({"model_name_or_path": str(model), "dataset_name": str(data), "eval_strategy": "no"})
    assert isinstance(found, PairLengths) and found.num_pairs == 40 and found.num_held_out == 0
    assert found.tokens[-1, 1] > found.tokens[0, 1] > 0


def test_what_pairs_share_is_planned_once(tmp_path, on_paper):
    """Two pairs of each prompt with one best answer: the second adds its worse answer alone."""
    model = files("orpo") / "demo" / "model"
    rows = [
        {"prompt": f"{n} " * 30, "chosen": f"{n} is a number." * 5, "rejected": f"{word} " * 10}
        for n in range(100, 140)
        for word in ("no", "none")
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model_name_or_path": str(model), "dataset_name": str(data), "eval_strategy": "no",
        "per_device_train_batch_size": 16,
    }  # fmt: skip
    here = cluster("h100-80", 1)
    found = read_lengths(recipe)
    one_of_two = found.tokens[::2, :2].sum() / found.tokens.sum()

    def planned(**more):
        return make_plan(recipe | more, here, read_lengths(recipe | more))

    together, apart = planned(), make_plan(recipe, here, replace(found, pairs=None))
    assert together.work.tokens == pytest.approx((1 - one_of_two) * apart.work.tokens, rel=0.02)
    assert together.work.training == pytest.approx((1 - one_of_two) * apart.work.training, rel=0.02)
    assert together.hours < apart.hours
    assert together.largest == pytest.approx((1 - one_of_two) * apart.largest, rel=0.05)
    assert together.memory.activations < 0.8 * apart.memory.activations
    assert planned(layout="packed").work.tokens == apart.work.separate_tokens
    alone = lay_out(recipe, replace(together.model, shares=False), here, found)
    assert alone.work.tokens == apart.work.tokens and alone.largest == apart.largest
    answers = planned(objective="sft")
    half = found.tokens[::2, :2].sum() / found.tokens[:, :2].sum()
    of_answers = make_plan(recipe | {"objective": "sft"}, here, replace(found, pairs=None))
    assert answers.work.tokens == pytest.approx((1 - half) * of_answers.work.tokens, rel=0.02)


def test_the_plan_lays_out_what_training_does():
    """The tokens of the largest micro-batches, and those of a pair, on one rank and on two."""
    pairs = [
        TokenizedPair(list(range(5, 45)), list(range(50, 60 + n % 5)), list(range(70 + n, 80 + 2 * n)))
        for n in range(40)
    ]
    lengths = PairLengths(
        np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]), 40, 0, "here", pairs,
        np.zeros(40, int),
    )  # fmt: skip
    cases = [(ranks, layout) for ranks in (1, 2) for layout in ("shared", "packed", "padded")]
    for ranks, layout in cases:
        shown = _first_steps(lengths, 20, seed=7, drop_last=False)
        laid = _laid_out(lengths, shown, Objective(preference_weight=0.1), ranks, 300, layout, shares=True)
        sizes = []
        for step in plan_epoch(40, 20, seed=7, epoch=0, prompts=lengths.prompts):
            own = [pairs[number] for number in step.tolist()]
            for rank in range(ranks):
                settings = BatchSettings(Objective(preference_weight=0.1), layout, 300, rank, ranks)
                sizes.append([b.num_tokens * (not b.empty) for b in build_step(own, step, settings).batches])
        assert laid.first == max(of_rank[0] for of_rank in sizes)
        assert laid.later == max(size for of_rank in sizes for size in of_rank[1:])
        assert laid.read == pytest.approx(sum(map(sum, sizes)) / 40)
        assert 0.7 < laid.balance <= 1 and (ranks > 1 or laid.balance == 1)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("more", [{}, {"data_seed": 3}, {"dataloader_drop_last": True, "seed": 5}])
def test_a_plan_counts_the_tokens_of_the_training_that_it_plans(layout, more, tmp_path):
    """An epoch of the demo's pairs by the trainer: the tokens of a pair, and of the largest micro-batch."""
    model = str(files("orpo") / "demo" / "model")
    data = files("orpo") / "demo" / "data" / "politeness" / "test.jsonl"
    few = tmp_path / "pairs.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:50]))
    settings = {
        "model_name_or_path": model, "dataset_name": str(few), "layout": layout, "eval_split": 0.0,
        "per_device_train_batch_size": 7, "tokens_per_micro_batch": 300, "bf16": False,
    } | more  # fmt: skip
    plan = make_plan(settings, cluster("h100-80", 1), read_lengths(settings), on_cpu=True)
    trainer = orpo.ORPOTrainer(args=orpo.ORPOConfig(output_dir=str(tmp_path / "run"), **settings))
    steps = [item["step"] for item in trainer.get_train_dataloader()]
    pairs = sum(len(batch) for step in steps for batch in step.pairs)
    within = 0.01 * more.get("dataloader_drop_last", 0)  # what is dropped counts for the mean
    assert plan.work.tokens == pytest.approx(sum(step.num_tokens for step in steps) / pairs, rel=within)
    assert plan.largest == max(batch.num_tokens for step in steps for batch in step.batches)
    said = next(line for line in plan_lines(plan, []) if line.startswith("a pair"))
    assert ("read once" in said) == (layout == "shared") and ("of padding" in said) == (layout == "padded")


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "epoch", "max_steps": 5},
        {"eval_strategy": "epoch", "max_steps": 7, "eval_on_start": False},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.5, "eval_delay": 2},
        {"save_strategy": "epoch", "max_steps": 6},
        {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 7, "eval_on_start": False},
        {"eval_strategy": "steps", "eval_steps": 0.3, "max_steps": 7},
        {"eval_strategy": "steps", "logging_steps": 2, "max_steps": 7},
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 7, "eval_delay": 4},
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "eval_delay": 40},
        {"save_strategy": "steps", "max_steps": 30},
        {"save_strategy": "steps", "max_steps": 30, "few": True},
        {"save_strategy": "steps", "save_steps": 4, "max_steps": 9},
        {"save_strategy": "no", "max_steps": 9},
        {"eval_strategy": "no"},
        {"eval_strategy": "no", "eval_on_start": True},
    ],
    ids=str,
)
def test_a_plan_counts_the_evaluations_that_a_run_has(settings, tmp_path):
    """As `orpo train` makes them, which evaluates at the end what was not."""
    settings = dict(settings)
    held_out = random_pairs(1 if settings.pop("few", False) else 5, seed=1)
    settings = {"max_steps": 4, "num_train_epochs": 3.0, "logging_steps": 1, "save_strategy": "no"} | settings
    trainer = tiny_trainer(tmp_path, evaluation=held_out, **settings)
    trainer.train()
    found = sum("eval_loss" in line for line in trainer.state.log_history)
    found += not trainer.is_evaluated()
    pairs = trainer.train_dataset
    tokens = float(trainer.eval_dataset.lengths.sum())
    lengths = PairLengths(pairs.lengths, len(pairs), len(held_out), "here", held_out_tokens=tokens)
    on_paper = _num_evaluations(
        _Settings(settings), lengths, 4, trainer.state.max_steps, 4, checkpoint_cost(1.0, 1, on_cpu=True)
    )
    assert on_paper == found


def test_a_model_whose_tokens_depend_on_the_length_of_a_pass_shares_nothing_on_paper(tmp_path):
    """As the engine has it: longrope switches its frequencies by the length of a whole pass."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    rope["original_max_position_embeddings"] = 64
    for settings, shares in (({}, True), ({"rope_parameters": rope}, False)):
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=128, **settings,
        )  # fmt: skip
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        model = LlamaForCausalLM(config)
        prepared = prepare_model(model, layout="shared", probe=False)
        asked = {"has_bf16": True, "autocast": True, "by_kernel": False}
        try:
            planned = paper_model(OrpoSettings(model_name_or_path=str(tmp_path)), **asked)
        except ModelError as error:  # as in transformers 5.17, whose longrope looks at values
            pytest.skip(str(error))
        assert planned.shares == (prepared.share_from is not None) == shares


def test_every_stage_is_planned(on_paper):
    """Memory is that of the largest stage, in whatever order; work is their mean."""
    recipe = {"model_name_or_path": str(files("orpo") / "demo" / "model"), "eval_strategy": "no"}
    here, found = cluster("h100-80", 1), drawn_lengths(UF, 500, recipe)
    sft, dpo = ({"objective": name, "share": share} for name, share in (("sft", 0.25), ("dpo", 0.75)))
    one_way, other = (
        make_plan(recipe | {"stages": stages}, here, found) for stages in ([sft, dpo], [dpo, sft])
    )
    alone = {name: make_plan(recipe | {"objective": name}, here, found) for name in ("sft", "dpo")}
    assert one_way.memory == other.memory == alone["dpo"].memory
    mean = 0.25 * alone["sft"].work.training + 0.75 * alone["dpo"].work.training
    assert one_way.work.training == pytest.approx(mean) == other.work.training


def test_a_step_has_no_more_pairs_than_there_are(on_paper):
    recipe = {"model_name_or_path": str(files("orpo") / "demo" / "model"), "eval_strategy": "no"}
    few = PairLengths(np.full((10, 3), 50), 10, 0, "here")
    here = cluster("h100-80", 1)
    plans = [
        make_plan(recipe | {"per_device_train_batch_size": size, "num_train_epochs": 1}, here, few)
        for size in (10, 512)
    ]
    assert plans[0].step_seconds == pytest.approx(plans[1].step_seconds) and plans[1].steps == 1
    dropping = recipe | {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "dataloader_drop_last": True,
    }
    assert make_plan(dropping, here, few).steps == 2
    for more in ({}, {"max_steps": 5}):
        with pytest.raises(ConfigError, match="dataloader_drop_last: 10 pairs are too few for a step of 12"):
            make_plan(dropping | {"per_device_train_batch_size": 12} | more, here, few)


def test_advice_names_no_step_that_would_be_dropped_whole(on_paper):
    dropping = FULL | {"dataloader_drop_last": True, "eval_strategy": "no"}
    plan = plan_of(dropping, "rtx4090-24", pairs=10)
    tried = [change.plan.cluster.ranks for change in _tried(dropping, plan)]
    assert 8 in tried and max(tried) == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"activation_checkpointing": True},
        {"fsdp": "full_shard", "fsdp_config": {"activation_checkpointing": True}},
    ],
)
def test_checkpointing_is_planned_under_each_of_its_names(settings):
    assert has_checkpointing(settings) and not has_checkpointing(dict.fromkeys(settings))


# ------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_plan(capsys, on_paper):
    words = ["--model_name_or_path", FULL["model_name_or_path"], "--pairs", "7000", "--lengths", UF]
    assert main(["plan", *words, "--gpu", "h100-80", "--gpus", "8"]) == 0
    shown = capsys.readouterr().out
    assert "does not fit" in shown and "\ntry --fsdp" in shown and "7.24 billion weights" in shown
    assert main(["plan", *words, "--gpu", "b200-180", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["num_weights"] == PUBLISHED[FULL["model_name_or_path"]]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h1000"], "--gpu h1000: unknown; one of"),
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--mfu", "40"], "--mfu 40: a share"),
        (["--price", "-1"], "--price -1"),
        (["--pairs", "7"], "write both"),
        (["--pairs", "7", "--lengths", "1/2"], "three means"),
        (["--pairs", "0", "--lengths", "1/2/3"], "--pairs 0"),
        (["--model_name_or_path", ""], "model_name_or_path is not set"),
        (["--streaming", "--max_steps", "3", "--dataset_name", "x"], "streaming: the data has no end"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["plan", "--model_name_or_path", "facebook/opt-125m", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_python_plans_as_the_command_does(capsys, on_paper):
    planned = orpo.plan_run(FULL, "h100-80", gpus=8, pairs=7000, lengths=UF)
    words = [word for key, value in FULL.items() for word in (f"--{key}", str(value))]
    main(["plan", *words, "--gpus", "8", "--pairs", "7000", "--lengths", UF])
    assert capsys.readouterr().out.splitlines() == planned.lines()


def test_json_has_every_part(on_paper):
    plan = plan_of(FULL, "h100-80", 8)
    found = plan_json(plan, cheapest_changes(FULL, plan))
    assert set(found["bytes"]) == set(plan.memory.__slots__) and not found["fits"]
    assert lay_out(FULL, plan.model, plan.cluster, plan.lengths) == plan
    assert head_bytes(1, 1, 1, chunk_tokens=1, trained=False) == 8
