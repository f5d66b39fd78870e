"""`orpo config`: the settings of a run, or of all runs, without running anything."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from orpo.settings.schema import Known

TRL_DIFFERENCES: dict[str, tuple[Any, str]] = {
    "learning_rate": (
        1e-6,
        "1e-6 hardly moves a base model in one stage; the published runs use 5e-6 and more",
    ),
    "max_length": (1024, "longer answers are dropped, never cut, and packed rows have no padding to pay for"),
    "beta": (0.1, "unset: the value of the preset named by `objective`, 0.1 for the default one"),
    "gradient_checkpointing": (True, "rows without padding and without logits need much less memory"),
    "dtype": (
        "float32",
        "unset: float32 for full fine-tuning; the frozen base under LoRA is held in bfloat16",
    ),
    "model_revision": ("main", "unset is the default branch, and also fits a local folder"),
    "lora_dropout": (0.05, "noise that preference pairs, seen one to three times, do not need"),
    "lora_target_modules": (None, "every linear layer, on models PEFT has no table for too"),
    "dataset_test_split": ("test", "unset: 5 % of the prompts are held out, which every data set has"),
    "eval_strategy": ("no", "unset: held-out pairs are scored as often as checkpoints are written"),
    "eval_on_start": (False, "unset: the state before training is what the result is compared with"),
    "save_steps": (500, "a tenth of the run, whatever its length"),
    "save_total_limit": (
        None,
        "a checkpoint of a full fine-tuning is six times the model; best and last are kept",
    ),
    "load_best_model_at_end": (False, "unset: on where every checkpoint is evaluated"),
    "logging_first_step": (False, "the first line appears at once, not after ten steps"),
    "logging_nan_inf_filter": (
        True,
        "the filter prints a loss of 0 where it is not a number; such a run stops here",
    ),
    "restore_callback_states_from_checkpoint": (False, "a resumed run keeps its patience for early stopping"),
    "ddp_find_unused_parameters": (None, "every trained parameter takes part in every row"),
}
"""Setting -> TRL's default, and why ours differs. A test keeps the list complete."""

_USAGE = "orpo config [RECIPE] [--KEY VALUE ...] [--all | --schema | --markdown]"


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo config` to the command line."""
    parser = words.add_parser(
        "config",
        help="print the settings a recipe and its overrides come to",
        description="Print the resolved settings as a recipe: those given, then our own defaults.",
        usage=_USAGE,
        allow_abbrev=False,
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--all", action="store_true", help="the defaults of TrainingArguments too")
    shape.add_argument("--schema", action="store_true", help="a JSON schema of recipes, for editors")
    shape.add_argument("--markdown", action="store_true", help="the reference docs/settings.md")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Print the settings; notices go to stderr, so that the output is a recipe."""
    from orpo.settings.recipe import dump_yaml, load_recipe
    from orpo.settings.schema import known_settings

    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    if args.markdown:
        print(settings_markdown(), end="")
        return 0
    recipe = load_recipe(overrides=args.settings)
    check_recipe(recipe.settings)
    for notice in recipe.notices:
        print(notice, file=sys.stderr)
    if recipe.settings:
        print(dump_yaml(recipe.settings), end="")
    print("# Defaults")
    defaults = {
        name: known.default
        for name, known in known_settings().items()
        if name not in recipe.settings and (known.own or args.all) and _is_writable(known)
    }
    print(dump_yaml(defaults), end="")
    return 0


def _is_writable(known: Known) -> bool:
    """Whether the default is a value, not an expression that only its module can compute."""
    from orpo.settings.schema import convert

    try:
        convert(known.default, known.kind)
    except ValueError:
        return False
    return True


def check_recipe(settings: dict[str, Any]) -> None:
    """Check ranges and combinations of a recipe's settings, inherited ones included.

    Raises:
        ConfigError: As `orpo.settings.config.check_settings`.
    """
    from orpo.settings.config import OrpoSettings, check_settings

    checked = OrpoSettings()
    for name, value in ({"max_steps": -1} | settings).items():
        setattr(checked, name, value)
    check_settings(checked)


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) that editors check recipes against."""
    from orpo.settings.schema import known_settings

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
    from orpo.settings.schema import members

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
    from orpo.settings.schema import describe, known_settings

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
    for name, (theirs, reason) in TRL_DIFFERENCES.items():
        # What TRL turns on and we inherit unset or false, depending on the version of transformers, is off.
        ours = known[name].default or False if theirs is True else known[name].default
        lines.append(f"| `{name}` | {_cell(ours)} | {_cell(theirs)} | {_escape(reason)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
