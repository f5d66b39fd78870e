"""A run as one self-contained HTML page: what was trained, on what, how it went, and what it says.

Curves are inline SVG, so that the page needs no network and can be mailed; colours are CSS variables, so that
it follows the reader's light or dark mode. What the run directory lacks, the page leaves out.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from orpo.run.directory import Run, Samples, is_number, read_json, read_run

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as the page shows it.

    Attributes:
        name: Name in metrics.jsonl, without the prefix `eval_`.
        title: Name in the page.
        better: +1 where larger is better, -1 where smaller is, 0 where neither.
        percent: Shown as a percentage.
    """

    name: str
    title: str
    better: int
    percent: bool = False


METRICS = (
    Metric("accuracy", "Preference accuracy", +1, percent=True),
    Metric("log_odds_ratio", "Log odds ratio", +1),
    Metric("margin", f"Margin (chosen {MINUS} rejected)", +1),
    Metric("chosen_logprob", "Chosen log-prob", +1),
    Metric("rejected_logprob", "Rejected log-prob", -1),
    Metric("nll", "NLL", -1),
    Metric("odds_ratio_loss", "Odds-ratio loss", -1),
    Metric("loss", "Loss", -1),
)
_SINGLE_CURVES = (
    (
        "log_odds_ratio",
        "Log odds ratio",
        "How much likelier, in log odds, a chosen answer is than a rejected one.",
    ),
    (
        "accuracy",
        "Preference accuracy",
        "Share of held-out pairs whose chosen answer has the higher log-prob.",
    ),
    ("nll", "NLL", "Negative log-likelihood of a token of the chosen side."),
    (
        "odds_ratio_loss",
        "Odds-ratio loss",
        "The part of the loss that compares the two answers; ln 2 where it cannot.",
    ),
)


Figures = Mapping[str, Sequence[float]]
"""Name of a metric -> its mean and the standard error of that."""


def write_report(
    run_dir: str | Path,
    contrast: Mapping[str, str | Path] | None = None,
    *,
    test: Mapping[str, Figures] | None = None,
    note: str | None = None,
) -> Path:
    """Write `report.html` into a run directory, and into `report.json` what the page was asked to show.

    Args:
        run_dir: The run; its name is `ORPO` in the page where there is a contrast.
        contrast: Name -> run directory of other runs to draw in the same axes, `{"SFT": ...}`.
        test: What pairs that no training has seen say, by model: before training, others, this run.
        note: A paragraph under the title, as plain text.

    What is None is as it was when the page was last written.

    Returns:
        Path of the page.

    Raises:
        DataError: As `read_run`.
    """
    run_dir = Path(run_dir)
    asked = read_json(run_dir / "report.json", {})
    if contrast is not None:
        asked["contrast"] = {name: os.path.relpath(other, run_dir) for name, other in contrast.items()}
    else:  # a run that has gone since is left out
        asked["contrast"] = {
            name: other for name, other in asked.get("contrast", {}).items() if (run_dir / other).is_dir()
        }
    if test is not None:
        asked["test"] = {model: dict(figures) for model, figures in test.items()}
    if note is not None:
        asked["note"] = note
    others = [read_run(run_dir / other, name) for name, other in asked["contrast"].items()]
    run = read_run(run_dir, "ORPO" if others else None)
    page = _page(run_dir.resolve().name, run, others, asked.get("test", {}), asked.get("note", ""))
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    if any(asked.values()):
        (run_dir / "report.json").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return path


# Page


def _page(title: str, run: Run, others: list[Run], test: Mapping[str, Figures], note: str) -> str:
    css = files("orpo.report").joinpath("report.css").read_text(encoding="utf-8")
    model = str(run.recipe.get("model_name_or_path") or "")
    subtitle = " · ".join(
        part
        for part in (
            model and f"from {Path(model).name or model}",
            _data_name(run.recipe.get("dataset_name")),
            f"{datetime.now():%Y-%m-%d %H:%M}",
        )
        if part
    )
    main_set, *more_sets = run.evaluation_sets()
    more_tables = "".join(_before_and_after(run.of_set(name), [], name) for name in more_sets)
    shown, beside = run.of_set(main_set), [other.of_set(main_set) for other in others]
    sections = [
        _overview(shown, beside, test, main_set, more_tables),
        _saved_evaluations([run, *others]),
        _curves(shown, beside),
        _samples(run.samples),
        _mapping_section("Data", "data", run.data, "What was read, and what was left out and why."),
        _mapping_section("Configuration", "configuration", run.recipe, "The resolved recipe."),
        _mapping_section("Environment", "environment", run.environment, "What it ran on."),
    ]
    note_html = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)} · ORPO report</title>
<style>
{css}</style>
</head>
<body>
<main>
<header>
<p class="kicker">ORPO training report</p>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(subtitle)}</p>
{note_html}
</header>
{"".join(sections)}
<footer>Made by <code>orpo report</code>; this page is self-contained and loads nothing.</footer>
</main>
</body>
</html>
"""


def _data_name(name: Any) -> str:
    names = list(name) if isinstance(name, (list, dict)) else [name] if name else []
    return ", ".join(Path(str(one)).name for one in names)


def _overview(
    run: Run, others: list[Run], test: Mapping[str, Figures], set_name: str, more_tables: str
) -> str:
    """The headline numbers, of test pairs where there are any, and the tables they are from."""
    first, last = run.first_evaluation(), run.final_evaluation()
    if first is None or last is None:
        return '<section><p class="empty">No evaluation has been logged yet.</p></section>'
    validation = _before_and_after(
        run, others, set_name or ("Validation pairs" if test else "Held-out pairs")
    )
    tested = {name: _as_line(figures) for name, figures in test.items()}
    shown = list(tested.values()) or [first, last]
    tiles = "".join(_tile(metric, shown[0], shown[-1]) for metric in METRICS[:2] + METRICS[3:5])
    caption = "No training and no choice of settings has seen these pairs; ± one standard error over prompts."
    columns = list(tested.items())
    test_table = _numbers_table("Test pairs", columns, caption, one_objective=False) if tested else ""
    tables = test_table + validation + more_tables
    return f'<section id="overview"><div class="tiles">{tiles}</div>{tables}</section>'


def _before_and_after(run: Run, others: list[Run], title: str) -> str:
    first, last = run.first_evaluation(), run.final_evaluation()
    if first is None or last is None:
        return ""
    compared = [(other.name, line) for other in others if (line := other.final_evaluation())]
    return _numbers_table(
        f"{title}, before and after",
        [("Before", first), *compared, (run.name if compared else "After", last)],
        f"Evaluated at step {_integer(first['step'])} and step {_integer(last['step'])}; ± one standard error"
        " over examples. Log-probs are means per token of a response.",
        one_objective=not compared,
    )


def _saved_evaluations(runs: list[Run]) -> str:
    """What `orpo eval` has saved in the run directory, one table a data set; beside it the other runs."""
    run = runs[0]
    tables = []
    for name, result in run.evaluations_saved.items():
        columns = [
            (
                one.name,
                {f"eval_{key}": value for key, value in one.evaluations_saved[name]["metrics"].items()},
            )
            for one in [*runs[1:], run]
            if name in one.evaluations_saved
        ]
        caption = (
            f"{_integer(result['num_pairs'])} pairs of {result['data']}; ± one standard error over examples."
        )
        tables.append(
            _numbers_table(f"Evaluation: {name}", columns, caption, one_objective=len(columns) == 1)
        )
    return f'<section id="evaluations">{"".join(tables)}</section>' if tables else ""


def _as_line(figures: Figures) -> dict[str, float]:
    """Figures in the form of a line of metrics.jsonl."""
    line: dict[str, float] = {}
    for name, (mean, error) in figures.items():
        line |= {f"eval_{name}": mean, f"eval_{name}_se": error}
    return line


def _numbers_table(
    title: str, columns: Sequence[tuple[str, Mapping[str, Any]]], caption: str, *, one_objective: bool
) -> str:
    """A metric a row; those of the last column are shown, the loss only where all minimise the same."""
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    rows = "".join(
        f'<tr><th scope="row">{metric.title}</th>'
        + "".join(f"<td>{_with_error(metric, line)}</td>" for _, line in columns)
        + "</tr>"
        for metric in METRICS
        if f"eval_{metric.name}" in columns[-1][1] and (one_objective or metric.name != "loss")
    )
    return f"""
<h2>{escape(title)}</h2>
<div class="scroll"><table class="numbers">
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p class="caption">{escape(caption)}</p>
"""


def _integer(value: Any) -> str:
    return f"{int(value):,}"


def _tile(metric: Metric, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    before, after = first.get(f"eval_{metric.name}"), last.get(f"eval_{metric.name}")
    if not is_number(after):
        return ""
    assert after is not None
    change = ""
    if is_number(before) and first is not last:
        assert before is not None
        good = (after - before) * metric.better > 0
        text = f"{100 * (after - before):+.1f} points" if metric.percent else f"{after - before:+.3f}"
        change = f'<span class="{"up" if good else "down"}">{text.replace("-", MINUS)}</span>'
    return (
        f'<div class="tile"><span class="label">{metric.title}</span>'
        f'<span class="value">{_number(metric, after)}</span>{change}</div>'
    )


def _number(metric: Metric, value: Any) -> str:
    if not is_number(value):
        return "\N{EN DASH}"
    return f"{100 * value:.1f} %" if metric.percent else f"{value:.3f}".replace("-", MINUS)


def shown_number(metric: Metric, line: Mapping[str, Any]) -> str:
    """A held-out number with its standard error, as plain text for a terminal."""
    text = _number(metric, line.get(f"eval_{metric.name}")).replace(MINUS, "-")
    error = line.get(f"eval_{metric.name}_se")
    if not is_number(error):
        return text
    assert error is not None
    return f"{text} ± {100 * error:.1f}" if metric.percent else f"{text} ± {error:.3f}"


def _with_error(metric: Metric, line: Mapping[str, Any]) -> str:
    text = _number(metric, line.get(f"eval_{metric.name}"))
    error = line.get(f"eval_{metric.name}_se")
    if not is_number(error):
        return text
    assert error is not None
    return (
        f"{text}<small> ± {100 * error:.1f}</small>"
        if metric.percent
        else f"{text}<small> ± {error:.3f}</small>"
    )


def _curves(run: Run, others: list[Run]) -> str:
    figures = [_logprob_figure(run, others)]
    for name, title, caption in _SINGLE_CURVES:
        figures.append(_held_out_figure(name, title, caption, run, others))
    figures.append(_training_figure(run, others))
    drawn = "".join(figures)
    if not drawn:
        return ""
    return f'<section id="curves"><h2>Curves</h2><div class="figures">{drawn}</div></section>'


def _logprob_figure(run: Run, others: list[Run]) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        for side in ("chosen", "rejected"):
            steps, values, errors = _best_series(one, f"{side}_logprob")
            if steps:
                lines.append(Line(steps, values, errors, side, position))
                name = f"{one.name}, {side}" if others else side
                legend.append(_legend(name, side, position))
    caption = "Mean log-prob of a token of the held-out answers; the band is one standard error."
    return _figure("Chosen and rejected answers", caption, lines, legend)


def _held_out_figure(name: str, title: str, caption: str, run: Run, others: list[Run]) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        steps, values, errors = _best_series(one, name)
        if steps:
            lines.append(Line(steps, values, errors, "run" if position == 0 else "other", position))
            legend.append(_legend(one.name, "run" if position == 0 else "other", position))
    percent = name == "accuracy"
    return _figure(title, caption, lines, legend if others else [], percent=percent)


def _training_figure(run: Run, others: list[Run]) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        steps, values = one.series("loss")
        if steps:
            kind = "run" if position == 0 else "other"
            lines.append(Line(steps, values, [], kind, position))
            legend.append(_legend(one.name, kind, position))
    caption = "Loss of the training steps. Different objectives have different losses."
    return _figure(
        "Training loss", caption if others else "Loss of the training steps.", lines, legend if others else []
    )


def _best_series(run: Run, name: str) -> tuple[list[float], list[float], list[float]]:
    """Held-out values with their standard errors, or the training values where nothing was held out."""
    steps, values = run.series(f"eval_{name}")
    if not steps:
        return (*run.series(name), [])
    _, errors = run.series(f"eval_{name}_se")
    return steps, values, errors if len(errors) == len(values) else []


def _legend(name: str, kind: str, position: int) -> str:
    return f'<span class="key {kind} p{min(position, 2)}">{escape(name)}</span>'


def _samples(samples: Samples) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        columns = "".join(
            f"<div><h4>{escape(str(name))}</h4><p>{escape(str(text).strip()) or '<em>(empty)</em>'}</p></div>"
            for name, text in _few(sample["answers"]).items()
        )
        prompt = sample.get("prompt", "")
        text = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", m)) for m in prompt)
        cards.append(
            f'<article><p class="prompt">{escape(text)}</p><div class="answers">{columns}</div></article>'
        )
    return f"""
<section id="samples"><h2>Sample answers</h2>
<p class="caption">Generated by the models of this page. They show style, not knowledge.</p>
{"".join(cards)}
</section>
"""


def _few(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Of the answers during training, `step 0`, `step 20`, ..., the first and the last; all others."""
    steps = [name for name in answers if str(name).startswith("step ")]
    return {name: text for name, text in answers.items() if name not in steps[1:-1]}


def _mapping_section(title: str, anchor: str, values: Mapping[str, Any], caption: str) -> str:
    """A section of names and values; a mapping of mappings becomes one part for each."""
    if not values:
        return ""
    parts = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    if len(parts) == len(values):
        lists = "".join(f"<h3>{escape(str(key))}</h3>{_list(value)}" for key, value in parts.items())
    else:
        lists = _list(values)
    return f"""
<section id="{anchor}"><details open><summary><h2>{title}</h2></summary>
<p class="caption">{caption}</p>
{lists}
</details></section>
"""


def _list(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_shown(value)}</dd></div>" for name, value in _flat(values)
    )
    return f'<dl class="pairs">{items}</dl>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values with those of inner mappings under `outer / inner`; what is empty is left out."""
    for key, value in values.items():
        name = prefix + (Path(key).name if str(key).startswith("/") else str(key))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} / ")
        elif value is not None and value != []:
            yield name, value


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        more = f", ... ({len(value):,} in all)" if len(value) > 12 else ""
        return escape(", ".join(str(item) for item in value[:12]) + more)
    return escape(str(value))


# Figures


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: points, standard errors (or none), colour, and the run it belongs to (0: this one)."""

    steps: Sequence[float]
    values: Sequence[float]
    errors: Sequence[float]
    colour: str
    position: int


# matplotlib writes plain colours; each of these stands for a CSS variable and is replaced in the SVG.
_COLOURS = {"chosen": "#0a0b01", "rejected": "#0a0b02", "run": "#0a0b03", "other": "#0a0b04"}
_INK, _GRID = "#0a0b05", "#0a0b06"
_VARIABLES = {
    **{code: f"var(--{name})" for name, code in _COLOURS.items()},
    _INK: "var(--muted)",
    _GRID: "var(--line)",
}
_DASHES = ((0, ()), (0, (5, 2.5)), (0, (1.5, 2)))


def _figure(
    title: str, caption: str, lines: Sequence[Line], legend: Sequence[str], *, percent: bool = False
) -> str:
    if not lines:
        return ""
    keys = f'<div class="legend">{"".join(legend)}</div>' if legend else ""
    return (
        f"<figure><h3>{escape(title)}</h3>{keys}{_svg(title, lines, percent=percent)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(title: str, lines: Sequence[Line], *, percent: bool) -> str:
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
        axes.set_xlabel("optimizer step", color=_INK)
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
    marker = "o" if len(line.steps) <= 40 else None
    axes.plot(
        line.steps, line.values, color=colour, linewidth=2, linestyle=dashes, marker=marker, markersize=3.5
    )
    if line.errors:
        low = [value - error for value, error in zip(line.values, line.errors, strict=True)]
        high = [value + error for value, error in zip(line.values, line.errors, strict=True)]
        axes.fill_between(line.steps, low, high, color=colour, alpha=0.13, linewidth=0)
