"""The `orpo` command as users meet it: fast, one line for a mistake, exit statuses a script can rely on."""

import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import orpo.commands.config
import orpo.commands.eval
from orpo import cli
from orpo.console import say
from orpo.settings.needs import check_needs

BIN = [sys.executable, "-m", "orpo"]


def orpo_command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | options.pop("env", {})
    return subprocess.run(
        [*BIN, *words], capture_output=True, text=True, env=environment, timeout=110, **options
    )


def seconds(*words: str) -> float:
    """Median CPU seconds of the process and its children: other tests share the cores."""
    times = []
    for _ in range(3):
        before = os.times()
        orpo_command(*words)
        after = os.times()
        times.append(
            after.children_user - before.children_user + after.children_system - before.children_system
        )
    return statistics.median(times)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("orpo: error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.mark.parametrize(
    "words", [["chat", "m", "--system", "caf\udce9"], ["train", "--output_dir", "\udce9"]]
)
def test_arguments_that_are_not_utf_8_are_refused_before_anything_is_loaded(capsys, words):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("orpo: error: command line: ") and "not UTF-8; write it in UTF-8" in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("eval m --data f --suite pairs:f", "--data and --suite are both given; leave one out"),
        ("eval m", "name what to evaluate on"),
        ("generate m --prompts f --out o.json --concurrency 0", "--concurrency: 0 is out of range"),
    ],
)
def test_options_that_cannot_be_used_are_named(capsys, words, expected):
    assert cli.main(words.split()) == 2
    assert expected in capsys.readouterr().err


def test_help_names_every_word_in_under_three_tenths_of_a_second():
    done = orpo_command("--help")
    assert done.returncode == 0
    for word in ("train", "eval", "chat", "report", "config"):
        assert f"\n    {word} " in done.stdout
    assert seconds("--help") < 0.3


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["eval", "--help"], ["config"], ["--version"]]
)
def test_help_and_config_import_nothing_heavy(words):
    code = (
        "import sys\nfrom orpo.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "sys.stderr.write(str({'torch', 'transformers', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()"
    assert done.stdout


def test_no_word_prints_the_help():
    done = orpo_command()
    assert done.returncode == 0
    assert "usage: orpo" in done.stdout


def test_version_is_printed():
    assert orpo_command("--version").stdout.startswith("orpo ")


def test_an_unknown_word_or_option_exits_with_2():
    assert orpo_command("trian").returncode == 2
    done = orpo_command("report", "run", "--colour", "red")
    assert done.returncode == 2
    assert "--colour red" in done.stderr


def test_a_typing_error_in_a_recipe_is_answered_in_under_a_second(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: x\ndataset_name: y\n\nlearning_rat: 1e-5\n")
    line = one_line_error(orpo_command("train", str(recipe)))
    assert line == "orpo: error: recipe.yaml:4: unknown setting 'learning_rat'; did you mean 'learning_rate'?"
    assert seconds("train", str(recipe)) < 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dataset_name", "x"], "model_name_or_path is not set"),
        (["--model_name_or_path", "x"], "dataset_name is not set"),
        (["missing.yaml"], "missing.yaml: cannot read the recipe: no such file"),
        (["--model_name_or_path", "x", "--dataset_name", "y", "--beta", "-1"], "beta: -1 is out of range"),
        (
            ["--model_name_or_path", "x", "--dataset_name", "y", "--report_to", "clearml"],
            "report_to: clearml needs clearml, which is not installed; pip install clearml",
        ),
        (
            ["--model_name_or_path", "x", "--dataset_name", "y", "--deepspeed", "z.json"],
            "deepspeed needs deepspeed, which is not installed",
        ),
        (
            ["--model_name_or_path", "x", "--dataset_name", "y", "--fsdp", "full_shard"],
            "fsdp shards a model over several processes, and this is one; write --launch N to start",
        ),
    ],
)
def test_what_a_run_lacks_is_said_before_anything_heavy(words, expected):
    begin = time.perf_counter()
    done = orpo_command("train", *words)
    assert expected in one_line_error(done)
    assert done.stdout == ""
    assert time.perf_counter() - begin < 10


def test_push_to_hub_without_credentials_fails_early(tmp_path):
    words = ["train", "--model_name_or_path", "x", "--dataset_name", "y", "--push_to_hub"]
    alone = {"HF_HOME": str(tmp_path), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "HUGGING_FACE_HUB_TOKEN": ""}
    line = one_line_error(orpo_command(*words, env=alone))
    assert "push_to_hub: no Hugging Face token was found" in line
    offline = alone | {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE is set" in one_line_error(orpo_command(*words, env=offline))


def test_push_to_hub_with_a_token_is_let_through(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    settings = {"model_name_or_path": "x", "dataset_name": "y", "push_to_hub": True}
    check_needs(settings)
    monkeypatch.delenv("HF_TOKEN")
    check_needs(settings | {"hub_token": "hf_x"})


def test_config_prints_a_recipe_and_its_notices_apart(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("torch_dtype: bfloat16\nlearning_rate: 5e-6\n")
    done = orpo_command("config", str(recipe), "--beta", "0.2")
    assert done.returncode == 0
    assert done.stderr == "torch_dtype (recipe.yaml:1): now called dtype\n"
    assert done.stdout.startswith("dtype: bfloat16\nlearning_rate: 5.0e-06\nbeta: 0.2\n")
    again = tmp_path / "again.yaml"
    for words in ([], ["--all"]):
        again.write_text(orpo_command("config", str(recipe), *words).stdout)
        assert orpo_command("config", str(again)).stderr == ""


def test_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(
        f"{' '.join(BIN)} config --schema | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def run_main(monkeypatch, error: BaseException) -> int:
    def fail(args):
        raise error

    monkeypatch.setattr(orpo.commands.config, "run", fail)
    return cli.main(["config"])


def test_ctrl_c_exits_with_130(monkeypatch, capsys):
    assert run_main(monkeypatch, KeyboardInterrupt()) == 130
    assert "stopped" in capsys.readouterr().err


def test_a_message_of_several_lines_is_still_one_line(monkeypatch, capsys):
    from orpo.errors import DataError

    assert run_main(monkeypatch, DataError("first\n  second")) == 2
    assert capsys.readouterr().err == "orpo: error: first second\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError())


def test_missing_folders_are_named(tmp_path, capsys):
    for folder, reason in ((tmp_path / "x", "no such run directory"), (tmp_path, "not a run directory")):
        assert cli.main(["report", str(folder)]) == 2
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1


def test_the_ci_entry_is_executable_and_runs_the_tests():
    path = Path(__file__).parent.parent / ".ci" / "run"
    assert os.access(path, os.X_OK)
    assert "make test" in path.read_text()


def test_a_result_for_programs_stands_alone_on_stdout(monkeypatch, capsys):
    """A damaged run's notice came before the JSON, which nothing could then read."""

    def run(args):
        say("the newest checkpoint is damaged")
        print('{"a": 1}')
        return 0

    monkeypatch.setattr(orpo.commands.eval, "run", run)
    for words, where in ((["--json"], 1), ([], 0)):
        assert cli.main(["eval", "M", "--data", "D", *words]) == 0
        assert "the newest checkpoint is damaged" in capsys.readouterr()[where]


@pytest.mark.parametrize("module", ["transformers.modeling_utils", None])
def test_commands_do_not_pass_on_what_transformers_will_rename(module, capsys):
    """Warnings of a model's loading are issued again, by the name of their file alone."""
    with warnings.catch_warnings(record=True) as caught:
        cli.main(["config"])
        warnings.warn_explicit("x", FutureWarning, "/lib/transformers/modeling_utils.py", 1, module)
        warnings.warn_explicit("y", FutureWarning, "/mine/modeling_utils.py", 1, "mine")
    assert [str(warning.message) for warning in caught] == ["y"]
