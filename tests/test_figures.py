"""Curves drawn as SVG: every point where its value says, round numbers along the edges."""

import itertools
import math
import re
from xml.etree import ElementTree

import hypothesis.strategies as st
import pytest
from hypothesis import given

from orpo.report.figures import Line, figure_html, ticks


def drawn(points, **options):
    page = figure_html("A & B", "caption", [Line(points, "run", options.pop("position", 0))], [], **options)
    return ElementTree.fromstring(re.search("<svg.*</svg>", page)[0])


def places(svg):
    """Of the marks: what is drawn, as seen from its labels."""
    marks = [(float(mark.get("cx")), float(mark.get("cy"))) for mark in svg.iter("circle")]
    texts = [
        (mark.text, float(mark.get("x")), float(mark.get("y")))
        for mark in svg.iter("text")
        if mark.text[-1] in "0123456789%"
    ]
    return marks, texts


def value_of(text):
    number = float(text.replace(",", "").replace("\N{MINUS SIGN}", "-").rstrip("%"))
    return number / 100 if text.endswith("%") else number


@pytest.mark.parametrize("percent", [False, True])
def test_points_lie_where_the_labels_say(percent):
    points = [(0, -0.2, None), (10, 0.31, None), (30, 0.9, None)]
    marks, texts = places(drawn(points, percent=percent))
    bottom = max(y for _, _, y in texts)
    across = [(value_of(text), x) for text, x, y in texts if y == bottom]
    up = [(value_of(text), y - 4) for text, x, y in texts if y != bottom]
    for (step, value, _), (x, y) in zip(points, marks, strict=True):
        (a, x_a), (b, x_b) = across[0], across[-1]
        assert step == pytest.approx(a + (x - x_a) / (x_b - x_a) * (b - a), abs=0.05)
        (a, y_a), (b, y_b) = up[0], up[-1]
        assert value == pytest.approx(a + (y - y_a) / (y_b - y_a) * (b - a), abs=0.005)


def test_a_value_that_is_not_finite_leaves_a_gap():
    svg = drawn(
        [(0, 1.0, 0.1), (1, math.nan, 0.1), (2, 2.0, 0.1), (3, math.inf, None), (4, 2.0, 0.1), (5, 3.0, 0.1)]
    )
    (curve,) = [path for path in svg.iter("path") if path.get("stroke-width") == "2"]
    assert curve.get("d").count("M") == 3 and curve.get("d").count("L") == 1
    assert len(list(svg.iter("circle"))) == 4 and "nan" not in ElementTree.tostring(svg, "unicode")
    assert figure_html("t", "c", [Line([(0, math.nan, None)], "run", 0)], []) == ""


def test_a_band_is_one_error_wide_and_other_runs_are_dashed():
    svg = drawn([(0, 1.0, 0.5), (10, 2.0, 0.5)], position=1)
    (curve,) = [path for path in svg.iter("path") if path.get("stroke-width") == "2"]
    (band,) = [path for path in svg.iter("path") if path.get("opacity")]
    assert curve.get("stroke-dasharray") and svg.get("aria-label") == "A & B"
    high, _, _, low = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", band.get("d"))]
    first, second = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", curve.get("d"))]
    assert low - high == pytest.approx(first - second, abs=0.2), "2 x 0.5 is as high as from 1 to 2"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8), st.booleans())
def test_ticks_are_round_and_few_and_inside(low, span, most, whole):
    found = ticks(low, low + span, most, whole=whole)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * span - 1e-9 <= tick <= low + span + 1e-6 * span + 1e-9 for tick in found)
    if len(found) > 1:
        steps = [b - a for a, b in itertools.pairwise(found)]
        assert max(steps) - min(steps) <= 1e-9 * max(map(abs, (*found, span)))
        digit = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert min(abs(digit - one) for one in (1, 2, 5)) < 1e-3
    if whole:
        assert all(tick == round(tick) for tick in found)
