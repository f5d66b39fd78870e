"""A recipe: YAML file and command line -> checked settings, without importing torch or transformers.

The command line beats the file; every value is converted to the type of its key (schema.py), names other
tools use are understood (renamed.py), and an unknown key stops with the nearest known one.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_origin

import yaml

from orpo.console import say
from orpo.errors import ConfigError, raised_as
from orpo.run.directory import RunDirectory, at_home
from orpo.settings.config import idle_lines
from orpo.settings.kinds import (
    SetTwice,
    YamlLoader,
    accepts_mapping,
    convert,
    is_boolean_word,
    members,
    not_usable,
    only_boolean,
    parse_yaml,
)
from orpo.settings.renamed import (
    MEANT,
    NO_EFFECT,
    ONE_THING,
    RENAMED,
    current_entries,
    takes_as,
    understood_names,
)
from orpo.settings.schema import known_settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """The explicit settings of a run.

    Attributes:
        settings: Flat key -> converted value, only what the file or the command line says.
        notices: One line for each key that was renamed or has no effect.
        name: Of the file, without its ending; None without a file.
        environment: Variables of TRL's `env:` section, to be set before anything heavy is imported.
    """

    settings: dict[str, Any]
    notices: tuple[str, ...] = ()
    name: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def idle(self) -> list[str]:
        """A line for each setting that waits for another one; a run says them by itself."""
        return idle_lines(self.settings, {name: known.default for name, known in known_settings().items()})

    def say_notices(self, *, error: bool = False) -> None:
        """Print both; with `error` beside a command's output, which is another thing."""
        for notice in [*self.notices, *self.idle]:
            say(notice, error=error)


_TYPED = "command line"
_MODELS = ("model_name_or_path", "adapter_name_or_path")
_MOST_MEANT = 3
"""Settings that a hint names."""


class Entry(NamedTuple):
    """A key and its value as written, and where: `recipe.yaml:12` or `command line`."""

    key: str
    value: Any
    where: str


def load_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and put the command line's settings over it.

    Args:
        path: A YAML mapping of flat keys; None where `overrides` names it, or for a run without a file.
        overrides: Arguments as typed: `recipe.yaml`, `--learning_rate 1e-5`, `--learning-rate=1e-5`,
            `learning_rate=1e-5`, `--bf16`, `--no_bf16`, `--report_to tensorboard wandb`,
            `--lr_scheduler_kwargs.num_cycles 2`.

    Raises:
        ConfigError: The file cannot be read, or a key or a value cannot be used; every such key is named.
    """
    files, typed = _read_arguments(overrides)
    files = ([str(path)] if path is not None else []) + files
    if len(files) > 1:
        raise ConfigError(f"command line: {files[1]!r} is not a setting; write --key value, and one recipe")
    settings: dict[str, Any] = {}
    notices: list[str] = []
    problems: list[str] = []
    environment: dict[str, str] = {}
    of_file = _read_recipe(Path(files[0])) if files else []
    written = _without_replaced(of_file, typed)
    everything = {entry.key: entry.value for entry in (*written, *typed)}
    for source in (written, typed):
        for entry in source:
            if entry.key == "env" and isinstance(entry.value, dict):
                environment |= {str(name): str(value) for name, value in entry.value.items()}
                continue
            try:
                notice = _apply(entry, settings, {other.key for other in source}, everything)
            except ValueError as error:
                problems.append(f"{entry.where}: {error}")
            else:
                notices += [f"{entry.key} ({entry.where}): {notice}"] if notice else []
    if problems:
        raise ConfigError("; ".join(problems))
    notices += _leave_behind(settings, of_file, {entry.key for entry in typed})
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(f"env: {name!r} cannot be a variable with the value {value!r}")
    return Recipe(settings, tuple(notices), Path(files[0]).stem if files else None, environment)


def _without_replaced(written: list[Entry], typed: list[Entry]) -> list[Entry]:
    """The file's entries but for those of a thing that the command line sets too, under whatever name."""
    given = {entry.key for entry in typed}
    replaced = {name for names in ONE_THING if names & given for name in names}
    return [entry for entry in written if entry.key not in replaced]


_PARTS_OF_DATA = ("dataset_config", "dataset_train_split", "dataset_test_split")


def _leave_behind(settings: dict[str, Any], of_file: list[Entry], typed: set[str]) -> list[str]:
    """Drop the splits that a recipe names in its own data where the command line names other data."""
    names = next(names for names in ONE_THING if "dataset_name" in names)
    written = next((entry.value for entry in of_file if entry.key in names), None)
    if written is None or not names & typed or settings.get("dataset_name") == written:
        return []
    parts = [part for part in _PARTS_OF_DATA if part in settings and part not in typed]
    for part in parts:
        del settings[part]
    line = f"{', '.join(parts)}: of {written} in the recipe, not of the data on the command line"
    return [line] if parts else []


def _apply(entry: Entry, settings: dict[str, Any], named: set[str], everything: Mapping[str, Any]) -> str:
    """Store an entry under today's names; a name in `named`, the keys of its source, beats its old name.

    Args:
        entry: A key and its value.
        settings: Where it is stored.
        named: The keys of its source.
        everything: All keys and values of file and command line, for names whose meaning depends on others.

    Returns:
        What to tell the user about the key, or nothing.

    Raises:
        ValueError: The key is unknown, or its value cannot be used.
    """
    current, notice = current_entries(entry.key, entry.value, everything)
    for key, value in current.items():
        if key != entry.key and key in named:
            notice += "" if everything[key] == value else f"; ignored, since {key} is set too"
        else:
            _set(settings, key, value, typed=entry.where == _TYPED)
    return notice


def _set(settings: dict[str, Any], key: str, value: Any, *, typed: bool) -> None:
    """Convert and store one value; `name.inner` stores into the mapping `name`.

    Raises:
        ValueError: The key is unknown, or its value cannot be converted.
    """
    name, _, inner = key.partition(".")
    known = known_settings().get(name)
    if known is None or (inner and not accepts_mapping(known.kind)):
        raise ValueError(f"unknown setting {key!r}{nearest(key)}")
    if inner:
        previous = settings.get(name)
        parsed = parse_yaml(value) if isinstance(value, str) else value
        settings[name] = (previous if isinstance(previous, dict) else {}) | {inner: parsed}
        return
    try:
        converted = convert(value, known.kind, split_commas=typed)
        if name == "stages" and converted:
            converted = [_stage(entry) for entry in converted]
        settings[name] = at_home(converted) if name in _MODELS else converted
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except ValueError:
        written = "nothing" if typed and value is True else _shown(value)
        raise ValueError(not_usable(key, written, known.kind)) from None


def _stage(entry: dict[str, Any]) -> dict[str, Any]:
    """A stage with its values converted as beside it; `resolve_stages` refuses what cannot be."""
    stage = dict(entry)
    for key, value in entry.items():
        kind = known_settings()[key].kind if key in known_settings() else float if key == "share" else Any
        with contextlib.suppress(ValueError):
            stage[key] = convert(value, kind)
    return stage


def nearest(key: str) -> str:
    """A hint at a setting whose name is made of the same words: `lora_rank` never stands for `local_rank`."""
    typed = key.lower().replace("-", "_").strip("_")
    names = [*known_settings(), *understood_names()]
    near = [n for n in difflib.get_close_matches(typed, names, n=5, cutoff=0.6) if _same_words(typed, n)]
    found = [RENAMED.get(name, name) for name in near[:1]]
    longer = [name for name in known_settings() if _has_words(name, typed)]
    if len(longer) <= _MOST_MEANT and (not found or found[0] in longer):
        found = longer
    found = MEANT.get(typed, found)
    if not found:
        return "; `orpo config --help` says how to list them all"
    return f"; did you mean {' or '.join(map(repr, found))}?"


def _has_words(name: str, typed: str) -> bool:
    """Whether a name has the words typed, in their order, with others between them; two may be chance."""
    words, wanted = iter(name.split("_")), typed.split("_")
    return len(wanted) != 2 and all(word in words for word in wanted)


def _same_words(typed: str, name: str) -> bool:
    """Whether the words typed are those of the name but for slips: all, or two and more in a row."""
    if re.findall(r"\d+", typed) != re.findall(r"\d+", name):
        return False
    words, whole = typed.split("_"), name.split("_")
    starts = range(len(whole) - len(words) + 1) if len(words) > 1 or len(whole) == 1 else ()
    runs = (whole[start : start + len(words)] for start in starts)
    near = any(all(map(_is_slip, words, run)) for run in runs)
    return near or _is_slip(typed.replace("_", ""), name.replace("_", ""), at_least=0.9)


def _is_slip(one: str, other: str, at_least: float = 0.75) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() >= at_least


def _shown(value: Any) -> str:
    hint = (
        " (YAML reads a bare yes, no, on or off as true or false: quote it)"
        if isinstance(value, bool)
        else ""
    )
    return (json.dumps(value) if isinstance(value, (bool, str)) else repr(value)) + hint


def _read_recipe(path: Path) -> list[Entry]:
    """The entries of a recipe file; a run directory stands for its recipe, and is its `output_dir`."""
    if not path.is_dir():
        return _read_yaml(path)
    entries = [entry for entry in _read_yaml(RunDirectory(path).recipe) if entry.key != "output_dir"]
    return [*entries, Entry("output_dir", str(path), str(path))]


def _read_yaml(path: Path) -> list[Entry]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        if isinstance(error, FileNotFoundError):
            reason = "no such file (a setting is written --key value or key=value)"
        raise ConfigError(f"{path}: cannot read the recipe: {reason}") from None
    with raised_as(ConfigError, f"{path}: not valid YAML"):
        return _entries(text, path)


def _entries(text: str, path: Path) -> list[Entry]:
    loader = None
    try:
        loader = YamlLoader(text)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"{path}: a recipe is a mapping of settings (`learning_rate: 5e-6`), one on each line"
            )
        loader.flatten_mapping(node)  # what `<<` merges comes first, so that the recipe's own beats it
        entries = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            value = loader.construct_object(value_node, deep=True)
            entries[key] = Entry(key, value, f"{path.name}:{key_node.start_mark.line + 1}")
        return list(entries.values())
    except SetTwice as error:
        first, again = (f"{path.name}:{line}" for line in error.lines)
        raise ConfigError(f"{again}: {error.name!r} is set twice; first at {first}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _read_arguments(words: Sequence[str]) -> tuple[list[str], list[Entry]]:
    """Arguments as typed -> recipe files, and entries whose values are still text, or lists of texts.

    A word ending in `.yaml` or `.yml` is a recipe wherever it stands; so is a word that is no option's value.
    """
    files: list[str] = []
    entries: list[Entry] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and not _is_assignment(word):
            files.append(word)
            continue
        name, equals, text = word.partition("=")
        head, dot, inner = name.removeprefix("--").partition(".")
        key = head.replace("-", "_") + dot + inner
        values = [text] if equals else _take_values(key, rest)
        if key == "config":
            files += values
        elif not values and (positive := _negated(key)):
            entries.append(Entry(positive, False, _TYPED))
        else:
            value: Any = values[0] if len(values) == 1 else values or True
            entries.append(Entry(key, value, _TYPED))
    return files, entries


def _is_assignment(word: str) -> bool:
    return re.match(r"^[A-Za-z_][\w.\-]*=", word) is not None


def _negated(key: str) -> str | None:
    """`no_bf16` -> `bf16`, where that is a setting that may be true or false."""
    name = key.removeprefix("no_")
    positive = known_settings().get(name)
    is_boolean = name in NO_EFFECT or (positive is not None and bool in members(positive.kind))
    return name if is_boolean and name != key and key not in known_settings() else None


def _take_values(key: str, rest: list[str]) -> list[str]:
    """Remove and return the words that belong to `--key`: several for a list, none for a lone boolean."""
    known = known_settings().get(takes_as(key.partition(".")[0]))
    several = known is not None and any(get_origin(member) is list for member in members(known.kind))
    lone = _negated(key) is not None or (known is not None and only_boolean(known.kind))
    values: list[str] = []
    while rest and not rest[0].startswith("--") and (several or not values):
        is_recipe = rest[0].endswith((".yaml", ".yml")) and key != "config"
        if is_recipe or (lone and not is_boolean_word(rest[0])) or (values and _is_assignment(rest[0])):
            break
        values.append(rest.pop(0))
    return values
