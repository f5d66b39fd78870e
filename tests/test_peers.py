"""Defects of other ORPO trainers that are about training, each with its number in the survey of peers.

Numbers 1, 2, 4, 6, 7, 8, 9, 12 and 19 are also tested where the feature is: test_trainer, test_trl_surface,
test_distributed.
"""

import pytest
import tiny_models
import torch
from tiny_training import logged, random_pairs, tiny_trainer, weights

from orpo.pairs import TokenizedPair


def test_one_very_long_prompt_leaves_the_others_alone(tmp_path):
    """peers 1: a prompt that filled max_length made the batch, then the model, not a number."""
    rows = [{"prompt": "Say it.", "chosen": f" Fine {n}.", "rejected": " No."} for n in range(15)]
    rows.append({"prompt": "word " * 400, "chosen": " Fine.", "rejected": " No."})
    model = tiny_models.build("Llama", vocab_size=700)
    trainer = tiny_trainer(tmp_path, model=model, train=rows, max_length=64, max_steps=3)
    assert len(trainer.train_dataset) == 15 and trainer.recorder.data_report["train"]["rows"]["dropped"]
    trainer.train()
    assert torch.isfinite(weights(trainer)).all()


def test_answers_the_model_is_certain_of_have_a_finite_gradient(tmp_path):
    """peers 2, 21, 33, 35, 39, 42: certain answers gave an infinite or NaN gradient, or none at all."""
    model = tiny_models.build("Llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    prompt, certain = [3, 4, 5, 6], []
    for _ in range(3):
        certain.append(model(torch.tensor([prompt + certain])).logits[0, -1].argmax().item())
    pairs = [TokenizedPair(prompt, certain, [1]), TokenizedPair(prompt, [1], certain)]
    trainer = tiny_trainer(tmp_path, model=model, train=pairs, max_steps=1, learning_rate=1e-6)
    trainer.train()
    assert logged(trainer, "log_odds_ratio") and 0 < logged(trainer, "grad_norm")[0] < float("inf")
    assert torch.isfinite(weights(trainer)).all()


def test_evaluation_does_not_leak_into_training_lines(tmp_path):
    """peers 19: evaluation wrote its numbers under the training names."""
    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(9, seed=5), eval_strategy="steps", eval_steps=1)
    trainer.train()
    alone = tiny_trainer(tmp_path)
    alone.train()
    assert logged(trainer, "accuracy") == logged(alone, "accuracy")
    assert logged(trainer, "nll") == logged(alone, "nll")


def test_router_losses_of_mixtures_count(tmp_path):
    """peers 22: the coefficient was set and then ignored."""
    losses = []
    for coefficient in (1.0, 10.0):
        model = tiny_models.build("Mixtral", output_router_logits=True, router_aux_loss_coef=coefficient)
        trainer = tiny_trainer(tmp_path, model=model, max_steps=1)
        trainer.train()
        losses.append(logged(trainer, "router_loss")[0])
    assert losses[1] == pytest.approx(10 * losses[0]) and losses[0] > 0.1


def test_odds_ratio_loss_is_not_divided_by_beta(tmp_path):
    """peers 23"""
    values = []
    for beta in (0.1, 0.5):
        trainer = tiny_trainer(tmp_path, beta=beta, max_steps=1)
        trainer.train()
        values.append(logged(trainer, "odds_ratio_loss")[0])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_every_trained_weight_has_a_gradient_and_it_is_not_zero(tmp_path):
    """peers 38: the gradient was zero for months."""
    trainer = tiny_trainer(tmp_path, nll_weight=0.0, max_steps=1)
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert all(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"logits_memory_mib": 1, "tokens_per_micro_batch": 20},
        {"layout": "packed"},
        {"layout": "padded"},
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 2},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*fork.*")
def test_settings_about_memory_and_speed_do_not_change_the_objective(tmp_path, settings):
    """peers 40: a memory option averaged the odds over other tokens."""
    plain, other = tiny_trainer(tmp_path), tiny_trainer(tmp_path, **settings)
    for trainer in (plain, other):
        trainer.train()
    assert logged(other) == pytest.approx(logged(plain), rel=1e-5)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-4, atol=1e-5)
