"""A run as one self-contained HTML page: what was trained, on what, how it went, and what it says.

Everything is inline, so the page needs no network and can be mailed. What the run directory lacks, the page
leaves out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from orpo.engine.metrics import in_order, metric_named, write_change, write_figure
from orpo.html_page import html_page
from orpo.report.figures import Line, Points, figure_html
from orpo.run.directory import Run, RunDirectory, Samples, read_json, read_run, write_json
from orpo.run.disk import replace_text
from orpo.run.log import Figure, Figures, figures_from_json, figures_to_json
from orpo.run.public import public

_TILES = ("accuracy", "log_odds_ratio", "chosen_logprob", "rejected_logprob")
_CURVES = ("log_odds_ratio", "accuracy", "nll", "odds_ratio_loss")

TestFigures = Mapping[str, Figures]
"""By model, what test pairs say of it: before training, other runs, this run."""


def write_report(
    run_dir: str | Path,
    contrast: Mapping[str, str | Path] | None = None,
    *,
    test: TestFigures | None = None,
    note: str | None = None,
) -> Path:
    """Write the page of a run into its directory, and what it was asked to show next to it.

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
    run_files = RunDirectory(run_dir)
    asked = read_json(run_files.page_request, {})
    if contrast is not None:
        asked["contrast"] = {name: os.path.relpath(other, run_dir) for name, other in contrast.items()}
    else:  # a run that has gone since is left out
        asked["contrast"] = {
            name: other for name, other in asked.get("contrast", {}).items() if (run_dir / other).is_dir()
        }
    if test is not None:
        asked["test"] = {model: figures_to_json(figures) for model, figures in test.items()}
    if note is not None:
        asked["note"] = note
    others = [_for_others(read_run(run_dir / other, name)) for name, other in asked["contrast"].items()]
    run = _for_others(read_run(run_dir, "ORPO" if others else None))
    where = run_files.page_request
    tested = {model: figures_from_json(values, where) for model, values in asked.get("test", {}).items()}
    page = _page(run_dir.resolve().name, run, others, tested, asked.get("note", ""))
    replace_text(run_files.page, page)
    if any(asked.values()):
        write_json(run_files.page_request, asked)
    return run_files.page


def _for_others(run: Run) -> Run:
    """What a page that is mailed may show of a run: no secret, no path of this machine."""
    return replace(
        run,
        recipe=public(run.recipe),
        data=public(run.data),
        environment=public(run.environment),
        saved_evaluations=public(run.saved_evaluations),
    )


# Page


def _page(title: str, run: Run, others: list[Run], test: TestFigures, note: str) -> str:
    css = files("orpo.report").joinpath("report.css").read_text(encoding="utf-8")
    model = str(run.recipe.get("model_name_or_path") or "")
    when = f"{datetime.now():%Y-%m-%d %H:%M}"
    about = (model and f"from {Path(model).name or model}", _data_name(run.recipe.get("dataset_name")), when)
    subtitle = " · ".join(part for part in about if part)
    sections = [
        _overview(run, others, test),
        _saved_evaluations([run, *others]),
        _curves(run, others),
        _samples(run.samples),
        _mapping_section("Data", "data", run.data, "What was read, and what was left out and why."),
        _mapping_section("Configuration", "configuration", run.recipe, "The resolved recipe."),
        _mapping_section("Environment", "environment", run.environment, "What it ran on."),
    ]
    note_html = f'<p class="note">{escape(note)}</p>' if note else ""
    body = f"""<header>
<p class="kicker">ORPO training report</p>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(subtitle)}</p>
{note_html}
</header>
{"".join(sections)}
<footer>Made by <code>orpo report</code>; this page is self-contained and loads nothing.</footer>"""
    return html_page(f"{title} · ORPO report", css, body)


def _data_name(name: Any) -> str:
    names = list(name) if isinstance(name, (list, dict)) else [name] if name else []
    return ", ".join(Path(str(one)).name for one in names)


def _overview(run: Run, others: list[Run], test: TestFigures) -> str:
    """The headline numbers, of test pairs where there are any, and the tables they are from."""
    sets = run.evaluation_sets()
    first, last = run.first_evaluation(sets[0]), run.final_evaluation(sets[0])
    if first is None or last is None:
        return '<section><p class="empty">No evaluation has been logged yet.</p></section>'
    shown = list(test.values()) or [first.metrics, last.metrics]
    tiles = "".join(_tile(name, shown[0], shown[-1]) for name in _TILES)
    tables = "".join(_before_and_after(run, others, name, tested=bool(test)) for name in sets)
    if test:
        caption = (
            "No training and no choice of settings has seen these pairs; ± one standard error over prompts."
        )
        tables = _numbers_table("Test pairs", list(test.items()), caption, one_objective=False) + tables
    if run.shared_prompts:
        warning = f"{run.shared_prompts:,} held-out pairs share a prompt with training pairs; they flatter."
        tables += f'<p class="caption"><strong>{warning}</strong></p>'
    return f'<section id="overview"><div class="tiles">{tiles}</div>{tables}</section>'


def _before_and_after(run: Run, others: list[Run], set_name: str, *, tested: bool) -> str:
    first, last = run.first_evaluation(set_name), run.final_evaluation(set_name)
    if first is None or last is None:
        return ""
    title = set_name or ("Validation pairs" if tested else "Held-out pairs")
    compared = [(other.name, line.metrics) for other in others if (line := other.final_evaluation(set_name))]
    return _numbers_table(
        f"{title}, before and after",
        [("Before", first.metrics), *compared, (run.name if compared else "After", last.metrics)],
        f"{last.num_pairs:,} pairs, evaluated at step {first.step:,} and step {last.step:,}; "
        "± one standard error over prompts. Log-probs are means per token of a response.",
        one_objective=not compared,
    )


def _saved_evaluations(runs: list[Run]) -> str:
    """What `orpo eval` has saved in the run directory, a table for each data set, with the other runs'."""
    run = runs[0]
    tables = []
    for name, result in run.saved_evaluations.items():
        columns = [
            (one.name, _saved_figures(one, name)) for one in [*runs[1:], run] if name in one.saved_evaluations
        ]
        caption = f"{result['num_pairs']:,} pairs of {result['data']}; ± one standard error over prompts."
        tables.append(
            _numbers_table(f"Evaluation: {name}", columns, caption, one_objective=len(columns) == 1)
        )
    return f'<section id="evaluations">{"".join(tables)}</section>' if tables else ""


def _saved_figures(run: Run, name: str) -> Figures:
    result = run.saved_evaluations[name]
    return figures_from_json(result.get("metrics"), f"{run.name}: evaluation {name!r}")


def _numbers_table(
    title: str, columns: Sequence[tuple[str, Figures]], caption: str, *, one_objective: bool
) -> str:
    """A metric a row; those of the last column are shown, the loss only where all minimise the same."""
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    shown = in_order(columns[-1][1])
    rows = "".join(
        f'<tr><th scope="row">{escape(_title(name))}</th>'
        + "".join(f"<td>{_figure_html(name, figures.get(name))}</td>" for _, figures in columns)
        + "</tr>"
        for name in shown
        if one_objective or name != "loss"
    )
    return f"""
<h2>{escape(title)}</h2>
<div class="scroll"><table class="numbers">
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p class="caption">{escape(caption)}</p>
"""


def _tile(name: str, first: Figures, last: Figures) -> str:
    before, after = first.get(name), last.get(name)
    if after is None:
        return ""
    change = ""
    if before is not None and first is not last:
        text, good = write_change(name, before, after)
        change = f'<span class="{"up" if good else "down"}">{_typeset(text)}</span>'
    return (
        f'<div class="tile"><span class="label">{escape(_title(name))}</span>'
        f'<span class="value">{_typeset(write_figure(name, after).value)}</span>{change}</div>'
    )


def _title(name: str) -> str:
    title = metric_named(name).title
    return title[:1].upper() + title[1:]


def _figure_html(name: str, figure: Figure | None) -> str:
    value, error = write_figure(name, figure)
    return _typeset(value) + (f"<small> ± {error}</small>" if error else "")


def _typeset(number: str) -> str:
    """With a minus sign instead of a hyphen, and a dash for nothing."""
    return number.replace("-", "\N{EN DASH}" if number == "-" else "\N{MINUS SIGN}")


def _curves(run: Run, others: list[Run]) -> str:
    set_name = run.evaluation_sets()[0]
    figures = [_logprob_figure(run, others, set_name)]
    figures += [_held_out_figure(name, run, others, set_name) for name in _CURVES]
    figures.append(_training_figure(run, others))
    drawn = "".join(figures)
    if not drawn:
        return ""
    return f'<section id="curves"><h2>Curves</h2><div class="figures">{drawn}</div></section>'


def _logprob_figure(run: Run, others: list[Run], set_name: str) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        for side in ("chosen", "rejected"):
            points = _held_out_series(one, f"{side}_logprob", set_name)
            if points:
                lines.append(Line(points, side, position))
                name = f"{one.name}, {side}" if others else side
                legend.append(_legend(name, side, position))
    caption = "Mean log-prob of a token of the held-out answers; the band is one standard error."
    return figure_html("Chosen and rejected answers", caption, lines, legend)


def _held_out_figure(name: str, run: Run, others: list[Run], set_name: str) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        points = _held_out_series(one, name, set_name)
        if points:
            lines.append(Line(points, "run" if position == 0 else "other", position))
            legend.append(_legend(one.name, "run" if position == 0 else "other", position))
    metric = metric_named(name)
    percent = metric.unit == "share"
    return figure_html(_title(name), metric.caption, lines, legend if others else [], percent=percent)


def _training_figure(run: Run, others: list[Run]) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        points = one.series("loss")
        if points:
            kind = "run" if position == 0 else "other"
            lines.append(Line(points, kind, position))
            legend.append(_legend(one.name, kind, position))
    caption = "Loss of the training steps." + (
        " Different objectives have different losses." if others else ""
    )
    return figure_html("Training loss", caption, lines, legend if others else [])


def _held_out_series(run: Run, name: str, set_name: str) -> Points:
    """Held-out values, or the training values where nothing was held out."""
    return run.series(name, set_name) or run.series(name)


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
