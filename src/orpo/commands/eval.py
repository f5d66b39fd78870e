"""`orpo eval MODEL [OTHER] --data FILE`: what a model prefers on held-out pairs, or two compared by pair."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orpo.console import LongWork, say_item
from orpo.errors import ConfigError

if TYPE_CHECKING:
    from orpo.evaluation.comparison import Comparison
    from orpo.evaluation.preferences import Evaluation, Result


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo eval` to the command line."""
    parser = words.add_parser(
        "eval",
        help="score held-out pairs: accuracy, margins, log odds, NLL",
        description="Score preference pairs with the model of a run directory, or with any model or adapter. "
        "With two, compare them pair by pair, both with the settings of the second.",
        usage="orpo eval MODEL [OTHER] --data FILE [options] [--KEY VALUE ...]",
        epilog="Any setting of a recipe is accepted too: --max_length 1024, --data_format hh, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="run directory, model or adapter folder, or hub name; one or two",
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="local file or hub name of the pairs")
    parser.add_argument("--split", default=None, help="split of a hub data set (default: test)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=512, help="pairs packed together")
    parser.add_argument("--name", help="save the result in RUN under this name (default: name of the data)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, save."""
    from orpo.settings.recipe import load_recipe

    settings = load_recipe(overrides=args.settings).settings
    from orpo.data.stages import following
    from orpo.evaluation.comparison import Comparison, compare_models
    from orpo.evaluation.preferences import evaluate

    if len(args.models) > 2:
        raise ConfigError(f"eval compares two models; {len(args.models)} are named")
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
        _print_comparison(found)
    else:
        _print_table(found)
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


def _print_table(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from orpo.engine.metrics import metric_named, write_figure

    whole = result.evaluation
    columns: dict[str, Evaluation] = {"all pairs": whole} | (whole.groups if len(whole.groups) > 1 else {})
    table = Table(title=f"{result.model} on {result.data}", title_justify="left")
    table.add_column("")
    for name, column in columns.items():
        table.add_column(f"{name} ({column.num_pairs:,})", justify="right")
    for name in whole.figures:
        cells = (str(write_figure(name, column.figures.get(name))) for column in columns.values())
        table.add_row(metric_named(name).title, *cells)
    Console().print(table)


def _print_comparison(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from orpo.engine.metrics import metric_named, write_change, write_figure

    change = found.change
    table = Table(title=f"{change.num_pairs:,} pairs of {found.second.data}", title_justify="left")
    for title in ("", found.first.model, found.second.model, "change"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for name, figure in change.after.items():
        both = (write_figure(name, change.before.get(name)), write_figure(name, figure))
        cells = (*map(str, both), str(write_change(name, change.change.get(name))))
        table.add_row(metric_named(name).title, *cells)
    Console().print(table)
    say_item("verdict", found.sentence)
