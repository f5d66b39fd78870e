"""Raw rows from wherever they lie: local files, the hub, objects in memory.

Every row comes with its origin (`pairs.jsonl:118`), so that whatever is wrong with it later can be said with
file and line. Local files are read with the standard library and pyarrow; `datasets` is imported for hub
names only.
"""

from __future__ import annotations

import ast
import csv
import gzip
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from orpo.data.splits import DEFAULT, check_file, files_of_split, parse_split, splits_of_folder
from orpo.errors import DataError, first_line, raised_as
from orpo.run.directory import read_json
from orpo.run.disk import describe, files_in

Row = dict[str, Any]
ORIGIN = "orpo_origin"
"""Column of a prepared data set: the file and line that a row was read from first."""
SAMPLE = 256
"""How many rows, the first of a data set, tell what its columns hold."""

_SAVED = ("state.json", "dataset_dict.json")
"""Files that tell a folder written by `save_to_disk`."""


class RawRow(NamedTuple):
    """A row before its format is known."""

    data: Row | DataError
    """The columns; or, for a row that cannot even be parsed, what is wrong with it."""
    source: str


def read_rows(data: object, *, split: str | None = DEFAULT, config: str | None = None) -> Iterator[RawRow]:
    """Yield the rows of a file, a folder of files, a hub name or an object, in order.

    Args:
        data: Local path, hub name, `Dataset`, `IterableDataset`, `DatasetDict` or an iterable of mappings.
        split: Split in the notation of `datasets` (`train`, `train[:100]`, `train+test`); None is `train`. A
            single file is the split `train` as a whole. An object without splits is read whole.
        config: Configuration of a hub data set, or of a folder that holds one.

    Raises:
        DataError: Nothing of that name can be read, or it has no such split.
    """
    if isinstance(data, str | Path):
        with raised_as(DataError, f"{data}: cannot be read"):
            yield from _named_rows(str(data), split, config)
    elif isinstance(data, Mapping):  # a DatasetDict
        for part in parse_split(split):
            if part.name not in data:
                known = ", ".join(map(str, data))
                raise DataError(f"the data set has no split {part.name!r}; it has {known}")
            yield from part.take(_object_rows(data[part.name], "row"))
    elif type(data).__name__ == "DataFrame":
        raise DataError(
            "cannot read rows from a DataFrame; pass Dataset.from_pandas(...) of the package datasets, or a"
            " list of rows"
        )
    elif isinstance(data, Iterable):
        yield from _object_rows(data, "row")
    else:
        raise DataError(f"cannot read rows from {type(data).__name__}; give a path, a hub name or a data set")


def splits_of(data: object, config: str | None = None) -> tuple[str, ...]:
    """Names of the splits of a local folder or a `DatasetDict`; none of anything else."""
    if isinstance(data, Mapping):
        is_weighted = all(isinstance(value, int | float) for value in data.values())
        return () if is_weighted else tuple(map(str, data))
    if not isinstance(data, str | Path):
        return ()
    with raised_as(DataError, f"{data}: cannot be read"):
        folder = Path(data).expanduser()
        if not folder.is_dir() or (folder / "state.json").exists():
            return ()
        if (listed := folder / "dataset_dict.json").is_file():  # written by `save_to_disk`
            return tuple(read_json(listed, {}).get("splits", ()))
        return tuple(splits_of_folder(folder, config, _is_data))


def data_files(data: str | Path, split: str | None, config: str | None = None) -> list[Path]:
    """The local files that `read_rows` reads rows from; none for a hub name."""
    path = Path(data).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    if any((path / name).exists() for name in _SAVED):
        return sorted(path.rglob("*.arrow"))
    parts = parse_split(split)
    return [file for part in parts for file in files_of_split(path, part.name, config, _is_data)]


def source_identity(data: object, splits: Sequence[str | None], config: str | None = None) -> Any:
    """Equal for data of which the same rows are read; None where that is not known before reading.

    Files and folders are known by the checksums of their bytes, data sets by their fingerprints.

    Args:
        data: As for `read_rows`, or names with weights, or several by name.
        splits: Those that may be read from a hub data set; None is `train`.
        config: Configuration of a hub data set.

    Raises:
        DataError: A hub data set cannot be loaded.
        OSError: A file cannot be read.
    """
    if isinstance(data, Mapping):
        found = {str(key): _value_identity(key, value, splits, config) for key, value in data.items()}
        return None if None in found.values() else found
    if isinstance(data, list | tuple) and data and all(isinstance(one, str | Path) for one in data):
        several = [source_identity(one, splits, config) for one in data]
        return None if None in several else several
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.exists():
            files = [path] if path.is_file() else files_in(path)
            return [[str(file), describe(file)] for file in files]
        if _reader(path) is not None:
            return None
        loaded = [_load_hub(str(data), config, split or DEFAULT) for split in dict.fromkeys(splits) if split]
        several = [source_identity(one, ()) for one in loaded]
        return None if None in several else [str(data), several]
    return [data._fingerprint, data.column_names] if _is_table(data) else None  # type: ignore[attr-defined]


def _value_identity(key: object, value: object, splits: Sequence[str | None], config: str | None) -> Any:
    if isinstance(value, int | float):  # a weight
        known = source_identity(key, splits, config)
        return None if known is None else [known, value]
    return source_identity(value, splits, config)


def _is_data(file: Path) -> bool:
    return _reader(file) is not None


def _named_rows(name: str, split: str | None, config: str | None) -> Iterator[RawRow]:
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        yield from _local_rows(path, split, config)
    elif path.exists():
        raise DataError(f"{name}: is no file and no folder; write the rows to a file")
    elif _reader(path) is not None:
        raise DataError(f"{name}: no such file; give an existing path or a hub name")
    else:
        yield from _object_rows(_load_hub(name, config, split or DEFAULT), name)


def _object_rows(rows: Iterable[Any], name: str) -> Iterator[RawRow]:
    for number, row in enumerate(_from_table(rows) if _is_table(rows) else rows):
        yield _as_row(row, f"{name}:{number}")


def _is_table(rows: Any) -> bool:
    """Whether this is a `Dataset` whose rows are plain Python."""
    return type(rows).__name__ == "Dataset" and rows.format["type"] is None and len(rows.column_names) > 0


def _from_table(rows: Any) -> Iterator[Row]:
    """The rows of a `Dataset`: many at once, because one by one takes it several times as long."""
    for batch in rows.iter(256):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _as_row(row: object, source: str) -> RawRow:
    if type(row) is dict and _PLAIN.issuperset(map(type, row.values())):
        return RawRow(row, source)
    if isinstance(row, Mapping):
        return RawRow({name: _plain(value) for name, value in row.items()}, source)
    return RawRow(DataError(f"is a {type(row).__name__}; expected an object with columns"), source)


_PLAIN = frozenset({str, list, dict, int, float, bool, type(None)})


def _plain(value: Any) -> Any:
    """Lists and numbers of numpy, as pandas hands them out, as Python's."""
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def _load_hub(name: str, config: str | None, split: str) -> Iterable[Any]:
    import datasets

    try:
        loaded: Iterable[Any] = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"{name}: neither a local file nor a hub data set that can be loaded ({reason}); "
            "check the name, dataset_config and the split"
        ) from error
    return loaded


def _local_rows(path: Path, split: str | None, config: str | None) -> Iterator[RawRow]:
    if path.is_dir() and any((path / name).exists() for name in _SAVED):
        yield from _saved_rows(path, split)
        return
    for part in parse_split(split):
        if path.is_dir():
            files = files_of_split(path, part.name, config, _is_data)
        else:
            check_file(path, part.name)
            files = [path]
        yield from part.take(row for file in files for row in _file_rows(file))


def _saved_rows(path: Path, split: str | None) -> Iterator[RawRow]:
    """A folder written by `save_to_disk`."""
    import datasets

    with raised_as(DataError, f"{path}: cannot be read", "is the folder damaged?"):
        loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, Mapping):
        loaded = {str(loaded.split or DEFAULT): loaded}
    yield from read_rows(loaded, split=split)


def _file_rows(path: Path) -> Iterator[RawRow]:
    read = _reader(path)
    if read is None:
        raise DataError(f"{path}: unknown file type; use one of {', '.join(_READERS)} (.gz as well)")
    with raised_as(DataError, f"{path}: cannot be read", "is the file damaged?"):
        yield from read(path)


# How files begin that are no text in UTF-8, and what to say of them; UTF-32 begins like UTF-16.
_FOREIGN_FILES = (
    (b"\x1f\x8b", "is compressed by gzip; name it {name}.gz"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it"),
    (b"\xfd7zXZ\x00", "is compressed by xz; unpack it"),
    (b"BZh", "is compressed by bzip2; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"PAR1", "is Parquet; name it so, with the ending .parquet"),
    (b"ARROW1", "is Arrow; name it so, with the ending .arrow"),
    (b"\xff\xfe\x00\x00", "is UTF-32, not UTF-8; save the file as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32, not UTF-8; save the file as UTF-8"),
    (b"\xff\xfe", "is UTF-16, not UTF-8; save the file as UTF-8"),
    (b"\xfe\xff", "is UTF-16, not UTF-8; save the file as UTF-8"),
)


def _refuse_foreign(path: Path) -> None:
    """Refuse a file of which no line is text."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        beginning: bytes = file.read(8)
    found = next((what for sign, what in _FOREIGN_FILES if beginning.startswith(sign)), None)
    if found is None and b"\0" in beginning:
        found = "holds zero bytes, as UTF-16 and UTF-32 do; save the file as UTF-8"
    if found is not None:
        raise DataError(f"{path.name}: {found.format(name=path.name)}")


def nothing_readable(bad: Sequence[RawRow]) -> DataError:
    """What to say of rows of which none can be parsed; `bad` are the first of them, at least one."""
    first = bad[0]
    others = f" (none of the first {len(bad)} rows can be read)" if len(bad) > 1 else ""
    suffix = Path(first.source.rpartition(":")[0].removesuffix(".gz")).suffix.lower()
    advice = f"; {_LAYOUTS[suffix]}" if suffix in _LAYOUTS else ""
    return DataError(f"{first.source}: {first.data}{others}{advice}")


_ONE_A_LINE = "write one JSON object a line, or name a file with one array of them .json"
_LAYOUTS = {
    ".jsonl": _ONE_A_LINE,
    ".ndjson": _ONE_A_LINE,
    ".json": "write one JSON array of the rows, or one object a line",
}


def _open(path: Path) -> IO[str]:
    _refuse_foreign(path)
    # A byte that is not UTF-8 becomes half a character: its row is malformed, and its neighbours survive.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


_FOREIGN_BYTE = re.compile("[\udc80-\udcff]")


def _not_utf8(text: str) -> DataError | None:
    """What is wrong with a text that was read from bytes of another encoding; None where nothing is."""
    if text.isascii() or (found := _FOREIGN_BYTE.search(text)) is None:
        return None
    byte = ord(found[0]) - 0xDC00
    return DataError(f"holds bytes that are not UTF-8 (0x{byte:02x}); save the file as UTF-8")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_json(line, f"{path.name}:{number}")


def _parse_json(text: str, source: str) -> RawRow:
    if (foreign := _not_utf8(text)) is not None:
        return RawRow(foreign, source)
    try:
        return _as_row(strict_json(text), source)
    except KeyTwice as error:
        return RawRow(DataError(str(error)), source)
    except (ValueError, RecursionError) as error:
        return RawRow(DataError(f"is not JSON ({first_line(error)})"), source)


class KeyTwice(Exception):  # noqa: N818 - a verdict on an object
    """An object names a key twice, and only one of its values could be taken."""


def strict_json(text: str) -> Any:
    """What a text writes in JSON.

    Raises:
        ValueError: It is none.
        KeyTwice: An object in it names a key twice.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise KeyTwice(f"has the key {twice!r} twice in one object; keep one of them")
    return found


def _read_json(path: Path) -> Iterator[RawRow]:
    """A JSON array of objects (or an object that holds one), each row with the line it begins on."""
    with _open(path) as file:
        text = file.read()
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        if (foreign := _not_utf8(text)) is not None and "\n" not in text.strip():
            raise DataError(f"{path.name}: {foreign}")
        try:
            loaded = strict_json(text)
        except KeyTwice as error:
            with suppress(json.JSONDecodeError):  # a line of several
                json.loads(text)
                raise DataError(f"{path.name}: {error}") from None
            yield from _read_jsonl(path)
            return
        except json.JSONDecodeError:
            yield from _read_jsonl(path)
            return
        tables = (
            [value for value in loaded.values() if isinstance(value, list)]
            if isinstance(loaded, dict)
            else []
        )
        if len(tables) != 1:
            several = f" (there are several: {', '.join(map(str, loaded))})" if len(tables) > 1 else ""
            raise DataError(
                f"{path.name}:1: expected a JSON array of rows{several}; wrap the rows in [ ] or write jsonl"
            )
        yield from _object_rows(tables[0], path.name)
        return
    yield from _read_array(text, start + 1, path.name)


def _read_array(text: str, position: int, name: str) -> Iterator[RawRow]:
    decoder, lenient = json.JSONDecoder(object_pairs_hook=_object), json.JSONDecoder()
    line, counted = 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            raise DataError(f"{name}:{line}: the JSON array does not end; is the file cut off?")
        if text[position] == "]":
            if text[position + 1 :].strip():
                raise DataError(f"{name}:{line}: something follows the JSON array; fix the file")
            return
        began = position
        twice: DataError | None = None
        try:
            row, position = decoder.raw_decode(text, position)
        except KeyTwice as error:
            twice = DataError(str(error))
            row, position = lenient.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # Where a broken row of an array ends is unknown, so the rest cannot be read: no skipping here.
            raise DataError(f"{name}:{error.lineno}: is not JSON ({error.msg}); fix the file") from error
        foreign = _not_utf8(text[began:position]) or twice
        yield _as_row(row, f"{name}:{line}") if foreign is None else RawRow(foreign, f"{name}:{line}")


def _read_csv(path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as file:
        reader = csv.reader(file, strict=True)
        header = _csv_header(reader, path.name)
        records = _csv_records(reader, len(header))
        head = list(itertools.islice(records, SAMPLE))
        listed = _list_columns(header, [cells for _, cells in head if not isinstance(cells, DataError)])
        for lines, cells in itertools.chain(head, records):
            row = cells if isinstance(cells, DataError) else _csv_row(cells, header, listed)
            # Each line that a stray quote has swallowed may have been a row.
            for number in lines if isinstance(cells, DataError) else lines[:1]:
                yield RawRow(row, f"{path.name}:{number}")


def _csv_records(reader: Any, columns: int) -> Iterator[tuple[range, list[str] | DataError]]:
    """The lines of each record, and its cells, or what is wrong with it; blank lines left out."""
    while True:
        first = reader.line_num + 1
        found: list[str] | DataError
        try:
            cells: list[str] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            found = DataError(f"is not CSV ({error}); write a quote within a cell twice")
        else:
            found = _not_a_record(cells, columns) or cells
        if found:
            yield range(first, max(reader.line_num, first) + 1), found


def _csv_header(reader: Any, name: str) -> list[str]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise DataError(f"{name}:1: the header is not CSV ({error})") from None
    problem = _not_utf8("".join(header))
    twice = sorted({cell for cell in header if header.count(cell) > 1})
    if problem is not None or twice:
        raise DataError(f"{name}:1: the header {problem or f'names {twice[0]!r} twice; rename one'}")
    return header


def _not_a_record(cells: list[str], columns: int) -> DataError | None:
    """Why cells are no row of as many columns; None where they are one, or a blank line."""
    if cells and len(cells) != columns:
        more = "more" if len(cells) > columns else "fewer"
        return DataError(f"has {more} cells than the header; put text that holds a comma into quotes")
    if any(_is_several_rows(cell, number, columns) for number, cell in enumerate(cells)):
        return DataError(
            "looks like several rows between two stray quotes; write a quote within a cell twice, or, if it"
            " is one row, give the file as jsonl"
        )
    return _not_utf8("".join(cells))


def _is_several_rows(cell: str, number: int, columns: int) -> bool:
    """Whether a cell is the rest of one row, whole rows, and the beginning of another.

    Two stray quotes at the edges of cells of the same column make that, and correct CSV. Each line then has
    the commas of what it was cut from; two lines alone, with no whole row between them, may well be text.
    """
    if columns < 2 or cell.count("\n") < 2:
        return False
    lines = cell.split("\n")
    expected = [columns - 1 - number, *[columns - 1] * (len(lines) - 2), number]
    return [line.count(",") for line in lines] == expected


def _list_columns(header: list[str], records: list[list[str]]) -> set[str]:
    """The columns of CSV that hold lists of texts: those in which every cell that is not blank writes one.

    Of a column of texts a cell may look like a list, as an answer in JSON does. A column of chosen answers
    holds texts, whatever they look like, and then so does that of the rejected ones beside it.
    """
    columns = {name: [row[index] for row in records] for index, name in enumerate(header)}
    lists = {
        name: [list_of_texts(cell) for cell in cells if not _is_blank(cell)]
        for name, cells in columns.items()
    }
    listed = {name for name, found in lists.items() if any(found) and None not in found}
    return listed - {
        side for name in listed if "chosen" in name for side in (name, name.replace("chosen", "rejected"))
    }


def _csv_row(cells: list[str], header: list[str], listed: set[str]) -> Row | DataError:
    """The cells of a record as a row, or why they are none."""
    row: Row = {}
    for name, cell in zip(header, cells, strict=True):
        row[name] = None if cell in _NOTHING else cell
        if name in listed and cell.lstrip().startswith("["):
            row[name] = list_of_texts(cell)
            if row[name] is None:
                return DataError(f"has a list in {name!r} that is neither JSON nor Python; fix the row")
    return row


_NOTHING = ("nan", "NaN")
"""How pandas writes a missing value."""


def _is_blank(cell: str) -> bool:
    return cell in _NOTHING or not cell.strip()


def list_of_texts(text: str) -> list[str | None] | None:
    """The texts, some perhaps missing, of a list in JSON or, as pandas writes it, in Python; else None."""
    if not text.lstrip().startswith(('["', "['", "[null", "[None", "[]")):
        return None
    for parse in (json.loads, python_literal):
        try:
            value = parse(text)
        except NOT_PARSED:
            continue
        is_list = isinstance(value, list) and all(isinstance(item, str | None) for item in value)
        return value if is_list else None
    return None


NOT_PARSED = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, KeyTwice)
"""What says that a text is no JSON or no Python."""
_BETWEEN_TEXTS = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\s+(?=['"])""")


def python_literal(text: str) -> Any:
    """What a text writes in Python; texts side by side, as numpy prints them, are several.

    Raises:
        ValueError: It is no literal; so say `SyntaxError`, `TypeError`, `RecursionError` and `MemoryError`.
        KeyTwice: An object in it names a key twice.
    """
    with warnings.catch_warnings():  # of escapes that Python does not know
        warnings.simplefilter("ignore")
        tree = ast.parse(_BETWEEN_TEXTS.sub(r"\1, ", text).lstrip(" \t"), mode="eval")
    value = ast.literal_eval(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _object([(key.value, None) for key in node.keys if isinstance(key, ast.Constant)])  # type: ignore[misc]
    return value


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from _read_batches(file.iter_batches(batch_size=1024), path.name)


def _read_arrow(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_file(source)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _read_batches(batches, path.name)


def _read_batches(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # offsets of a damaged file point anywhere, and reading there can kill us
        for row in batch.to_pylist():
            yield RawRow(row, f"{name}:{number}")
            number += 1


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow]] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return _READERS.get(suffixes[-1]) if suffixes and suffixes[-1] not in (".parquet", ".arrow") else None
    return _READERS.get(suffixes[-1]) if suffixes else None
