"""Every setting's name, type and default, and the conversion of what users write to that type.

Our own settings come from config.py, our defaults for those of `transformers.TrainingArguments` from
inherited.py. The rest is read with `ast` from the source of the installed transformers, so that a recipe is
checked without importing it or torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from orpo.errors import ConfigError
from orpo.settings.config import OWN, OrpoSettings
from orpo.settings.inherited import INHERITED, UNCHANGED
from orpo.settings.renamed import NO_EFFECT


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about one setting.

    Attributes:
        kind: The type its values are converted to.
        default: The default value; the text of an expression where it is not a literal.
        help: One line.
        own: True for a setting of this package, False for one of `TrainingArguments`.
    """

    kind: Any
    default: Any
    help: str
    own: bool


@cache
def known_settings() -> dict[str, Known]:
    """Every setting by name: our own first, then those of the installed `TrainingArguments`.

    Raises:
        ConfigError: transformers is not installed.
    """
    hints = get_type_hints(OrpoSettings)
    own = {f.name: Known(hints[f.name], f.default, OWN[f.name], own=True) for f in fields(OrpoSettings)}
    theirs = _training_arguments()
    for name, inherited in INHERITED.items():
        if name in theirs and name not in NO_EFFECT and inherited.default is not UNCHANGED:
            base = theirs.pop(name)
            kind = base.kind | None if inherited.default is None else base.kind
            own[name] = Known(kind, inherited.default, inherited.facts or base.help, own=True)
    return own | {name: known for name, known in theirs.items() if name not in NO_EFFECT}


def _training_arguments() -> dict[str, Known]:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("transformers is not installed; pip install orpo")
    folder = Path(spec.submodule_search_locations[0])
    sources = (folder / "trainer_utils.py", folder / "training_args.py")
    choices = {name: values for source in sources for name, values in _enums(source)}
    return dict(_class_fields(sources[1], "TrainingArguments", choices))


@cache
def _parse(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8")) if source.is_file() else ast.Module([], [])


def _enums(source: Path) -> Iterator[tuple[str, Any]]:
    """Classes made of string constants, as Literal types: `SchedulerType` -> Literal["linear", ...]."""
    for node in _parse(source).body:
        if isinstance(node, ast.ClassDef) and any(
            isinstance(b, ast.Name) and "Enum" in b.id for b in node.bases
        ):
            values = tuple(
                item.value.value
                for item in node.body
                if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
            )
            if values:
                yield node.name, Literal[values]


def _class_fields(source: Path, name: str, choices: Mapping[str, Any]) -> Iterator[tuple[str, Known]]:
    """The dataclass fields of a class, read from its source."""
    constants: dict[str, ast.expr] = {}
    for node in _parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = node.value
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id, _known_field(item, choices, constants)


def _known_field(item: ast.AnnAssign, choices: Mapping[str, Any], constants: Mapping[str, ast.expr]) -> Known:
    annotation = ast.unparse(item.annotation)
    if any(name in annotation for name in choices):
        annotation = re.sub(r"\s*\|\s*str\b", "", annotation)
    metadata: dict[str, Any] = {}
    default: Any = None
    if isinstance(item.value, ast.Call):
        arguments = {keyword.arg: keyword.value for keyword in item.value.keywords if keyword.arg}
        written = arguments.get("default")
        default = _literal(constants.get(written.id, written) if isinstance(written, ast.Name) else written)
        metadata = {
            key: _literal(value)
            for key, value in _dict_items(arguments.get("metadata"))
            if key in ("help", "choices")
        }
    elif item.value is not None:
        default = _literal(item.value)
    kind = _evaluate(annotation, choices)
    if isinstance(metadata.get("choices"), (list, tuple)):
        kind = Literal[tuple(metadata["choices"])]
    return Known(kind, default, " ".join(str(metadata.get("help", "")).split()), own=False)


def _dict_items(node: ast.expr | None) -> Iterable[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), value


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


class _Names(dict[str, Any]):
    """Names an annotation may use; a class we do not know accepts any value."""

    def __missing__(self, name: str) -> Any:
        return Any


def _evaluate(annotation: str, choices: Mapping[str, Any]) -> Any:
    known = {
        "str": str,
        "int": int,
        "float": float,
        "bool": bool,
        "dict": dict,
        "list": list,
        "Literal": Literal,
    }
    try:
        return eval(annotation, {"__builtins__": {}}, _Names(known | dict(choices)))
    except TypeError:
        return Any


_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


def convert(value: Any, kind: Any, *, split_commas: bool = False) -> Any:
    """A YAML value or a typed text -> a value of `kind`.

    Args:
        value: As read; text is parsed where `kind` is a number, a boolean, a list or a mapping.
        kind: A type, a union, a Literal, `list[...]` or `dict[...]`.
        split_commas: Text `a,b` becomes a list where one is accepted; for the command line.

    Raises:
        ConfigError: A mapping in it has a name twice.
        ValueError: It cannot be converted.
    """
    accepted = members(kind)
    if value is None or value == "null" or (value == "none" and str not in accepted):
        if NoneType in accepted or Any in accepted:
            return None
        raise ValueError(value)
    # Brackets and stars mark a regular expression, whose commas are its own.
    if split_commas and isinstance(value, str) and not set("()[]{}*+\\").intersection(value):
        several = "," in value and any(get_origin(member) is list for member in accepted)
        value = [part.strip() for part in value.split(",")] if several else value
    for member in sorted(accepted, key=_rank):
        try:
            return _convert_to(value, member, keep_text=str in accepted)
        except ConfigError:  # no other type makes it right
            raise
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _rank(member: Any) -> int:
    """Order in which the members of a union are tried: the narrowest first, text last."""
    origin = get_origin(member) or member
    order = [Literal, bool, int, float, dict, list, str, Any]
    return order.index(origin) if origin in order else len(order)


def _convert_to(value: Any, member: Any, *, keep_text: bool) -> Any:
    """Convert to one type that is not a union; with `keep_text`, text is not taken apart into a list."""
    origin = get_origin(member) or member
    if origin is Literal:
        return _choice(value, get_args(member))
    if origin is dict:
        return _mapping(value, get_args(member))
    if origin is list:
        return _items(value, get_args(member), keep_text)
    if member is Any:
        return parse_yaml(value) if isinstance(value, str) else value
    if member is bool:
        return _boolean(value)
    if member in (int, float):
        return _number(value, member)
    if member is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(value)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    # YAML reads a bare `no` as false, and `save_strategy: no` is what everybody writes.
    value = "no" if value is False and False not in choices else value
    for choice in choices:
        if value == choice or (isinstance(choice, bool) and str(value).lower() == str(choice).lower()):
            return choice
    raise ValueError(value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise ValueError(value)


def _number(value: Any, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    if isinstance(value, str):
        text = value.replace("_", "")
        value = int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    number: int | float = value
    if kind is int and isinstance(number, float) and not number.is_integer():
        raise ValueError(value)
    return int(number) if kind is int else number


def _mapping(value: Any, kinds: tuple[Any, ...]) -> dict[str, Any]:
    value = parse_yaml(value) if isinstance(value, str) and value.lstrip().startswith("{") else value
    if not isinstance(value, dict):
        raise ValueError(value)
    kind = kinds[1] if kinds else Any
    return {str(key): convert(item, kind) if kind is not Any else item for key, item in value.items()}


def _items(value: Any, kinds: tuple[Any, ...], keep_text: bool) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml(value)
    if isinstance(value, str) and not keep_text:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    return [convert(item, kinds[0]) if kinds else item for item in value]


def only_boolean(kind: Any) -> bool:
    """Whether nothing but true, false and null is accepted."""
    return set(members(kind)) <= {bool, NoneType}


def is_boolean_word(text: str) -> bool:
    """Whether a typed word means true or false."""
    return text.lower() in _BOOLEANS


def accepts_mapping(kind: Any) -> bool:
    """Whether one of the alternatives is a mapping."""
    return any((get_origin(member) or member) is dict for member in members(kind))


def describe(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    return " or ".join(dict.fromkeys(_describe_one(member) for member in sorted(members(kind), key=_rank)))


def _describe_one(member: Any) -> str:
    origin = get_origin(member) or member
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(member))
    if origin is list:
        return "a list" + (f" of {describe(get_args(member)[0])}" if get_args(member) else "")
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping",
        NoneType: "null",
    }
    return names.get(origin, "a value")


class SetTwice(yaml.MarkedYAMLError):
    """A mapping has a name twice, of whose values YAML would keep the last.

    Attributes:
        name: The name.
        lines: The lines, counted from 1, on which it is written first and again.
    """

    def __init__(self, name: str, again: yaml.Mark, first: yaml.Mark) -> None:
        super().__init__(problem=f"{name!r} is set twice", problem_mark=again)
        self.name, self.lines = name, (first.line + 1, again.line + 1)


class YamlLoader(yaml.SafeLoader):
    """SafeLoader whose numbers are those of the command line: `5e-6` is one, `010` and `12:30` are text.

    YAML 1.1 reads the latter as 8 and as 750, and a day as a date. As text they are converted, or refused, as
    typed ones are. A name that a mapping has twice is refused, on every level.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, before anything is merged into it, and compare its names."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    raise SetTwice(key.value, key.start_mark, first[key.value])
                first[key.value] = key.start_mark
        return node


_NUMBERS = {
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+)$",
    "tag:yaml.org,2002:float": (
        r"^([-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
_DATE = "tag:yaml.org,2002:timestamp"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (*_NUMBERS, _DATE)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    YamlLoader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Parse a value written in YAML.

    Raises:
        ConfigError: A mapping in it has a name twice.
        ValueError: It is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=YamlLoader)
    except SetTwice as error:
        raise ConfigError(f"{error.name!r} is set twice in {text}") from None
    except yaml.YAMLError:
        raise ValueError(text) from None
