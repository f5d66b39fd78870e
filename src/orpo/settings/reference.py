"""The settings for people and editors: defaults as YAML, a JSON schema, docs/settings.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from orpo.run.directory import dump_yaml
from orpo.settings.config import FACTS
from orpo.settings.kinds import convert, describe, members
from orpo.settings.renamed import current_entries
from orpo.settings.schema import Known, known_settings


def resolved_yaml(settings: Mapping[str, Any], *, inherited: bool = False) -> str:
    """A recipe with the defaults written out below it.

    Args:
        settings: Of the recipe.
        inherited: Whether to list the defaults of `TrainingArguments` too, not only ours.
    """
    defaults = {
        name: known.default
        for name, known in known_settings().items()
        if name not in settings and (known.own or inherited) and _is_writable(name, known)
    }
    return (dump_yaml(settings) if settings else "") + "# Defaults\n" + dump_yaml(defaults)


def _is_writable(name: str, known: Known) -> bool:
    """Whether the default is a value that a recipe may have: no expression, and nothing to be told about."""
    try:
        convert(known.default, known.kind)
        _, notice = current_entries(name, known.default)
    except ValueError:
        return False
    return not notice


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) that editors check recipes against."""
    properties = {
        name: {"description": known.help} | _json_type(known.kind) for name, known in known_settings().items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "orpo recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _json_type(kind: Any) -> dict[str, Any]:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    types: list[str] = []
    choices: list[Any] = []
    for member in members(kind):
        origin = get_origin(member) or member
        if origin is Any:
            return {}
        if origin is Literal:
            choices += get_args(member)
        else:
            types.append(names.get(origin, "null"))
    if not choices:
        return {"type": types if len(types) > 1 else types[0]}
    options: list[dict[str, Any]] = [{"enum": choices}, *({"type": name} for name in types)]
    return {"anyOf": options} if types else options[0]


def settings_markdown() -> str:
    """The settings reference as Markdown: our own settings, and where defaults differ from TRL's and why."""
    known = known_settings()
    lines = [
        "# Settings",
        "",
        "Printed by `orpo config --markdown`. Every setting of `transformers.TrainingArguments` is accepted",
        "too (`orpo config --all`). The command line beats the recipe, the recipe beats these defaults.",
        "",
        "| setting | default | takes | what it does |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {_cell(item.default)} | {_escape(describe(item.kind))} | {_escape(item.help)} |"
        for name, item in known.items()
        if item.own
    ]
    lines += [
        "",
        "## Where a default differs from TRL's ORPOConfig",
        "",
        "| setting | here | TRL 1.16 | why |",
        "|---|---|---|---|",
    ]
    for name, facts in FACTS.items():
        if facts.trl is not None:
            theirs, why = facts.trl
            # What TRL turns on and we inherit unset or false, by version of transformers, is off.
            ours = known[name].default or False if theirs is True else known[name].default
            lines.append(f"| `{name}` | {_cell(ours)} | {_cell(theirs)} | {_escape(why)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
