"""What is kept of a run's data equals what reading gives, and is used for the same data alone."""

import json
from dataclasses import fields

import datasets
import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from orpo.data import kept, rows
from orpo.data.source import read_training
from orpo.settings.config import OrpoSettings


def pairs_of(number, first=0):
    return [
        {"prompt": f"question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "source": "ab"[n % 2]}
        for n in range(first, first + number)
    ]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("orpo.data.source.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "CACHED_FROM", 10)
    path = tmp_path / "pairs.jsonl"
    rows = [*pairs_of(40), {"prompt": "q", "chosen": "same", "rejected": "same"}, pairs_of(1)[0]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    return path


def once(train=None, evals=None, tokenizer=None, evaluates=True, **settings):
    """What is given, and whether rows were read for it."""
    lines = []
    settings = OrpoSettings(**{"on_bad_row": "skip", "eval_split": 0.2, **settings})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kept, "say", lines.append)
        tokenizer = tokenizer or tiny_tokenizer("chatml")
        data = kept.read_training_once(train, evals, settings, tokenizer, evaluates=evaluates)
    return data, lines


def was_read(*given, **settings):
    return not any("has not changed" in line for line in once(*given, **settings)[1])


def formats_of(read):
    return {key: (one.name, one.reason) for key, one in read.formats.items()}


def same(one, other):
    assert one.lines() == other.lines()
    assert json.dumps(one.to_json()) == json.dumps(other.to_json())
    assert (one.text_rows, one.template) == (other.text_rows, other.template)
    assert one.evals.keys() == other.evals.keys()
    for mine, theirs in zip(
        [one.train, *one.evals.values()], [other.train, *other.evals.values()], strict=True
    ):
        assert len(mine.pairs) == len(theirs.pairs) > 0
        assert [*mine.pairs] == [*theirs.pairs]
        for name in ("tokens", "offsets", "contexts", "spans", "span_offsets", "pair_index"):
            assert np.array_equal(getattr(mine.pairs, name), getattr(theirs.pairs, name))
        assert mine.pairs.groups == theirs.pairs.groups
        names = [
            {key: (one.name, one.reason) for key, one in read.formats.items()} for read in (mine, theirs)
        ]
        assert names[0] == names[1]


def test_a_second_start_gives_the_same_without_reading(file, tmp_path):
    held_out = tmp_path / "held out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in pairs_of(12, first=100)))
    table = datasets.Dataset.from_list(pairs_of(30))
    for given in (
        {"dataset_name": str(file)},
        {"dataset_name": str(file), "eval_dataset_name": str(held_out)},
        {"dataset_name": {str(file): 2.0, str(held_out): 0.5}},
        {"train": table},
        {"train": table, "evals": {"one": datasets.Dataset.from_list(pairs_of(9, 200)), "": table}},
    ):
        first, _ = once(**given)
        again, lines = once(**given)
        assert any("has not changed" in line for line in lines), given
        same(first, again)


def test_a_folder_is_known_by_all_of_its_files(file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, number in (("train", 20), ("test", 11)):
        rows_ = pairs_of(number, first=100 * number)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    assert was_read(dataset_name=str(folder))
    assert not was_read(dataset_name=str(folder))
    with (folder / "test.jsonl").open("a") as test:
        test.write(json.dumps(pairs_of(1, 900)[0]) + "\n")
    assert was_read(dataset_name=str(folder))


CHANGES = {
    "chat_template": "zephyr",
    "columns": {"prompt": "prompt"},
    "data_format": "standard",
    "dataset_train_split": "train[:30]",
    "eval_split": 0.3,
    "max_dropped": 0.5,
    "max_length": 60,
    "sft_rows": "use",
    "text_rows": "chat",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_other_data(file, name):
    assert was_read(dataset_name=str(file))
    assert not was_read(dataset_name=str(file))
    assert was_read(dataset_name=str(file), **{name: CHANGES[name]})


def test_evaluation_data_that_is_given_is_other_data_than_that_which_is_named(file, tmp_path):
    """Pairs that are trained on are left out of one and stay in the other."""
    held_out = tmp_path / "held out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in pairs_of(25, first=39)))
    settings = {"dataset_name": str(file), "eval_dataset_name": str(held_out)}
    named, _ = once(**settings)
    assert was_read(None, str(held_out), **settings)
    given, _ = once(None, str(held_out), **settings)
    assert len(given.eval_pairs) == len(named.eval_pairs) + 1


def test_anything_else_that_changes_is_other_data(file, monkeypatch):
    tokenizer = tiny_tokenizer("chatml")
    assert was_read(dataset_name=str(file))
    assert was_read(dataset_name=str(file), evaluates=False)
    tokenizer.add_tokens(["question"])
    assert was_read(dataset_name=str(file), tokenizer=tokenizer)
    assert not was_read(dataset_name=str(file))
    text = file.read_text()
    file.write_text(text.replace("good 3", "fine 3"))
    assert was_read(dataset_name=str(file))
    file.write_text(text)
    assert not was_read(dataset_name=str(file))
    monkeypatch.setattr(kept, "__version__", "another")
    assert was_read(dataset_name=str(file))


def test_the_day_matters_where_the_template_writes_it(file):
    dated = tiny_tokenizer("chatml")
    dated.chat_template = "{{ strftime_now('%Y') }}" + dated.chat_template
    for tokenizer, matters in ((tiny_tokenizer("chatml"), False), (dated, True)):
        for day in ("2025-01-01", "2026-01-01"):
            read = was_read(dataset_name=str(file), tokenizer=tokenizer, template_date=day)
            assert read == (matters or day == "2025-01-01"), (day, matters)


def test_reading_looks_at_no_setting_that_the_key_lacks(file):
    looked_at = set()
    names = {field.name for field in fields(OrpoSettings)} | {"seed", "max_steps"}

    class Recorded(OrpoSettings):
        def __getattribute__(self, name):
            if name in names:
                looked_at.add(name)
            return super().__getattribute__(name)

    settings = Recorded(dataset_name=str(file), on_bad_row="skip", eval_split=0.2)
    looked_at.clear()
    read_training(None, None, settings, tiny_tokenizer("chatml"), evaluates=True)
    assert len(looked_at) > 10
    assert looked_at - {"dataset_num_proc", "template_date"} <= set(kept.SETTINGS)


def test_what_is_damaged_is_said_and_made_again(file, tmp_path):
    once(dataset_name=str(file))
    (folder,) = (tmp_path / "home" / "orpo").glob("run-*")
    (folder / "contents.json").write_text("{")
    data, lines = once(dataset_name=str(file))
    assert ["damaged" in line for line in lines] == [True]
    tokens = next(folder.rglob("tokens.npy"))
    tokens.write_bytes(bytes(tokens.stat().st_size))
    again, _ = once(dataset_name=str(file))
    same(data, again)
    assert not was_read(dataset_name=str(file))


def test_rows_in_memory_and_small_sets_are_read_each_time(file, tmp_path, monkeypatch):
    assert was_read(pairs_of(20))
    assert was_read(pairs_of(20))
    monkeypatch.setattr(kept, "CACHED_FROM", 1000)
    assert was_read(dataset_name=str(file))
    assert was_read(dataset_name=str(file))
    assert not [*tmp_path.glob("home/orpo/run-*")]


def test_a_hub_data_set_is_known_by_its_fingerprint(file, monkeypatch):
    table = datasets.Dataset.from_list(pairs_of(30))
    monkeypatch.setattr(rows, "_load_hub", lambda name, config, split: table)
    assert was_read(dataset_name="someone/pairs")
    assert not was_read(dataset_name="someone/pairs")
    table = datasets.Dataset.from_list(pairs_of(31))
    assert was_read(dataset_name="someone/pairs")


def test_a_place_that_cannot_be_written_is_said(file, tmp_path):
    (tmp_path / "home").write_text("in the way")
    data, lines = once(dataset_name=str(file))
    assert len(data.train.pairs) > 20
    assert ["could not be kept" in line for line in lines] == [True]
