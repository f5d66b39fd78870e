"""A judgement as lines for a terminal of 80 columns."""

from __future__ import annotations

import textwrap

from orpo.engine.metrics import write_with_unit
from orpo.judging.job import Judgement

_WIDTH = 80


def lines(found: Judgement) -> list[str]:
    """What to print."""
    win = found.win
    rows = [("win rate", str(write_with_unit(win.rate, "share")) + _bounds(win.interval))]
    controlled = win.length_controlled
    if controlled is not None:
        rate = f"{100 * controlled.rate:.1f} %{_bounds(controlled.interval)}"
        rows.append(("at equal length", rate if controlled.comparable else f"{rate} *"))
    rows += [
        ("wins", f"{win.wins:,}"),
        ("ties", f"{win.ties:,}"),
        ("losses", f"{win.losses:,}"),
        ("no verdict", f"{len(found.failures):,}"),
        ("mean length", "{:,.0f} characters against {:,.0f}".format(*reversed(win.mean_lengths))),
    ]
    if found.consistent is not None:
        rows.append(("both orders agree", f"{100 * found.consistent:.1f} %"))
    if found.first_shown is not None:
        rows.append(("shown first wins", f"{100 * found.first_shown:.1f} %"))
    width = max(len(name) for name, _ in rows) + 2
    head = f"{found.second} against {found.first}, by {found.by}"
    printed = [*textwrap.wrap(head, _WIDTH), *(f"{name:<{width}}{value}" for name, value in rows)]
    if controlled is not None and not controlled.comparable:
        what = "a fit without AlpacaEval's two files; it compares with no leaderboard"
        printed.append(f"* {what}")
    if found.path is not None:
        printed.append(f"{'written':<{width}}{found.path}")
    return printed


def _bounds(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return ""
    return f"   95 %: {100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
