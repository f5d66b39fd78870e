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
