"""The result of a suite as lines for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from orpo.engine.metrics import write_change_with_unit, write_with_unit
from orpo.suites.job import SuiteResult
from orpo.suites.measured import Value

_WIDTH = 80


def lines(result: SuiteResult) -> list[str]:
    """A row for each metric, with the number of items it is over; with two models, the change too.

    A metric of a group of items stands under that of all of them.
    """
    columns, before = result.measured.columns, None if result.before is None else result.before.values()
    models = result.model if before is None else f"{result.first} (first), {result.model} (second)"
    rows = [["", "mean", "n"] if before is None else ["", "first", "second", "change", "n"]]
    changes, order = result.changes, list(columns)
    for name, value in sorted(
        result.metrics.items(), key=lambda one: order.index(result.measured.whole(one[0]))
    ):
        unit = columns[name].unit
        cells = [_written(value, unit)]
        if before is not None:
            change = changes.get(name)
            moved = write_change_with_unit(None if change is None else change.figure, unit)
            cells = [_written(before.get(name), unit), *cells, str(moved)]
        whole = result.measured.whole(name)
        title = name if whole == name else f"  {name[len(whole) + 2 : -1]}"
        rows.append([title, *cells, f"{value.n:,}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(
            [f"{row[0]:<{widths[0]}}"]
            + [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    saved = [f"saved as {result.path}"] if result.path is not None else []
    return [*textwrap.wrap(f"{result.suite}: {models}", _WIDTH), *table, *saved]


def _written(value: Value | None, unit: str) -> str:
    return str(write_with_unit(None if value is None else value.figure, unit))
