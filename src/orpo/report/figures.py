"""Curves as inline SVG: text stays text, and colours are CSS variables, which follow light and dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Points = Sequence[tuple[int, float, float | None]]
"""Step, value and standard error, where it has one."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its points, its colour, and the run it belongs to (0: this one)."""

    points: Points
    colour: str
    position: int


# matplotlib writes plain colours; each of these stands for a CSS variable and is replaced in the SVG.
METHODS = tuple(f"m{number}" for number in range(6))
"""Colours of curves that stand side by side, each of a method of its own."""
_COLOURS = {"chosen": "#0a0b01", "rejected": "#0a0b02", "run": "#0a0b03", "other": "#0a0b04"} | {
    name: f"#0a0b1{number}" for number, name in enumerate(METHODS)
}
_INK, _GRID = "#0a0b05", "#0a0b06"
_VARIABLES = {
    **{code: f"var(--{name})" for name, code in _COLOURS.items()},
    _INK: "var(--muted)",
    _GRID: "var(--line)",
}
_DASHES = ((0, ()), (0, (5, 2.5)), (0, (1.5, 2)))


def figure_html(
    title: str,
    caption: str,
    lines: Sequence[Line],
    legend: Sequence[str],
    *,
    percent: bool = False,
    marks: Sequence[int] = (),
    across: str = "optimizer step",
) -> str:
    """A figure with its title, legend and caption; nothing where there is no curve.

    Args:
        title: Above the figure, and for readers who do not see it.
        caption: Below it.
        lines: The curves.
        legend: The keys, as HTML.
        percent: Whether values are shares.
        marks: Steps after which another stage begins.
        across: What the points go along.
    """
    if not lines:
        return ""
    keys = f'<div class="legend">{"".join(legend)}</div>' if legend else ""
    return (
        f"<figure><h3>{escape(title)}</h3>{keys}{_svg(title, lines, percent, marks, across)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(title: str, lines: Sequence[Line], percent: bool, marks: Sequence[int], across: str) -> str:
    """The curves as inline SVG whose text is text and whose colours are CSS variables."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5}):
        figure = Figure(figsize=(5.0, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        for step in marks:
            axes.axvline(step, color=_GRID, linewidth=1.2)
        axes.set_xlabel(across, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.margins(x=0.02)
        buffer = io.StringIO()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">',
        svg,
    )
    for code, variable in _VARIABLES.items():
        svg = svg.replace(code, variable)
    return svg


def _draw(axes: Any, line: Line) -> None:
    colour = _COLOURS[line.colour]
    dashes = _DASHES[min(line.position, 2)]
    steps, values, errors = zip(*line.points, strict=True)
    marker = "o" if len(steps) <= 40 else None
    axes.plot(steps, values, color=colour, linewidth=2, linestyle=dashes, marker=marker, markersize=3.5)
    if None not in errors:
        low = [value - error for value, error in zip(values, errors, strict=True)]
        high = [value + error for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
