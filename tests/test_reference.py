"""DPO's reference: the model before training, asked once, kept, and the same for a resumed run."""

import copy
import dataclasses

import numpy as np
import pytest
import reference
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from test_resume import SAVING, StopAt, metrics
from tiny_training import logged, random_pairs, tiny_config, tiny_trainer, weights

from orpo.engine import steps
from orpo.errors import ConfigError
from orpo.settings.config import PRESETS, OrpoSettings, check_settings
from orpo.training import reference as kept
from orpo.training.reference import as_reference

pytestmark = pytest.mark.usefixtures("lazy_disk")

DPO = {"objective": "dpo", "beta": 0.5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kept, "EVALUATION_BLOCK", 4)


def expected_logprobs(model, pairs):
    """One answer at a time, by a copy in float64."""
    logprobs = reference.logprobs_of(copy.deepcopy(model).double().eval())
    with torch.no_grad():
        return [
            [
                logprobs([*p.prompt, *side])[len(p.prompt) - 1 :].mean().item()
                for side in (p.chosen, p.rejected)
            ]
            for p in pairs
        ]


def the_file(folder):
    (path,) = folder.glob("reference-*.npy")
    return path


def test_training_and_evaluation_compare_with_the_model_before_training(tmp_path):
    """The second step and the evaluation after it, by the slow twin with a copy of the first model."""
    pairs, held_out = random_pairs(8), random_pairs(5, seed=3)
    first = tiny_models.build("Llama")
    before, objective = reference.logprobs_of(copy.deepcopy(first).double()), PRESETS["dpo"]
    trainer = tiny_trainer(
        tmp_path, model=first, train=pairs, evaluation=held_out, objective="dpo", max_steps=1,
        per_device_train_batch_size=8, eval_strategy="no", learning_rate=0.5,
    )  # fmt: skip
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(
        next(np.load(path) for path in tmp_path.glob("reference-*.npy") if len(np.load(path)) == 8),
        expected_logprobs(tiny_models.build("Llama"), pairs),
        rtol=1e-5,
    )
    trained = tiny_models.build("Llama")
    trained.load_state_dict(trainer.model.state_dict())
    after = reference.logprobs_of(trained.double())
    losses = [reference.orpo_loss(after, [pair], objective, before).item() for pair in held_out]
    figures = trainer.evaluate()
    assert abs(np.mean(losses) - np.log(2)) > 1e-3
    assert figures["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    margins = [-np.log(np.expm1(loss)) for loss in losses]  # of -log sigmoid
    assert figures["eval_reward_margin"] == pytest.approx(np.mean(margins), abs=1e-5)
    assert figures["eval_rewards/accuracies"] == np.mean(np.array(margins) > 0)
    rewards = figures["eval_rewards/chosen"] - figures["eval_rewards/rejected"]
    assert rewards == pytest.approx(figures["eval_rewards/margins"], abs=1e-6)


def test_pairs_that_the_reference_never_saw_have_no_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, **DPO, max_steps=1)
    trainer.train()
    figures = trainer.evaluate(random_pairs(3, seed=9))
    assert "eval_accuracy" in figures and "eval_log_odds_ratio" in figures
    assert not {"eval_loss", "eval_odds_ratio_loss", "eval_reward_margin"} & figures.keys()


def test_micro_batches_do_not_change_the_gradient(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", **DPO)
    parts = tiny_trainer(tmp_path / "parts", **DPO, tokens_per_micro_batch=20, layout="packed")
    whole.train()
    parts.train()
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)


def test_a_pass_that_was_cut_off_goes_on_where_it_stopped(tmp_path, monkeypatch):
    scored = []
    plain = steps.build_step

    def counting(pairs, index, settings):
        scored.append(len(pairs))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return plain(pairs, index, settings)

    monkeypatch.setattr("orpo.training.trainer.build_step", counting)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, **DPO).train()
    assert (np.load(the_file(tmp_path)) < 0).all(1).tolist() == [True] * 8 + [False] * 5
    monkeypatch.setattr(kept, "EVALUATION_BLOCK", 3)  # so that a block is known in part
    tiny_trainer(tmp_path, **DPO).train()
    assert scored == [4, 4, 4, 3, 3, 1]
    np.testing.assert_allclose(
        np.load(the_file(tmp_path)), expected_logprobs(tiny_models.build("Llama"), random_pairs()), rtol=1e-5
    )


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    """Its reference is the model before the first step, though one of the files of it was lost."""
    settings = DPO | SAVING | {"evaluation": random_pairs(5, seed=3), "eval_steps": 2, "learning_rate": 0.01}
    whole = tiny_trainer(tmp_path / "whole", **settings)
    whole.train()
    halted = tiny_trainer(tmp_path / "halted", **settings, arguments={"callbacks": [StopAt(2)]})
    halted.train()
    assert halted.state.global_step == 2
    kept_file, lost = sorted(
        (tmp_path / "halted").glob("reference-*.npy"), key=lambda path: len(np.load(path))
    )
    lost.unlink()
    written = kept_file.stat().st_mtime_ns
    again = tiny_trainer(tmp_path / "halted", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(whole))
    assert metrics(tmp_path / "halted") == metrics(tmp_path / "whole")
    assert lost.exists() and kept_file.stat().st_mtime_ns == written


def test_the_name_of_the_file_follows_the_weights_and_the_pairs(tmp_path):
    other = tiny_models.build("Llama")
    other.model.norm.weight.data[0] += 1e-3
    pairs = random_pairs(4)
    changed = dataclasses.replace(pairs[3], rejected=[*pairs[3].rejected[:-1], 1])
    assert len(changed.rejected) == len(pairs[3].rejected) and changed != pairs[3]
    names = []
    for model, train in (
        (tiny_models.build("Llama"), pairs),
        (tiny_models.build("Llama"), [*pairs[:3], changed]),
        (other, pairs),
    ):
        trainer = tiny_trainer(tmp_path, model=model, train=train, **DPO, max_steps=1)
        trainer.train()
        names.append({path.name for path in tmp_path.glob("reference-*.npy")})
    trainer.train()  # now of other weights, but of the same reference
    names.append({path.name for path in tmp_path.glob("reference-*.npy")})
    assert [len(found) for found in names] == [1, 2, 3, 3]


def test_a_fresh_adapter_s_reference_is_its_base_and_a_trained_one_is_its_own(tmp_path):
    base = tiny_models.build("Llama")
    with as_reference(base) as of_base:
        pass
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules="all-linear"))
    with as_reference(model) as fresh:
        assert all(module.disable_adapters for module in model.modules() if hasattr(module, "lora_A"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    with as_reference(model) as trained:
        assert not any(module.disable_adapters for module in model.modules() if hasattr(module, "lora_A"))
    assert len({of_base, fresh, trained}) == 3
    with as_reference(
        get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    ) as other:
        assert other == fresh
    pairs = random_pairs(4)
    trainer = tiny_trainer(tmp_path, model=model, train=pairs, **DPO, max_steps=1, learning_rate=0.0)
    trainer.train()
    np.testing.assert_allclose(np.load(the_file(tmp_path)), expected_logprobs(model, pairs), rtol=1e-4)


def test_each_of_several_rejected_answers_has_a_reference(tmp_path):
    rows = [
        {"prompt": f"{n}", "chosen": f" yes {n}", "rejected": [f" no {n}", f" never {n}, {n}"]}
        for n in range(4)
    ]
    model = tiny_models.build("Llama", vocab_size=600)
    expected = copy.deepcopy(model)
    trainer = tiny_trainer(tmp_path, model=model, train=rows, **DPO, max_steps=1)
    trainer.train()
    pairs = [trainer.train_dataset[number] for number in range(8)]
    assert len({tuple(pair.rejected) for pair in pairs}) == 8
    np.testing.assert_allclose(np.load(the_file(tmp_path)), expected_logprobs(expected, pairs), rtol=1e-5)


def test_rows_without_a_rejected_answer_are_no_obstacle(tmp_path):
    pairs = [*random_pairs(3), *tiny_models.mixed_pairs()]
    trainer = tiny_trainer(tmp_path, train=pairs, **DPO, nll_weight=0.5, max_steps=2)
    trainer.train()
    assert all(np.isfinite(logged(trainer)))


def test_a_reference_that_is_yet_to_come_is_not_taken_from_a_checkpoint(tmp_path):
    """Of a run whose stages were others, which `force` lets pass."""
    later = kept.Reference(tiny_config(tmp_path), 4)
    later.restore("made at step 2", 3, [])
    assert later.is_awaited and not later.is_due(3) and later.is_due(4)
    later.restore("made at step 4", 5, [])
    assert not later.is_awaited and later.name_at(5) == "made at step 4" and later.name_at(4) == ""


@pytest.mark.parametrize(
    "settings",
    [{"objective": "dpo"}, {"stages": [{"objective": "dpo", "share": 0.5}, {"objective": "simpo"}]}],
)
def test_a_stream_cannot_be_scored_once_before_its_steps(settings):
    with pytest.raises(ConfigError, match="streaming: objective dpo scores all pairs once"):
        check_settings(OrpoSettings(streaming=True, **settings))


def test_a_full_disk_costs_a_later_start_its_time(tmp_path, monkeypatch, capsys):
    def full(*args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    trainer = tiny_trainer(tmp_path, **DPO, max_steps=1)
    trainer.train()
    assert logged(trainer) == [pytest.approx(np.log(2), abs=1e-6)]
    assert "what the reference says is not kept (" in capsys.readouterr().out
