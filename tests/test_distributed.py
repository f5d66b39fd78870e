"""One process, several rows, several ranks: the same training. Ranks are forked, on gloo."""

import pytest
import torch
from tiny_training import logged, on_ranks, random_pairs, tiny_trainer, weights


def run(folder, **settings):
    trainer = tiny_trainer(folder, evaluation=random_pairs(7, seed=1), eval_strategy="no", **settings)
    trainer.train()
    return {
        "weights": weights(trainer),
        "losses": logged(trainer),
        "accuracies": logged(trainer, "accuracy"),
        "tokens": logged(trainer, "tokens_per_second"),
        "evaluation": trainer.evaluate(),
        "world_size": trainer.args.world_size,
    }


def assert_same(one, other):
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert one["accuracies"] == pytest.approx(other["accuracies"], rel=1e-6)
    torch.testing.assert_close(one["weights"], other["weights"], rtol=1e-6, atol=1e-6)
    for name, value in one["evaluation"].items():
        if "second" not in name and "runtime" not in name:
            assert other["evaluation"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_accumulation_rows_and_ranks_do_not_change_the_training(tmp_path):
    """peers 6"""
    one = run(tmp_path)
    assert_same(one, run(tmp_path, tokens_per_row=30))
    assert_same(one, run(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert_same(one, run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, tokens_per_row=60))
    for settings in (
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tokens_per_row": 25},
    ):
        ranks = on_ranks(lambda s=settings: run(tmp_path, **s))
        assert [rank["world_size"] for rank in ranks] == [2, 2]
        for rank in ranks:
            assert_same(one, rank)
