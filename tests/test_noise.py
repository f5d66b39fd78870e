"""NEFTune's noise is that of a text by itself, whatever is packed beside it."""

import math

import pytest
import tiny_models
import torch
from test_trainer import tiny_trainer

from orpo.engine.model import prepare_model
from orpo.engine.noise import noisy_embeddings
from orpo.engine.packing import pack
from orpo.engine.passes import PassLimits, split_passes
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

ALPHA = 5.0


def whole(batch):
    """The micro-batch as one pass."""
    (each,), _ = split_passes(batch, PassLimits())
    return each


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_each_token_has_the_length_of_its_own_side(layout):
    pairs = tiny_models.mixed_pairs()
    batch = pack(pairs, Objective(), layout=layout)
    lengths = whole(batch).side_lengths_BN.flatten()
    for pair in range(len(pairs)):
        for role, side in ((1, pairs[pair].chosen), (2, pairs[pair].rejected)):
            mine = batch.source_T[(batch.pair_T == pair) & (batch.role_T == role)]
            own = mine[1:] if layout == "shared" and role == 2 else mine  # the first is the prompt's last
            assert (lengths[own] == len(pairs[pair].prompt) + len(side)).all()


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_the_noise_is_as_large_as_that_of_a_text_alone(layout):
    model = tiny_models.build("Llama")
    embeddings = model.get_input_embeddings()
    batch = whole(pack(tiny_models.mixed_pairs(), Objective(), layout=layout))
    plain = embeddings(batch.input_ids_BN)
    with noisy_embeddings(embeddings, batch, ALPHA):
        noise = torch.stack([embeddings(batch.input_ids_BN) for _ in range(50)]) - plain
    bound = ALPHA / (batch.side_lengths_BN * plain.shape[-1]).sqrt()
    relative = noise / bound[..., None]
    assert relative.abs().max() <= 1 + 1e-4 and relative.abs().max() > 0.99
    assert abs(relative.std().item() - 1 / math.sqrt(3)) < 0.01  # of a uniform distribution
    assert torch.equal(embeddings(batch.input_ids_BN), plain)


def test_a_run_trains_with_noise_of_the_same_size_in_micro_batches_of_any_size(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "orpo.engine.noise.torch.rand_like", lambda like: sizes.append(like) or torch.ones_like(like)
    )
    found = []
    for budget in (30, 10_000):
        trainer = tiny_trainer(tmp_path / str(budget), neftune_noise_alpha=ALPHA, max_steps=2,
                               tokens_per_micro_batch=budget, logging_steps=1)  # fmt: skip
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append(losses)
    assert sizes and found[0] == pytest.approx(found[1], rel=1e-5)
    quiet = tiny_trainer(tmp_path / "quiet", max_steps=2, logging_steps=1)
    quiet.train()
    losses = [line["loss"] for line in quiet.state.log_history if "loss" in line]
    assert losses != pytest.approx(found[0], rel=1e-3)


def test_a_micro_batch_of_several_passes_takes_the_lengths_of_each(monkeypatch):
    """A side beyond the switch of longrope runs by itself: the embeddings read one part after the other."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}  # fmt: skip
    model = tiny_models.build("Llama", rope_parameters=rope, max_position_embeddings=128)
    prepare_model(model)
    pairs = [TokenizedPair([7] * n, [8] * 9, [9] * 8) for n in (40, 5)]
    model.train()
    quiet = model(batch=pack(pairs, Objective(), share_from=None)).loss.item()
    drawn = []
    monkeypatch.setattr(
        "orpo.engine.noise.torch.rand_like",
        lambda like: drawn.append(like.shape) or torch.ones_like(like) / 2,
    )
    assert model(batch=pack(pairs, Objective(), share_from=None), noise=ALPHA).loss.item() == quiet
    assert len(drawn) > 1  # passes; the middle of the range is no noise
