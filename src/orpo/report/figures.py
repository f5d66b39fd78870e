"""Curves as inline SVG: text stays text, and colours are CSS variables, which follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[int, float, float | None]]
"""Step, value and standard error, where it has one."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: its points, its colour (a CSS variable), and the run it belongs to (0: this one)."""

    points: Points
    colour: str
    position: int


METHODS = tuple(f"m{number}" for number in range(6))
"""Colours of curves that stand side by side, each of a method of its own."""
_WIDTH, _HEIGHT = 480, 280
_TOP, _RIGHT, _BOTTOM = 10, 12, 44
_CHARACTER = 7
"""Width of a digit, in units of the picture."""
_DASHES = ("", ' stroke-dasharray="7 3.5"', ' stroke-dasharray="2 2.6"')
_MARKED = 40
"""Points of a curve that are marked each, at most."""


def figure_html(
    title: str,
    caption: str,
    lines: Sequence[Line],
    legend: Sequence[str],
    *,
    percent: bool = False,
    across: str = "optimizer step",
    marks: Sequence[int] = (),
) -> str:
    """A figure with its title, legend and caption; nothing where there is no curve.

    Args:
        title: Above the figure, and for readers who do not see it.
        caption: Below it.
        lines: The curves; points whose value is not finite leave a gap.
        legend: The keys, as HTML.
        percent: Whether values are shares.
        across: What the points go along.
        marks: Steps after which another stage begins.
    """
    if not any(math.isfinite(value) for line in lines for _, value, _ in line.points):
        return ""
    keys = f'<div class="legend">{"".join(legend)}</div>' if legend else ""
    return (
        f"<figure><h3>{escape(title)}</h3>{keys}{_svg(title, lines, percent, across, marks)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(title: str, lines: Sequence[Line], percent: bool, across: str, marks: Sequence[int]) -> str:
    steps = [float(step) for line in lines for step, value, _ in line.points if math.isfinite(value)]
    values = [edge for line in lines for _, low, high in _bands(line.points) for edge in (low, high)]
    x_low, x_high = _widened(min(steps), max(steps), 0.02)
    y_low, y_high = _widened(min(values), max(values), 0.05)
    heights = ticks(y_low, y_high, 5)
    labels = _labels(heights, percent=percent)
    left = 14 + _CHARACTER * max(map(len, labels), default=0)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return left + (step - x_low) / (x_high - x_low) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - y_low) / (y_high - y_low) * (bottom - _TOP)

    parts = []
    for height, label in zip(heights, labels, strict=True):
        parts.append(f'<path d="M{left} {y(height):.1f}H{right}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{y(height) + 4:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<path d="M{left} {bottom}H{right}" stroke="var(--line)"/>')
    along = ticks(min(steps), max(steps), 6, whole=True)
    for step, label in zip(along, _labels(along), strict=True):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="{(left + right) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(across)}</text>'
    )
    for step in marks:
        if x_low <= step <= x_high:
            parts.append(f'<path d="M{x(step):.1f} {_TOP}V{bottom}" stroke="var(--muted)" opacity="0.5"/>')
    for line in lines:
        parts += _curve([(x(step), y(value)) for step, value, _ in _finite(line.points)], line)
        edges = [(x(step), y(low), y(high)) for step, low, high in _bands(line.points) if low < high]
        if len(edges) == len(line.points) > 1:
            there = "L".join(f"{at:.1f} {top:.1f}" for at, _, top in edges)
            back = "L".join(f"{at:.1f} {base:.1f}" for at, base, _ in reversed(edges))
            parts.append(f'<path d="M{there}L{back}Z" fill="var(--{line.colour})" opacity="0.13"/>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" font-size="12">'
        f"{''.join(parts)}</svg>"
    )


def _curve(places: Sequence[tuple[float, float]], line: Line) -> Iterable[str]:
    """A line through all points, in pieces where a value is not finite, and marks where there are few."""
    drawn, lasting = "", False
    rest = iter(places)
    for _, value, _ in line.points:
        if not math.isfinite(value):
            lasting = False
            continue
        at, height = next(rest)
        drawn += f"{'L' if lasting else 'M'}{at:.1f} {height:.1f}"
        lasting = True
    ink = f"var(--{line.colour})"
    yield f'<path d="{drawn}" fill="none" stroke="{ink}" stroke-width="2"{_DASHES[min(line.position, 2)]}/>'
    if len(places) <= _MARKED:
        yield "".join(
            f'<circle cx="{at:.1f}" cy="{height:.1f}" r="3" fill="{ink}"/>' for at, height in places
        )


def _finite(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _bands(points: Points) -> list[tuple[int, float, float]]:
    """Each finite value with one standard error below and above, where it has one."""
    found = []
    for step, value, error in _finite(points):
        around = error if error is not None and math.isfinite(error) else 0.0
        found.append((step, value - around, value + around))
    return found


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """A range with a margin on either side; of one value, a range around it."""
    margin = (high - low) * share or max(abs(low) * share, 1e-3)
    return low - margin, high + margin


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, `most` steps apart at most; whole ones on request."""
    rough = max((high - low) / most, 1e-300)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _labels(heights: Sequence[float], *, percent: bool = False) -> list[str]:
    """The numbers with as many digits as tell them apart."""
    step = heights[1] - heights[0] if len(heights) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step * (100 if percent else 1)) + 1e-9))
    written = [f"{height:,.{digits}{'%' if percent else 'f'}}" for height in heights]
    return [text.replace("-", "\N{MINUS SIGN}") for text in written]
