"""The result of a suite as a table for a terminal."""

from __future__ import annotations

from orpo.engine.metrics import write_change_with_unit, write_with_unit
from orpo.suites.job import SuiteResult
from orpo.suites.measured import Value


def print_result(result: SuiteResult) -> None:
    """Print a row for each metric, with the number of items it is over; with two models, the change too."""
    from rich.console import Console
    from rich.table import Table

    columns, before = result.measured.columns, None if result.before is None else result.before.values()
    title = result.suite if before is not None else f"{result.model}: {result.suite}"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    if before is None:
        names: list[str] = ["mean"]
    else:
        names = [str(result.first), result.model, "change"]
    for name in (*names, "n"):
        table.add_column(name, justify="right", overflow="fold")
    changes = result.changes
    for name, value in result.metrics.items():
        unit = columns[name].unit
        cells = [str(write_with_unit(value.figure, unit))]
        if before is not None:
            change = changes.get(name)
            cells = [
                _written(before.get(name), unit),
                *cells,
                str(write_change_with_unit(None if change is None else change.figure, unit)),
            ]
        table.add_row(name, *cells, f"{value.n:,}")
    Console().print(table)
    if result.path is not None:
        print(f"saved as {result.path}")


def _written(value: Value | None, unit: str) -> str:
    return str(write_with_unit(None if value is None else value.figure, unit))
