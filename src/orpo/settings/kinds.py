"""What users write, as values of a setting's type: YAML, words of the command line, and objects of Python."""

from __future__ import annotations

import os
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from orpo.errors import ConfigError

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


def usable(key: str, value: Any, kind: Any) -> Any:
    """The value that a script gives to the setting `key`, as a recipe's would be converted.

    Raises:
        ConfigError: It cannot be converted.
    """
    if only_boolean(kind) and type(value) is int and value in (0, 1):
        return bool(value)
    if type(value).__name__ == "dtype":
        value = str(value)
    try:
        return convert(_as_written(value), kind)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except ValueError:
        raise ConfigError(not_usable(key, repr(value), kind)) from None


def _as_written(value: Any) -> Any:
    """Paths, numbers of numpy and sets, also within others, as a recipe writes them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {_as_written(key): _as_written(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_as_written, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_as_written(item) for item in value]
    return value


def not_usable(key: str, written: str, kind: Any) -> str:
    """The line on what is `written` where a setting of another type is due."""
    return f"{key}: {written} is not usable; expected {describe(kind)}"


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
