"""Data as other tools describe it: dataset_info.json, a `datasets:` block, a mixture, names with a subset.

Each description (of LLaMA-Factory, Axolotl, TRL, ms-swift or the Alignment Handbook) becomes the settings
that read the same rows in the same way: `dataset_name`, `columns`, `data_format`, a split, a configuration.
What has no counterpart is named in one line, and nothing trains: nobody would see a set that is read
otherwise than described.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orpo.settings.other_tools import Translation, Written, is_off, written_as


@dataclass(frozen=True)
class DataDescription:
    """One set of data.

    Attributes:
        names: Files, folders or a hub name.
        split: Its split, where one is named.
        reading: The settings that say how rows are read; one value serves all sets of a run.
        weights: How often each of the names is seen in an epoch; empty: once.
    """

    names: tuple[str, ...]
    split: str | None = None
    reading: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()

    @property
    def setting(self) -> Any:
        """As `dataset_name` takes it: a name, a list of names, or a mapping of names to weights."""
        if self.weights and set(self.weights) != {1}:
            return dict(zip(self.names, self.weights, strict=True))
        return self.names[0] if len(self.names) == 1 else list(self.names)


MIXTURE = "dataset_mixture"
TRAINING = (
    *("dataset", "datasets", "train_dataset", "train_file", "train_data", "data_path", "dataset_path"),
    MIXTURE,
)
EVALUATION = ("eval_dataset", "val_dataset", "test_datasets", "eval_file", "validation_file", "test_file")


def training_data(key: str, value: Any, written: Written) -> Translation:
    """A name in `TRAINING` -> `dataset_name` and how to read it.

    Raises:
        ValueError: A part has no counterpart, or the sets differ in how they are read.
    """
    if is_off(value) or "dataset_name" in written:
        return {}, "no effect: " + ("it is unset" if is_off(value) else "dataset_name is set too")
    joined = _join(key, _described(key, value, written))
    split = {} if joined.split is None else {"dataset_train_split": joined.split}
    entries = {"dataset_name": joined.setting} | split | joined.reading
    if key == MIXTURE and not is_off(value.get("test_split_size")):
        entries["eval_split"] = value["test_split_size"]
    of_its_own = "; its seed has no effect: seed draws both" if key == MIXTURE and "seed" in value else ""
    return entries, written_as(entries) + of_its_own


def evaluation_data(key: str, value: Any, written: Written) -> Translation:
    """A name in `EVALUATION` -> `eval_dataset_name`, read as the training data is.

    Raises:
        ValueError: A part has no counterpart, or these sets are read otherwise than the training data.
    """
    if is_off(value) or "eval_dataset_name" in written:
        return {}, "no effect: " + ("it is unset" if is_off(value) else "eval_dataset_name is set too")
    joined = _join(key, _described(key, value, written))
    entries: dict[str, Any] = {"eval_dataset_name": joined.setting}
    if joined.split is not None:
        entries["dataset_test_split"] = joined.split
    if trained := next((name for name in TRAINING if not is_off(written.get(name))), None):
        train = _join(trained, _described(trained, written[trained], written))
        _join(key, [replace(train, split=None), replace(joined, split=None)])
    else:
        entries |= joined.reading
    return entries, written_as(entries)


def _described(key: str, value: Any, written: Written) -> list[DataDescription]:
    if key == MIXTURE:
        if not isinstance(value, Mapping) or not isinstance(value.get("datasets"), list):
            raise ValueError(f"{key}: expected a mapping with a list `datasets`; or write dataset_name")
        unknown = [name for name in value if name not in _OF_MIXTURE and not is_off(value[name])]
        _refuse(key, "the mixture", unknown)
        return [_from_block(key, item) for item in value["datasets"]]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [_from_block(key, item) for item in value]
    if isinstance(value, Mapping) or key in ("datasets", "test_datasets"):
        raise ValueError(
            f"{key}: expected a list of mappings with path, split and type; or write dataset_name"
        )
    texts = value if isinstance(value, list) else str(value).split(",")
    return [_from_name(key, str(text).strip(), written) for text in texts]


def _join(key: str, described: list[DataDescription]) -> DataDescription:
    """All sets as one; a column is left out where all of them leave it out.

    Raises:
        ValueError: They are not read in the same way.
    """
    left_out = set.intersection(*(_left_out(d.reading) for d in described))
    described = [replace(d, reading=_with_left_out(d.reading, left_out)) for d in described]
    first = described[0]
    for other in described[1:]:
        ours, theirs = ({"split": d.split} | d.reading for d in (first, other))
        if differing := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
            raise ValueError(
                f"{key}: {first.names[0]} and {other.names[0]} differ in {', '.join(differing)}, and one "
                "value serves all sets of a run; write the rows in one shape, or train on one of them"
            )
    names = tuple(name for d in described for name in d.names)
    weights = tuple(weight for d in described for weight in d.weights)
    return DataDescription(names, first.split, first.reading, weights)


def _left_out(reading: Mapping[str, Any]) -> set[str]:
    return {name for name, theirs in (reading.get("columns") or {}).items() if theirs is None}


def _with_left_out(reading: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """The settings of a set with these of its columns left out, and no others."""
    columns = {
        name: theirs
        for name, theirs in (reading.get("columns") or {}).items()
        if theirs is not None or name in left_out
    }
    return {name: value for name, value in reading.items() if name != "columns"} | (
        {"columns": columns} if columns else {}
    )


def _refuse(
    key: str, name: str, parts: list[str], what_to_do: str = "remove them, or prepare the rows"
) -> None:
    if parts:
        raise ValueError(f"{key}: {name}: no counterpart here for {', '.join(parts)}; {what_to_do}")


# ------------------------------------------------------------------- names: LLaMA-Factory and ms-swift

_LLAMA_FACTORY = {"dataset_dir", "finetuning_type", "stage", "cutoff_len", "template", "pref_loss"}
_INFO = "dataset_info.json"


def _from_name(key: str, name: str, written: Written) -> DataDescription:
    """A name that dataset_info.json describes; else a file or a hub name, with ms-swift's `:subset#count`."""
    info = Path(str(written.get("dataset_dir") or "data")) / _INFO
    if info.is_file() and (table := _read_info(key, info)):
        if name in table:
            return _from_info(key, name, table[name], info.parent)
        if written.keys() & _LLAMA_FACTORY and not Path(name).exists():
            raise ValueError(f"{key}: {name!r} is not in {info}; it has {', '.join(table)}")
    elif written.keys() & _LLAMA_FACTORY and "/" not in name and not Path(name).exists():
        raise ValueError(
            f"{key}: {name!r} is no file, and there is no {info} that describes it; set dataset_dir to the "
            "folder with that file, or dataset_name to a file or a hub name"
        )
    path, _, count = name.partition("#")
    if count:
        raise ValueError(f"{key}: {name}: no setting counts rows; write dataset_train_split: train[:{count}]")
    path, _, subset = (path, "", "") if Path(path).exists() else path.partition(":")
    return DataDescription((path,), reading={"dataset_config": subset} if subset else {})


def _read_info(key: str, path: Path) -> dict[str, dict[str, Any]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: cannot read {path}: {error}") from None
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ValueError(f"{key}: {path} is not a JSON object of described sets")
    return table


def _from_info(key: str, name: str, entry: Mapping[str, Any], folder: Path) -> DataDescription:
    """One entry of dataset_info.json."""
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    if not entry.get("ranking"):
        raise ValueError(
            f"{key}: {name} is not marked `ranking: true` in {_INFO}: its rows are no pairs; "
            "name a set of pairs"
        )
    unknown = [part for part in ("folder", "num_samples", "revision") if not is_off(entry.get(part))]
    unknown += [part for part in columns if part not in _INFO_COLUMNS]
    unknown += [part for part in tags if part not in ("role_tag", "content_tag", *_ROLE_TAGS)]
    _refuse(key, name, unknown)
    for tag, known in _ROLE_TAGS.items():
        if tag in tags and tags[tag] not in known:
            raise ValueError(
                f"{key}: {name}: {tag}: turns of {tags[tag]!r} are not known; name them {known[0]}"
            )
    if "hf_hub_url" in entry:
        where = str(entry["hf_hub_url"])
    elif "file_name" in entry:
        where = str(folder / str(entry["file_name"]))
    else:
        raise ValueError(f"{key}: {name}: only hf_hub_url and file_name can be read here; download the rows")
    read = _INFO_READERS.get(str(entry.get("formatting", "alpaca")))
    if read is None:
        raise ValueError(f"{key}: {name}: formatting {entry['formatting']} is not known; alpaca or sharegpt")
    reading = read(columns, tags)
    if entry.get("subset"):
        reading["dataset_config"] = str(entry["subset"])
    return DataDescription((where,), entry.get("split"), reading)


_INFO_COLUMNS = (
    "prompt",
    "query",
    "response",
    "history",
    "messages",
    "system",
    "tools",
    "chosen",
    "rejected",
)
# Our name for each column of an alpaca set.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}


# Columns that LLaMA-Factory reads by default, and not where `columns` names others without them.
_UNNAMED = {"alpaca": ("query", "history", "system", "tools"), "sharegpt": ("system", "tools")}
# The tags of roles, with the names that are read as such.
_ROLE_TAGS = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "system_tag": ("system",),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call",),
}  # fmt: skip


def _alpaca(columns: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, Any]:
    ours = {_ALPACA.get(name, name): theirs for name, theirs in columns.items() if name != "messages"}
    left_out = [_ALPACA.get(name, name) for name in _UNNAMED["alpaca"] if columns and not columns.get(name)]
    return _reading("instruction", ours, left_out)


def _sharegpt(columns: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, Any]:
    ours = {name: theirs for name, theirs in columns.items() if name not in _ALPACA and name != "history"}
    left_out = [name for name in _UNNAMED["sharegpt"] if columns and not columns.get(name)]
    if ours.get("messages") == "conversations":
        del ours["messages"]
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if (role, content) == ("from", "value"):
        return _reading("sharegpt", ours, left_out)
    return _reading("messages", {**ours, "role": role, "content": content}, left_out)


_INFO_READERS: dict[str, Callable[[Mapping[str, str], Mapping[str, str]], dict[str, Any]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
}


def _reading(
    data_format: str | None, columns: Mapping[str, str], left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """The settings of a format, of columns that have other names than ours, and of those not to be read."""
    other: dict[str, str | None] = dict.fromkeys(left_out)
    other |= {ours: str(theirs) for ours, theirs in columns.items() if theirs and theirs != ours}
    return ({"data_format": data_format} if data_format else {}) | ({"columns": other} if other else {})


# ----------------------------------------------------------------------------- blocks: Axolotl and TRL

# The last part of `type`, as in chatml.intel, and the format of its rows; None: found from the columns.
_TYPES: dict[str, str | None] = {
    "argilla": None,
    "argilla_chat": None,
    "ultra": None,
    "icr": "instruction",
    "intel": "instruction",
    "prompt_pairs": "instruction",
    "nectar": "ranked",
    "default": "messages",
    "chat_template": "messages",
}
_FIELDS = {
    "field_messages": "messages",
    "field_prompt": "prompt",
    "field_system": "system",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_tools": "tools",
    "message_field_role": "role",
    "message_field_content": "content",
}
_READ_ELSEWHERE = {"path", "type", "split", "name", "data_files", "ds_type", "chat_template"}
_READ_ELSEWHERE |= {"message_property_mappings", "roles", "preprocess_shards", "columns", "weight"}
_OF_MIXTURE = ("datasets", "test_split_size", "seed")
_HANDBOOK = {"id": "path", "config": "name"}
"""What the Alignment Handbook calls these keys."""
_LOADERS = ("json", "csv", "parquet", "arrow")


def _from_block(key: str, entry: Any) -> DataDescription:
    """One item of an Axolotl `datasets:` list; TRL's and the Alignment Handbook's look the same."""
    if isinstance(entry, Mapping):
        entry = {_HANDBOOK.get(str(name), str(name)): value for name, value in entry.items()}
    if not isinstance(entry, Mapping) or not entry.get("path"):
        raise ValueError(f"{key}: each set needs a path, as in `- path: pairs.jsonl`")
    path = str(entry["path"])
    properties = dict(entry.get("message_property_mappings") or {})
    unknown = [n for n in entry if n not in {*_READ_ELSEWHERE, *_FIELDS} and not is_off(entry[n])]
    unknown += [n for n in properties if n not in ("role", "content")]
    _refuse(key, path, unknown)
    columns = {ours: entry[theirs] for theirs, ours in _FIELDS.items() if entry.get(theirs)} | properties
    reading = _from_type(key, path, entry.get("type"), columns)
    if entry.get("name"):
        reading["dataset_config"] = str(entry["name"])
    if entry.get("chat_template") and not str(entry["chat_template"]).startswith("tokenizer_default"):
        reading["chat_template"] = entry["chat_template"]
    files = _block_files(key, path, entry.get("data_files"))
    weight = 1.0 if entry.get("weight") is None else float(entry["weight"])
    return DataDescription(files, entry.get("split"), reading, (weight,) * len(files))


def _block_files(key: str, path: str, data_files: Any) -> tuple[str, ...]:
    if not data_files:
        return (path,)
    files = tuple(map(str, data_files if isinstance(data_files, list) else [data_files]))
    if path in _LOADERS:
        return files
    if Path(path).is_dir():
        return tuple(str(Path(path) / file) for file in files)
    raise ValueError(f"{key}: {path}: no counterpart here for data_files of a hub set; name its split")


def _from_type(key: str, path: str, kind: Any, columns: dict[str, str]) -> dict[str, Any]:
    """How `type` says that rows are read: a name such as chatml.intel, or a mapping of fields."""
    if isinstance(kind, Mapping):
        return _from_fields(key, path, kind)
    if kind is None:
        return _reading(None, columns)
    template, _, rows = str(kind).rpartition(".")
    if rows not in _TYPES:
        raise ValueError(
            f"{key}: {path}: type {kind} is for other rows than pairs, or not known here; name the shape in "
            "data_format, and the columns in columns"
        )
    reading = _reading(_TYPES[rows], columns)
    return reading if template in ("", "chat_template") else reading | {"chat_template": template}


def _from_fields(key: str, path: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    """A type of the user's own: texts in named fields, used as they are."""
    formats = {f"{side}_format": "{" + side + "}" for side in ("prompt", "chosen", "rejected")}
    unknown = [n for n, value in kind.items() if n in formats and value not in (None, formats[n])]
    unknown += [n for n in kind if n not in formats and n not in _FIELDS]
    _refuse(key, path, [f"type.{name}" for name in unknown], "write the rows as they are to be read")
    named = {ours: kind[theirs] for theirs, ours in _FIELDS.items() if kind.get(theirs) and ours != "system"}
    return _reading("standard", named)
