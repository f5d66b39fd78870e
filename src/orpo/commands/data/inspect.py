"""`orpo data inspect`: what a data set is, what is wrong with it, and what a model could learn from it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from orpo.console import LongWork, say
from orpo.errors import ConfigError


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the word to the command line."""
    parser = words.add_parser(
        "inspect",
        help="print what a data set is, what is wrong with it and what trivial features predict",
        description="Look at a whole data set before training: format, rows, lengths, cost in tokens, what "
        "max_length drops, duplicates and contradictions, overlap between splits and with evaluation sets, "
        "broken text, refusals, and what a model could learn without learning the task.",
        epilog="Any setting of a recipe is accepted too: --max_length 1024, --data_format hh, ...",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", help="local file or folder, or hub name of the pairs")
    parser.add_argument("--model", metavar="M", help="run directory, model or adapter, for lengths in tokens")
    parser.add_argument("--recipe", metavar="R", help="recipe, or run directory, whose settings are used")
    parser.add_argument("--split", help="split of the data (default: all of a file, else train)")
    parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="F",
        help="evaluation sets whose questions are looked for in the data",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write inspect.html and inspect.json into DIR"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Look, print, and write page and JSON."""
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides=[*args.settings, "--dataset_name", args.data])
    recipe.say_notices(error=True)
    if args.out is not None:
        _make(args.out)
    from orpo.curation.inspection import inspect_data
    from orpo.data.stages import following
    from orpo.run.directory import write_json

    with LongWork() as work, following(work):
        found = inspect_data(
            args.data,
            args.model,
            split=args.split,
            against=args.against,
            progress=work,
            **recipe.settings,
        )
    if args.json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        width = shutil.get_terminal_size().columns
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign must not end the command
        print("\n".join(found.lines(width)))
    if args.out is None:
        say("\nadd --out DIR for the same as a page (inspect.html) and as inspect.json")
        return 0
    page = args.out / "inspect.html"
    page.write_text(found.page(), encoding="utf-8", errors="replace")
    write_json(args.out / "inspect.json", found.to_json())
    say(f"\npage        {page}")
    return 0


def _make(folder: Path) -> None:
    """Make the folder before the work, so that a mistake is said at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from None
