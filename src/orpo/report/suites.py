"""What suites (`orpo eval --suite`) have found, on the page of a run: a table for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from orpo.engine.metrics import Written, write_change_with_unit, write_with_unit
from orpo.html_page import typeset
from orpo.run.log import Figure


def suites_section(suites: Sequence[Mapping[str, Any]]) -> str:
    """A table for each: metrics with errors and numbers of items, and what changed from another model."""
    tables = "".join(_table(one) for one in suites if one.get("metrics"))
    return f'<section id="suites"><h2>Suites</h2>{tables}</section>' if tables else ""


def _table(suite: Mapping[str, Any]) -> str:
    metrics, other = suite["metrics"], suite.get("compared_with")
    before, change = (other[key] for key in ("metrics", "change")) if other else ({}, {})
    heads = ["Before", "After", "Change", "Items"] if other else ["Mean", "Items"]
    rows = ""
    for name, value in metrics.items():
        unit = value.get("unit", "number")
        cells = [_cell(write_with_unit(_figure(value), unit))]
        if other:
            moved = write_change_with_unit(_figure(change.get(name)), unit)
            cells = [_cell(write_with_unit(_figure(before.get(name)), unit)), *cells, _cell(moved)]
        cells.append(f"{value['n']:,}")
        told = "".join(f"<td>{one}</td>" for one in cells)
        rows += f'<tr><th scope="row">{escape(name)}</th>{told}</tr>'
    compared = ""
    if other:
        compared = f" Before: {escape(str(other['model']))}; a change is over the items that both have."
    said = "".join(f" {escape(notice)}." for notice in suite.get("notices", []))
    return f"""
<h3>{escape(str(suite["suite"]))}</h3>
<div class="scroll"><table class="numbers">
<thead><tr><td></td>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p class="caption">± one standard error over items.{compared}{said}</p>
"""


def _figure(value: Mapping[str, Any] | None) -> Figure | None:
    return None if value is None else Figure(value["mean"], value.get("se"))


def _cell(written: Written) -> str:
    return escape(typeset(str(written)))
