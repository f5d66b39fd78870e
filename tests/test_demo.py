"""`orpo demo --fast` as a newcomer runs it: a process of its own, offline; then what it leaves behind."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orpo.cli import main
from orpo.data.dataset import prompt_index, tokenize_pairs
from orpo.data.preferences import read_preferences
from orpo.demo import screen
from orpo.demo.experiment import EXPERIMENTS, FAST, free_directory
from orpo.demo.study import Training, shown_prompts
from orpo.engine.loading import load_tokenizer
from orpo.engine.steps import BatchSettings, StepDataset
from orpo.errors import ConfigError
from orpo.pairs import PreferencePair
from orpo.run.log import Figure
from orpo.settings.config import Objective

SOURCE = Path(__file__).parents[1] / "src"
FIGURES = {"chosen_logprob", "rejected_logprob", "log_odds_ratio", "accuracy", "nll_token_mean"}
MODELS = ["base", "SFT", "ORPO"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The run directory, and what was on the screen."""
    folder = tmp_path_factory.mktemp("demo")
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "orpo", "demo", "--fast"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return folder / "runs" / "demo", process.stdout


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


pytestmark = pytest.mark.timeout(600)


def test_screen_says_what_it_is_and_is_not(demo):
    text = " ".join(demo[1].split())
    for phrase in (
        *("AI-written", "Llama 3.1 70B", "style, not knowledge", "knows next to nothing", "fast version"),
        *("± one standard error", "orpo chat runs/demo", "runs/demo/report.html"),
    ):
        assert phrase in text, phrase


def test_screen_shows_the_table_with_standard_errors(demo):
    folder, text = demo
    found = json.loads((folder / "demo.json").read_text())["test"]
    assert list(found) == MODELS
    for name in MODELS:
        assert set(found[name]) >= FIGURES
        assert all(value["se"] > 0 for value in found[name].values())
    answers = json.loads((folder / "demo.json").read_text())["answers"]
    for row, metric in (("repetition", "repetition"), ("answers that end", "ended")):
        line = next(line for line in text.splitlines() if line.startswith(row))
        shares = [float(value) for value in re.findall(r"(\d+\.\d) %", line)]
        assert shares == [round(100 * answers[name][metric]["mean"], 1) for name in MODELS]
    line = next(line for line in text.splitlines() if line.startswith("rejected log-prob"))
    means = [float(value) for value in re.findall(r"(-?\d+\.\d+) ±", line)]
    assert means == [round(found[name]["rejected_logprob"]["mean"], 3) for name in MODELS]


def test_run_directories_hold_a_model_a_recipe_and_curves_of_the_validation_split(demo):
    for folder in (demo[0], demo[0] / "sft"):
        for name in (
            *("model.safetensors", "tokenizer.json", "recipe.yaml", "metrics.jsonl"),
            *("environment.json", "data_report.json", "README.md"),
        ):
            assert (folder / name).is_file(), name
        evaluations = [line for line in lines(folder / "metrics.jsonl") if line["kind"] == "eval"]
        assert [line["step"] for line in evaluations] == [0, FAST["max_steps"] // 2, FAST["max_steps"]]
        assert all(line["metrics"]["rejected_logprob"]["se"] > 0 for line in evaluations)


def test_both_start_from_the_same_base_and_take_equally_many_steps(demo):
    starts = [lines(folder / "metrics.jsonl")[0] for folder in (demo[0], demo[0] / "sft")]
    for name in ("chosen_logprob", "rejected_logprob", "accuracy"):
        first, second = (start["metrics"][name]["mean"] for start in starts)
        assert first == pytest.approx(second, abs=1e-6)
    training = json.loads((demo[0] / "demo.json").read_text())["training"]
    assert training["SFT"]["steps"] == training["ORPO"]["steps"] == FAST["max_steps"]


def test_sft_never_runs_a_rejected_answer_and_orpo_reads_each_prompt_once(demo):
    plan = replace(EXPERIMENTS["politeness"], **FAST)
    read = read_preferences(str(plan.split("train")), data_format="instruction")
    pairs = tokenize_pairs(read, load_tokenizer(str(plan.base)), max_length=plan.max_length)
    settings = BatchSettings(Objective(preference_weight=0.0), "shared", 4096)
    training = json.loads((demo[0] / "demo.json").read_text())["training"]
    for method, sides in (("SFT", False), ("ORPO", True)):
        steps = StepDataset(
            pairs, replace(settings, score_rejected=sides), pairs_per_step=plan.pairs_per_step,
            seed=plan.seed, prompts=prompt_index(pairs),
        )  # fmt: skip
        numbers = range(plan.max_steps)
        assert training[method]["tokens"] == sum(steps[number].num_tokens for number in numbers)
        seen = [pair for number in numbers for pairs in steps[number].pairs for pair in pairs]
        whole = sum(len(p.prompt) + len(p.chosen) + sides * len(p.rejected) for p in seen)
        assert 0.9 * whole < training[method]["tokens"] <= whole  # a few instructions begin the same
    for line in lines(demo[0] / "sft" / "metrics.jsonl"):
        assert line["kind"] != "train" or "rejected_logprob" not in line["metrics"]


def test_page_has_both_runs_in_one_picture_and_the_answers_of_all_three(demo):
    page = (demo[0] / "report.html").read_text()
    for phrase in (
        "ORPO, rejected",
        "SFT, rejected",
        "Log odds ratio",
        "Accuracy",
        "NLL",
        "AI-written",
        "Answers that end",
        "Repetition",
        "answers against SFT",
    ):
        assert phrase in page, phrase
    samples = json.loads((demo[0] / "samples.json").read_text())
    assert len(samples) == 3
    assert all(list(sample["answers"]) == MODELS for sample in samples)
    assert samples[0]["prompt"] in page.replace("&#x27;", "'")
    assert samples[0]["prompt"] in demo[1]


def test_eval_chat_and_report_accept_the_run_directory(demo, capsys, monkeypatch, tmp_path):
    folder = demo[0]
    assert main(["eval", str(folder), "--data", str(folder / "test.jsonl"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    shown = json.loads((folder / "demo.json").read_text())["test"]["ORPO"]
    assert metrics.keys() == shown.keys()
    for name in FIGURES:
        assert metrics[name] == pytest.approx(shown[name], abs=1e-4), "the same mean and the same error"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    command = [
        "chat",
        str(folder),
        "--compare",
        str(folder / "sft"),
        "--temperature",
        "0",
        "--max_tokens",
        "4",
    ]
    assert main(command) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "SFT, rejected" in page  # still next to the other run
    assert "Evaluation: test" in page


def test_second_run_goes_to_a_new_directory(tmp_path):
    first = free_directory(tmp_path / "runs" / "demo")
    assert first == tmp_path / "runs" / "demo"
    assert free_directory(first) == first  # still empty
    (first / "recipe.yaml").write_text("")
    assert free_directory(first) == tmp_path / "runs" / "demo-2"
    (tmp_path / "file").write_text("")
    assert free_directory(tmp_path / "file") == tmp_path / "file-2"
    with pytest.raises(ConfigError, match="name another"):
        free_directory(tmp_path / "file" / "demo")


def test_missing_base_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(EXPERIMENTS, "politeness", replace(EXPERIMENTS["politeness"], base=tmp_path))
    assert main(["demo", "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "base model" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_offensive_data_begins_with_a_warning_and_promises_no_gain():
    console = Console(file=io.StringIO(), width=80)
    screen.opening(console, EXPERIMENTS["harmless"])
    text = " ".join(console.file.getvalue().split())
    assert text.index("Content warning") < text.index("pairs")
    assert "No gain is promised" in text


def figures(chosen, rejected, accuracy=0.5):
    values = {
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
        "accuracy": accuracy,
        "log_odds_ratio": 0.1,
    }
    return {name: Figure(value, 0.01) for name, value in values.items()}


def test_reading_follows_the_figures_whichever_way_they_go():
    took = {"SFT": Training(8, 1000, 10.0), "ORPO": Training(8, 1500, 15.0)}
    found = {"base": figures(-4.0, -4.0), "SFT": figures(-2.0, -3.0), "ORPO": figures(-2.2, -4.3)}
    text = " ".join(screen.reading(found, took))
    assert "yet made them likelier: +1.00" in text
    assert "ends 1.30 below SFT" in text
    assert "1.5 times the tokens" in text
    found |= {"SFT": figures(-2.0, -5.0), "ORPO": figures(-2.2, -4.3)}
    text = " ".join(screen.reading(found, took))
    assert "made them less likely: -1.00" in text
    assert "ends 0.70 above SFT" in text


def test_picture_places_each_model_on_one_axis():
    found = {"base": figures(-4.0, -4.0), "SFT": figures(-2.0, -3.0), "ORPO": figures(-2.0, -4.0)}
    base, sft, orpo, *_ = screen.picture(found, 80).plain.splitlines()
    assert sft.index("○") < sft.index("●") == orpo.index("●")
    assert orpo.index("○") == base.index("●")
    assert sft.index("○") == (orpo.index("○") + orpo.index("●")) // 2


def test_shown_prompts_are_short_and_different():
    def pair(text):
        return PreferencePair([{"role": "user", "content": text}], [], [])

    texts = ["one", "one", "two\nlines", "x" * 71, "two", "three", "four"]
    assert [p.instruction for p in shown_prompts([pair(text) for text in texts])] == ["one", "two", "three"]
