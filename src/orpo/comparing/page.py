"""The page of a comparison: self-contained, in the style of the reports of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from orpo.comparing.choosing import DECIDES, Trial
from orpo.comparing.methods import MODELS_HELD
from orpo.comparing.quality import METRICS, Quality
from orpo.comparing.result import COSTS, Comparison, Entry
from orpo.comparing.screen import SHOWN, write_choice
from orpo.comparing.sentences import rules, sentences
from orpo.engine.metrics import metric_named, write_change, write_figure
from orpo.html_page import html_page, typeset
from orpo.report.figures import METHODS, Line, Points, figure_html
from orpo.report.page import figure_as_html
from orpo.run.directory import read_run
from orpo.run.disk import replace_text
from orpo.run.log import Figure

_BY_SIZE = ("accuracy", "log_odds_ratio")
_DASH = "\N{EN DASH}"


def write_page(result: Comparison) -> Path:
    """Write the page of a comparison into its folder."""
    colours = {method: METHODS[number % len(METHODS)] for number, method in enumerate(result.chosen)}
    name = result.folder.name
    body = f"""<header>
<p class="kicker">ORPO comparison</p>
<h1>{escape(name)}</h1>
<p class="subtitle">{escape(_subtitle(result))}</p>
</header>
<section id="verdict">{_list(sentences(result))}</section>
{_quality(result)}
{_answers(result)}
{_figures("sizes", "By training pairs", _size_figures(result, colours))}
{_cost(result)}
{_figures("curves", "While training", _step_figures(result, colours))}
{_choice(result)}
<section id="rules"><h2>How it was made</h2>{_list(rules(result))}</section>
<footer>Made by <code>orpo compare</code>; this page is self-contained and loads nothing.</footer>"""
    css = files("orpo.report").joinpath("report.css").read_text(encoding="utf-8")
    replace_text(result.page_path, html_page(f"{name} · ORPO comparison", css, body))
    return result.page_path


def _subtitle(result: Comparison) -> str:
    base = Path(str(result.recipe.get("model_name_or_path"))).name
    seeds = f"{result.seeds} seed{'' if result.seeds == 1 else 's'}"
    return f"{', '.join(result.chosen)} · from {base} · {seeds} · {datetime.now():%Y-%m-%d %H:%M}"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(typeset(line))}</li>' for line in lines)}</ul>" if lines else ""


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of cells that are HTML already, with their rows' names as text."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="numbers even"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _title(name: str) -> str:
    title = metric_named(name).title
    return title[:1].upper() + title[1:]


def _quality(result: Comparison) -> str:
    rows = {"base": result.base} | {entry.method: entry.quality for entry in result.whole}
    titles = ["Odds-ratio loss" if name == DECIDES else _title(name) for name in METRICS]
    means = [
        (method, [figure_as_html(name, _figure(quality, name)) for name in METRICS])
        for method, quality in rows.items()
    ]
    changes = [
        (entry.method, [_change(entry.quality, name) for name in METRICS])
        for entry in result.whole
        if entry.quality.change
    ]
    number = f"{result.counts['test']:,} pairs of {result.num_prompts:,} prompts"
    against = ""
    if changes:
        against = (
            f"<h2>Against {escape(result.baseline)}</h2>{_table(titles, changes)}"
            '<p class="caption">Differences pair by pair, with the interval that holds with 95 %. Green and'
            " red are beyond noise; grey may be chance.</p>"
        )
    return f"""<section id="quality"><h2>Test pairs<span class="n">{number}</span></h2>
{_table(titles, means)}
<p class="caption">± one standard error, over prompts and seeds. Log-probs are means per token of an
answer. The odds-ratio loss is that of plain ORPO for every method.</p>
{against}</section>"""


def _figure(quality: Quality, name: str) -> Figure | None:
    return quality.means[name].figure if name in quality.means else None


def _change(quality: Quality, name: str) -> str:
    change = quality.change.get(name)
    if change is None:
        return _DASH
    written = write_change(name, Figure(change.mean))
    bounds = change.interval(quality.looks)
    interval = ""
    if bounds is not None:
        low, high = (typeset(write_change(name, Figure(bound)).value) for bound in bounds)
        interval = f"<br><small>{low} to {high}</small>"
    colour = {"better": "up", "worse": "down"}.get(quality.kind(name), "flat")
    unit = f" {written.unit}" if written.unit else ""
    return f'<span class="{colour}">{typeset(written.value)}{unit}</span>{interval}'


def _answers(result: Comparison) -> str:
    if not result.answers:
        return ""
    names = ("ended", "repetition")
    rows = [
        (method, [figure_as_html(name, answers.figures.get(name)) for name in names])
        for method, answers in result.answers.items()
    ]
    number = f"{next(iter(result.answers.values())).number:,} test prompts"
    captions = " ".join(metric_named(name).caption for name in names)
    return f"""<section id="answers"><h2>Answers<span class="n">{number}</span></h2>
{_table([_title(name) for name in names], rows)}
<p class="caption">{captions} Each answer takes the likeliest token; first seed.</p></section>"""


_COSTS = {
    "cpu_seconds": ("CPU seconds", ".0f"),
    "seconds": ("Wall seconds", ".0f"),
    "step_seconds": ("of it in steps", ".0f"),
    "peak_gib": ("Peak memory, GiB", ".2f"),
    "steps": ("Steps", ",.0f"),
    "tokens": ("Tokens read", ",.0f"),
    "answers": ("Forward passes", ",.0f"),
}


def _cost(result: Comparison) -> str:
    rows = [
        (
            entry.method,
            [
                *(format(entry.cost(COSTS[name]), style) for name, (_, style) in _COSTS.items()),
                str(MODELS_HELD),
            ],
        )
        for entry in result.whole
    ]
    heads = [*(title for title, _ in _COSTS.values()), "Models held"]
    return f"""<section id="cost"><h2>What one training took</h2>{_table(heads, rows)}
<p class="caption">Means over the seeds, each training in a process of its own. Times have loading,
evaluations and saving in them, but not the import of libraries; memory is that of the whole process, or of
the GPU. A forward pass is one answer that goes through the model; prompts are read once for both.</p>
</section>"""


def _figures(anchor: str, title: str, figures: str) -> str:
    if not figures:
        return ""
    return f'<section id="{anchor}"><h2>{title}</h2><div class="figures">{figures}</div></section>'


def _drawn(
    name: str, about: str, series: Mapping[str, Points], colours: Mapping[str, str], across: str
) -> str:
    """A metric of each method as a curve."""
    shown = {method: points for method, points in series.items() if points}
    legend = [f'<span class="key {colours[method]}">{escape(method)}</span>' for method in shown]
    lines = [Line(points, colours[method], 0) for method, points in shown.items()]
    metric = metric_named(name)
    caption = f"{metric.caption} {about}; the band is one standard error."
    percent = metric.unit == "share"
    return figure_html(_title(name), caption, lines, legend, percent=percent, across=across)


def _size_figures(result: Comparison, colours: Mapping[str, str]) -> str:
    if len(result.sizes) < 2:
        return ""
    methods = [entry.method for entry in result.whole]
    return "".join(
        _drawn(
            name,
            "Test pairs",
            {method: list(_by_size(result, method, name)) for method in methods},
            colours,
            "training pairs",
        )
        for name in _BY_SIZE
    )


def _by_size(result: Comparison, method: str, name: str) -> Iterator[tuple[int, float, float | None]]:
    for entry in sorted(result.entries, key=lambda one: one.size):
        if entry.method == method and name in entry.quality.means:
            one = entry.quality.means[name]
            yield entry.size, one.mean, one.se


def _step_figures(result: Comparison, colours: Mapping[str, str]) -> str:
    return "".join(
        _drawn(
            name,
            "Validation pairs, first seed",
            {entry.method: _series(entry, name) for entry in result.whole},
            colours,
            "optimizer step",
        )
        for name in SHOWN
    )


def _series(entry: Entry, name: str) -> Points:
    """A metric over the steps of a method's first seed."""
    run = read_run(entry.folders[0])
    return run.series(name, run.evaluation_sets()[0])


def _choice(result: Comparison) -> str:
    parts = []
    heads = ("Odds-ratio loss", "To the chosen one", "Accuracy", "Chosen log-prob")
    for method, chosen in result.chosen.items():
        rows = [
            _trial(trial, is_chosen=number == chosen.number) for number, trial in enumerate(chosen.trials)
        ]
        parts.append(f"<h3>{escape(method)}</h3>{_table(heads, rows)}")
    counts = f"{result.counts['validation']:,} validation pairs"
    return f"""<section id="choice"><h2>Settings that were tried<span class="n">{counts}</span></h2>
{"".join(parts)}
<p class="caption">The first row of each is what the recipe says.</p></section>"""


def _trial(trial: Trial, *, is_chosen: bool) -> tuple[str, list[str]]:
    name = write_choice(trial.choice) + (" (chosen)" if is_chosen else "")
    if trial.failure:
        return name, [f"<em>failed: {escape(trial.failure)}</em>", "", "", ""]
    difference = trial.to_chosen.get(DECIDES)
    written = _DASH if difference is None else typeset(str(write_change(DECIDES, difference.figure)))
    kept = "" if trial.keeps else " <small>ruled out: less likely than before</small>"
    means = {metric: one.figure for metric, one in trial.means.items()}
    loss, accuracy = (figure_as_html(one, means.get(one)) for one in (DECIDES, "accuracy"))
    likely = typeset(write_figure("chosen_logprob", means.get("chosen_logprob")).value)
    return name, [loss, written, accuracy, likely + kept]
