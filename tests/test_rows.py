"""Files and objects are read row by row, each with its file and line."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo.data.rows import read_rows
from orpo.errors import DataError

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "é", "chosen": "f\ng", "rejected": None}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def rows(data, **options):
    return [(row.data, row.source) for row in read_rows(data, **options)]


def test_jsonl_rows_carry_their_line_and_blank_lines_are_passed_over(tmp_path):
    text = "\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]) + "\n"
    assert rows(write(tmp_path / "p.jsonl", text)) == [(ROWS[0], "p.jsonl:1"), (ROWS[1], "p.jsonl:3")]


def test_gzip_and_a_path_as_text(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    assert [row for row, _ in rows(str(path))] == ROWS


def test_json_array_rows_carry_the_line_they_begin_on(tmp_path):
    path = write(tmp_path / "p.json", json.dumps(ROWS, indent=2))
    assert rows(path) == [(ROWS[0], "p.json:2"), (ROWS[1], "p.json:7")]


def test_json_with_one_array_inside_and_json_that_is_jsonl(tmp_path):
    assert [row for row, _ in rows(write(tmp_path / "a.json", json.dumps({"v": 1, "data": ROWS})))] == ROWS
    assert [row for row, _ in rows(write(tmp_path / "b.json", "\n".join(map(json.dumps, ROWS))))] == ROWS


def test_broken_json_says_where(tmp_path):
    with pytest.raises(DataError, match=r"p\.json:3: is not JSON"):
        rows(write(tmp_path / "p.json", '[\n{"a": 1},\n{"a": ]'))
    with pytest.raises(DataError, match=r"p\.json:2: the JSON array does not end"):
        rows(write(tmp_path / "p.json", '[{"a": 1},\n'))
    with pytest.raises(DataError, match="expected a JSON array"):
        rows(write(tmp_path / "p.json", '{"a": 1}'))


def test_a_line_that_is_no_object_is_handed_on_with_its_problem(tmp_path):
    (_, first), (row, source), (other, _) = rows(write(tmp_path / "p.jsonl", '{"a": 1}\n{"a": \n[1]\n'))
    assert (first, source) == ("p.jsonl:1", "p.jsonl:2")
    assert isinstance(row, DataError) and "is not JSON" in str(row)
    assert isinstance(other, DataError) and "is a list" in str(other)


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n{"a": "good"}\n')
    assert [row["a"] for row, _ in rows(path)] == ["\ufffd", "good"]


def test_csv_cells_are_text_or_json_lists(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    text = 'prompt,chosen,rejected\n"two\nlines",b,\nx,"' + json.dumps(messages).replace('"', '""') + '",c\n'
    assert rows(write(tmp_path / "p.csv", text)) == [
        ({"prompt": "two\nlines", "chosen": "b", "rejected": ""}, "p.csv:2"),
        ({"prompt": "x", "chosen": messages, "rejected": "c"}, "p.csv:4"),
    ]


def test_parquet_and_arrow(tmp_path):
    table = pa.Table.from_pylist([{"chosen": [{"role": "user", "content": "x"}], "rejected": "c"}] * 3)
    pq.write_table(table, tmp_path / "p.parquet")
    with pa.ipc.new_file(tmp_path / "p.arrow", table.schema) as sink:
        sink.write_table(table)
    with pa.ipc.new_stream(tmp_path / "s.arrow", table.schema) as sink:
        sink.write_table(table)
    for name in ("p.parquet", "p.arrow", "s.arrow"):
        assert rows(tmp_path / name) == [(row, f"{name}:{i}") for i, row in enumerate(table.to_pylist())]


def test_a_folder_gives_the_files_of_the_split_or_all(tmp_path):
    write(tmp_path / "train-0.jsonl", '{"a": 1}')
    write(tmp_path / "train-1.jsonl", '{"a": 2}')
    write(tmp_path / "test.jsonl", '{"a": 3}')
    write(tmp_path / "README.md", "no data")
    assert [row["a"] for row, _ in rows(tmp_path, split="train")] == [1, 2]
    assert [row["a"] for row, _ in rows(tmp_path, split="validation")] == [3, 1, 2]


def test_objects_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert rows(data) == [(ROWS[0], "row:0"), (ROWS[1], "row:1")]
    assert rows(datasets.DatasetDict({"train": data}), split="train") == rows(data)
    assert [row for row, _ in rows(data.to_iterable_dataset())] == ROWS
    data.save_to_disk(str(tmp_path / "saved"))
    assert [row for row, _ in rows(tmp_path / "saved")] == ROWS
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        rows(datasets.DatasetDict({"train": data}), split="test")


def test_what_cannot_be_read_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="unknown file type"):
        rows(write(tmp_path / "p.xlsx", ""))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        rows(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot read rows from int"):
        rows(3)


def test_hub_names_go_to_the_datasets_library(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "user/none":
            raise FileNotFoundError("no such data set\nlong explanation")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows("user/pairs", split="train_prefs", config="v2")[0] == (ROWS[0], "user/pairs:0")
    assert asked == [("user/pairs", "v2", "train_prefs")]
    with pytest.raises(
        DataError, match=r"^user/none: neither a local file nor a hub data set .*no such data set\)"
    ) as e:
        rows("user/none")
    assert "\n" not in str(e.value)
