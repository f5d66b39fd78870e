"""The parts of the page below the figures: what the run took, its data, its settings, what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orpo.data.counts import RowCounts
from orpo.data.findings import Findings
from orpo.engine.metrics import metric_named, write_figure
from orpo.evaluation.verdict import run_objective, share_advice
from orpo.run.directory import Run
from orpo.settings.schema import known_settings


def training_section(run: Run) -> str:
    """What training took, and how its gradient and its NLL were made up."""
    facts = dict(_facts(run))
    if not facts:
        return ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items()
    )
    advice = share_advice(run_objective(run.recipe), run.training_means())
    hints = f"<p class='caption'>To change these shares: {escape('; '.join(advice))}.</p>" if advice else ""
    return f"""
<section id="training"><h2>Training</h2>
<dl class="pairs">{items}</dl>{hints}
</section>
"""


def _facts(run: Run) -> list[tuple[str, str]]:
    lines = [record for record in run.records if record.kind == "train"]
    if not lines:
        return []
    planned = run.environment.get("steps")
    of_planned = f" of {planned:,}" if isinstance(planned, int) and planned > run.last_step else ""
    facts = [("steps", f"{run.last_step:,}{of_planned}")]
    if run.stages:
        facts.append(("stages", ", ".join(f"{name} from step {step:,}" for step, name in run.stages)))
    trained = run.data.get("train", {}).get("rows", {}).get("kept")
    if trained:
        facts.append(("pairs trained on", f"{trained:,}"))
    facts.append(("time in all", _time(max(record.seconds for record in run.records))))
    tokens = [record.metrics["tokens"].mean for record in lines if "tokens" in record.metrics]
    if tokens:
        seconds = sum(
            record.metrics["tokens"].mean / record.metrics["tokens_per_second"].mean
            for record in lines
            if "tokens" in record.metrics and record.metrics["tokens_per_second"].mean > 0
        )
        rate = f", {sum(tokens) / seconds:,.0f} a second" if seconds else ""
        facts += [
            ("of it in training steps", _time(seconds)),
            ("tokens trained on", f"{sum(tokens):,.0f}{rate}"),
        ]
    peaks = [record.metrics["peak_memory"].mean for record in lines if "peak_memory" in record.metrics]
    if peaks:
        facts.append(
            ("peak memory", f"{max(peaks):.2f} GiB on {run.environment.get('device', 'the device')}")
        )
    means = run.training_means()
    shares = [name for name in ("odds_share", "prompt_share") if name in means]
    return facts + [(metric_named(name).title, write_figure(name, means[name]).value) for name in shares]


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def data_section(data: Mapping[str, Any]) -> str:
    """What was read, what was left out and why, and what is odd about it, in sentences."""
    parts = []
    for name, report in data.items():
        lines = _data_lines(report) if isinstance(report, Mapping) else []
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            parts.append(f"<h3>{escape(str(name))}</h3><ul>{items}</ul>")
    return _folded("Data", "data", "".join(parts), is_open=True) if parts else ""


def _data_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{Path(str(file)).name}: format {form}" for file, form in report.get("formats", {}).items()]
    for file, names in report.get("unused_columns", {}).items():
        lines.append(f"{Path(str(file)).name}: columns not used: {', '.join(names)}")
    if isinstance(report.get("streaming"), str):
        lines.append(f"streamed: {report['streaming']}")
    try:
        if "rows" in report:
            lines += RowCounts.from_dict(report["rows"]).lines()
        if "findings" in report:
            lines += Findings.from_dict(report["findings"]).lines()
    except (KeyError, TypeError):  # of another version
        lines.append("counts of another version of orpo: see the report of the data in the run directory")
    return lines


def settings_section(recipe: Mapping[str, Any]) -> str:
    """The recipe: first what is not as it would be by default, then the rest."""
    known = known_settings()
    given: dict[str, Any] = {}
    usual: dict[str, Any] = {}
    for name, value in recipe.items():
        is_usual = name in known and value in (known[name].default, None)
        (usual if is_usual else given)[name] = value
    if not recipe:
        return ""
    number = f"{len(usual)} settings at their defaults" if len(usual) != 1 else "1 setting at its default"
    rest = f"<details><summary>{number}</summary>{_list(usual)}</details>"
    return _folded("Settings", "settings", _list(given) + (rest if usual else ""), is_open=True)


def environment_section(environment: Mapping[str, Any]) -> str:
    """What it ran on."""
    if not environment:
        return ""
    flat = {name: value for name, value in environment.items() if not isinstance(value, Mapping)}
    for name, value in environment.items():
        if isinstance(value, Mapping):
            flat[name] = [f"{key} {one}" for key, one in value.items()]
    return _folded("Environment", "environment", _list(flat), is_open=False)


def _folded(title: str, anchor: str, body: str, *, is_open: bool) -> str:
    opened = " open" if is_open else ""
    return f"""
<section id="{anchor}"><details{opened}><summary><h2>{title}</h2></summary>
{body}
</details></section>
"""


def _list(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{escape(str(name)).replace('_', '_<wbr>')}</dt><dd>{escape(_shown(value))}</dd></div>"
        for name, value in values.items()
        if value is not None and value != [] and value != {}
    )
    return f'<dl class="pairs">{items}</dl>'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(one)}" for key, one in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(item) for item in value)
    text = str(value)
    return Path(text).name if text.startswith("/") else text
