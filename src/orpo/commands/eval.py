"""`orpo eval MODEL [OTHER]`: what a model prefers on held-out pairs, or what suites say; two compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orpo.console import LongWork
from orpo.errors import ConfigError
from orpo.suites.suite_options import add_suites, check_no_suites, run_chosen

if TYPE_CHECKING:
    from orpo.evaluation.comparison import Comparison
    from orpo.evaluation.preferences import Result


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo eval` to the command line."""
    parser = words.add_parser(
        "eval",
        help="score held-out pairs, or run suites; two models compared",
        description="Score preference pairs with the model of a run directory, or with any model or adapter. "
        "With two, compare them pair by pair, both with the settings of the second. Or run suites, whose "
        "answers and scores are kept: the same command goes on where it was stopped.",
        usage="orpo eval MODEL [OTHER] (--data FILE | --suite NAMES) [options] [--KEY VALUE ...]",
        epilog="Any setting of a recipe is accepted too: --max_length 1024, --data_format hh, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="run directory, model or adapter folder, or hub name; one or two; for suites endpoint:URL too",
    )
    parser.add_argument("--data", metavar="FILE", help="local file or hub name of the pairs")
    parser.add_argument("--split", default=None, help="split of a hub data set (default: test)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=512, help="pairs packed together")
    parser.add_argument("--name", help="save the result in RUN under this name (default: name of the data)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    add_suites(parser)
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, save."""
    from orpo.settings.recipe import load_recipe

    settings = load_recipe(overrides=args.settings).settings
    if len(args.models) > 2:
        raise ConfigError(f"eval compares two models; {len(args.models)} are named")
    if args.data is not None and args.suite is not None:
        raise ConfigError("--data and --suite are both given; leave one out, or write --suite pairs:FILE")
    if args.data is None and args.suite is None:
        raise ConfigError("name what to evaluate on: --data FILE, or --suite NAMES (pairs:FILE is one)")
    if args.suite is not None:
        return run_chosen(args, settings)
    check_no_suites(args)
    from orpo.data.stages import following
    from orpo.evaluation.comparison import Comparison, compare_models
    from orpo.evaluation.preferences import evaluate
    from orpo.evaluation.table import print_comparison, print_table

    options = {"split": args.split, "name": args.name, "batch_size": args.batch_size, "quiet": args.json}
    found: Result | Comparison
    with _progress(silent=args.json) as progress, LongWork() as work, following(work):
        options |= settings | {"progress": progress}
        if len(args.models) == 1:
            found = evaluate(args.models[0], args.data, **options)
        else:
            first, second = args.models
            found = compare_models(first, second, args.data, **options)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
        return 0
    if isinstance(found, Comparison):
        print_comparison(found)
    else:
        print_table(found)
    if found.path is not None:
        print(f"saved as {found.path}")
    return 0


@contextmanager
def _progress(*, silent: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, which disappears when the work is done."""
    if silent or not sys.stdout.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
