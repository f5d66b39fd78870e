"""An inspection as one self-contained HTML page: what matters first, then every table.

The style is that of the report page; drawings are inline SVG, and nothing is loaded or run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.curation.advice import advice, several, share, short
from orpo.curation.lengths import Spread, Tokens
from orpo.curation.lines import told_of
from orpo.curation.wording import Found
from orpo.html_page import html_page

if TYPE_CHECKING:
    from orpo.curation.bias import Audit
    from orpo.curation.inspection import Inspection
    from orpo.evaluation.statistics import Interval

DASH = "\N{EN DASH}"
Cell = tuple[str, str]
"""HTML of a cell and its class."""


def draw_page(found: Inspection) -> str:
    """An inspection as a page."""
    css = files("orpo.report").joinpath("report.css").read_text(encoding="utf-8")
    css += files("orpo.curation").joinpath("inspect.css").read_text(encoding="utf-8")
    split = f"split {found.split} · " if found.split else ""
    name = Path(found.data).name or found.data
    rows = f"{several(found.pairs, 'pair')} of {several(found.rows.total, 'row')}"
    sections = (
        _know(found), _rows(found), _lengths(found), _tokens(found.tokens), _audit(found), _repeats(found),
        _elsewhere(found), _wording(found),
    )  # fmt: skip
    body = f"""<header><p class="kicker">Data inspection</p><h1>{_text(name)}</h1>
<p class="subtitle">{_text(split)}{rows}</p></header>
{"".join(sections)}
<footer>{_text(". ".join(found.left_out) or "Everything was looked at.")}</footer>"""
    return html_page(f"{name} · data inspection", css, body)


def _text(text: str) -> str:
    """Plain text as HTML; half a character, which no page can hold, as U+FFFD."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _know(found: Inspection) -> str:
    items = "".join(
        f'<li class="{one.level}"><span>{_text(one.sentence)}</span></li>' for one in advice(found)
    )
    return f'<section><h2>What you should know before training</h2><ol class="advice">{items}</ol></section>'


# ------------------------------------------------------------------------------------- parts of a page


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str | Cell]], caption: str = "", chosen: int | None = None
) -> str:
    """A table whose first column names the rows; `chosen` is the row that stands out."""
    rows = list(rows)
    kinds = ["" if isinstance(cell, str) else f' class="{cell[1]}"' for cell in (*rows[0],)] if rows else []
    titles = "".join(f"<th{kind}>{_text(one)}</th>" for one, kind in zip(head, kinds, strict=False))
    lines = []
    for number, (name, *cells) in enumerate(rows):
        cells_html = "".join(
            f"<td>{cell}</td>" if isinstance(cell, str) else f'<td class="{cell[1]}">{cell[0]}</td>'
            for cell in cells
        )
        kind = ' class="set"' if number == chosen else ""
        lines.append(f'<tr{kind}><th scope="row">{name}</th>{cells_html}</tr>')
    below = f'<p class="caption">{_text(caption)}</p>' if caption else ""
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{titles}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def _list(values: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in values)
    return f'<dl class="pairs">{items}</dl>'


def _where(sources: Iterable[str]) -> Cell:
    return _text(", ".join(sources)) or DASH, "text"


def _histogram(title: str, one: Spread, kind: str) -> str:
    """The bins of a distribution as bars, each as wide as the next: the axis is logarithmic."""
    width, height, foot = 300, 110, 18
    most = max(number for _, number in one.histogram)
    step = width / len(one.histogram)
    bars, labels = [], []
    every = max(len(one.histogram) // 5, 1)
    for place, (lower, number) in enumerate(one.histogram):
        tall = (height - foot) * number / most
        bars.append(
            f'<rect class="bar {kind}" x="{place * step + 0.5:.1f}" y="{height - foot - tall:.1f}"'
            f' width="{step - 1:.1f}" height="{tall:.1f}"/>'
        )
        if place % every == 0 and place * step < width - 20:
            labels.append(
                f'<text x="{place * step + 1:.1f}" y="{height - 4}" font-size="11">{_short(lower)}</text>'
            )
    return (
        f"<figure><h3>{_text(title)}</h3>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">'
        f"{''.join(bars + labels)}</svg>"
        f"<figcaption>median {one.median:,}, longest {one.largest:,}</figcaption></figure>"
    )


def _short(number: int) -> str:
    return (
        f"{number / 1000:.0f}k"
        if number >= 10_000
        else f"{number / 1000:.1f}k"
        if number >= 1000
        else str(number)
    )


# ------------------------------------------------------------------------------------- sections


def _rows(found: Inspection) -> str:
    rows = found.rows
    facts = [("data", found.data)] if Path(found.data).name != found.data else []
    facts += [
        ("format", text if len(found.formats) == 1 else f"{name}: {text}")
        for name, text in found.formats.items()
    ]
    facts += [("columns not used", ", ".join(names)) for names in found.unused_columns.values()]
    facts += [("distinct prompts", f"{found.prompts:,}")]
    turns = ", ".join(f"{several(number, 'turn')}: {pairs:,}" for number, pairs in [*found.turns.items()][:8])
    facts += [("turns of a prompt", turns)]
    facts += [("with a system turn", f"{found.with_system:,}")] if found.with_system else []
    facts += [("note", notice) for notice in found.notices]
    sources = [*found.sources.items()]
    facts += [(f"source {name}", f"{number:,}") for name, number in sources[:10]]
    facts += [("further sources", f"{len(sources) - 10:,}")] if len(sources) > 10 else []
    tables = (("malformed", rows.skipped), ("dropped", rows.dropped))
    reasons = [
        (_text(f"{verb}: {reason}"), f"{number:,}", _where(rows.first_rows(reason)))
        for verb, table in tables
        for reason, number in sorted(table.items(), key=lambda item: -item[1])
    ]
    table = _table(["rows that do not train", "rows", "first"], reasons) if reasons else ""
    return f"<section><h2>Rows</h2>{_list(facts)}{table}</section>"


def _lengths(found: Inspection) -> str:
    tokens = found.tokens
    sides = ("prompt", "chosen", "rejected")
    units: list[tuple[str, Mapping[str, Spread | None]]] = [("characters", found.characters)]
    if tokens is not None:
        units.insert(0, ("tokens", {name: getattr(tokens, name) for name in sides}))
    unit, drawn = units[0]
    figures = "".join(
        _histogram(f"{name}, {unit}", one, name if name != "prompt" else "")
        for name in sides
        if (one := drawn.get(name)) is not None
    )
    rows = [
        (
            f"{name}, {unit}", f"{one.mean:,.0f}", *(f"{value:,}" for value in one.percentiles.values()),
            f"{one.largest:,}",
        )
        for unit, spreads in units
        for name, one in spreads.items()
        if one is not None
    ]  # fmt: skip
    head = ["", "mean", "5 %", "25 %", "median", "75 %", "95 %", "99 %", "longest"]
    longer = (
        f"The chosen answer is the longer one in {share(found.chosen_longer, 1)} of the pairs."
        if found.chosen_longer is not None
        else ""
    )
    return (
        f'<section><h2>Lengths</h2><div class="figures">{figures}</div>{_table(head, rows, longer)}</section>'
    )


def _tokens(tokens: Tokens | None) -> str:
    if tokens is None:
        return ""
    rows = [
        (
            f"{one.max_length:,}", f"{one.whole:,}", f"{one.cut:,}", f"{one.dropped:,}",
            short(one.shared_tokens), short(one.padded_tokens),
        )
        for one in tokens.limits
    ]  # fmt: skip
    is_set = [place for place, one in enumerate(tokens.limits) if one.max_length == tokens.max_length]
    sampled = (
        f" Counted on {tokens.pairs:,} of {tokens.of_pairs:,} pairs drawn at random, and scaled up."
        if tokens.pairs < tokens.of_pairs
        else ""
    )
    cost = short(round(tokens.epochs * tokens.set_limit.shared_tokens))
    caption = (
        f"Tokens of {tokens.model}.{sampled} Cut: the oldest turns of the prompt go. Here each prompt runs"
        f" once for both answers, without padding; padded: each side with its prompt, in batches of"
        f" {tokens.batch_size} as wide as the longest. {tokens.epochs:g} epochs at the marked length are"
        f" {cost} tokens."
    )
    head = ["max_length", "whole", "cut", "dropped", "tokens an epoch", "padded"]
    table = _table(head, rows, caption, is_set[0] if is_set else None)
    lines = "".join(f'<p class="caption">{_text(line)}</p>' for line in tokens.counts.lines()[1:])
    return f"<section><h2>Cost, and what max_length does</h2>{table}{lines}</section>"


def _audit(found: Inspection) -> str:
    looked = found.audit
    if looked is None:
        return ""
    if not looked.looks:
        return f"<section><h2>What trivial features predict</h2><p>{_text(looked.sentence())}</p></section>"
    rows = [
        (
            _text(look.title), str(look.accuracy), (_interval_svg(look.accuracy), "text"), _auc(look.auc),
            (_text(look.leaning if look.predicts else DASH), "text"),
        )
        for look in looked.looks
    ]  # fmt: skip
    head = ["feature alone", "accuracy", "40 % to 100 %", "AUC", "what marks the chosen answers"]
    table = _table(head, rows, _audit_caption(looked, found))
    return f"<section><h2>What trivial features predict</h2>{table}</section>"


def _audit_caption(looked: Audit, found: Inspection) -> str:
    drawn = f"{looked.pairs:,} pairs" + (" drawn at random" if looked.pairs < found.pairs else "")
    return (
        f"How often a linear classifier that sees only this feature names the chosen answer, in {drawn} with"
        f" {looked.prompts:,} prompts, each judged by one that has not seen its prompt. The intervals are"
        f" clustered by prompt and hold for all {len(looked.looks)} looks together with 95 %."
    )


def _auc(found: Interval) -> str:
    return f"{found.share:.2f} ({found.low:.2f} to {found.high:.2f})"


def _interval_svg(found: Interval) -> str:
    """An interval on an axis from 40 to 100 %, 50 % marked."""
    value, low, high = (min(max((one - 0.4) / 0.6, 0.0), 1.0) * 160 + 5 for one in found)
    half = 160 / 6 + 5
    return (
        f'<svg viewBox="0 0 170 18" role="img" aria-label="{100 * found[0]:.0f} %">'
        f'<line class="half" x1="{half:.1f}" x2="{half:.1f}" y1="0" y2="18"/>'
        f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="9" y2="9"/>'
        f'<circle class="dot" cx="{value:.1f}" cy="9" r="4"/></svg>'
    )


def _repeats(found: Inspection) -> str:
    findings = found.findings
    rows = [
        ("pairs that repeat an earlier one", findings.duplicates, found.first("duplicates")),
        (
            "prompts that nearly repeat an earlier one",
            findings.near_duplicates,
            found.first("near_duplicates"),
        ),
        ("pairs that contradict another", findings.contradictions, found.first("contradictions")),
        ("identical sides (dropped)", found.identical, []),
        ("nearly identical sides", found.nearly_identical.number, found.nearly_identical.first),
    ]
    cells = [
        (name, f"{number:,}", share(number, max(found.pairs, 1)), _where(first))
        for name, number, first in rows
    ]
    caption = (
        "Nearly repeats: four fifths of the runs of three words are the same. Contradicts: same prompt, sides"
        " swapped. Nearly identical: nine tenths of the words of the two answers are the same."
    )
    return f"<section><h2>Repeats</h2>{_table(['', 'number', 'of pairs', 'first'], cells, caption)}</section>"


def _elsewhere(found: Inspection) -> str:
    parts = []
    if len(found.splits) > 1:
        rows = [
            (
                _text(" and ".join(one.splits)),
                f"{one.prompts:,}",
                f"{one.rows.number:,}",
                _where(one.rows.first),
            )
            for one in found.shared
        ]
        head = ["splits", "prompts in both", "pairs of the second", "first"]
        names = ", ".join(found.splits)
        parts.append(
            _table(head, rows)
            if rows
            else f'<p class="caption">No prompt stands in two of {_text(names)}.</p>'
        )
    for one in found.overlaps:
        kinds: tuple[tuple[str, Found], ...] = (
            ("same prompt", one.exact), ("nearly the same prompt", one.near), ("13 words in a row", one.runs),
        )  # fmt: skip
        counted = [(name, f"{kind.number:,}", _where(kind.first)) for name, kind in kinds]
        run = f" The run that most pairs have: “{one.run}”." if one.run else ""
        asked = several(one.questions, "question")
        caption = f"{asked}. Each pair is counted once, in the first row that fits.{run}"
        parts.append(f"<h3>{_text(one.name)}</h3>" + _table(["overlap", "pairs", "first"], counted, caption))
    return f"<section><h2>Found elsewhere</h2>{''.join(parts)}</section>" if parts else ""


def _wording(found: Inspection) -> str:
    seen, told = found.refusals, found.languages
    rows = [(_text(name), f"{one.number:,}", _where(one.first)) for name, one in found.encoding.items()]
    rows += [
        ("only the chosen answer refuses", f"{seen.only_chosen.number:,}", _where(seen.only_chosen.first)),
        (
            "only the rejected answer refuses",
            f"{seen.only_rejected.number:,}",
            _where(seen.only_rejected.first),
        ),
    ]
    caption = (
        f"{share(seen.chosen, 1)} of the chosen and {share(seen.rejected, 1)} of the rejected answers refuse,"
        " by the words in which English answers do."
    )
    if told is not None and told.shares:
        shown = ", ".join(f"{name} {share(part, 1)}" for name, part in told.shares.items() if part >= 0.01)
        caption += f" Languages of {told_of(found)}: {shown}."
    return f"<section><h2>Wording</h2>{_table(['', 'pairs', 'first'], rows, caption)}</section>"
