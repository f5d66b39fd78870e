"""Whole commands on a tiny model: train, stop, resume, evaluate, talk, report."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import orpo.training.job
from orpo import cli
from orpo.errors import DataError
from orpo.report.page import write_report
from orpo.run.checkpoints import base_model_name, model_folder
from orpo.run.directory import read_run
from orpo.run.log import Figure

BIN = [sys.executable, "-m", "orpo"]
pytestmark = pytest.mark.timeout(300)  # a process imports everything again, on a machine that may be busy


def orpo_main(*words: object) -> tuple[int, str]:
    """Run a command in this process; returns its status and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main([str(word) for word in words])
    return status, out.getvalue()


def pairs(number: int, first: int = 0) -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus {n % 7}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + n % 7}, of course."}],
            "rejected": [{"role": "assistant", "content": "No, I will not say." + " Never!" * (n % 4)}],
            "source": "even" if n % 2 == 0 else "odd",
        }
        for n in range(first, first + number)
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a model, training pairs, test pairs and a recipe."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_jsonl(folder / "train.jsonl", [*pairs(40), {**pairs(1)[0], "rejected": pairs(1)[0]["chosen"]}])
    write_jsonl(folder / "test.jsonl", pairs(15, first=50))
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "torch_dtype": "float32",
        "dataset_name": str(folder / "train.jsonl"),
        "eval_dataset_name": str(folder / "test.jsonl"),
        "max_prompt_length": 100,
        "learning_rate": "3e-3",
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "report_to": "none",
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def trained(world) -> tuple[Path, str]:
    """The run directory of a finished run, and what the run printed; a real process."""
    done = subprocess.run(
        [*BIN, "train", str(world / "recipe.yaml"), "--num_samples", "2", "--max_completion_length=8"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return world / "run", done.stdout


def test_a_run_tells_format_counts_plan_and_result(trained):
    _, printed = trained
    for expected in (
        "torch_dtype (recipe.yaml:2): now called dtype",
        "max_prompt_length (recipe.yaml:5): no effect",
        "format conversational",
        "chosen     ",
        "dropped 1: chosen and rejected are identical (first: train.jsonl:41)",
        "data       40 pairs",
        "held out   15 pairs",
        "steps      15 of 8 pairs: 3 epochs of 5 steps",
        "accuracy",
        "step 15",
        "15 held-out pairs",
        "verdict    ",
        "--compare",
    ):
        assert expected in printed


def test_a_run_directory_holds_what_the_design_lists(trained):
    run_dir, _ = trained
    names = {path.name for path in run_dir.iterdir()}
    assert {
        "recipe.yaml", "data_report.json", "metrics.jsonl", "environment.json", "README.md", "report.html",
        "samples.json", "config.json", "model.safetensors", "tokenizer.json", "checkpoint-15",
    } <= names  # fmt: skip


def test_the_result_loads_with_plain_transformers_and_its_template(trained, world):
    run_dir, _ = trained
    model = AutoModelForCausalLM.from_pretrained(run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    ids = tokenizer.apply_chat_template(
        pairs(1)[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]


def test_the_same_command_on_a_finished_run_changes_nothing(trained, world):
    run_dir, _ = trained
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    status, printed = orpo_main(
        "train", world / "recipe.yaml", "--num_samples", 2, "--max_completion_length", 8
    )
    assert status == 0
    assert "finished run" in printed
    assert orpo_main("train", run_dir)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}


def test_other_data_or_steps_on_a_finished_run_are_refused(trained, world):
    for words in (["--per_device_train_batch_size", 4], ["--dataset_name", world / "other.jsonl"]):
        status, printed = orpo_main("train", world / "recipe.yaml", *words)
        assert status == 2 and str(words[0])[2:] in printed


def test_another_recipe_on_a_finished_run_is_refused_with_the_difference(trained, world):
    status, printed = orpo_main("train", world / "recipe.yaml", "--learning_rate", "1e-3")
    assert status == 2
    assert "learning_rate: 0.003 -> 0.001" in printed


def test_a_killed_run_goes_on_and_a_stopped_one_too(world):
    """Killed with -9, then stopped with Ctrl-C, then finished: by the same command each time."""
    run_dir = world / "interrupted"
    words = ["train", world / "recipe.yaml", "--output_dir", run_dir, "--num_train_epochs", "200",
             "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]  # fmt: skip

    def start_and_signal(number: signal.Signals, step: int) -> tuple[int, str]:
        """In a forked process, because importing everything again takes seconds."""
        log = world / f"log-{number.name}"
        process = multiprocessing.get_context("fork").Process(target=logged_main, args=(log, words))
        process.start()
        deadline = time.monotonic() + 100
        while not (run_dir / f"checkpoint-{step}").exists() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode, log.read_text()

    status, _ = start_and_signal(signal.SIGKILL, 2)
    assert status == -signal.SIGKILL
    reached = max(int(path.name[11:]) for path in run_dir.glob("checkpoint-*"))
    status, printed = start_and_signal(signal.SIGINT, reached + 2)
    assert status == 128 + signal.SIGINT, printed
    assert f"resuming from {run_dir}/checkpoint-" in printed
    assert "stopped by SIGINT" in printed
    assert "Traceback" not in printed
    newest = model_folder(str(run_dir))
    assert newest != str(run_dir)  # the unfinished run has its model in a checkpoint
    last = int(newest.rpartition("-")[2]) + 2
    status, printed = orpo_main(*words, "--save_steps", 1000, "--force", "--max_steps", last)
    assert status == 0, printed
    assert f"resuming from {newest}" in printed
    assert model_folder(str(run_dir)) == str(run_dir)


def logged_main(log: Path, words: list[object]) -> None:
    with (
        log.open("w", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        os._exit(cli.main([str(word) for word in words]))


def test_a_dry_run_checks_everything_and_writes_nothing(world, tmp_path):
    status, printed = orpo_main("train", world / "recipe.yaml", "--dry_run", "--output_dir", tmp_path / "run")
    assert status == 0
    assert "steps      15 of 8 pairs" in printed
    assert "dry run" in printed
    assert not (tmp_path / "run").exists()


def test_two_dry_runs_at_a_time_leave_nothing_and_do_not_meet(world, tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    checked = orpo.training.job._checked_trainer

    def meanwhile(config):
        trainer = checked(config)
        if not (tmp_path / "other").exists():  # once: another process ends before this one does
            (tmp_path / "other").mkdir()
            run.rmdir()
        return trainer

    monkeypatch.setattr("orpo.training.job._checked_trainer", meanwhile)
    status, printed = orpo_main("train", world / "recipe.yaml", "--dry_run", "--output_dir", run)
    assert status == 0 and "nothing was trained or written" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--torch_compile_mode", "nope"], "torch_compile_backend: inductor with torch_compile_mode: nope"),
        (["--dataloader_prefetch_factor", "0"], "dataloader_prefetch_factor: 0 is out of range"),
        (["--use_liger_kernel"], "use_liger_kernel needs liger_kernel, which is not installed; pip install"),
        (
            ["--lr_scheduler_kwargs", "{nope: 3}"],
            "lr_scheduler_kwargs: {'nope': 3} cannot be used with lr_sched",
        ),
        (
            ["--lr_scheduler_type", "warmup_stable_decay"],
            "'num_decay_steps'); what a schedule takes is written lr_scheduler_kwargs: {name: value}",
        ),
        (["--optim", "galore_adamw"], "optim: galore_adamw cannot be used"),
        (["--optim_args", "a=b=c"], "optim_args: 'a=b=c' is no name=value"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_settings_that_cannot_be_used_are_one_line_dry_or_not(world, tmp_path, words, expected, dry):
    run = ["--output_dir", tmp_path / "run", "--dry_run", str(dry)]
    status, printed = orpo_main("train", world / "recipe.yaml", *run, *words)
    assert status == 2
    assert printed.splitlines()[-1].startswith("orpo: error: ") and expected in printed.splitlines()[-1]
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize(
    ("rows", "words", "expected"),
    [
        ([*pairs(3), {"prompt": "a", "chosen": 3, "rejected": "b"}], [], "bad.jsonl:4"),
        ([], [], "the data set is empty"),
        (pairs(3), ["--model_name_or_path", "/no/such/folder"], "/no/such/folder"),
        (pairs(3), ["--chat_template", "chatmll"], "did you mean 'chatml'"),
        (pairs(3), ["--max_length", "5"], "max_length"),
        (pairs(3), ["--dataloader_drop_last"], "dataloader_drop_last: 3 pairs are too few for a step of 8"),
    ],
)
def test_bad_data_and_models_are_one_line_and_exit_2(world, tmp_path, rows, words, expected):
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    status, printed = orpo_main(
        "train", world / "recipe.yaml", "--dataset_name", data, "--output_dir", tmp_path / "run", *words
    )
    assert status == 2
    assert printed.splitlines()[-1].startswith("orpo: error: ")
    assert expected in printed.splitlines()[-1]


# ---------------------------------------------------------------------------------------- eval


def evaluate(run: object, data: Path, *words: object) -> dict:
    status, printed = orpo_main("eval", run, "--data", data, "--json", *words)
    assert status == 0, printed
    return json.loads(printed[printed.index("{") :])


def test_eval_of_a_run_equals_the_run_s_own_last_evaluation(trained, world):
    run_dir, _ = trained
    result = evaluate(run_dir, world / "test.jsonl")
    logged = read_run(run_dir).final_evaluation("").metrics
    for name in ("accuracy", "margin", "log_odds_ratio", "chosen_logprob", "rejected_logprob", "nll", "loss"):
        found = result["metrics"][name]
        assert (found["mean"], found["se"]) == pytest.approx(
            (logged[name].mean, logged[name].se), rel=1e-4, abs=1e-6
        )
    assert result == json.loads((run_dir / "eval-test.json").read_text())


def test_eval_does_not_depend_on_the_batch_size(trained, world):
    """Peers' defect 7: evaluation numbers that change with the evaluation batch size."""
    run_dir, _ = trained
    whole = evaluate(run_dir, world / "test.jsonl")
    for words in (
        ["--batch_size", 1],
        ["--batch_size", 4],
        ["--tokens_per_micro_batch", 64],
        ["--layout", "padded"],
    ):
        other = evaluate(run_dir, world / "test.jsonl", *words)
        for one, two in ((other, whole), (other["groups"]["odd"], whole["groups"]["odd"])):
            for name, figure in two["metrics"].items():
                assert one["metrics"][name] == pytest.approx(figure, rel=1e-4, abs=1e-6), (words, name)


def test_eval_names_groups_and_takes_any_model_and_any_objective(world):
    result = evaluate(world / "base", world / "test.jsonl", "--objective", "response", "--name", "base")
    assert {name: group["num_pairs"] for name, group in result["groups"].items()} == {"even": 8, "odd": 7}
    weighted = sum(g["num_pairs"] * g["metrics"]["margin"]["mean"] for g in result["groups"].values()) / 15
    assert weighted == pytest.approx(result["metrics"]["margin"]["mean"], rel=1e-5)
    assert not (world / "base" / "eval-base.json").exists(), "nothing is written into a model that is no run"
    # On the response alone, the NLL over examples is minus the mean log-prob of the chosen responses.
    figures = result["metrics"]
    assert figures["nll"]["mean"] == pytest.approx(-figures["chosen_logprob"]["mean"], rel=1e-5)


def test_eval_prints_a_table(trained, world):
    run_dir, _ = trained
    status, printed = orpo_main("eval", run_dir, "--data", world / "test.jsonl")
    assert status == 0
    for expected in (
        "using 15 of 15 rows",
        "accuracy",
        "all pairs (15)",
        "even (8)",
        "±",
        "saved as",
    ):
        assert expected in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch_size", "0"], "batch_size: 0 is out of range"),
        (["--betta", "1"], "did you mean 'beta'"),
    ],
)
def test_eval_refuses_settings_it_cannot_use(world, words, expected):
    status, printed = orpo_main("eval", world / "base", "--data", world / "test.jsonl", *words)
    assert status == 2
    assert expected in printed


def test_eval_of_a_folder_without_a_model_says_so(tmp_path, world):
    status, printed = orpo_main("eval", tmp_path, "--data", world / "test.jsonl")
    assert status == 2
    assert "holds no model, no adapter and no whole checkpoint" in printed


def test_a_mistyped_run_directory_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    fake_run(tmp_path / "runs" / "first", [])
    monkeypatch.chdir(tmp_path)
    for name in ("runs/frist", "./first", "/no/such/run", "runs/a/b"):
        status, printed = orpo_main("chat", name)
        assert (status, printed) == (2, f"orpo: error: {name}: there is no such folder\n")
    assert model_folder("mistralai/Mistral-7B-v0.1") == "mistralai/Mistral-7B-v0.1"


def test_a_run_remembers_where_its_base_is(world, monkeypatch):
    monkeypatch.chdir(world)
    words = [
        "--model_name_or_path",
        "base",
        "--output_dir",
        "elsewhere",
        "--max_steps",
        1,
        "--eval_strategy",
        "no",
    ]
    assert orpo_main("train", world / "recipe.yaml", *words)[0] == 0
    monkeypatch.chdir("/")
    assert base_model_name(str(world / "elsewhere")) == str(world / "base")


# ---------------------------------------------------------------------------------------- LoRA


def test_an_adapter_is_trained_evaluated_and_talked_to_beside_its_base(world, monkeypatch):
    run_dir = world / "lora"
    status, printed = orpo_main(
        "train", world / "recipe.yaml", "--output_dir", run_dir, "--use_peft", "--max_steps", 3, "--lora_r", 2
    )
    assert status == 0, printed
    assert "of them" in printed
    assert (run_dir / "adapter_model.safetensors").exists()
    assert not (run_dir / "model.safetensors").exists()
    result = evaluate(run_dir, world / "test.jsonl")
    final = read_run(run_dir).final_evaluation("")
    assert result["metrics"]["loss"]["mean"] == pytest.approx(final.metrics["loss"].mean, rel=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 plus 1?\n"))
    status, printed = orpo_main("chat", run_dir, "--compare", "--max_tokens", 3, "--temperature", 0)
    assert status == 0, printed
    assert f"[{run_dir}]" in printed
    assert f"[{world / 'base'}]" in printed


def test_a_run_in_stages_is_trained_evaluated_and_shown(world):
    run_dir, data = world / "stages", world / "test.jsonl"
    stages = "[{objective: sft, share: 0.5}, {objective: dpo, beta: 0.5}]"
    words = ("--output_dir", run_dir, "--stages", stages, "--max_steps", 4, "--learning_rate", 3e-2)
    status, printed = orpo_main("train", world / "recipe.yaml", *words)
    assert status == 0, printed
    for expected in (
        "objective  dpo, from step 3: ",
        "step 1: stage 1 of 2, sft",
        "step 3: stage 2 of 2, dpo",
    ):
        assert expected in printed
    page = Page((run_dir / "report.html").read_text()).text
    assert "sft from step 1, dpo from step 3" in page
    figures = evaluate(run_dir, data)["metrics"]
    assert "accuracy" in figures and not {"loss", "reward_margin", "chosen_reward"} & figures.keys()
    # Without the reference there is no loss; the first of two models is taken for it.
    status, printed = orpo_main("eval", world / "base", run_dir, "--data", data, "--json")
    change = json.loads(printed[printed.index("{") :])["change"]
    assert status == 0 and change["before"]["loss"]["mean"] == pytest.approx(0.6931472)
    assert change["after"]["reward_margin"]["mean"] == change["change"]["reward_margin"]["mean"] != 0
    status, printed = orpo_main("eval", run_dir, "--data", data)
    assert status == 0 and "objective dpo: loss and rewards are left out" in printed
    assert "loss" in evaluate(run_dir, data, "--objective", "simpo")["metrics"]


# ---------------------------------------------------------------------------------------- chat


def test_chat_answers_each_line_of_stdin(trained, monkeypatch):
    run_dir, _ = trained
    typed = "What is 3 plus 3?\n\nAnd 4?\n/reset\nWhat is 3 plus 3?\n/help\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    status, printed = orpo_main(
        "chat", run_dir, "--temperature", 0, "--max_tokens", 6, "--system", "Be brief."
    )
    assert status == 0, printed
    lines = printed.splitlines()
    again = lines.index("(a new conversation)") + 1
    assert lines[0] == lines[again]  # greedy, and the history is gone
    assert lines[-1].startswith("(/reset")
    assert "never read" not in printed


def test_chat_forgets_the_oldest_turns_when_the_model_can_read_no_more(trained, monkeypatch):
    run_dir, _ = trained
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n" * 12))
    status, printed = orpo_main("chat", run_dir, "--max_tokens", 20, "--seed", 1)
    assert status == 0, printed
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\n"))
    status, printed = orpo_main("chat", run_dir, "--max_tokens", 250)
    assert status == 2
    assert "do not fit into the 256 tokens" in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature", "-1"], "temperature: -1.0 is out of range"),
        (["--top_p", "0"], "top_p: 0.0 is out of range"),
        (["--max_tokens", "0"], "max_tokens: 0 is out of range"),
        (["--compare"], "does not say what it was trained from"),
        (["--beside"], "--beside is now called --compare"),
    ],
)
def test_chat_refuses_what_it_cannot_do(world, words, expected):
    status, printed = orpo_main("chat", world / "base", *words)
    assert status == 2
    assert expected in printed


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_chat_refuses_a_line_that_is_not_utf_8(world, monkeypatch, errors):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", typed)
    status, printed = orpo_main("chat", world / "base")
    assert status == 2 and "not UTF-8" in printed and "type it in UTF-8" in printed


# ---------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """Checks that elements are closed in order; collects texts, links and element counts."""

    VOID = ("meta", "br", "wbr", "img", "link", "hr", "input")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_that_loads_nothing(trained):
    run_dir, _ = trained
    page = Page((run_dir / "report.html").read_text())
    assert page.count["svg"] == 7
    assert all(link.startswith("#") for link in page.links)
    assert page.count.get("script", 0) == page.count.get("img", 0) == page.count.get("link", 0) == 0
    for expected in (
        "Accuracy",
        "Chosen and rejected answers",
        "What is",
        "learning_rate",
        "torch",
    ):
        assert expected in page.text


def fake_run(folder: Path, lines: list[dict], **recipe: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def evaluation(step: int, accuracy: float, name: str = "") -> dict:
    metrics = {"accuracy": {"mean": accuracy, "se": 0.01}, "loss": {"mean": 1 - accuracy, "se": 0.01}}
    return {"step": step, "kind": "eval", "set": name, "num_pairs": 20, "metrics": metrics}


def saved(step: int, model_step: int) -> dict:
    return {"step": step, "kind": "saved", "model_step": model_step}


def test_the_report_compares_runs_and_escapes_what_models_say(tmp_path):
    orpo_run = fake_run(tmp_path / "orpo", [evaluation(0, 0.5), evaluation(9, 0.777)])
    sft_run = fake_run(tmp_path / "sft", [evaluation(0, 0.5), evaluation(9, 0.666)])
    samples = [{"prompt": "<script>alert(1)</script>", "answers": {"SFT": "a & b", "ORPO": "<b>"}}]
    (orpo_run / "samples.json").write_text(json.dumps(samples))
    page = Page(write_report(orpo_run, {"SFT": sft_run}, note="AI-written pairs").read_text())
    for expected in (
        "<script>alert(1)</script>",
        "a & b",
        "<b>",
        "77.7 %",
        "66.6 %",
        "SFT",
        "AI-written pairs",
    ):
        assert expected in page.text
    assert page.count.get("script", 0) == 0


@pytest.mark.parametrize(
    "names",
    [("hh", "hh_harmless"), ("eval_", "eval_hh"), ("my/set", "with blanks"), ("nll", "a_nll_token_mean")],
)
def test_the_report_shows_each_evaluation_set_whatever_its_name(tmp_path, names):
    first, second = names
    lines = [
        evaluation(0, 0.51, first), evaluation(0, 0.52, second),
        evaluation(9, 0.83, first), evaluation(9, 0.74, second),
    ]  # fmt: skip
    page = Page(write_report(fake_run(tmp_path / "run", lines)).read_text())
    for expected in (*(f"{name}20 pairs" for name in names), "83.0 %", "74.0 %", "+32.0 points"):
        assert expected in page.text
    assert page.text.count("51.0 % ± 1.0") == page.text.count("52.0 % ± 1.0") == 1
    assert page.count["svg"] == 1


def test_a_page_written_again_shows_what_it_showed(tmp_path):
    orpo_run = fake_run(tmp_path / "orpo", [evaluation(0, 0.5), evaluation(9, 0.777)])
    sft_run = fake_run(tmp_path / "orpo" / "sft", [evaluation(0, 0.5), evaluation(9, 0.666)])
    test = {"base": {"accuracy": Figure(0.411, 0.02)}, "ORPO": {"accuracy": Figure(0.833, 0.02)}}
    write_report(orpo_run, {"SFT": sft_run}, test=test, note="AI-written pairs")
    moved = orpo_run.rename(tmp_path / "moved")
    page = Page(write_report(moved).read_text())
    for expected in ("66.6 %", "AI-written pairs", "41.1 %", "83.3 %", "+42.2 points", "Validation pairs"):
        assert expected in page.text
    shutil.rmtree(moved / "sft")
    assert "66.6 %" not in Page(write_report(moved).read_text()).text


def test_the_report_shows_what_eval_has_saved(tmp_path):
    orpo_run = fake_run(tmp_path / "orpo", [evaluation(0, 0.5), evaluation(9, 0.777)])
    sft_run = fake_run(tmp_path / "sft", [evaluation(0, 0.5), evaluation(9, 0.666)])
    for folder, accuracy in ((orpo_run, 0.912), (sft_run, 0.623)):
        found = {
            "data": "mine.jsonl",
            "num_pairs": 1234,
            "metrics": {"accuracy": {"mean": accuracy, "se": 0.01}},
        }
        (folder / "eval-mine.json").write_text(json.dumps(found))
    page = Page(write_report(orpo_run).read_text()).text
    assert "91.2 % ± 1.0" in page
    assert "1,234 pairs of mine.jsonl" in page
    assert "62.3 %" not in page
    assert "62.3 %" in Page(write_report(orpo_run, {"SFT": sft_run}).read_text()).text


def test_the_final_evaluation_is_that_of_the_weights_that_were_saved(tmp_path):
    lines = [evaluation(0, 0.5), evaluation(5, 0.9), evaluation(9, 0.7)]
    kept = fake_run(tmp_path / "kept", [*lines, saved(9, 5)])
    assert read_run(kept).final_evaluation("").step == 5
    assert read_run(fake_run(tmp_path / "last", lines)).final_evaluation("").step == 9, "not saved yet"
    again = fake_run(tmp_path / "again", [*lines[:2], saved(5, 5), lines[2], saved(9, 9)])
    assert read_run(again).final_evaluation("").step == 9


def test_numbers_that_the_user_measures_are_in_the_tables(tmp_path):
    line = evaluation(0, 0.5)
    line["metrics"]["helpful/score_nll_loss"] = {"mean": 0.625}
    page = Page(write_report(fake_run(tmp_path / "run", [line])).read_text())
    assert "Helpful/score_nll_loss" in page.text and "0.625" in page.text


def test_the_report_of_a_run_that_was_cut_off_is_still_made(tmp_path):
    lines = [{"step": step, "kind": "train", "metrics": {"loss": 2.0 / step}} for step in (1, 2)]
    run_dir = fake_run(tmp_path / "cut", lines)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = Page(write_report(run_dir).read_text())
    assert page.count["svg"] == 1
    assert "No evaluation has been logged yet" in page.text
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "lo\n{"step": 4, "loss": 1}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:1: not valid JSON"):
        write_report(run_dir)


def test_report_of_a_contrast_run_on_the_command_line(tmp_path):
    run_dir = fake_run(tmp_path / "orpo", [evaluation(0, 0.5), evaluation(9, 0.7)])
    status, printed = orpo_main("report", run_dir, "--contrast", f"SFT={run_dir}")
    assert (status, printed) == (0, f"{run_dir / 'report.html'}\n")
    assert orpo_main("report", run_dir, "--contrast", "SFT")[0] == 2
