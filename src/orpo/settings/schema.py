"""Every setting's name, type and default.

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
from types import NoneType
from typing import Any, Literal, get_type_hints

from orpo.errors import ConfigError
from orpo.settings.config import OWN, OrpoSettings
from orpo.settings.inherited import INHERITED, UNCHANGED
from orpo.settings.kinds import members
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
        chosen: Any = Literal[tuple(metadata["choices"])]
        kind = chosen | None if NoneType in members(kind) else chosen
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
