"""The trainer in one process: what a step is, what is logged, evaluated and written, and what is refused."""

import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import tiny_models
import torch
import yaml
from peft import LoraConfig
from tiny_tokenizer import tiny_tokenizer
from tiny_training import logged, random_pairs, tiny_config, tiny_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from orpo import ORPOConfig, ORPOTrainer
from orpo.engine.packing import pack
from orpo.engine.steps import (
    BatchSettings,
    StepDataset,
    StepStream,
    build_step,
    by_prompt,
    num_nll_tokens,
    shuffled,
    split_batches,
)
from orpo.errors import ConfigError, DataError, ModelError, RunError
from orpo.pairs import TokenizedPair
from orpo.run.directory import read_run
from orpo.settings.config import Objective
from orpo.training.cautions import cautions
from orpo.training.preflight import check_optimization, summary
from orpo.training.progress import Stopwatch
from orpo.training.stepping import SteppingTrainer

OBJECTIVES = [
    Objective(),
    Objective(nll_on="response"),
    Objective(nll_on="assistant"),
    Objective(nll_reduction="pair"),
    Objective(nll_weight=0.0),
]


EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
"""An evaluation and a checkpoint after each step."""

# ------------------------------------------------------------------------------------------ the overrides


def test_overridden_hooks_are_these():
    """Each hook of transformers.Trainer that is overridden, with its reason; private ones may change."""
    public = {
        "train": "signals, whole checkpoints, no second evaluation at step 0 on resuming",
        "get_train_dataloader": "an item is an optimizer step, rank-aware already",
        "get_eval_dataloader": "the same rows, and raw data is tokenized",
        "get_test_dataloader": "the same for predict",
        "num_examples": "a loader's items are not examples",
        "get_total_train_batch_size": "accumulation is inside a step",
        "training_step": "micro-batches of a step, ranks exchange gradients once",
        "evaluate": "each set has a record of its own, whatever its name",
        "evaluation_loop": "means over examples",
        "log": "the window's numbers",
        "floating_point_ops": "there is no `input_ids` to count",
        "call_model_init": "checks the model it gives",
        "save_model": "model card, no bars",
        "create_accelerator_and_postprocess": "refuses rows and layers divided over ranks",
        "create_model_card": "ours",
    }
    private = {
        "_evaluate": "what is there before the first step may be the best checkpoint",
        "_get_grad_norm": "the only place after backward and before the optimizer that may raise",
        "_issue_warnings_after_load": "tied weights are not missing",
        "_load_best_model": "experts have other names in the file",
        "_load_from_checkpoint": "the same",
        "_track_num_input_tokens": "there is no `input_ids` to count",
        "_save_checkpoint": "written under another name and renamed; with the open log window and a manifest",
    }
    overridden = {
        name
        for name, value in [*vars(ORPOTrainer).items(), *vars(SteppingTrainer).items()]
        if inspect.isfunction(value) and hasattr(Trainer, name) and name != "__init__"
    }
    assert overridden == public.keys() | private.keys()


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_denominators_are_the_sums_of_the_packed_pairs(objective):
    pairs = tiny_models.mixed_pairs()
    for pair in pairs:
        batch = pack([pair], objective)
        expected = 1 if objective.nll_reduction == "pair" else num_nll_tokens(pair, objective)
        assert batch.nll_weight == pytest.approx(expected)
    settings = BatchSettings(objective, "shared", tokens_per_micro_batch=40)
    step = build_step(pairs, range(len(pairs)), settings)
    assert step.denominators.nll == pytest.approx(sum(batch.nll_weight for batch in step.batches))
    assert step.denominators.pairs == sum(batch.num_preferences for batch in step.batches)


def test_ranks_share_a_step_without_overlap_and_with_equally_many_micro_batches():
    pairs = random_pairs(9)
    steps = [
        build_step(
            pairs,
            range(9),
            BatchSettings(Objective(), "shared", tokens_per_micro_batch=40, rank=rank, num_ranks=3),
        )
        for rank in range(3)
    ]
    assert len({len(step.batches) for step in steps}) == 1 and len({step.denominators for step in steps}) == 1
    seen = [index for step in steps for batch in step.batches if not batch.empty for index in batch.index]
    assert sorted(seen) == list(range(9))


def test_token_budget_loader_shows_each_pair_once_and_has_a_constant_length():
    """trap 1: the stock path duplicated and lost pairs, and its epochs differed in length."""
    for budget in (20, 60, 10_000):
        steps = StepDataset(random_pairs(61), BatchSettings(Objective(), "shared", budget), pairs_per_step=8)
        for epoch in range(3):
            steps.set_epoch(epoch)
            seen = [i for n in range(len(steps)) for batch in steps[n].batches for i in batch.index]
            assert sorted(seen) == list(range(61)) and len(steps) == 8


def test_epochs_have_orders_of_their_own(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([i for batch in trainer._last_step.batches for i in batch.index])

    trainer.add_callback(Watch())
    trainer.train()
    epochs = [list(itertools.chain(*seen[:4])), list(itertools.chain(*seen[4:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(13)) and epochs[0] != epochs[1]


def test_an_epoch_that_a_callback_ends_early_is_followed_by_the_next(tmp_path, capsys):
    """By its order of pairs, and by the stage that each step belongs to."""
    stages = [{"objective": "sft", "share": 0.25}, {"objective": "orpo"}]
    plain = tiny_trainer(tmp_path / "plain", max_steps=8, stages=stages)
    trainer = tiny_trainer(tmp_path / "early", max_steps=8, stages=stages)
    runs = {trainer: [], plain: []}

    class Watch(TrainerCallback):
        def __init__(self, run, ends):
            self.run, self.ends = run, ends

        def on_step_end(self, args, state, control, **kwargs):
            step = self.run._last_step
            index = [i for batch in step.batches for i in batch.index]
            runs[self.run].append((index, step.objective.preference_weight > 0))
            control.should_epoch_stop = state.global_step in self.ends

    for run, ends in ((plain, ()), (trainer, (2,))):
        run.add_callback(Watch(run, ends))
        run.train()
    expected, seen = ([sorted(index) for index, _ in runs[run]] for run in (plain, trainer))
    assert seen == expected[:2] + expected[4:8]
    assert [compares for _, compares in runs[trainer]] == [False] * 2 + [True] * 4
    printed = capsys.readouterr().out
    assert printed.count("step 2: a callback ended the epoch early; a run that resumes after it counts") == 1


def test_a_search_minimises_the_loss_and_tries_what_it_says(tmp_path):
    pytest.importorskip("optuna")
    pairs = random_pairs(4, seed=3)

    def trainer(name, **more):
        return ORPOTrainer(
            model_init=lambda: tiny_models.build("Llama"), processing_class=tiny_tokenizer(),
            args=tiny_config(tmp_path / name, eval_strategy="epoch", max_steps=2),
            train_dataset=random_pairs(), eval_dataset=pairs, **more,
        )  # fmt: skip

    def space(trial):
        beta = trial.suggest_categorical("beta", [0.7])
        return {"beta": beta, "max_steps": 3, "lr_scheduler_type": "cosine"}

    found = trainer("search").hyperparameter_search(space, n_trials=1, backend="optuna")
    alone = tiny_trainer(tmp_path / "alone", evaluation=pairs, eval_strategy="epoch", max_steps=3, beta=0.7,
                         lr_scheduler_type="cosine")  # fmt: skip
    alone.train()
    assert found.objective == pytest.approx(alone.evaluate()["eval_loss"])
    searched = trainer("refused")
    for name, value in (("max_length", 30), ("per_device_train_batch_size", 2), ("lora_r", 4)):
        with pytest.raises(ConfigError, match=f"hyperparameter_search: {name}: data and model were made"):
            trainer(name).hyperparameter_search(
                lambda trial, n=name, v=value: {n: v}, n_trials=1, backend="optuna"
            )
    with pytest.raises(ConfigError, match=r"beta: -1.0 is out of range"):
        searched.hyperparameter_search(lambda trial: {"beta": -1}, n_trials=1, backend="optuna")
    with pytest.raises(ConfigError, match="direction: maximize, and the loss is what is not named"):
        searched.hyperparameter_search(space, direction="maximize")
    with pytest.raises(ConfigError, match="give hp_space, as lambda trial"):
        searched.hyperparameter_search()
    with pytest.raises(ConfigError, match="give model_init"):
        tiny_trainer(tmp_path / "model").hyperparameter_search(space)


@pytest.mark.parametrize("given", [None, [1, 2], 3.0])
def test_compute_metrics_that_gives_no_mapping_is_one_line(given, tmp_path):
    arguments = {"compute_metrics": lambda _: given}
    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(3), arguments=arguments)
    with pytest.raises(ConfigError, match=r"compute_metrics gave .*; expected a mapping of names to numbers"):
        trainer.evaluate()


def test_a_metric_that_no_evaluation_finds_is_one_line(tmp_path):
    trainer = tiny_trainer(
        tmp_path, evaluation=random_pairs(3), **EACH_STEP, metric_for_best_model="zz",
        greater_is_better=True, arguments={"compute_metrics": lambda _: {"mine": 1.0}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"metric_for_best_model: 'zz' is none of an evaluation's: .*mine"):
        trainer.train()


@pytest.mark.parametrize(
    ("metric", "greater", "better"), [("loss", True, "less"), ("accuracy", False, "more")]
)
def test_a_best_checkpoint_that_would_be_the_worst_is_refused(metric, greater, better, tmp_path):
    with pytest.raises(ConfigError, match=rf"greater_is_better: \w+: {better} of '{metric}' is better"):
        tiny_trainer(
            tmp_path, evaluation=random_pairs(3), **EACH_STEP, metric_for_best_model=metric,
            greater_is_better=greater, load_best_model_at_end=True,
        )  # fmt: skip


def test_checkpoints_that_no_run_resumes_from_are_said_before_it_begins(tmp_path, capsys):
    said = "save_only_model: checkpoints without the optimizer's state; a run that is stopped begins again"
    for settings, number in (({"save_only_model": True}, 1), ({}, 0)):
        trainer = tiny_trainer(tmp_path, **(settings | {"save_strategy": "steps"}))
        assert sum(said in line for line in cautions(trainer)) == number


def test_stream_steps_are_alike_on_every_rank_and_begin_anew():
    pairs = random_pairs(5)
    steps = []
    for rank in range(2):
        settings = BatchSettings(Objective(), "shared", 1000, rank=rank, num_ranks=2)
        stream = iter(StepStream(lambda: pairs, settings, pairs_per_step=4, shuffle_buffer=3))
        steps.append([next(stream) for _ in range(5)])
    seen = [
        p.source
        for one, two in zip(*steps, strict=True)
        for s in (one, two)
        for pairs in s.pairs
        for p in pairs
    ]
    assert sorted(seen) == sorted(pair.source for pair in pairs for _ in range(4))
    with pytest.raises(DataError, match="no row that can train"):
        next(iter(StepStream(lambda: [], settings, pairs_per_step=4)))


def test_shuffle_buffer_yields_every_pair_once():
    import numpy as np

    pairs = random_pairs(20)
    drawn = list(shuffled(pairs, 6, np.random.default_rng(0)))
    assert drawn != pairs and sorted(p.source for p in drawn) == sorted(p.source for p in pairs)


def test_splitting_rows_keeps_the_step():
    settings = BatchSettings(Objective(), "shared", 1000)
    pairs = random_pairs(5)
    step = build_step(pairs, range(5), settings)
    halves = split_batches(step, settings)
    assert len(step.batches) == 1 and len(halves.batches) == 2 and halves.denominators == step.denominators
    assert sorted(i for batch in halves.batches for i in batch.index) == list(range(5))
    singles = build_step(pairs[:1], [0], settings)
    assert split_batches(singles, settings) is None


# ------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_first_step_is_the_reference_step(tmp_path, beta):
    """One SGD step in float32 against the float64 reference: the loss, and the move of every weight."""
    pairs = random_pairs(6)
    model = tiny_models.build("Llama")
    slow = tiny_models.build("Llama").double()
    before = torch.cat([w.detach().flatten() for w in slow.parameters()])
    loss = reference.orpo_loss(reference.logprobs_of(slow), pairs, Objective(preference_weight=beta))
    loss.backward()
    gradient = torch.cat([w.grad.flatten() for w in slow.parameters()])

    trainer = tiny_trainer(
        tmp_path,
        model=model,
        train=pairs,
        beta=beta,
        max_steps=1,
        learning_rate=0.5,
        tokens_per_micro_batch=50,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(gradient.norm().item(), rel=1e-4)
    torch.testing.assert_close(weights(trainer).double(), before - 0.5 * gradient, rtol=1e-5, atol=1e-5)


def test_logged_loss_is_the_sum_of_its_parts(tmp_path):
    trainer = tiny_trainer(tmp_path, beta=0.7, nll_weight=0.5, max_steps=3)
    trainer.train()
    for line in trainer.state.log_history[:3]:
        assert line["loss"] == pytest.approx(0.5 * line["nll"] + 0.7 * line["odds_ratio_loss"], rel=1e-5)
        assert line["rewards/accuracies"] == line["accuracy"] and line["tokens_per_second"] > 0


def test_the_last_window_is_logged_however_short(tmp_path):
    trainer = tiny_trainer(tmp_path, logging_steps=3, logging_first_step=False, max_steps=4)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [3, 4]


def test_steps_and_schedule_count_optimizer_steps(tmp_path):
    """trap 3: the Trainer's accumulation is a constant. trap 10: its total batch size was wrong."""
    trainer = tiny_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=-1,
        num_train_epochs=2,
    )
    trainer.train()
    assert trainer.state.global_step == 2 * 3 and trainer.get_total_train_batch_size(trainer.args) == 6
    assert logged(trainer, "learning_rate")[-1] == pytest.approx(0.05 / 6)
    assert trainer.args.ddp_find_unused_parameters is False and trainer.args.remove_unused_columns is False


def test_the_steps_of_a_part_of_an_epoch_are_those_that_are_made(tmp_path):
    """Four steps an epoch: the line said 5, `round` of 5.2, where the Trainer makes 6."""
    trainer = tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=1.3)
    trainer.train()
    assert trainer.state.global_step == 6
    assert "steps      6 of 4 pairs: 1.5 epochs of 4 steps" in summary(trainer)


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": -1}, {"max_steps": 5}, {"stages": [{"objective": "sft", "share": 0.5}, {"beta": 0.1}]}],
)
def test_fewer_pairs_than_a_step_that_are_to_be_dropped_are_refused(tmp_path, settings):
    few = {"per_device_train_batch_size": 100, "dataloader_drop_last": True}
    with pytest.raises(ConfigError, match="dataloader_drop_last: 13 pairs are too few for a step of 100"):
        tiny_trainer(tmp_path, **few, **settings)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"foo": 1}, "gradient_checkpointing_kwargs: foo is not one of context_fn, debug"),
        ({"use_reentrant": False, "determinism_check": "no"}, "gradient_checkpointing_kwargs cannot be used"),
    ],
)
def test_what_checkpointing_does_not_take_is_refused_before_the_first_step(tmp_path, kwargs, expected):
    with pytest.raises(ConfigError, match=expected):
        tiny_trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


def test_what_torch_compile_does_not_take_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="inductor with torch_compile_mode: nope cannot be used"):
        tiny_trainer(tmp_path, torch_compile=True, torch_compile_mode="nope")


def test_operations_and_tokens_are_counted_as_transformers_does(tmp_path):
    """It looks for `input_ids` in what a step is given, and counts nothing without."""
    trainer = tiny_trainer(tmp_path, include_num_input_tokens_seen="all", num_train_epochs=1)
    read = sum(batch["step"].num_tokens for batch in trainer.get_train_dataloader())
    metrics = trainer.train().metrics
    weights = trainer.model.num_parameters(exclude_embeddings=True)
    assert metrics["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen == read
    assert metrics["total_flos"] == trainer.state.total_flos == 6 * read * weights


def test_arguments_that_an_optimizer_does_not_read_are_refused(tmp_path):
    """transformers parses them for every optimizer, and gives them to a few."""
    trainer = tiny_trainer(tmp_path, optim="rmsprop", optim_args="alpha=0.9, eps=1e-7")
    check_optimization(trainer)
    for optim, argument in (("rmsprop", "betas"), ("adamw_torch", "eps")):
        trainer = tiny_trainer(tmp_path, optim=optim, optim_args=f"{argument}=0.5")
        with pytest.raises(ConfigError, match=f"optim_args: {argument}: optim: {optim} takes none"):
            check_optimization(trainer)


def test_settings_of_an_optimizer_that_another_one_does_not_read_are_told(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="sgd", optim_target_modules=["attn"])
    with pytest.raises(ConfigError, match="optim_target_modules: optim: sgd takes none; leave it out"):
        check_optimization(trainer)
    trainer = tiny_trainer(tmp_path, optim="sgd", adam_beta2=0.95, weight_decay=0.1)
    assert check_optimization(trainer) == ["adam_beta2: no effect with optim: sgd"]
    trainer = tiny_trainer(tmp_path, optim="adamw_torch", adam_beta2=0.95, adam_epsilon=1e-6)
    assert check_optimization(trainer) == []


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("cosine", {"num_cycles": "x"}), ("polynomial", {"power": "x"}), ("inverse_sqrt", {"timescale": "x"}),
        ("inverse_sqrt", {"timescale": 0}),
    ],
)  # fmt: skip
def test_what_a_schedule_cannot_compute_with_is_refused_before_the_first_step(tmp_path, schedule, kwargs):
    trainer = tiny_trainer(tmp_path, lr_scheduler_type=schedule, lr_scheduler_kwargs=kwargs)
    with pytest.raises(ConfigError, match=f"lr_scheduler_kwargs: .* cannot be used with .*{schedule}"):
        check_optimization(trainer)


@pytest.mark.parametrize("schedule", ["linear", "reduce_lr_on_plateau", "greedy", "constant"])
def test_schedules_that_can_be_computed_pass(tmp_path, schedule):
    settings = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 1}
    check_optimization(tiny_trainer(tmp_path, evaluation=random_pairs(3), **settings))


def test_things_of_the_wrong_kind_are_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="peft_config is a dict; expected a configuration of PEFT"):
        tiny_trainer(tmp_path, arguments={"peft_config": {"r": 4}})
    frame = type("DataFrame", (list,), {})([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"DataFrame; pass Dataset.from_pandas\(...\)"):
        tiny_trainer(tmp_path, train=frame)


def test_user_arguments_are_left_alone(tmp_path):
    args = tiny_config(tmp_path, gradient_accumulation_steps=3)
    tiny = ORPOTrainer(
        tiny_models.build("Llama"), args, None, random_pairs(), processing_class=tiny_tokenizer()
    )
    assert args.gradient_accumulation_steps == 3 and tiny.pairs_per_step == 12


def test_a_micro_batch_that_does_not_fit_is_split_in_one_printed_line(tmp_path, capsys):
    """The model raises as CUDA does: after the backward of a long micro-batch, and once before the next."""
    plain = tiny_trainer(tmp_path, tokens_per_micro_batch=10_000)
    plain.train()
    trainer = tiny_trainer(tmp_path, tokens_per_micro_batch=60)
    run = trainer._run_batch

    batches = []

    def small_machine(model, batch, denominators, **options):
        batches.append(batch)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = run(model, batch, denominators, **options)
        if batch.num_pairs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    trainer._run_batch = small_machine
    trainer.train()
    torch.testing.assert_close(weights(trainer), weights(plain), rtol=1e-6, atol=1e-6)
    for name in ("loss", "nll", "margin"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-5, abs=3e-6)
    assert "retrying with micro-batches of half as many pairs" in capsys.readouterr().out


def test_a_pair_that_does_not_fit_alone_stops_the_run(tmp_path):
    trainer = tiny_trainer(tmp_path)

    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    trainer._run_batch = no_memory
    with pytest.raises(RunError, match=r"step 1: out of memory .*Tried to allocate.*tokens_per_micro_batch"):
        trainer.train()


# ------------------------------------------------------------------------------------------ not a number


class _Poison(TrainerCallback):
    """Puts a NaN into the weights that only token 5 reads, before step 2."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                model.get_input_embeddings().weight[5] = float("nan")


def test_a_loss_that_is_not_a_number_stops_before_the_optimizer_and_names_the_rows(tmp_path):
    """trap 6; peers 1, 2"""
    pairs = [TokenizedPair([7, 8], [9, 10], [11], source=f"clean:{n}") for n in range(7)]
    pairs.append(TokenizedPair([5, 8], [9, 10], [11], source="data.jsonl:118"))
    trainer = tiny_trainer(tmp_path, train=pairs, tokens_per_micro_batch=5, max_steps=2, seed=1)
    trainer.add_callback(_Poison())
    second = trainer.get_train_dataloader().dataset[1]
    assert "data.jsonl:118" in [pair.source for pairs in second.pairs for pair in pairs], (
        "choose another seed"
    )
    with pytest.raises(
        RunError, match=r"step 2: .*not finite.*no weight was changed.*rank 0: data\.jsonl:118\."
    ):
        trainer.train()
    after = weights(trainer)
    assert torch.isnan(after).sum() == trainer.model.config.hidden_size, "nothing but the poison itself"
    assert logged(trainer) and all(loss == loss and loss != 0 for loss in logged(trainer))


def test_an_infinite_gradient_of_a_finite_loss_stops_too(tmp_path):
    trainer = tiny_trainer(tmp_path, max_grad_norm=1.0)
    before = weights(trainer)
    weight = next(iter(trainer.model.parameters()))
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match="not finite"):
        trainer.train()
    assert torch.equal(weights(trainer), before)


# ------------------------------------------------------------------------------------------ evaluation


def test_evaluation_does_not_depend_on_batch_sizes(tmp_path):
    """trap 4; peers 7"""
    results = []
    for settings in (
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 5},
        {"tokens_per_micro_batch": 25},
    ):
        trainer = tiny_trainer(tmp_path, evaluation=random_pairs(11, seed=3), eval_strategy="no", **settings)
        results.append(
            {k: v for k, v in trainer.evaluate().items() if "second" not in k and "runtime" not in k}
        )
    for other in results[1:]:
        assert results[0] == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert results[0]["eval_accuracy_se"] > 0


def test_evaluation_is_the_reference_s(tmp_path):
    pairs = random_pairs(5, seed=4)
    trainer = tiny_trainer(tmp_path, evaluation=pairs, eval_strategy="no", beta=0.4)
    slow = tiny_models.build("Llama").double()
    logprobs = reference.logprobs_of(slow)
    losses = [
        reference.orpo_loss(logprobs, [pair], Objective(preference_weight=0.4)).item() for pair in pairs
    ]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_evaluation_measures_preferences_where_training_does_not(tmp_path):
    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(5), beta=0.0)
    trainer.train()
    assert "accuracy" not in trainer.state.log_history[1] and 0 <= trainer.evaluate()["eval_accuracy"] <= 1


def test_evaluation_does_not_change_the_training(tmp_path):
    """trap 5: with dropout, evaluating used to change the final weights."""
    runs = []
    for settings in ({"eval_strategy": "no"}, {"eval_strategy": "steps", "eval_steps": 1, "num_samples": 1}):
        model = tiny_models.build("Llama", attention_dropout=0.3)
        trainer = tiny_trainer(
            tmp_path,
            model=model,
            evaluation=random_pairs(6),
            disable_dropout=False,
            max_completion_length=2,
            **settings,
        )
        trainer.train()
        runs.append(weights(trainer))
    assert torch.equal(*runs)
    plain = tiny_trainer(tmp_path, model=tiny_models.build("Llama", attention_dropout=0.3))
    plain.train()
    assert not torch.equal(runs[0], weights(plain)), "the dropout did something, and is off by default"


def test_step_zero_is_evaluated_first_and_the_last_step_too(tmp_path):
    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(6), eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [0, 3, 4]


def test_several_evaluation_sets(tmp_path):
    """peers 8"""
    sets = {"near": random_pairs(4), "far": random_pairs(3, seed=9)}
    trainer = tiny_trainer(
        tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    line = trainer.evaluate()
    assert line["eval_near_loss"] != line["eval_far_loss"]
    assert trainer.args.metric_for_best_model == "eval_near_loss" and trainer.state.best_model_checkpoint
    assert trainer.evaluate(sets["far"])["eval_loss"] == pytest.approx(line["eval_far_loss"])


def test_compute_metrics_gets_log_probs_of_both_sides(tmp_path):
    seen = {}

    def compute(prediction):
        seen["shape"], seen["labels"] = prediction.predictions.shape, prediction.label_ids
        return {"mine": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    pairs = [*random_pairs(5), TokenizedPair([1], [2, 3], [], source="sft")]
    trainer = tiny_trainer(
        tmp_path, evaluation=pairs, eval_strategy="no", arguments={"compute_metrics": compute}
    )
    metrics = trainer.evaluate()
    assert seen["shape"] == (6, 2) and not seen["labels"].any() and 0 <= metrics["eval_mine"] <= 1
    output = trainer.predict(pairs)
    assert output.predictions[-1, 1] != output.predictions[-1, 1], "no rejected side: not a number"
    assert output.metrics["test_accuracy"] == metrics["eval_accuracy"]


def test_whatever_compute_metrics_calls_its_numbers_they_are_recorded(tmp_path, capsys):
    def compute(prediction):
        return {
            "helpful/accuracy": np.float32(0.5), "my_nll_loss": 1, "eval_prefixed": 2.0, "margin": 7.0,
            "table": [1, 2], "my_se": np.array(3.0), 8: torch.tensor(4.0),
        }  # fmt: skip

    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(3), arguments={"compute_metrics": compute})
    flat = trainer.evaluate()
    assert flat["eval_prefixed"] == 2.0 and flat["eval_table"] == [1, 2] and flat["eval_margin"] == 7.0
    (record,) = read_run(tmp_path).records
    expected = {"helpful/accuracy": 0.5, "my_nll_loss": 1, "prefixed": 2.0, "my_se": 3.0, "8": 4.0}
    assert {name: record.metrics[name].mean for name in expected} == expected
    trainer.evaluate()
    printed = capsys.readouterr().out
    assert printed.count("compute_metrics: 'table' is no number, so it is not recorded") == 1
    assert printed.count("compute_metrics: 'margin' replaces the metric of that name") == 1


def test_numbers_that_a_user_logs_are_recorded(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.log({"judge/score": 0.25})
    (record,) = read_run(tmp_path).records
    assert record.metrics["judge/score"].mean == 0.25


SETS = ("hh", "hh_harmless", "my/set", "two words", "eval_hh", "nll")


def test_evaluation_sets_of_any_name_have_their_own_records(tmp_path):
    sets = {name: random_pairs(3 + number, seed=number) for number, name in enumerate(SETS)}
    trainer = tiny_trainer(
        tmp_path, evaluation=sets, eval_strategy="steps", eval_steps=2, max_steps=2, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    run = read_run(tmp_path)
    assert run.evaluation_sets() == list(SETS)
    last = trainer.state.log_history
    for name, pairs in sets.items():
        first, final = run.first_evaluation(name), run.final_evaluation(name)
        assert (first.step, final.step, final.num_pairs) == (0, 2, len(pairs))
        flat = [line[f"eval_{name}_loss"] for line in last if f"eval_{name}_loss" in line]
        assert flat[-1] == final.metrics["loss"].mean
    assert trainer.state.best_metric == run.final_evaluation("hh").metrics["loss"].mean
    assert "| accuracy, two words |" in (tmp_path / "README.md").read_text()


def test_rows_given_to_evaluate_are_counted_and_recorded_apart(tmp_path, capsys):
    """Nothing is dropped without a counted line, on every way in."""
    rows = [{"prompt": "P", "chosen": "a b", "rejected": "c"}] * 15 + [
        {"prompt": "P", "chosen": " ", "rejected": "c"}
    ]
    model = tiny_models.build("Llama", vocab_size=len(tiny_tokenizer()))
    trainer = tiny_trainer(tmp_path, model=model, evaluation=random_pairs(3))
    capsys.readouterr()
    trainer.evaluate(eval_dataset=rows)
    trainer.evaluate(eval_dataset={"mine": rows})
    trainer.predict(rows)
    printed = capsys.readouterr().out
    assert printed.count("using 15 of 16 rows") == 3 and "eval mine: using 15 of 16 rows" in printed
    assert printed.count("dropped 1: empty chosen answer (first: row:15)") == 3
    assert [(record.set, record.num_pairs) for record in read_run(tmp_path).records] == [
        ("given rows", 15), ("mine", 15)
    ]  # fmt: skip


def test_best_checkpoint_is_kept_and_loaded(tmp_path):
    """Training too fast, so that the first checkpoint is the best; a limit of one keeps it and the last."""
    trainer = tiny_trainer(
        tmp_path,
        evaluation=random_pairs(20, seed=7),
        learning_rate=3.0,
        **EACH_STEP,
        save_total_limit=1,
    )
    trainer.train()
    evaluated = {x["step"]: x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x}
    del evaluated[0]
    best = min(evaluated, key=evaluated.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-5)


def test_loading_the_best_checkpoint_misses_no_tied_weight(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr("transformers.trainer.logger.warning", lambda *words: warned.append(words))
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_models.build("Llama", tie_word_embeddings=True),
        evaluation=random_pairs(5, seed=7),
        **EACH_STEP,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert not any("missing" in str(words) for words in warned)
    embedding = trainer.model.get_input_embeddings().weight
    assert trainer.model.get_output_embeddings().weight is embedding
    trainer._issue_warnings_after_load(
        SimpleNamespace(missing_keys=["a", "lm_head.weight"], unexpected_keys=[])
    )
    assert "['a']" in str(warned[-1])


def test_early_stopping(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        evaluation=random_pairs(20, seed=7),
        learning_rate=3.0,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=12,
        early_stopping_patience=2,
    )
    trainer.train()
    assert trainer.state.global_step < 12
    with pytest.raises(ConfigError, match="early_stopping_patience"):
        tiny_trainer(tmp_path, early_stopping_patience=2)


def test_prompts_are_held_out_where_evaluation_is_wanted_and_none_is_given(tmp_path, capsys):
    rows = [{"prompt": f"Say {n}", "chosen": f" It is {n}.", "rejected": " No."} for n in range(40)]
    model = tiny_models.build("Llama", vocab_size=700)
    trainer = tiny_trainer(tmp_path, model=model, train=rows, eval_strategy="steps", eval_split=0.1)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (36, 4)
    assert "4 of 40 pairs are held out" in capsys.readouterr().out
    assert tiny_trainer(tmp_path, model=model, train=rows).eval_dataset is None
    with pytest.raises(ConfigError, match="there is no evaluation data"):
        tiny_trainer(tmp_path, model=model, train=rows, eval_strategy="steps", eval_split=0)


# ------------------------------------------------------------------------------------------ files


def test_run_directory(tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Say {n}"}],
            "chosen": [{"role": "assistant", "content": f"It is {n}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for n in range(10)
    ]
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_models.build("Llama", vocab_size=len(tokenizer)),
        train=rows[:8],
        evaluation=rows[8:],
        processing_class=tokenizer,
        eval_strategy="steps",
        eval_steps=2,
        num_samples=2,
        max_completion_length=3,
        gradient_accumulation_steps=2,
        logging_steps=2,
    )
    trainer.train()
    trainer.save_model()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (4, "train"), (4, "eval"), (4, "saved")
    ]  # fmt: skip
    names = ["loss", "nll", "odds_ratio_loss", "log_odds_ratio", "accuracy", "margin", "chosen_logprob"]
    training, evaluating = lines[1], lines[0]
    assert {"epoch", "seconds", "metrics"} <= training.keys()
    shares = {"odds_share", "prompt_share"}
    took = {"tokens_per_second", "tokens", "peak_memory"}
    assert {"grad_norm", "learning_rate", "rejected_logprob", *names, *shares, *took} == training[
        "metrics"
    ].keys()
    assert (evaluating["set"], evaluating["num_pairs"]) == ("", 2)
    assert evaluating["metrics"].keys() == {*names, "rejected_logprob", "nll_token_mean"}
    assert all(figure.keys() == {"mean", "se"} for figure in evaluating["metrics"].values())
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["beta"] == 0.1 and recipe["gradient_accumulation_steps"] == 2
    assert recipe == ORPOConfig(**recipe).recipe(), "the recipe makes the same run"
    libraries = json.loads((tmp_path / "environment.json").read_text())["libraries"]
    assert libraries["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert json.loads((tmp_path / "data_report.json").read_text())["train"]["rows"]["kept"] == 8
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == 2 and samples[0]["answers"].keys() == {"chosen", "step 0", "step 2", "step 4"}
    assert samples[0]["answers"]["chosen"] == "It is 8.", "peers 9: no answer loses its head"
    assert "checkpoint" not in " ".join(path.name for path in tmp_path.iterdir())
    card = (tmp_path / "README.md").read_text()
    assert "tags:\n- orpo" in card and "| accuracy |" in card

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    end = loaded.convert_tokens_to_ids("<|eot_id|>")
    assert end in model.generation_config.eos_token_id, "generation stops at the end of a turn"
    again = tiny_trainer(
        tmp_path / "again",
        model=model,
        train=rows,
        evaluation=rows[8:],
        eval_strategy="no",
        processing_class=loaded,
    )
    final = lines[-2]["metrics"]["loss"]["mean"]
    assert again.evaluate()["eval_loss"] == pytest.approx(final, rel=1e-5)


def test_trackers_of_transformers_work(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_trainer(tmp_path, report_to="tensorboard").train()
    assert any((tmp_path / "runs").rglob("events*"))


def test_nothing_is_sent_anywhere(tmp_path, monkeypatch):
    """trap 11: no telemetry, no look at the hub, with a local model and local data."""
    import socket

    def refuse(*arguments):
        raise AssertionError(f"a connection was opened: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tiny_models.build("Llama").save_pretrained(tmp_path / "model")
    trainer = tiny_trainer(tmp_path / "run", model=str(tmp_path / "model"))
    trainer.train()
    trainer.save_model()


def test_progress_lines_where_there_is_no_terminal(tmp_path, capsys):
    trainer = tiny_trainer(
        tmp_path, evaluation=random_pairs(3), eval_strategy="steps", eval_steps=4, max_steps=2
    )
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("step 1/2  loss ") and "tokens/s" in line]) == 1
    assert any(line.startswith("step 0/2  evaluation  loss ") for line in lines)


def test_progress_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trainer = tiny_trainer(tmp_path, disable_tqdm=False)
    trainer.train()
    shown = capsys.readouterr().out
    assert "4/4" in shown and "accuracy" in shown and "preference share" in shown and "left 0:0" in shown


# ------------------------------------------------------------------------------------------ settings


def test_defaults():
    args = ORPOConfig(output_dir="x")
    assert (
        args.beta == 0.1 and args.nll_weight == 1.0 and args.learning_rate == 5e-6 and args.nll_on == "full"
    )
    assert args.logging_nan_inf_filter is False and args.report_to == [] and args.eval_strategy == "no"
    assert args.load_best_model_at_end is False and args.save_total_limit == 2
    if not torch.cuda.is_available():
        assert args.use_cpu and args.bf16 is False


def test_a_recipe_with_data_evaluates_and_keeps_the_best():
    args = ORPOConfig(output_dir="x", dataset_name="pairs.jsonl")
    assert args.eval_strategy == "steps" and args.eval_steps == args.save_steps and args.eval_on_start
    assert args.load_best_model_at_end and args.metric_for_best_model == "loss" and not args.greater_is_better
    assert ORPOConfig(output_dir="x", dataset_name="pairs.jsonl", eval_split=0).eval_strategy == "no"
    assert ORPOConfig(output_dir="x", dataset_name="pairs.jsonl", eval_strategy="no").eval_strategy == "no"
    epochs = ORPOConfig(output_dir="x", dataset_name="pairs.jsonl", save_strategy="epoch")
    assert epochs.eval_strategy == "epoch" and epochs.load_best_model_at_end
    uneven = ORPOConfig(output_dir="x", eval_strategy="steps", eval_steps=100, save_steps=250)
    assert not uneven.load_best_model_at_end


def test_evaluation_data_without_a_strategy_is_used(tmp_path):
    trainer = tiny_trainer(
        tmp_path, train=random_pairs(3000), evaluation=random_pairs(5), save_strategy="steps", max_steps=10,
        per_device_train_batch_size=300,
    )  # fmt: skip
    trainer.train()
    assert [x["step"] for x in trainer.state.log_history if "eval_loss" in x] == list(range(11))
    assert trainer.state.best_model_checkpoint
    silent = tiny_trainer(tmp_path, evaluation=random_pairs(5), eval_strategy="no")
    assert not silent.args.eval_on_start


def test_settings_of_trl_without_effect_are_named_in_one_line():
    args = ORPOConfig(output_dir="x", max_prompt_length=128, padding_value=0, truncation_mode="keep_end")
    assert len(args.notices) == 3 and args.notices[0].startswith("max_prompt_length has no effect: ")


def test_settings_that_wait_for_another_are_named_from_python_too():
    """But names on the hub: a script may call `push_to_hub` itself."""
    given = {"lora_r": 4, "save_steps": 5, "save_strategy": "epoch", "hub_model_id": "me/it"}
    assert ORPOConfig(output_dir="x", **given).notices == [
        "save_steps: no effect without save_strategy: steps",
        "lora_r: no effect without use_peft: true",
    ]
    on_adapter = ORPOConfig(output_dir="x", adapter_name_or_path="a", lora_r=4).notices
    assert on_adapter == ["lora_r: no effect on the adapter of adapter_name_or_path, which has its own"]
    for open_or_on in ({"eval_steps": 5}, {"eval_strategy": "steps", "eval_steps": 5}):
        assert not [line for line in ORPOConfig(output_dir="x", **open_or_on).notices if "effect" in line]


def test_settings_that_only_other_code_of_the_trainer_reads_are_named():
    """What evaluation, loaders and steps of transformers read, which are not ours."""
    given = {"train_sampling_strategy": "group_by_length", "average_tokens_across_devices": False}
    given |= {"per_device_eval_batch_size": 2, "bf16_full_eval": True, "eval_accumulation_steps": 2}
    given |= {"accelerator_config": {"even_batches": False}, "dataloader_persistent_workers": True}
    notices = ORPOConfig(output_dir="x", use_cpu=True, dataloader_num_workers=1, **given).notices
    assert sorted(line.split(" has no effect: ")[0] for line in notices) == sorted(given)


def test_presets_are_filled_in():
    args = ORPOConfig(output_dir="x", objective="tempered_odds", beta=0.3)
    assert (args.nll_weight, args.odds_scale, args.beta) == (0.0, None, 0.3)
    assert args.objective_settings == Objective(preference_weight=1.0, nll_weight=0.0, scale=0.3)
    assert len(args.notices) == 1 and "beta" in args.notices[0]


def test_hf_argument_parser(monkeypatch):
    from transformers import HfArgumentParser

    for module in ("trl.scripts.utils", "trl.trainer.model_config"):  # see test_trl_surface
        monkeypatch.delitem(sys.modules, module, raising=False)
    (args,) = HfArgumentParser(ORPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--beta", "0.3", "--use_peft", "--dataset_name", "pairs.jsonl"]
    )
    assert args.beta == 0.3 and args.use_peft and args.dataset_name == "pairs.jsonl"


# ------------------------------------------------------------------------------------------ refusals


def test_one_process_of_many_that_would_train_alone_is_refused(tmp_path, monkeypatch):
    """trap 9"""
    args = tiny_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but this process would train alone"):
        ORPOTrainer(
            tiny_models.build("Llama"), args, train_dataset=random_pairs(), processing_class=tiny_tokenizer()
        )


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        tiny_trainer(tmp_path, model=t5)
    frozen = tiny_models.build("Llama").requires_grad_(False)
    with pytest.raises(ModelError, match="no weight of the model is trained"):
        tiny_trainer(tmp_path, model=frozen)


def test_a_model_that_zero_3_has_cut_is_refused_in_one_line(tmp_path):
    model = tiny_models.build("Llama")
    next(model.parameters()).ds_id = 0
    with pytest.raises(ModelError, match=r"ZeRO-3 has cut it already.*pass its name, or load it first"):
        tiny_trainer(tmp_path, model=model)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="train_dataset"):
        ORPOTrainer(tiny_models.build("Llama"), tiny_config(tmp_path), processing_class=tiny_tokenizer())
    with pytest.raises(ModelError, match="processing_class"):
        ORPOTrainer(tiny_models.build("Llama"), tiny_config(tmp_path), train_dataset=random_pairs())
    with pytest.raises(ConfigError, match="model_name_or_path"):
        ORPOTrainer(None, tiny_config(tmp_path), train_dataset=random_pairs())
    with pytest.raises(ConfigError, match="model_init_kwargs"):
        tiny_trainer(tmp_path, model_init_kwargs={"dtype": "float32"})


def test_package_is_light_to_import():
    import subprocess
    import sys

    code = "import orpo, sys; orpo.__version__; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_run_in_an_old_directory_forgets_what_was_said_of_the_old_model(tmp_path):
    for name in ("report.json", "eval-test.json", "mine.json"):
        (tmp_path / name).write_text("{}")
    tiny_trainer(tmp_path, max_steps=1).train()
    assert [path.name for path in sorted(tmp_path.glob("*.json"))] == [
        "data_report.json",
        "environment.json",
        "mine.json",
    ]


def test_the_card_has_the_figures_of_the_weights_beside_it(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        evaluation=random_pairs(20, seed=7),
        learning_rate=20.0,
        **EACH_STEP,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model()
    best = trainer.state.best_global_step
    assert best < 4
    loss = next(x["eval_loss"] for x in trainer.state.log_history if x["step"] == best and "eval_loss" in x)
    card = (tmp_path / "README.md").read_text()
    assert f"after {best} steps" in card and f"| loss | {loss:.3f}" in card
    assert str(tmp_path) not in card, "cards are published"


def test_samples_go_on_with_another_number_of_prompts(tmp_path):
    for number, steps in ((1, 1), (3, 2)):
        trainer = tiny_trainer(
            tmp_path,
            model=tiny_models.build("Llama", vocab_size=len(tiny_tokenizer())),
            evaluation={"mine": random_pairs(5, seed=2), "other": random_pairs(4, seed=3)},
            num_samples=number,
            max_completion_length=2,
            max_steps=2,
            **EACH_STEP,
        )
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=steps == 2)
    answers = [sample["answers"].keys() for sample in json.loads((tmp_path / "samples.json").read_text())]
    assert answers == [{"chosen", "step 0", "step 1", "step 2"}, *[{"chosen", "step 2"}] * 2]


def test_settings_of_loading_are_refused_for_a_model_that_is_loaded(tmp_path):
    for settings in ({"use_peft": True}, {"use_peft": True, "load_in_4bit": True}):
        with pytest.raises(ConfigError, match="the model is loaded already"):
            tiny_trainer(tmp_path, **settings)
    with pytest.raises(ConfigError, match="leave peft_config"):
        ORPOTrainer(
            model_init=lambda: tiny_models.build("Llama"),
            args=tiny_config(tmp_path),
            peft_config=LoraConfig(),
            processing_class=tiny_tokenizer(),
            train_dataset=random_pairs(),
        )


def test_resize_embeddings_reaches_a_model_that_is_named(tmp_path):
    tokenizer = tiny_tokenizer(None, special_tokens=False)
    tiny_models.build("Llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    config = tiny_config(tmp_path, resize_embeddings=True, chat_template="chatml", max_steps=1)
    trainer = ORPOTrainer(str(tmp_path / "base"), config, train_dataset=rows)
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 2


def test_a_stopwatch_goes_on_from_the_seconds_there_were():
    stopwatch = Stopwatch()
    stopwatch.restart(100.0)
    assert 100 < stopwatch.seconds < 101
    assert 100 < stopwatch.restart() < 101
    assert stopwatch.seconds < 1


def test_a_stream_hands_over_the_pairs_of_a_prompt_together_as_many_as_a_step_has():
    pairs = [
        TokenizedPair([prompt], [2], [number]) for prompt, number in zip("AAAAABBA", range(8), strict=True)
    ]
    together = list(by_prompt(iter(pairs), 2))
    assert [[pair.rejected[0] for pair in some] for some in together] == [[0, 1], [2, 3], [4], [5, 6], [7]]


def test_steps_of_a_stream_have_the_pairs_of_a_prompt_together():
    pairs = [TokenizedPair([3, number // 2], [4], [number]) for number in range(12)]
    settings = BatchSettings(Objective(preference_weight=0.1), "shared", 1000)
    stream = iter(StepStream(lambda: pairs, settings, pairs_per_step=2, shuffle_buffer=4))
    steps = [next(stream) for _ in range(12)]  # two passes
    prompts = [{tuple(pair.prompt) for batch in step.pairs for pair in batch} for step in steps]
    assert all(len(one) == 1 for one in prompts) and prompts[:6] != prompts[6:]
