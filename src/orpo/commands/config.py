"""`orpo config`: the settings of a run, or of all runs, without running anything."""

from __future__ import annotations

import argparse
import json
import sys

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
    shape.add_argument("--all", action="store_true", help="include the defaults of TrainingArguments")
    shape.add_argument("--schema", action="store_true", help="print a JSON schema of recipes, for editors")
    shape.add_argument("--markdown", action="store_true", help="print the reference, docs/settings.md")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Print the settings; notices go to stderr, so that the output is a recipe."""
    from orpo.settings.config import check_recipe
    from orpo.settings.recipe import load_recipe
    from orpo.settings.reference import json_schema, resolved_yaml, settings_markdown

    if args.schema:
        print(json.dumps(json_schema(), indent=2))
    elif args.markdown:
        print(settings_markdown(), end="")
    else:
        recipe = load_recipe(overrides=args.settings)
        check_recipe(recipe.settings)
        for notice in [*recipe.notices, *recipe.idle]:
            print(notice, file=sys.stderr)
        print(resolved_yaml(recipe.settings, inherited=args.all), end="")
    return 0
