"""Held-out pairs of one model, or of two, as a table for a terminal."""

from __future__ import annotations

from orpo.console import say, say_item
from orpo.engine.metrics import metric_named, write_change, write_figure
from orpo.evaluation.comparison import Comparison
from orpo.evaluation.preferences import Evaluation, Result


def print_table(result: Result) -> None:
    """Print a row for each metric, and a column for each group of pairs."""
    from rich.console import Console
    from rich.table import Table

    whole = result.evaluation
    columns: dict[str, Evaluation] = {"all pairs": whole} | (whole.groups if len(whole.groups) > 1 else {})
    say(f"{result.model} on {result.data}")  # a title would be folded to the width of the table
    table = Table()
    table.add_column("")
    for name, column in columns.items():
        table.add_column(f"{name} ({column.num_pairs:,})", justify="right")
    for name in whole.figures:
        cells = (str(write_figure(name, column.figures.get(name))) for column in columns.values())
        table.add_row(metric_named(name).title, *cells)
    Console().print(table)


def print_comparison(found: Comparison) -> None:
    """Print both models, the change of each metric, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    change = found.change
    say(f"{change.num_pairs:,} pairs of {found.second.data}")
    table = Table()
    for title in ("", found.first.model, found.second.model, "change"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for name, figure in change.after.items():
        both = (write_figure(name, change.before.get(name)), write_figure(name, figure))
        cells = (*map(str, both), str(write_change(name, change.change.get(name))))
        table.add_row(metric_named(name).title, *cells)
    Console().print(table)
    say_item("verdict", found.sentence)
