"""Reading for a run: held out means held out, and every message says which set it is about."""

import json

import pytest
from tiny_tokenizer import tiny_tokenizer

from orpo.data.source import read_training
from orpo.errors import DataError
from orpo.settings.config import OrpoSettings

ROWS = [{"prompt": f"Prompt {n}:\n", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(train=None, evals=None, **settings):
    return read_training(train, evals, OrpoSettings(**settings), tiny_tokenizer("chatml"), evaluates=True)


def test_a_named_split_that_a_file_has_not_stops_the_run(tmp_path):
    """The worst fault found: the whole file trained and was evaluated too."""
    file = write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(DataError, match=r"^eval: .*test_prefs"):
        read(dataset_name=file, dataset_test_split="test_prefs")


@pytest.mark.parametrize("number", [20, 3])
def test_evaluation_pairs_that_train_stop_the_run(tmp_path, number):
    train = write(tmp_path / "train.jsonl", ROWS)
    held_out = write(tmp_path / "held_out.jsonl", ROWS[-number:])
    with pytest.raises(DataError, match=r"^eval: .*the training data has the same pair"):
        read(dataset_name=train, eval_dataset_name=held_out)


def test_a_few_of_them_are_left_out_and_counted(tmp_path):
    train = write(tmp_path / "train.jsonl", ROWS[:11])
    held_out = write(tmp_path / "held_out.jsonl", ROWS[9:])
    data = read(dataset_name=train, eval_dataset_name=held_out, max_dropped=0.2)
    assert (len(data.train_pairs), len(data.eval_pairs)) == (11, 9)
    assert any("eval: dropped 2: the training data has the same pair" in line for line in data.lines())


def test_objects_from_python_are_evaluated_as_they_are_with_a_line():
    data = read(ROWS, ROWS[:4])
    assert len(data.eval_pairs) == 4
    assert any(line.startswith("eval: 4 of 4 pairs are also trained on") for line in data.lines())


def test_the_limit_of_dropped_rows_is_checked_for_each_set_with_its_name_and_size():
    bad = [{**ROWS[0], "chosen": " "}, {**ROWS[1], "chosen": ""}]
    with pytest.raises(DataError, match=r"^eval hh: 2 of 16 rows \(12%\) cannot be used"):
        read(ROWS, {"ok": ROWS[:3], "hh": [*ROWS[:14], *bad]})


def test_held_out_prompts_are_announced_and_shared_by_no_training_pair(tmp_path):
    file = write(tmp_path / "pairs.jsonl", ROWS)
    data = read(dataset_name=file)
    assert any("no evaluation data: 1 of 20 pairs are held out" in line for line in data.lines())
    prompts = {tuple(pair.prompt) for pair in (data.train_pairs[i] for i in range(len(data.train_pairs)))}
    assert tuple(data.eval_pairs[0].prompt) not in prompts


def test_shared_prompts_are_found_and_counted():
    data = read(
        ROWS, [{**ROWS[0], "chosen": "another"}, {"prompt": "New:\n", "chosen": "a", "rejected": "b"}]
    )
    assert data.to_json()["train"]["findings"]["shared_prompts"] == 1
    assert "train: 1 evaluation pair has a prompt that is trained on (row:0)" in data.lines()


# ---------------------------------------------------------------------------- a folder with splits of its own


def folder(tmp_path, **files):
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    for name, rows in files.items():
        write(data / f"{name}.jsonl", rows)
    return str(data)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["test"], "test"), (["validation", "test"], "validation"), (["dev"], "dev"), (["my-eval"], "my-eval")],
)
def test_a_folder_is_evaluated_on_its_own_split_and_says_so(tmp_path, names, expected):
    files = {name: ROWS[12 + 4 * place : 16 + 4 * place] for place, name in enumerate(names)}
    data = read(dataset_name=folder(tmp_path, train=ROWS[:12], **files))
    assert (len(data.train_pairs), len(data.eval_pairs)) == (12, 4)
    assert data.evals[""].preferences[0].source == f"{expected}.jsonl:1"
    (line,) = (line for line in data.lines() if line.startswith("evaluating on the split"))
    assert f"evaluating on the split {expected} of {tmp_path / 'data'}" in line
    assert ("test is left for orpo eval" in line) == (len(names) > 1)


def test_no_own_split_is_used_where_another_was_asked_for_or_none(tmp_path):
    name = folder(tmp_path, train=ROWS[:12], test=ROWS[12:16], validation=ROWS[16:])
    assert len(read(dataset_name=name, dataset_test_split="test").evals[""].preferences) == 4
    assert not read(dataset_name=name, eval_split=0.0).evals
    trained = read(dataset_name=name, dataset_train_split="train+validation")
    assert (len(trained.train_pairs), len(trained.eval_pairs)) == (16, 4)
    whole = read(dataset_name=name, dataset_train_split="train+validation+test", eval_split=0.2)
    assert any(line.startswith("no evaluation data: 4 of 20 pairs") for line in whole.lines())


def test_splits_go_with_what_is_trained_on(tmp_path):
    rows = {
        "train_sft": ROWS[:5],
        "train_prefs": ROWS[5:10],
        "test_sft": ROWS[10:12],
        "test_prefs": ROWS[12:15],
    }
    data = read(dataset_name=folder(tmp_path, **rows), dataset_train_split="train_prefs")
    assert (len(data.train_pairs), len(data.eval_pairs)) == (5, 3)


def test_one_of_several_folders_with_a_split_is_named_and_not_used(tmp_path):
    other = write(tmp_path / "other.jsonl", ROWS[12:])
    name = folder(tmp_path, train=ROWS[:10], test=ROWS[10:12])
    data = read(dataset_name=[name, other])
    assert f"only {name} of the training data has a split to evaluate on, which is not used" in data.lines()
    assert any(line.startswith("no evaluation data: 1 of 18 pairs") for line in data.lines())
    weighted = read(dataset_name={name: 2})
    assert (len(weighted.train_pairs), len(weighted.eval_pairs)) == (20, 2)


def test_the_splits_of_an_object_are_used_too():
    data = read({"train": ROWS[:12], "test": ROWS[12:]})
    assert (len(data.train_pairs), len(data.eval_pairs)) == (12, 8)
