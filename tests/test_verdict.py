"""Whether training worked: planted outcomes with known verdicts, errors and powers against simulation."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from planted_pairs import results
from tiny_tokenizer import tiny_tokenizer
from tiny_training import random_pairs, tiny_trainer
from transformers import TrainerCallback

from orpo import cli
from orpo.engine.head import Denominators, pair_scores
from orpo.engine.head import _loss as plain_loss
from orpo.engine.metrics import MetricWindow
from orpo.engine.packing import pack
from orpo.engine.precision import bfloat16_gain
from orpo.errors import DataError
from orpo.evaluation.per_pair import PairResults, matched, read_results, write_results
from orpo.evaluation.statistics import clustered_mean, critical, pairs_needed, visible
from orpo.evaluation.verdict import Change, compare, judge_run, said_of
from orpo.pairs import TokenizedPair
from orpo.run.checkpoints import checkpoint_step
from orpo.run.directory import RunDirectory, read_run
from orpo.settings.config import Objective
from orpo.training.cadence import MOST, SHARE, evaluations
from orpo.training.cautions import cautions
from orpo.training.preflight import precision_summary
from orpo.training.progress import Pace, times_left

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def verdict(before: PairResults, after: PairResults, **objective: float) -> tuple[str, str]:
    planted = Objective(**objective)
    return said_of(compare(before, after, planted), planted)


def noise(number: int, size: float = 0.3, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BEFORE = (-3 + noise(60, 0.5, 1), -3 + noise(60, 0.5, 2))


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind", "words"),
    [
        (+0.6, +0.1, "learned", "It learned the preference: the log odds ratio of 60 held-out pairs"),
        (+0.6, +0.6, "nothing", "it learned the style of the answers, not which is better"),
        (+0.1, +0.6, "worse", "Worse than its base: "),
        (1e-7, 0.0, "nothing", "It learned nothing that matters: "),
        (+0.04, 0.0, "nothing", "It learned nothing that matters: "),
        (-40.0, -42.0, "worse", "; the loss changed by +3"),  # told apart better, and unable to write
    ],
)
def test_planted_outcomes_have_their_verdict(chosen, rejected, kind, words):
    small = min(abs(chosen - rejected), 0.1)
    after = (BEFORE[0] + chosen + small * noise(60, 1, 3), BEFORE[1] + rejected + small * noise(60, 1, 4))
    found, said = verdict(results(*BEFORE), results(*after))
    assert found == kind and words in said, said


def test_a_noisy_change_is_not_measurable_and_says_how_many_pairs_would_tell():
    wild = noise(60, 1, 3)
    after = (BEFORE[0] + 0.12 + wild - wild.mean(), BEFORE[1])
    change = compare(results(*BEFORE), results(*after), Objective())
    kind, said = said_of(change, Objective())
    odds = change.change["log_odds_ratio"]
    assert kind == "nothing" and said.startswith("Nothing measurable with 60 held-out pairs: ")
    assert change.pairs_needed == pairs_needed(abs(odds.mean), odds.se * math.sqrt(60)) > 60
    assert f"about {float(f'{change.pairs_needed:.2g}'):,.0f} pairs" in said


def test_figures_that_contradict_each_other_give_no_verdict():
    """One answer in ten is pushed far down, and half of the others change sides by a hair."""
    before = results(torch.full((80,), -3.0), torch.full((80,), -3.01))
    rejected = torch.where(torch.arange(80) < 30, -9.0, -2.99)
    kind, said = verdict(before, results(torch.full((80,), -3.0), rejected))
    assert kind == "nothing" and "contradict" in said


def test_a_model_that_is_only_surer_has_learned_no_preference():
    """Margins of both signs grow by 70 %: their mean rises, the odds-ratio loss does not fall."""
    chosen = torch.full((100,), -30.0, dtype=torch.float64)  # where log odds are the log-probs
    margins = 0.3 + noise(100, 1.0, 5)
    kind, said = verdict(results(chosen, chosen - margins), results(chosen, chosen - 1.7 * margins))
    assert kind == "nothing" and said.startswith("Surer, but no better: "), said


def test_supervised_fine_tuning_is_judged_by_its_loss():
    raised = results(BEFORE[0] + 0.6, BEFORE[1] + 0.9)
    assert verdict(results(*BEFORE), raised, preference_weight=0.0)[0] == "learned"
    assert verdict(raised, results(*BEFORE), preference_weight=0.0)[0] == "worse"


def test_pairs_of_one_prompt_are_one_observation():
    """12 prompts with 20 pairs each that move together: 240 independent pairs would be certain."""
    prompts = torch.arange(12).repeat_interleave(20)
    moved = 0.25 + noise(12, 0.6, 5)[prompts]
    chosen, rejected = -3 + noise(240, 0.5, 6), -3 + noise(240, 0.5, 7)
    shared = results(chosen, rejected, prompts), results(chosen + moved, rejected, prompts)
    apart = results(chosen, rejected), results(chosen + moved, rejected)
    assert verdict(*shared)[0] == "nothing" and "240 held-out pairs of 12 prompts" in verdict(*shared)[1]
    assert verdict(*apart)[0] == "learned"


def test_few_pairs_prove_a_catastrophe_and_no_accuracy():
    before = results([-3.0, -2.9, -3.2], [-3.1, -3.0, -2.8])
    assert verdict(before, results([-700.0, -710.0, -690.0], [-700.0, -720.0, -695.0]))[0] == "worse"
    assert verdict(before, results([-3.0, -2.9, -3.2], [-3.2, -3.0, -3.3]))[0] == "nothing", "100 % of 3"
    assert verdict(results([-3.0], [-3.1]), results([-2.0], [-3.1]))[1].startswith("No verdict: ")


def test_the_error_of_a_change_is_that_of_each_pair_s_change():
    after = (BEFORE[0] + 0.3 + noise(60, 0.1, 8), BEFORE[1] + noise(60, 0.1, 9))
    found = compare(results(*BEFORE), results(*after), Objective()).change["margin"]
    changes = (after[0] - after[1]) - (BEFORE[0] - BEFORE[1])
    assert found.mean == pytest.approx(changes.mean().item())
    assert found.se == pytest.approx((changes.std() / math.sqrt(60)).item())
    means = [results(*side).figures(Objective())["margin"].se for side in (BEFORE, after)]
    assert found.se < math.hypot(*means) / 3, "far below that of two separate means"


def test_pairs_are_matched_by_where_they_come_from():
    first = results([-1.0, -2.0, -3.0], [-9.0] * 3, sources=["a:1", "a:1", "a:2"], groups=["x", "y", "y"])
    second = results([-30.0, -10.0, -50.0], [-9.0] * 3, sources=["a:2", "a:1", "b:1"])
    one, two = matched(first, second)
    assert one.sources == two.sources == ["a:1", "a:2"]
    assert one.scores.chosen_logprob_P.tolist() == [-1, -3]
    assert two.scores.chosen_logprob_P.tolist() == [-10, -30]
    groups = compare(first, second, Objective()).groups
    assert {name: group.num_pairs for name, group in groups.items()} == {"x": 1, "y": 1}


def test_results_and_changes_are_read_as_they_were_written(tmp_path):
    sets = {"my/set": results(*BEFORE, prompts=[3] * 60), "": results([-0.1], [-0.7], groups=["g"])}
    write_results(tmp_path / "pairs.jsonl", sets)
    again = read_results(tmp_path / "pairs.jsonl")
    for name, one in sets.items():
        for column, read in zip(one.scores, again[name].scores, strict=True):
            torch.testing.assert_close(read, column, rtol=0, atol=0, equal_nan=True)
        assert (one.sources, one.groups) == (again[name].sources, again[name].groups)
        assert one.prompt_P.tolist() == again[name].prompt_P.tolist()
    change = compare(results(*BEFORE), results(*BEFORE[::-1], groups=["g"] * 60), Objective())
    assert Change.from_json(json.loads(json.dumps(change.to_json())), "here") == change
    (tmp_path / "pairs.jsonl").write_text('{"set": ""}\n')
    with pytest.raises(DataError, match=r"pairs.jsonl:1: damaged"):
        read_results(tmp_path / "pairs.jsonl")


# ---------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("prompts", "quantile"), [(3, 4.303), (6, 2.571), (10, 2.262), (31, 2.042)])
def test_critical_values_are_student_s(prompts, quantile):
    assert critical(prompts) == pytest.approx(quantile, rel=0.035 if prompts == 3 else 0.002)


def test_the_pairs_said_to_be_needed_show_the_change_four_times_in_five():
    """Two pairs a prompt, half of whose spread they share."""
    torch.manual_seed(0)
    effect, pilot = 0.2, 4000

    def draw(number: int) -> Change:
        prompts = torch.arange(number // 2).repeat_interleave(2)
        moved = effect + torch.randn(number // 2)[prompts] + torch.randn(number)
        mean = clustered_mean(moved, torch.ones(number), prompts)
        return Change(
            num_pairs=number,
            num_preferences=number,
            num_prompts=number // 2,
            before={},
            after={},
            change={"log_odds_ratio": mean},
        )

    error = draw(pilot).change["log_odds_ratio"].se
    needed = pairs_needed(effect, error * math.sqrt(pilot))
    assert 500 < needed < 700
    found = [draw(2 * (needed // 2)) for _ in range(400)]
    assert sum(one.direction("log_odds_ratio") > 0 for one in found) / 400 == pytest.approx(0.8, abs=0.05)
    assert visible(found[0].change["log_odds_ratio"], needed // 2) == pytest.approx(effect, rel=0.15)


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(preference_weight=2.0, nll_on="response", nll_weight=0.5),
        Objective(preference_weight=0.7, scale=0.4, nll_on="assistant", nll_reduction="pair"),
        Objective(compares="sums", scale=0.1, label_smoothing=0.3),
    ],
)
def test_the_odds_share_is_that_of_two_backward_passes(objective):
    """The L1 norms of the gradients in all logits that each term has by itself, by autograd."""
    pairs = [pair for pair in tiny_models.mixed_pairs() if pair.rejected]
    batch = pack(pairs, objective)
    torch.manual_seed(0)
    logits = (3 * torch.randn(len(batch.target_T), 50, dtype=torch.float64)).requires_grad_()
    batch.target_T.remainder_(50)
    logprob_T = logits.log_softmax(1).gather(1, batch.target_T[:, None])[:, 0]
    norms = []
    for off in ("nll_weight", "preference_weight"):
        alone = replace(batch, objective=replace(objective, **{off: 0.0}))
        loss = plain_loss(logprob_T, alone, Denominators(batch.nll_weight, len(pairs)))
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        norms.append(gradient.abs().sum().item())
    window = MetricWindow(objective, torch.device("cpu"))
    window.add_pairs(pair_scores(logprob_T.detach(), batch), batch.num_context_tokens)
    means = window.close(lambda sums: sums)
    assert means["odds_share"] == pytest.approx(norms[0] / sum(norms), rel=1e-6)
    context = sum(len(p.prompt) + p.chosen_context - 1 for p in pairs)
    answers = sum(len(p.chosen) - p.chosen_context for p in pairs)
    if objective.nll_on == "full":
        assert means["prompt_share"] == pytest.approx(context / (context + answers))
    if objective.nll_on == "response":
        assert means["prompt_share"] == 0


# ---------------------------------------------------------------------------------------- of a run


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def test_what_is_kept_survives_an_interruption(tmp_path):
    """The verdict of a run that was interrupted is that of the run that was not, with two files of pairs."""
    evaluation = {"small": random_pairs(12, seed=7), "large": random_pairs(20, seed=8)}
    settings = {"evaluation": evaluation, "learning_rate": 1.0, "max_steps": 3, **EACH_STEP}
    tiny_trainer(tmp_path / "cut", **settings, arguments={"callbacks": [StopAt(2)]}).train()
    for name in ("whole", "cut"):
        trainer = tiny_trainer(tmp_path / name, **settings)
        trainer.train(resume_from_checkpoint=name == "cut")
        trainer.save_model()
    whole, cut = judge_run(tmp_path / "whole"), judge_run(tmp_path / "cut")
    assert cut == whole and list(cut.sets) == ["large", "small"]
    assert not cut.chose, "the first set chooses, the larger one judges"
    assert RunDirectory(tmp_path / "cut").steps_with_results() == [0, cut.step]
    figures = read_run(tmp_path / "cut").evaluation_at("large", cut.step).metrics
    assert cut.change.after["margin"].mean == pytest.approx(figures["margin"].mean)


@pytest.mark.parametrize(
    ("rate", "peft", "higher"), [(1e-9, False, "5e-06"), (1e-9, True, "0.0002"), (1e-6, False, "1e-05")]
)
def test_a_run_that_hardly_moved_is_told_a_rate_that_moves_models(tmp_path, rate, peft, higher):
    """Ten times a useless rate may be as useless."""
    settings = {"evaluation": random_pairs(12, seed=7), "max_steps": 1, **EACH_STEP}
    model = tmp_path / "base"
    tiny_models.build("Llama").save_pretrained(model)
    tiny_trainer(tmp_path, model=str(model), **settings, learning_rate=rate, use_peft=peft).train()
    assert judge_run(tmp_path).advice[0].startswith(f"learning_rate: {higher} (at {rate:g} the model hardly")


def test_without_held_out_pairs_the_verdict_says_how_to_hold_out(tmp_path):
    tiny_trainer(tmp_path, max_steps=1).train()
    found = judge_run(tmp_path)
    assert found.kind == "unknown" and "no pairs were held out" in found.sentence
    assert "eval_split: 0.05" in found.advice[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model and pairs that a run can learn from."""
    folder = tmp_path_factory.mktemp("verdict")
    tokenizer = tiny_tokenizer("chatml")
    tiny_models.build("Llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, first, number in (("train", 0, 48), ("held", 100, 24), ("test", 200, 40)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {n} plus {n % 7}?"}],
                "chosen": [{"role": "assistant", "content": f"It is {n + n % 7}, of course."}],
                "rejected": [{"role": "assistant", "content": "No, I will not help with that!"}],
                "source": "even" if n % 2 == 0 else "odd",
            }
            for n in range(first, first + number)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_process(log: Path, *words: object) -> tuple[int, str]:
    """Run a command in a process of its own; returns its exit status and what it printed."""

    def target() -> None:
        with (
            log.open("w", buffering=1) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            os._exit(cli.main([str(word) for word in words]))

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(120)
    return process.exitcode, log.read_text()


def train_words(world: Path, name: str, rate: float, *more: object) -> list[object]:
    return [
        *("train", "--model_name_or_path", world / "base", "--dataset_name", world / "train.jsonl"),
        *("--eval_dataset_name", world / "held.jsonl", "--output_dir", world / name),
        *("--per_device_train_batch_size", 8, "--max_steps", 3, "--beta", 1, "--learning_rate", rate),
        *("--max_completion_length", 4, "--eval_steps", 1, "--save_steps", 1, *more),
    ]


@pytest.fixture(scope="module")
def good(world) -> tuple[Path, str]:
    status, printed = run_process(world / "good.log", *train_words(world, "good", 0.02, "--warmup_steps", 9))
    assert status == 0, printed
    return world / "good", printed


def test_a_run_ends_with_its_verdict(good):
    _, printed = good
    assert "verdict    It learned the preference: the log odds ratio of 24 held-out pairs" in printed
    assert "next       orpo chat" in printed
    assert "preference share " in printed and "prompt share " in printed
    for caution in (
        "warning    warmup_steps: 9 is no shorter than the run of 3 steps",
        "warning    only 48 pairs are trained on",
        "warning    24 held-out pairs will show a change of accuracy of about 27 points or more",
    ):
        assert caution in printed


def test_a_result_worse_than_its_base_exits_3_and_keeps_the_base(world, tmp_path):
    words = train_words(world, "wild", 5.0)
    status, printed = run_process(tmp_path / "log", *words)
    assert status == 3 and "verdict    Worse than its base: " in printed, printed
    assert "the base was kept" in printed and "try        learning_rate: " in printed
    assert "learning_rate: 5 may destroy the model" in printed
    run = world / "wild"
    assert read_run(run).model_step == 0
    assert min(map(checkpoint_step, run.glob("checkpoint-*"))) == 0
    kept, base = ((folder / "model.safetensors").read_bytes() for folder in (run, world / "base"))
    assert kept == base
    assert run_process(tmp_path / "log", *words)[0] == 3, "the finished run still says so"
    assert run_process(tmp_path / "log", *words, "--fail_if_worse", "false")[0] == 0


def test_eval_compares_two_models_pair_by_pair_and_leaves_the_first_alone(world, good, tmp_path):
    before = sorted((world / "base").iterdir())
    words = ("eval", world / "base", good[0], "--data", world / "test.jsonl")
    status, printed = run_process(tmp_path / "log", *words)
    assert status == 0 and f"verdict    {good[0]} is better than {world / 'base'}: " in printed, printed
    assert sorted((world / "base").iterdir()) == before
    saved = json.loads((good[0] / "eval-test.json").read_text())
    change = Change.from_json(saved["compared_with"]["change"], "")
    assert change.num_pairs == 40 and set(change.groups) == {"even", "odd"}
    (kept,) = read_results(good[0] / "eval-test.jsonl").values()
    assert kept.figures(Objective(preference_weight=1.0))["margin"].mean == pytest.approx(
        change.after["margin"].mean
    )
    assert run_process(tmp_path / "log", "report", good[0])[0] == 0
    page = (good[0] / "report.html").read_text()
    first, second = page.index("Evaluation: test"), page.index("Held-out pairs")
    assert first < second, "the larger set, which did not choose the checkpoint, leads"
    assert "By source" in page and "40 pairs" in page


def test_an_evaluation_of_a_run_that_has_not_ended_says_so(world, good, tmp_path):
    shutil.copytree(good[0], world / "short")
    for name in ("finished.json", "model.safetensors", "config.json"):
        (world / "short" / name).unlink()
    _, printed = run_process(tmp_path / "log", "eval", world / "short", "--data", world / "test.jsonl")
    assert "short: the run is not finished; this is the model of checkpoint-3" in printed


# ---------------------------------------------------------------------------------------- before and during


LONG_PROMPTS = [
    TokenizedPair([1] * 60 + [2 + n % 2] * 41, [5] * 20, [6] * 9, source=f"pairs:{n}") for n in range(120)
]
"""All begin with the same 60 of 101 tokens, 100 of which are predicted."""


HALF = tiny_models.build("Llama").half()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 1e-9}, "learning_rate: 1e-09 will hardly move the model"),
        ({"learning_rate": 1.0}, "learning_rate: 1 may destroy the model"),
        ({"learning_rate": 1.0, "optim": "sgd"}, None),
        ({"warmup_steps": 40}, "warmup_steps: 40 is no shorter than the run of 40 steps"),
        ({"warmup_steps": 0.8}, "warmup_steps: 0.8 is most of the run of 40 steps"),
        ({"warmup_steps": 0.1}, None),
        ({"train": random_pairs(2)}, "only 2 pairs are trained on"),
        (
            {"evaluation": random_pairs(3)},
            "3 held-out pairs will show a change of accuracy of about 100",
        ),
        ({"evaluation": None}, "nothing is held out"),
        (
            {"train": LONG_PROMPTS},
            "83% of the NLL's tokens are prompt, 49% an opening",
        ),
        ({"train": LONG_PROMPTS, "nll_on": "response"}, None),
        ({"model": HALF}, "weights that are trained are float16"),
        ({"model": HALF, "optim": "sgd", "learning_rate": 1.0}, None),
    ],
)
def test_cautions(tmp_path, settings, expected):
    given = {"train": random_pairs(120), "evaluation": random_pairs(700, seed=3), "max_steps": 40}
    given |= {"optim": "adamw_torch", "learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 9}
    if settings.get("evaluation", ...) is None:
        given["eval_strategy"] = "no"
    lines = cautions(tiny_trainer(tmp_path, **(given | settings)))
    if expected is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith(f"warning    {expected}"), lines


@pytest.mark.parametrize("trained", [10, 300, 3_000, 100_000])
@pytest.mark.parametrize(("evaluation", "checkpoint"), [(0, 0), (20, 1), (5, 200)])
@pytest.mark.parametrize("on_start", [False, True])
def test_evaluations_and_checkpoints_take_a_tenth_at_most(trained, evaluation, checkpoint, on_start):
    number = evaluations(trained, evaluation, checkpoint, on_start=on_start)
    taken = (number + on_start) * (evaluation + checkpoint)
    assert 1 <= number <= MOST
    assert number == 1 or taken <= SHARE * trained
    assert number == MOST or taken + evaluation + checkpoint > SHARE * trained, "and no fewer than that"


def test_the_default_cadence_of_a_short_run_is_its_ends(tmp_path, capsys):
    settings = {"evaluation": random_pairs(60, seed=7), "train": random_pairs(160), "save_strategy": "steps"}
    trainer = tiny_trainer(tmp_path, max_steps=20, per_device_train_batch_size=8, **settings)
    assert (
        "evaluated and saved at the end only: more often would take over a tenth" in capsys.readouterr().out
    )
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [0, 20]
    asked = tiny_trainer(tmp_path / "asked", max_steps=20, eval_strategy="steps", eval_steps=5, **settings)
    assert asked.args.eval_steps == 5 and asked.args.save_steps == 5


@pytest.mark.parametrize(
    ("eval_steps", "saved_every"), [(7, 7), (3, 9), (1, 10), (0.03, 9), (0.25, 25), (400, 400)]
)
@pytest.mark.parametrize("strategy", ["steps", None])
def test_checkpoints_follow_the_steps_of_evaluations(tmp_path, eval_steps, saved_every, strategy):
    settings = {"evaluation": random_pairs(6, seed=7), "save_strategy": "steps", "eval_strategy": strategy}
    trainer = tiny_trainer(tmp_path, max_steps=100, eval_steps=eval_steps, **settings)
    assert trainer.args.eval_steps == eval_steps and trainer.args.save_steps == saved_every
    assert trainer.args.load_best_model_at_end and trainer.args.metric_for_best_model == "loss"


def test_each_checkpoint_is_evaluated_where_only_evaluations_are_asked_for(tmp_path):
    settings = {"evaluation": random_pairs(6, seed=7), "save_strategy": "steps", "save_total_limit": 9}
    trainer = tiny_trainer(tmp_path, max_steps=14, eval_steps=4, **settings)
    trainer.train()
    evaluated = {line["step"] for line in trainer.state.log_history if "eval_loss" in line}
    saved = {int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
    assert saved == evaluated == {0, 4, 8, 12, 14} and trainer.state.best_global_step is not None


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({"eval_steps": 4, "save_steps": 6}, 1),
        ({"eval_steps": 4, "save_strategy": "epoch"}, 1),
        ({"eval_steps": 4, "save_steps": 8}, 0),
        ({"eval_steps": 4, "save_strategy": "no"}, 0),
        ({"eval_steps": 4, "save_steps": 6, "load_best_model_at_end": False}, 0),
    ],
)
def test_a_run_that_keeps_no_best_checkpoint_says_so(tmp_path, settings, lines, capsys):
    given = {"evaluation": random_pairs(6, seed=7), "eval_strategy": "steps", "save_strategy": "steps"}
    tiny_trainer(tmp_path, **given | settings)
    assert capsys.readouterr().out.count("the run ends with its last weights, not the best") == lines


def test_what_is_turned_off_stays_off_where_there_is_data(tmp_path):
    off = {"load_best_model_at_end": False, "eval_on_start": False, "save_strategy": "steps"}
    trainer = tiny_trainer(tmp_path, evaluation=random_pairs(6, seed=7), **off)
    assert trainer.args.eval_strategy == "steps"
    assert not trainer.args.load_best_model_at_end and not trainer.args.eval_on_start


class _State:
    def __init__(self, step: int, last: int):
        self.global_step, self.max_steps = step, last


@pytest.mark.parametrize(("strategy", "every"), [("steps", 4), ("steps", 7), ("epoch", None), ("no", None)])
def test_the_time_left_includes_evaluations(strategy, every):
    """A made-up clock: a step takes 2 seconds, an evaluation 30; what is said is what is still to come."""
    now = [0.0]
    pace, last, epochs = Pace(lambda: now[0]), 14, 2
    due = {"steps": [*range(every or 1, last, every or 1), last], "epoch": [7, 14], "no": []}[strategy]
    total = 30 + last * 2 + 30 * len(due)

    def said(step: int, done: bool) -> float:
        left = times_left(_State(step, last), _Epochs(epochs), strategy, every, done=done)
        return pace.left({"step": last - step, "evaluation": left})

    now[0] += 30
    pace.end("evaluation")
    for step in range(1, last + 1):
        pace.begin()
        now[0] += 2
        pace.end("step")
        assert now[0] + said(step, done=False) == pytest.approx(total)
        if step in due:
            now[0] += 30
            pace.end("evaluation")
            assert now[0] + said(step, done=True) == pytest.approx(total)


class _Epochs:
    def __init__(self, number: float):
        self.num_train_epochs = number


def test_a_run_says_where_bfloat16_would_be_faster():
    on_cpu = SimpleNamespace(bf16=False, fp16=False, device=torch.device("cpu"))
    assert precision_summary(on_cpu, 1.9) == "float32"
    assert precision_summary(on_cpu, 3.14).endswith("multiplies bfloat16 3.1x as fast: bf16: true")
    assert (
        precision_summary(SimpleNamespace(bf16=True, fp16=False, device=on_cpu.device), 3.0)
        == "bfloat16 autocast"
    )
    assert (
        precision_summary(SimpleNamespace(bf16=False, fp16=False, device=torch.device("cuda"))) == "float32"
    )
    assert 0.01 < bfloat16_gain(64) < 100
