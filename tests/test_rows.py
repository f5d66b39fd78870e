"""Files and objects are read row by row, each with its file and line."""

import gzip
import json
import re

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
    assert isinstance(other, DataError) and "is a list; expected an object" in str(other)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", b'{"a": "caf\xe9"}\n{"a": "good"}\n'),
        ("p.json", b'[{"a": "caf\xe9"},\n{"a": "good"}]'),
        ("p.csv", b"a,b\ncaf\xe9,1\ngood,2\n"),
    ],
)
def test_bytes_that_are_not_utf8_make_their_row_malformed_and_no_other(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    (bad, _), (good, _) = rows(path)
    assert "bytes that are not UTF-8 (0xe9)" in str(bad)
    assert good["a"] == "good"


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "is UTF-16, not UTF-8; save the file as UTF-8"),
        ("utf-32", "is UTF-32, not UTF-8; save the file as UTF-8"),
        ("utf-16-le", "holds zero bytes, as UTF-16 and UTF-32 do; save the file as UTF-8"),
        ("utf-32-be", "holds zero bytes, as UTF-16 and UTF-32 do; save the file as UTF-8"),
    ],
)
def test_a_file_of_another_encoding_is_said_as_such(tmp_path, name, encoding, said):
    content = '{"a": "b"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"^{re.escape(name)}: {said}$"):
        rows(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b'{"a": "b"}\n', mtime=0), r"is compressed by gzip; name it p\.jsonl\.gz"),
        (b"PK\x03\x04rest", "is a zip archive; unpack it"),
    ],
)
def test_a_packed_file_is_said_as_such(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"^p\.jsonl: {said}$"):
        rows(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"a": "x", "a": "y"}\n{"a": "good"}\n'),
        ("p.json", '{"a": "x", "a": "y"}\n{"a": "good"}\n'),
        ("p.json", '[{"a": "x", "a": "y"},\n{"a": "good"}]'),
        ("p.jsonl", '{"b": [{"a": "x", "a": "x"}]}\n{"a": "good"}\n'),
    ],
)
def test_a_key_that_comes_twice_makes_its_row_malformed_and_no_other(tmp_path, name, text):
    (bad, first), (good, second) = rows(write(tmp_path / name, text))
    assert "has the key 'a' twice in one object; keep one of them" in str(bad)
    assert (good, first, second) == ({"a": "good"}, f"{name}:1", f"{name}:2")


def test_a_key_that_comes_twice_around_the_rows_stops_the_run(tmp_path):
    with pytest.raises(DataError, match=r"^p\.json: has the key 'data' twice"):
        rows(write(tmp_path / "p.json", '{"data": [\n{"a": "x"}],\n"data": []}'))


def test_csv_cells_are_text_or_json_lists_of_texts(tmp_path):
    text = 'prompt,chosen,rejected\n"two\nlines",b,\nx,y,"[""b"", ""c""]"\nx,y,"[\'b\', \'c\']"\nx,y,[]\n'
    assert rows(write(tmp_path / "p.csv", text)) == [
        ({"prompt": "two\nlines", "chosen": "b", "rejected": ""}, "p.csv:2"),
        ({"prompt": "x", "chosen": "y", "rejected": ["b", "c"]}, "p.csv:4"),
        ({"prompt": "x", "chosen": "y", "rejected": ["b", "c"]}, "p.csv:5"),
        ({"prompt": "x", "chosen": "y", "rejected": []}, "p.csv:6"),
    ]


def test_a_csv_cell_is_a_list_only_where_those_of_its_column_are(tmp_path):
    """An answer in JSON became several rejected answers."""
    head = "prompt,chosen,rejected\n"

    def read(*records):
        lines = "".join(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in one) + "\n" for one in records
        )
        return [tuple(row.values()) for row, _ in rows(write(tmp_path / "p.csv", head + lines))]

    warm = '["red", "green"]'
    mixed = [("List two", "Red, green", warm), ("Name one", "red", "blue")]
    assert read(*mixed) == mixed
    answers = [("List two", '["a", "b"]', warm), ("List again", "['a']", "['b']")]
    assert read(*answers) == answers  # the chosen answer is one, and so is the rejected one beside it
    several = [("Name one", "red", warm)]
    assert read(*several) == [("Name one", "red", ["red", "green"])]


def test_behind_many_lists_in_a_column_of_csv_a_text_is_one_and_a_broken_list_malformed(tmp_path):
    several = "a,\"['b', 'c']\"\n"
    text = "chosen,rejected\n" + several * 256 + "a,b\n" + "a,\"['b', 'c\"\n" + several
    *_, one, broken, last = rows(write(tmp_path / "p.csv", text))
    assert one == ({"chosen": "a", "rejected": "b"}, "p.csv:258")
    assert last == ({"chosen": "a", "rejected": ["b", "c"]}, "p.csv:260")
    assert broken[1] == "p.csv:259" and "a list in 'rejected' that is neither JSON nor" in str(broken[0])


def test_texts_side_by_side_in_a_cell_are_several_and_nan_is_none(tmp_path):
    """As numpy prints an array of texts, and pandas a value that is missing."""
    text = """a,b
"['no' 'ne\\'er'\n ""it's""]",nan
"['x\\' \\'y', 'z']",banana
"""
    assert [row for row, _ in rows(write(tmp_path / "p.csv", text))] == [
        {"a": ["no", "ne'er", "it's"], "b": None},
        {"a": ["x' 'y", "z"], "b": "banana"},
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


def number_of(path, **options):
    return [row["a"] for row, _ in rows(path, **options)]


def test_a_folder_gives_the_files_of_the_split_and_of_no_other(tmp_path):
    write(tmp_path / "train-0.jsonl", '{"a": 1}')
    write(tmp_path / "train-1.jsonl", '{"a": 2}')
    write(tmp_path / "test.jsonl", '{"a": 3}')
    write(tmp_path / "constraints.jsonl", '{"a": 4}')
    write(tmp_path / "README.md", "no data")
    assert number_of(tmp_path) == number_of(tmp_path, split=None) == [1, 2]
    assert number_of(tmp_path, split="test") == [3]
    assert number_of(tmp_path, split="train+test") == [1, 2, 3]
    with pytest.raises(
        DataError, match=r"there is no split 'validation'; the folder has constraints, test, train$"
    ):
        rows(tmp_path, split="validation")


def test_a_folder_whose_files_name_no_split_is_read_whole(tmp_path):
    write(tmp_path / "a.jsonl", '{"a": 1}')
    write(tmp_path / "b.jsonl", '{"a": 2}')
    assert number_of(tmp_path) == [1, 2]
    with pytest.raises(DataError, match=r"no split 'test_prefs'; the folder has train$"):
        rows(tmp_path, split="test_prefs")


def test_a_single_file_has_no_splits(tmp_path):
    path = write(tmp_path / "pairs.jsonl", '{"a": 1}')
    assert number_of(path) == number_of(path, split=None) == [1]
    with pytest.raises(
        DataError, match=r"pairs\.jsonl: a single file has no splits, so there is no 'test_prefs'"
    ):
        rows(path, split="test_prefs")
    assert number_of(write(tmp_path / "my-test.jsonl", '{"a": 1}'), split="test") == [1]


def test_files_that_could_all_be_the_split_are_not_mixed(tmp_path):
    for number, name in enumerate(("train_gen", "train_prefs", "test_prefs")):
        write(tmp_path / f"{name}.jsonl", json.dumps({"a": number}))
    with pytest.raises(DataError, match="'train' could be any of train_gen, train_prefs; name one"):
        rows(tmp_path)
    assert number_of(tmp_path, split="train_prefs") == [1]
    assert number_of(tmp_path, split="test") == [2]


def snapshot(tmp_path):
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("train_gen", "train_prefs", "test_prefs")):
        table = pa.table({"a": [number]})
        pq.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001-6f9c2d.parquet")
    return tmp_path


def test_the_splits_of_a_hub_snapshot_are_in_its_data_folder(tmp_path):
    snapshot(tmp_path)
    for folder in (tmp_path, tmp_path / "data"):
        assert number_of(folder, split="train_prefs") == [1]
        assert number_of(folder, split="test_prefs") == [2]
        with pytest.raises(
            DataError, match="no split 'train'; the folder has test_prefs, train_gen, train_prefs"
        ):
            rows(folder)
    (file,) = (tmp_path / "data").glob("train_prefs*")
    assert number_of(file, split="train_prefs") == number_of(file) == [1]
    with pytest.raises(DataError, match="no splits"):
        rows(file, split="test_prefs")


def test_the_card_of_a_hub_snapshot_says_which_files_make_a_split(tmp_path):
    write(
        snapshot(tmp_path) / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train_prefs-*\n"
        "- config_name: gen\n  data_files: data/train_gen*\n---\n# Pairs\n",
    )
    assert number_of(tmp_path) == [1] and number_of(tmp_path, config="gen") == [0]
    with pytest.raises(DataError, match=r"no split 'test_prefs'; the folder has train$"):
        rows(tmp_path, split="test_prefs")


def test_a_folder_of_data_files_may_hold_a_list_of_them(tmp_path):
    """As LLaMA-Factory's `data/dataset_info.json`, which `save_to_disk` writes as well."""
    write(tmp_path / "dataset_info.json", '{"mine": {"file_name": "pairs.jsonl"}}')
    write(tmp_path / "pairs.jsonl", '{"a": 1}')
    assert number_of(tmp_path) == [1]


def test_a_folder_of_configurations_needs_one_named(tmp_path):
    for number, name in enumerate(("en", "de")):
        (tmp_path / name / "train").mkdir(parents=True)
        write(tmp_path / name / "train" / "0000.jsonl", json.dumps({"a": number}))
    with pytest.raises(DataError, match="several configurations; set dataset_config to one of de, en"):
        rows(tmp_path)
    assert number_of(tmp_path, config="de") == [1]


def test_splits_may_be_sub_folders(tmp_path):
    for number, name in enumerate(("train", "test")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0000.jsonl", json.dumps({"a": number}))
    assert (number_of(tmp_path), number_of(tmp_path, split="test")) == ([0], [1])


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("train[:5]", range(5)), ("train[15:]", range(15, 20)), ("train[2:4]", range(2, 4)),
        ("train[:10%]", range(2)), ("train[:33%]", range(7)),
        ("train[-3:]", range(17, 20)), ("train[90%:]", range(18, 20)),
        ("train[:1]+train[19:]", [0, 19]),
    ],
)  # fmt: skip
def test_a_slice_of_a_split_is_taken_as_the_datasets_library_takes_it(tmp_path, split, kept):
    datasets = pytest.importorskip("datasets")
    data = [{"a": number} for number in range(20)]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, data)))
    assert number_of(path, split=split) == list(kept)
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(data)})
    assert number_of(both, split=split) == list(kept)
    with pytest.raises(DataError, match=r"the split 'train\[:x\]' cannot be read"):
        rows(path, split="train[:x]")


def test_damaged_files_are_said_in_one_line(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "p.jsonl.gz").write_bytes(b"plain text")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    (tmp_path / "p.arrow").write_bytes(b"")
    for name in ("p.parquet", "p.jsonl.gz", "c.jsonl.gz", "p.arrow"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read .*; is the file damaged\?$") as error:
            rows(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"p\.json:1: something follows the JSON array"):
        rows(write(tmp_path / "p.json", '[{"a": 1}][{"a": 2}]'))


def test_a_csv_row_with_too_many_or_too_few_cells_is_malformed(tmp_path):
    text = "prompt,chosen,rejected\nHello, world,a b,c d\nx,y\nx,y,z\n"
    more, fewer, good = rows(write(tmp_path / "p.csv", text))
    assert "more cells than the header" in str(more[0]) and more[1] == "p.csv:2"
    assert "fewer cells than the header" in str(fewer[0])
    assert good == ({"prompt": "x", "chosen": "y", "rejected": "z"}, "p.csv:4")


def csv_with(cell, also=""):
    """Twenty rows of three cells; `cell` stands for the fifth row's second one, `also` for the 15th's."""
    lines = [f"question {n},good answer {n},bad answer {n}" for n in range(20)]
    lines[5], lines[15] = (lines[n].replace(f"good answer {n}", text or f"good answer {n}")
                           for n, text in ((5, cell), (15, also)))  # fmt: skip
    return "\n".join(["prompt,chosen,rejected", *lines]) + "\n"


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        (csv_with('"good answer 5', 'good answer 15"'), range(7, 18)),  # correct CSV: eleven rows in one cell
        (csv_with('"good answer 5', 'good "answer 15'), range(7, 18)),
        (csv_with('"good answer 5'), range(7, 22)),
        (csv_with('"good" answer 5'), range(7, 8)),
    ],
)
def test_rows_between_stray_quotes_are_malformed_each_of_them(tmp_path, text, bad):
    found = rows(write(tmp_path / "p.csv", text))
    assert [source for row, source in found if isinstance(row, DataError)] == [f"p.csv:{n}" for n in bad]
    good = [row["prompt"] for row, _ in found if not isinstance(row, DataError)]
    assert good == [f"question {n}" for n in range(20) if n + 2 not in bad]


def test_csv_text_of_several_lines_is_a_row(tmp_path):
    text = csv_with('"first, second\nthird\nfourth, fifth, sixth, ""seventh""\n"', '"one, two\nthree, four"')
    found = rows(write(tmp_path / "p.csv", text))
    assert len(found) == 20 and found[5][0]["chosen"].endswith('"seventh"\n')
    assert found[15][0]["chosen"] == "one, two\nthree, four"


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"p\.csv:1: the header names 'chosen' twice"):
        rows(write(tmp_path / "p.csv", "prompt,chosen,chosen\na,b,c\n"))


def test_objects_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert rows(data) == [(ROWS[0], "row:0"), (ROWS[1], "row:1")]
    assert rows(datasets.DatasetDict({"train": data}), split="train") == rows(data)
    assert [row for row, _ in rows(data.to_iterable_dataset())] == ROWS
    data.save_to_disk(str(tmp_path / "saved"))
    assert [row for row, _ in rows(tmp_path / "saved")] == ROWS
    with pytest.raises(DataError, match="no split 'test_prefs'; it has train"):
        rows(tmp_path / "saved", split="test_prefs")
    write(tmp_path / "saved" / "state.json", "{")
    with pytest.raises(DataError, match="saved: cannot be read"):
        rows(tmp_path / "saved")
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
