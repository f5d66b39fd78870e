"""Several objectives in one run: one schedule, one chain of checkpoints, exact where a stage ends."""

import copy
import functools
import math

import pytest
import reference
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_resume import SAVING, StopAt, metrics
from tiny_training import logged, random_pairs, tiny_config, tiny_trainer, weights

from orpo.errors import ConfigError, RunError
from orpo.evaluation.verdict import judge_run, run_objective
from orpo.run.directory import read_run
from orpo.settings.config import PRESETS, OrpoSettings, Schedule, Stage, resolve_objective, resolve_stages
from orpo.settings.recipe import load_recipe
from orpo.training.pair_log import best_trained_step

TWO = [{"objective": "sft", "share": 0.5}, {"objective": "tempered_odds", "beta": 0.7}]


SFT_DPO = [{"objective": "sft", "share": 0.5}, {"objective": "dpo", "beta": 0.5}]
STAGED = SAVING | {
    "evaluation": random_pairs(5, seed=3), "eval_steps": 2, "learning_rate": 0.01, "logging_steps": 3,
    "max_steps": 4,
}  # fmt: skip


def stages(entries, **beside):
    return resolve_stages(OrpoSettings(stages=entries, **beside))


def test_stages_are_presets_with_their_own_settings_over_those_beside():
    first, second = stages(TWO, nll_on="response")
    assert (first.name, second.name) == ("sft", "tempered_odds")
    assert first.objective.preference_weight == 0 and first.objective.nll_on == "response"
    assert (second.objective.scale, second.objective.nll_weight) == (0.7, 0)
    assert (first.share, second.share) == (0.5, 0.5)
    assert resolve_objective(OrpoSettings(stages=TWO))[0] == stages(TWO)[-1].objective
    assert stages(None, objective="simpo") == (Stage("simpo", PRESETS["simpo"], 1.0),)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([], "there is none in the list"),
        ([{"objective": "paper"}], "stage 1: objective: 'paper' is not one of orpo"),
        ([{"objective": "sft", "learning_rate": 1}], "stage 1 has learning_rate"),
        ([{"objective": "sft", "beta": 0.1}], "stage 1: beta: 0.1: objective sft has none"),
        ([{"beta": "much"}], "stage 1: beta: 'much' is no number"),
        ([{"beta": -1}], "stage 1: beta: -1 is out of range"),
        ([{"nll_on": "all"}], "stage 1: nll_on: 'all' is not one of full"),
        ([{"objective": "sft", "share": 0.5}, {"beta": 0.1, "share": 0.6}], "they add up to 1"),
        ([{"beta": 0.1}, {"beta": 0.2}], "one may be left open"),
        ([{"beta": 0.1, "share": 1.0}, {"beta": 0.2}], "one may be left open"),
        ([{"beta": 0.1, "share": 0}, {"beta": 0.2}], "each is above 0"),
        ([{}, {"beta": 0.2}], "stage 1 names no objective"),
        ([{"objective": "dpo", "share": 0.1}, {"objective": "dpo"}], "dpo is there more than once"),
        (["sft", "dpo"], "stage 1 is 'sft'; it has an objective"),
        ([{"beta": 0.1, "share": True}], "each is above 0"),
    ],
)
def test_stages_that_make_no_run_are_refused(entries, said):
    with pytest.raises(ConfigError, match=said):
        stages(entries)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau needs a loss"),
        ({"ignore_data_skip": True}, "ignore_data_skip: "),
    ],
)
def test_settings_that_cannot_go_with_stages_are_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        tiny_config(tmp_path, stages=SFT_DPO, eval_strategy="steps", **settings)


def test_objective_and_stages_exclude_each_other():
    with pytest.raises(ConfigError, match="objective: dpo: name it in stages"):
        stages(TWO, objective="dpo")
    with pytest.raises(ConfigError, match=r"simpo_gamma: 0.5: no objective in stages has it"):
        stages(TWO, simpo_gamma=0.5)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(0, 40))
def test_every_stage_has_its_share_of_the_steps_and_at_least_one(weights, more):
    parts = [Stage("sft", PRESETS["sft"], weight / sum(weights)) for weight in weights]
    number = len(parts) + more
    schedule = Schedule(parts, number)
    steps = [schedule.starts[i + 1] - schedule.starts[i] for i in range(len(parts) - 1)]
    steps.append(number - schedule.starts[-1])
    assert min(steps) >= 1 and schedule.starts[0] == 0
    names = [schedule.starts.index(max(s for s in schedule.starts if s <= step)) for step in range(number)]
    assert [schedule.at(step) is parts[name] for step, name in enumerate(names)] == [True] * number
    if len(parts) == 2 and 1 <= parts[0].share * number <= number - 1:
        assert schedule.starts[1] == round(parts[0].share * number)


def test_fewer_steps_than_stages_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="2 stages cannot share 1 steps"):
        tiny_trainer(tmp_path, stages=TWO, max_steps=1)


def watched(trainer):
    """The pairs of each step of a trainer, and the model it starts from, in float64; filled as it trains."""
    steps, models = [], []
    plain = trainer.training_step

    def watching(model, inputs, *others):
        steps.append([pair for batch in inputs["step"].pairs for pair in batch])
        models.append(tiny_models.build("Llama"))
        models[-1].load_state_dict(trainer.model.state_dict())
        models[-1].double()
        return plain(model, inputs, *others)

    trainer.training_step = watching
    return steps, models


def lines(trainer, name="loss"):
    return [name in line for line in trainer.state.log_history if "loss" in line]


def test_each_step_minimises_the_objective_of_its_stage(tmp_path):
    """Every step by the slow twin, over the end of an epoch."""
    trainer = tiny_trainer(tmp_path, train=random_pairs(8), stages=TWO, max_steps=4)
    steps, models = watched(trainer)
    trainer.train()
    objectives = [PRESETS["sft"]] * 2 + [stages(TWO)[1].objective] * 2
    losses = [
        reference.orpo_loss(reference.logprobs_of(model), step, objective).item()
        for model, step, objective in zip(models, steps, objectives, strict=True)
    ]
    assert logged(trainer) == pytest.approx(losses, rel=1e-5)
    assert lines(trainer, "accuracy") == [False] * 2 + [True] * 2
    first, *_, last = (line for line in trainer.state.log_history if "loss" in line)
    assert (
        first["rewards/chosen"] == 0 and last["rewards/chosen"] == last["chosen_logprob"]
    )  # times the weight


def test_the_reference_of_dpo_is_the_model_after_the_stage_before(tmp_path):
    """Loss of each step, and evaluations: without a loss until that model is there, then with it."""
    held_out = random_pairs(5, seed=3)
    trainer = tiny_trainer(
        tmp_path, stages=SFT_DPO, max_steps=5, evaluation=held_out, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=0.5,
    )  # fmt: skip
    steps, models = watched(trainer)
    trainer.train()
    before = reference.logprobs_of(models[2])
    dpo = stages(SFT_DPO)[1].objective
    losses = [
        reference.orpo_loss(reference.logprobs_of(model), step, dpo, before).item()
        for model, step in zip(models[2:], steps[2:], strict=True)
    ]
    assert logged(trainer)[2:] == pytest.approx(losses, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2)) and abs(losses[2] - losses[0]) > 1e-3
    evaluations = [line for line in trainer.state.log_history if "eval_nll" in line]
    known = {line["step"]: line["eval_loss"] for line in evaluations if "eval_loss" in line}
    assert [line["step"] for line in evaluations] == [0, 1, 2, 3, 4, 5] and list(known) == [2, 3, 4, 5]
    assert known[2] == pytest.approx(math.log(2), abs=1e-6)
    at_4 = reference.logprobs_of(models[4])
    assert known[4] == pytest.approx(
        sum(reference.orpo_loss(at_4, [pair], dpo, before).item() for pair in held_out) / 5, rel=1e-5
    )
    assert trainer.state.best_global_step == min(known, key=known.get)
    change = judge_run(tmp_path).change
    assert change.before["loss"].mean != pytest.approx(math.log(2), abs=1e-3)
    assert change.after["loss"].mean == pytest.approx(known[best_trained_step(trainer.args, trainer.state)])


@pytest.mark.parametrize(("entries", "stop"), [("TWO", 1), ("TWO", 3), ("SFT_DPO", 2), ("SFT_DPO", 3)])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, whole_runs, entries, stop):
    """Stopped within the first stage, at its end, and within the second."""
    settings = STAGED | {"stages": globals()[entries]}
    whole, expected = whole_runs(entries)
    tiny_trainer(tmp_path, **settings, arguments={"callbacks": [StopAt(stop)]}).train()
    again = tiny_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), expected)
    assert metrics(tmp_path) == metrics(whole)
    run = read_run(tmp_path)
    assert run.stages == [(1, "sft"), (3, settings["stages"][1]["objective"])]
    logged_at = [record.step for record in run.records if record.kind == "train"]
    assert logged_at == [1, 2, 3, 4], "the first, the last of a stage, every third and the last"


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Runs that were not stopped: their directory and weights, by the name of their stages."""

    @functools.cache
    def whole(entries):
        folder = tmp_path_factory.mktemp(entries)
        trainer = tiny_trainer(folder, **STAGED, stages=globals()[entries])
        trainer.train()
        return folder, weights(trainer)

    return whole


def test_a_run_does_not_go_on_with_other_stages_nor_without_its_reference(tmp_path):
    """At the end of the stage before the reference can be asked again; later the run does not go on."""
    tiny_trainer(tmp_path, **STAGED, stages=SFT_DPO, arguments={"callbacks": [StopAt(3)]}).train()
    other = tiny_trainer(tmp_path, **STAGED, stages=[SFT_DPO[0], {"objective": "dpo"}])
    with pytest.raises(RunError, match="stages: "):
        other.train(resume_from_checkpoint=True)
    for path in tmp_path.glob("reference-*.npy"):
        path.unlink()
    with pytest.raises(RunError, match=r"reference-.*.npy: what the reference of dpo said is lost.* step 2;"):
        tiny_trainer(tmp_path, **STAGED, stages=SFT_DPO).train(resume_from_checkpoint=True)
    again = tiny_trainer(tmp_path, **STAGED, stages=SFT_DPO)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_evaluations_of_all_stages_are_of_the_last_objective(tmp_path, capsys):
    held_out = random_pairs(5, seed=3)
    trainer = tiny_trainer(
        tmp_path, stages=TWO, max_steps=4, evaluation=held_out, eval_strategy="steps", eval_steps=1
    )
    first = copy.deepcopy(trainer.model).double()
    trainer.train()
    last = stages(TWO)[1].objective
    expected = [reference.orpo_loss(reference.logprobs_of(first), [p], last).item() for p in held_out]
    assert logged(trainer, "eval_loss")[0] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    printed = capsys.readouterr().out
    assert "step 1: stage 1 of 2, sft" in printed and "step 3: stage 2 of 2, tempered_odds" in printed
    assert run_objective(trainer.args.recipe()) == last


def test_the_reference_of_a_first_stage_is_asked_and_the_second_goes_without(tmp_path):
    two = [{"objective": "dpo", "share": 0.5}, {"objective": "simpo"}]
    trainer = tiny_trainer(tmp_path, stages=two, max_steps=2)
    trainer.train()
    shown = [line for line in trainer.state.log_history if "loss" in line]
    assert ["reward_accuracy" in line for line in shown] == [True, False]
    assert len(list(tmp_path.glob("reference-*.npy"))) == 1


def test_a_stream_counts_its_steps(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"{n}", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(9)]
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_models.build("Llama", vocab_size=600),
        train=Dataset.from_list(rows).to_iterable_dataset(),
        stages=TWO,
        max_steps=4,
    )
    trainer.train()
    assert ["accuracy" in line for line in trainer.state.log_history if "loss" in line] == [False] * 2 + [
        True
    ] * 2


def test_stages_are_read_from_a_recipe_and_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "stages:\n- {objective: sft, share: 0.1}\n- objective: simpo\n  beta: 5e-1\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.settings["stages"][1] == {"objective": "simpo", "beta": 0.5}
    typed = load_recipe(None, ["--stages", "[{objective: sft, share: 0.2}, {objective: simpo}]"])
    assert [stage.share for stage in stages(typed.settings["stages"])] == pytest.approx([0.2, 0.8])
