"""The run directory: records of any name survive writing and reading, older files are refused in one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from orpo.console import say, say_error
from orpo.errors import DataError, ModelError
from orpo.report.page import write_report
from orpo.run.card import write_model_card
from orpo.run.checkpoints import STATE_FILE, model_folder, run_recipe
from orpo.run.directory import RunDirectory, read_run
from orpo.run.log import Figure, Record, append_record, flat, flat_name, read_records, write_records
from orpo.run.repair import put_damaged_aside

names = st.text(st.characters(codec="utf-8"), min_size=0, max_size=12)
figures = st.dictionaries(
    names | st.sampled_from(["loss_se", "_se"]),
    st.builds(Figure, st.floats(-9, 9), st.none() | st.floats(0, 9)),
    max_size=3,
)
records = st.one_of(
    st.builds(Record, step=st.integers(0, 99), kind=st.just("train"), metrics=figures),
    st.builds(
        Record, step=st.integers(0, 9), kind=st.just("eval"), set=names, num_pairs=st.just(9), metrics=figures
    ),
    st.builds(Record, step=st.integers(0, 99), kind=st.just("saved"), model_step=st.integers(0, 99)),
)  # fmt: skip


@given(st.lists(records, max_size=4))
def test_records_are_read_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    for record in written:
        append_record(path, record)
    assert read_records(path) == written
    write_records(path, written[1:])
    assert read_records(path) == written[1:]


@pytest.mark.parametrize(
    "line",
    [
        {"step": 3, "loss": 2.0},
        {"step": 3, "eval_loss": 2.0, "eval_loss_se": 0.1},
        {"step": 3, "kind": "eval", "metrics": {"loss": 2.0, "loss_se": 0.1}},
        {"step": 3, "kind": "train", "metrics": {"loss": [2.0, 0.1]}},
        {"step": 3, "kind": "train", "metrics": None},
        {"step": 3, "kind": "train", "unheard": 1},
        {"step": 3, "kind": "eval", "metrics": {"loss": 2.0}},
        {"step": 3, "kind": "eval", "set": ["hh"], "num_pairs": 9},
        {"step": "3", "kind": "train"},
        ["a list"],
    ],
)
def test_a_log_of_another_version_is_refused_with_its_line(tmp_path, line):
    run = RunDirectory(tmp_path)
    run.log.write_text(json.dumps({"step": 1, "kind": "train"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: ") as refused:
        read_run(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_last_line_cut_short_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    append_record(run.log, Record(step=1, kind="train"))
    with run.log.open("a") as file:
        file.write('{"step": 2, "ki')
    assert [record.step for record in read_run(tmp_path).records] == [1]


def test_flat_names_are_those_that_dashboards_and_metric_for_best_model_expect():
    assert (flat_name("loss"), flat_name("loss", "hh")) == ("eval_loss", "eval_hh_loss")
    values = {"loss": Figure(2.0, 0.1), "nll": Figure(1.0)}
    assert flat(values, "eval_hh") == {"eval_hh_loss": 2.0, "eval_hh_loss_se": 0.1, "eval_hh_nll": 1.0}


def test_series_keep_training_and_every_set_apart(tmp_path):
    run = RunDirectory(tmp_path)
    for record in (
        Record(step=0, kind="eval", set="hh", num_pairs=2, metrics={"nll": Figure(3.0, 0.1)}),
        Record(step=0, kind="eval", set="hh_harmless", num_pairs=2, metrics={"nll": Figure(4.0, 0.2)}),
        Record(step=5, kind="train", metrics={"nll": Figure(2.0)}),
    ):
        append_record(run.log, record)
    found = read_run(tmp_path)
    assert found.evaluation_sets() == ["hh", "hh_harmless"]
    assert found.series("nll", "hh") == [(0, 3.0, 0.1)]
    assert found.series("nll", "hh_harmless") == [(0, 4.0, 0.2)]
    assert found.series("nll") == [(5, 2.0, None)]


def fake_checkpoint(folder, step, *, truncated=False):
    """A checkpoint with a manifest, whose weights are cut short afterwards where asked."""
    from safetensors.numpy import save_file

    from orpo.run.checkpoints import write_state

    path = RunDirectory(folder).checkpoint(step)
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file({}, path / "model.safetensors")
    write_state(path, {})
    if truncated:
        (path / "model.safetensors").write_bytes(b"\x08")
    return path


def test_a_damaged_newest_checkpoint_is_used_by_nobody(tmp_path, capsys):
    whole = fake_checkpoint(tmp_path, 1)
    fake_checkpoint(tmp_path, 2, truncated=True)
    assert model_folder(str(tmp_path)) == str(whole)
    assert "checkpoint-2 is skipped: model.safetensors has 1 bytes" in capsys.readouterr().out
    (whole / "config.json").unlink()
    with pytest.raises(ModelError, match="no whole checkpoint"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("weights", [None, b"", b"cut"])
def test_a_model_that_was_not_saved_whole_is_replaced_by_the_newest_whole_checkpoint(
    tmp_path, capsys, weights
):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    for folder in (tmp_path, checkpoint):
        (folder / "config.json").write_text("{}")
        save_file({"weight": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors")
    assert model_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_folder(str(tmp_path)) == str(checkpoint)
    assert capsys.readouterr().out.endswith(f"; using {checkpoint}\n")
    shutil.rmtree(checkpoint)
    assert model_folder(str(tmp_path)) == str(tmp_path), "what loads it says what is wrong"


def test_a_checkpoint_that_a_run_lacks_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append_record(RunDirectory(tmp_path / "run").log, Record(step=1, kind="train"))
    with pytest.raises(ModelError, match="run/checkpoint-9: there is no such folder"):
        model_folder("run/checkpoint-9")
    assert model_folder("organisation/model") == "organisation/model"


@pytest.mark.parametrize(
    ("name", "content"),
    [("environment.json", b"[]"), ("samples.json", b"{}"), ("eval-hh.json", b"3"), ("report.json", b"[]"),
     ("eval-hh.json", b'{"num_pairs": 3, "accuracy": 0.5, "accuracy_se": 0.1}'),
     ("metrics.jsonl", b"\xff\xfe"), ("recipe.yaml", b"\xff\xfe"), ("data_report.json", b"\xff\xfe")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, name, content):
    RunDirectory(tmp_path).log.write_text("")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        write_report(tmp_path)
    assert "\n" not in str(refused.value)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("samples.json", [{"a": 1}]),
        ("samples.json", [3]),
        ("samples.json", [{"prompt": "a", "answers": {"step 0": 3}}]),
        ("samples.json", [{"prompt": ["a"], "answers": {}}]),
        ("samples.json", [{"prompt": "a", "answers": {"step 0": "b"}, "tokens": {"step 0": "x"}}]),
        ("samples.json", [{"prompt": "a", "answers": {}, "tokens": None}]),
        ("data_report.json", {"train": 3}),
        ("data_report.json", {"train": {"findings": 3}}),
    ],
)
def test_a_file_of_json_that_means_nothing_is_named_with_the_way_out(tmp_path, name, content, capsys):
    write_records(tmp_path / "metrics.jsonl", [Record(step=1, kind="train", metrics={"loss": Figure(1.0)})])
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{name}: .*; delete the file to go on without"):
        write_report(tmp_path)
    put_damaged_aside(RunDirectory(tmp_path))
    assert capsys.readouterr().out.endswith(f"; kept as {name}.damaged, and made again\n")
    assert write_report(tmp_path).is_file()


def test_a_set_of_any_name_keeps_the_table_of_the_card_whole(tmp_path):
    write_model_card(tmp_path, {}, [("accuracy, a|b\n<c>", "1.0")])
    assert "\n| accuracy, a\\|b &lt;c> | 1.0 |\n" in (tmp_path / "README.md").read_text()


def test_evaluations_are_found_by_name(tmp_path):
    run = RunDirectory(tmp_path)
    run.evaluation("a-b.c").write_text('{"x": 1}')
    assert run.read_evaluations() == {"a-b.c": {"x": 1}}
    run.forget_results()
    assert run.read_evaluations() == {}


def test_lines_are_printed_by_the_first_rank_alone_and_errors_once_a_machine(monkeypatch, capsys):
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        say("a line")
        say_error(DataError("no\n such file"))
        say_error(DataError("mine alone"), everywhere=True)
    printed = capsys.readouterr()
    assert printed.out == "a line\n"
    lines = printed.err.splitlines()
    assert lines.count("orpo: error: no such file") == 2
    assert [line for line in lines if "mine" in line] == [
        f"orpo: error (rank {rank}): mine alone" for rank in range(4)
    ]


def test_reading_a_run_needs_no_torch(tmp_path):
    append_record(RunDirectory(tmp_path).log, Record(step=1, kind="train"))
    code = (
        "import sys; from pathlib import Path; from orpo.run.directory import read_run; "
        f"read_run(Path({str(tmp_path)!r})); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_copied_checkpoint_with_a_damaged_state_is_one_line(tmp_path):
    (tmp_path / STATE_FILE).write_text('{"recipe": {"te')
    with pytest.raises(DataError, match=f"{STATE_FILE}:1: not valid JSON"):
        run_recipe(str(tmp_path))
