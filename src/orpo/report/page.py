"""A run as one self-contained HTML page: whether it worked, by how much, how it went, and what it says.

The page leads with the strongest evidence there is (evidence.py). Everything is inline, so the page needs no
network and can be mailed. What the run directory lacks, the page leaves out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.engine.metrics import Written, in_order, metric_named, write_change, write_figure
from orpo.evaluation.verdict import Change, judge_run, run_objective, said_of
from orpo.html_page import html_page, typeset
from orpo.report.answers import samples_section
from orpo.report.contrast import differing_settings, obstacles, same_held_out_pairs
from orpo.report.details import data_section, environment_section, settings_section, training_section
from orpo.report.evidence import Evidence, Shown, collect
from orpo.report.figures import Line, Points, figure_html
from orpo.report.suites import suites_section
from orpo.run.directory import Run, RunDirectory, read_json, read_run, write_json
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
    test_change: Change | None = None,
    note: str | None = None,
) -> Path:
    """Write the page of a run into its directory, and what it was asked to show next to it.

    Says where a run of the contrast is not comparable, as the page does.

    Args:
        run_dir: The run; its name is `ORPO` in the page where there is a contrast.
        contrast: Name -> run directory of other runs to draw in the same axes, `{"SFT": ...}`.
        test: What pairs that no training has seen say, by model: before training, others, this run.
        test_change: The same of the first and the last of these models, pair by pair.
        note: A paragraph under the title, as plain text.

    What is None is as it was when the page was last written.

    Returns:
        Path of the page.

    Raises:
        DataError: As `read_run`.
    """
    run_dir = Path(run_dir).expanduser()
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
        asked["test_change"] = None if test_change is None else test_change.to_json()
    if note is not None:
        asked["note"] = note
    replace_text(run_files.page, _page(run_dir, asked, run_files.page_request))
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
        suites=public(run.suites),
    )


# Page


def _page(run_dir: Path, asked: Mapping[str, Any], where: Path) -> str:
    others = {name: read_run(run_dir / other, name) for name, other in asked["contrast"].items()}
    run = read_run(run_dir, "ORPO" if others else None)
    same_pairs = {
        name: same_held_out_pairs(run_dir, run, run_dir / asked["contrast"][name], other)
        for name, other in others.items()
    }
    verdict, change = judge_run(run_dir, run), asked.get("test_change")
    run, others = _for_others(run), {name: _for_others(other) for name, other in others.items()}
    shown = Shown(
        run_dir=run_dir,
        run=run,
        verdict=verdict,
        others=[other for name, other in others.items() if same_pairs[name]],
        test={model: figures_from_json(values, where) for model, values in asked.get("test", {}).items()},
        test_change=None if change is None else Change.from_json(change, where),
    )
    evidence = collect(shown)
    sections = [
        _verdict(shown, evidence),
        _overview(run, evidence),
        _comparability(run, others, same_pairs),
        suites_section(run.suites),
        _curves(run, list(others.values())),
        training_section(run),
        samples_section(run.samples),
        data_section(run.data),
        settings_section(run.recipe),
        environment_section(run.environment),
    ]
    title = run_dir.resolve().name
    body = f"""<header>
<p class="kicker">ORPO training report</p>
<h1>{escape(title)}</h1>
<p class="subtitle">{escape(_subtitle(run))}</p>
{_unfinished(run)}
{f'<p class="note">{escape(asked["note"])}</p>' if asked.get("note") else ""}
</header>
{"".join(sections)}
<footer>Made by <code>orpo report</code>; this page is self-contained and loads nothing.</footer>"""
    css = files("orpo.report").joinpath("report.css").read_text(encoding="utf-8")
    return html_page(f"{title} · ORPO report", css, body)


def _subtitle(run: Run) -> str:
    model = str(run.recipe.get("model_name_or_path") or "")
    when = f"{datetime.now():%Y-%m-%d %H:%M}"
    about = (model and f"from {Path(model).name or model}", _data_name(run.recipe.get("dataset_name")), when)
    return " · ".join(part for part in about if part)


def _data_name(name: Any) -> str:
    names = list(name) if isinstance(name, (list, dict)) else [name] if name else []
    return ", ".join(Path(str(one)).name for one in names)


def _unfinished(run: Run) -> str:
    if run.model_step is not None:
        return ""
    planned = run.environment.get("steps")
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    return f'<p class="warning"><strong>Unfinished: step {run.last_step:,}{of}.</strong></p>'


def _verdict(shown: Shown, evidence: Sequence[Evidence]) -> str:
    """The sentence that the strongest evidence comes to, and what to try."""
    verdict = shown.verdict
    change = evidence[0].change if evidence else None
    if change is not None and change is not verdict.change:
        kind, said = said_of(change, run_objective(shown.run.recipe))
        verdict = replace(verdict, kind=kind, sentence=said, advice=())
    advice = "".join(f"<li>{escape(line)}</li>" for line in verdict.advice)
    tries = f'<p class="caption">Try:</p><ul>{advice}</ul>' if advice else ""
    said = f"<p>{escape(typeset(verdict.sentence))}</p>{tries}"
    return f'<section id="verdict" class="{verdict.kind}">{said}</section>'


def _overview(run: Run, evidence: Sequence[Evidence]) -> str:
    """The headline numbers, and a table for each set of pairs."""
    if not evidence:
        return '<section><p class="empty">No evaluation has been logged yet.</p></section>'
    tiles = "".join(_tile(name, evidence[0]) for name in _TILES)
    tables = "".join(_table(one, run) + _groups(one) for one in evidence)
    if run.shared_prompts:
        warning = f"{run.shared_prompts:,} held-out pairs share a prompt with training pairs; they flatter."
        tables += f'<p class="caption"><strong>{warning}</strong></p>'
    return f'<section id="overview"><div class="tiles">{tiles}</div>{tables}</section>'


def _comparability(run: Run, others: Mapping[str, Run], same_pairs: Mapping[str, bool]) -> str:
    """In what the runs of the contrast differ, and why some are not comparable."""
    items = []
    for name, other in others.items():
        against = obstacles(run, other, same_pairs=same_pairs[name])
        if against:
            items.append(
                f"<li><strong>{escape(name)} is not comparable: {escape('; '.join(against))}.</strong></li>"
            )
            say(f"{name} is not comparable: {'; '.join(against)}")
        different = differing_settings(run, other)
        if different:
            items.append(f"<li>{escape(name)} has {escape('; '.join(different))}.</li>")
    return (
        f'<section id="contrast"><h2>Runs side by side</h2><ul>{"".join(items)}</ul></section>'
        if items
        else ""
    )


def _table(evidence: Evidence, run: Run) -> str:
    """A metric a row; the loss only where all minimise the same."""
    change = evidence.change.change if evidence.change else {}
    columns = [name for name, _ in evidence.columns] + (["Change"] if change else [])
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(_title(name))}</th>'
        + "".join(f"<td>{figure_as_html(name, figures.get(name))}</td>" for _, figures in evidence.columns)
        + (f"<td>{_change_html(name, change.get(name))}</td>" if change else "")
        + "</tr>"
        for name in in_order(evidence.columns[-1][1])
        if evidence.one_objective or name != "loss"
    )
    paired = " The error of a change is that of the change of each pair." if change else ""
    alone = (run.recipe.get("nll_on") == "response" and " The NLL is over the answer alone.") or ""
    return f"""
<h2>{escape(evidence.title)}<span class="n">{_number(evidence)}</span></h2>
<div class="scroll"><table class="numbers{" paired" if change else ""}">
<thead><tr><td></td>{head}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
<p class="caption">{escape(evidence.about)} ± one standard error over prompts.{paired}
Log-probs are means per token of a response.{alone}</p>
"""


def _number(evidence: Evidence) -> str:
    """How many pairs, and of how many prompts where some share one."""
    if evidence.num_pairs is None:
        return ""
    change = evidence.change
    shared = change is not None and 0 < change.num_prompts < change.num_preferences
    return f"{evidence.num_pairs:,} pairs" + (
        f" of {change.num_prompts:,} prompts" if change and shared else ""
    )


def _groups(evidence: Evidence) -> str:
    """A row for each source that the data names, where it names several."""
    groups = evidence.change.groups if evidence.change else {}
    if len(groups) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{one.num_pairs:,}</td>'
        + "".join(
            f"<td>{figure_as_html(metric, one.before.get(metric))}</td>"
            f"<td>{_change_html(metric, one.change.get(metric))}</td>"
            for metric in ("accuracy", "log_odds_ratio")
        )
        + "</tr>"
        for name, one in groups.items()
    )
    heads = ("Pairs", "Accuracy before", "Change", "Log odds ratio before", "Change")
    return f"""
<h3>By source</h3>
<div class="scroll"><table class="numbers">
<thead><tr><td></td>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>
<tbody>{rows}</tbody>
</table></div>
"""


def _tile(name: str, evidence: Evidence) -> str:
    figure = evidence.columns[-1][1].get(name)
    if figure is None:
        return ""
    written = write_figure(name, figure)
    change = evidence.change.change.get(name) if evidence.change else _difference(name, evidence)
    changed = ""
    if change is not None:
        text = typeset(str(write_change(name, change)))
        changed = f'<span class="{_colour(name, change, evidence)}">{text}</span>'
    return (
        f'<div class="tile"><span class="label">{escape(_title(name))}</span>'
        f'<span class="value">{typeset(written.value)}{_error_html(written)}</span>{changed}'
        f'<span class="n">{_number(evidence)}</span></div>'
    )


def _difference(name: str, evidence: Evidence) -> Figure | None:
    """The change of a mean where the pairs were not kept: without an error."""
    before, after = (figures.get(name) for figures in (evidence.columns[0][1], evidence.columns[-1][1]))
    if before is None or after is None or not evidence.has_before or len(evidence.columns) < 2:
        return None
    return Figure(after.mean - before.mean)


def _colour(name: str, change: Figure, evidence: Evidence) -> str:
    """Green or red where a change is measurable, grey where chance may have made it."""
    compared = evidence.change
    if compared is None or not compared.direction(name):
        return "flat"
    return "up" if change.mean * metric_named(name).better > 0 else "down"


def _title(name: str) -> str:
    title = metric_named(name).title
    return title[:1].upper() + title[1:]


def figure_as_html(name: str, figure: Figure | None) -> str:
    """A figure with its error and its unit in small type."""
    written = write_figure(name, figure)
    return typeset(written.value) + _error_html(written)


def _error_html(written: Written) -> str:
    error = f" ± {written.error}" if written.error else ""
    return f"<small>{error} {written.unit}</small>" if error or written.unit else ""


def _change_html(name: str, change: Figure | None) -> str:
    written = write_change(name, change)
    return typeset(written.value) + _error_html(written)


def _curves(run: Run, others: list[Run]) -> str:
    set_name = run.evaluation_sets()[0]
    figures = [_logprob_figure(run, others, set_name)]
    figures += [_held_out_figure(name, run, others, set_name) for name in _CURVES]
    figures += [_training_figure(name, run, others) for name in ("loss", "odds_share")]
    drawn = "".join(figures)
    if not drawn:
        return ""
    names = ", ".join(f"{name} from step {step:,}" for step, name in run.stages)
    stages = f'<p class="caption">Lines mark where a stage begins: {escape(names)}.</p>' if names else ""
    return f'<section id="curves"><h2>Curves</h2>{stages}<div class="figures">{drawn}</div></section>'


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
    return figure_html("Chosen and rejected answers", caption, lines, legend, marks=_marks(run))


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
    return figure_html(
        _title(name), metric.caption, lines, legend if others else [], percent=percent, marks=_marks(run)
    )


def _training_figure(name: str, run: Run, others: list[Run]) -> str:
    lines = []
    legend = []
    for position, one in enumerate([run, *others]):
        points = one.series(name)
        if len(points) > 1:
            kind = "run" if position == 0 else "other"
            lines.append(Line(points, kind, position))
            legend.append(_legend(one.name, kind, position))
    metric = metric_named(name)
    several = " Different objectives have different losses." if others and name == "loss" else ""
    caption = f"{metric.caption} Measured while training.{several}"
    percent = metric.unit == "share"
    title = "Training loss" if name == "loss" else _title(name)
    return figure_html(title, caption, lines, legend if others else [], percent=percent, marks=_marks(run))


def _marks(run: Run) -> list[int]:
    """The steps after which a stage other than the first begins."""
    return [step - 1 for step, _ in run.stages[1:]]


def _held_out_series(run: Run, name: str, set_name: str) -> Points:
    """Held-out values, or the training values where nothing was held out."""
    return run.series(name, set_name) or run.series(name)


def _legend(name: str, kind: str, position: int) -> str:
    return f'<span class="key {kind} p{min(position, 2)}">{escape(name)}</span>'
