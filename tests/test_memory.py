"""The token budget of a micro-batch follows the memory there is."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orpo.engine import memory
from orpo.engine.footprint import measure_footprint
from orpo.engine.memory import default_tokens_per_micro_batch, free_memory

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture
def model():
    """Four layers of 64."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=500,
    )
    return LlamaForCausalLM(config).float()


def budget(monkeypatch, model, room, most=8192, **kwargs):
    monkeypatch.setattr(memory, "MAX_TOKENS_ON_CPU", most)
    monkeypatch.setattr(memory, "free_memory", lambda device: int(room))
    return default_tokens_per_micro_batch(model, CPU, **kwargs)


def states(model):
    return 12 * sum(weight.numel() for weight in model.parameters())


def per_token(model, **kwargs):
    return measure_footprint(model).per_token(**kwargs)


def test_half_of_what_gradients_and_moments_leave_goes_to_the_micro_batch(monkeypatch, model):
    each = per_token(model)
    assert budget(monkeypatch, model, states(model) + 2 * 4096.5 * each) == 4096
    assert budget(monkeypatch, model, states(model) + 2 * 4095 * each) == 3840  # a multiple of 256
    smaller = states(model) - 6 * sum(weight.numel() for weight in model.parameters())
    assert budget(monkeypatch, model, smaller + 2 * 4096.5 * each, optim="adamw_8bit") == 4096
    freed = states(model) - 4 * sum(weight.numel() for weight in model.parameters())
    assert budget(monkeypatch, model, freed + 2 * 4096.5 * each, in_backward=True) == 4096
    model.to(torch.bfloat16)
    assert per_token(model) < 0.7 * each


def test_frozen_weights_need_no_states(monkeypatch, model):
    room = states(model) + 2 * 2048 * per_token(model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    own = 12 * model.get_input_embeddings().weight.numel()
    expected = (room - own) / 2 / per_token(model)
    assert 2048 < expected < 8192
    assert budget(monkeypatch, model, room) == int(expected) // 256 * 256


def test_checkpointed_layers_keep_their_inputs_only(monkeypatch, model):
    footprint = measure_footprint(model)
    of_inputs = 4 * 64 * 4
    assert per_token(model, checkpointing=True) == pytest.approx(
        of_inputs + footprint.layers / 4 + 3.3 * 4 * 256, rel=0.01
    )
    room = states(model) + 2 * 2048.5 * per_token(model, checkpointing=True)
    assert budget(monkeypatch, model, room, checkpointing=True) == 2048
    assert budget(monkeypatch, model, room) == 1024


def test_ranks_that_share_weights_and_states_each_hold_a_part(monkeypatch, model):
    """Under FSDP the model is still whole, and not on its device, when the budget is asked for."""
    held = states(model) + sum(weight.nbytes for weight in model.parameters())
    assert budget(monkeypatch, model, held / 4 + 2 * 2048.5 * per_token(model), num_shards=4) == 2048


def test_evaluation_keeps_one_layer(monkeypatch, model):
    each = measure_footprint(model).layers / 4
    assert budget(monkeypatch, model, 2 * 2048.5 * each, trains=False) == 2048


def test_a_family_that_cannot_be_tried_is_counted_as_llama_is(monkeypatch):
    falcon = tiny_models.build("Falcon")
    with pytest.raises(TypeError):
        measure_footprint(falcon)
    config = falcon.config
    each = 96 * config.hidden_size * config.num_hidden_layers
    assert budget(monkeypatch, falcon, states(falcon) + 2 * 2048.5 * each) == 2048


def test_bounds(monkeypatch, model):
    most = memory.MAX_TOKENS_ON_CPU
    assert budget(monkeypatch, model, 10_000 * GIB, most) == most == 2048
    assert budget(monkeypatch, model, 0, most) == 1024


def test_half_precision_counts_where_training_will_use_it(monkeypatch, model):
    plain = per_token(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = measure_footprint(model)
        assert half.per_token() < 0.8 * plain
        copies = 2 * sum(w.numel() for name, w in model.named_parameters() if "_proj" in name)
        assert half.fixed == pytest.approx(copies, rel=0.02), "autocast's copies of the weights"
        room = states(model) + half.fixed + 2 * 2048.5 * half.per_token()
        assert budget(monkeypatch, model, room) == 2048


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def test_free_memory_is_shared_by_the_ranks_of_a_machine(monkeypatch, machine):
    monkeypatch.setattr(memory, "_control_group_rooms", list)
    assert free_memory(CPU) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 2 * GIB


def test_free_memory_ends_at_the_limit_of_a_control_group(monkeypatch, machine, tmp_path):
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, limit, used, inactive in ((job.parent, "max", 0, 0), (job, 4 * GIB, 3 * GIB, GIB // 2)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    own = tmp_path / "own"
    own.write_text("4:memory:/elsewhere\n0::/slurm/job\n")
    rooms = memory._control_group_rooms(tmp_path, own)
    assert rooms == [3 * GIB // 2]
    assert memory._control_group_rooms(tmp_path, tmp_path / "absent") == []
    monkeypatch.setattr(memory, "_control_group_rooms", lambda: rooms)
    assert free_memory(CPU) == 3 * GIB // 2
