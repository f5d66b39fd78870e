"""An inspection in short, for a terminal: a label and what there is to say, no line too wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from orpo.curation.advice import advice, several, share, short
from orpo.curation.lengths import Spread, Tokens

if TYPE_CHECKING:
    from orpo.curation.bias import Audit
    from orpo.curation.inspection import Inspection

_INDENT = 12


def lines(found: Inspection, width: int) -> list[str]:
    """The facts, then what matters most, wrapped."""
    wrapped = []
    for label, text in [*_facts(found)]:
        wrapped += _labelled(label, text, width)
    wrapped += ["", "What you should know before training"]
    for number, one in enumerate(advice(found), start=1):
        wrapped += _labelled(f"{number}", one.sentence, width, indent=3)
    return wrapped


def _labelled(label: str, text: str, width: int, indent: int = _INDENT) -> list[str]:
    first = f"{label:<{indent - 1}} "
    return textwrap.wrap(
        text, max(width, 40), initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    ) or [first.rstrip()]


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    yield from _reading(found)
    yield from _rows(found)
    yield from _lengths(found)
    yield from _repeats(found)
    yield from _wording(found)
    if found.audit is not None:
        yield from _audit(found.audit, found.pairs)
    for line in found.left_out:
        yield "note", line


def _reading(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "data", found.data + (f", split {found.split}" if found.split else "")
    for name, text in found.formats.items():
        yield "format", text if len(found.formats) == 1 else f"{name}: {text}"
    for name, columns in found.unused_columns.items():
        yield "not used", f"{'' if len(found.formats) == 1 else name + ': '}columns {', '.join(columns)}"
    for notice in found.notices:
        yield "note", notice


def _lengths(found: Inspection) -> Iterator[tuple[str, str]]:
    for name, one in found.characters.items():
        if one is not None:
            yield name, _spread(one, "characters")
    if found.chosen_longer is not None:
        yield "", f"the chosen answer is the longer one in {share(found.chosen_longer, 1)} of the pairs"
    if found.tokens is not None:
        yield from _tokens(found.tokens)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    rows = found.rows
    yield "rows", f"{several(rows.total, 'row')}, {several(found.pairs, 'pair')} that can train"
    for verb, table in (("malformed", rows.skipped), ("dropped", rows.dropped)):
        for reason, number in sorted(table.items(), key=lambda item: -item[1]):
            yield verb, f"{number:,}: {reason} ({', '.join(rows.first_rows(reason))})"
    system = f", {share(found.with_system, found.pairs)} with a system turn" if found.with_system else ""
    turns = _counted({several(number, "turn"): pairs for number, pairs in found.turns.items()})
    yield "prompts", f"{found.prompts:,} distinct; {turns}{system}"
    if found.sources:
        yield "sources", _counted(found.sources)


def _counted(counts: Mapping[str, int], at_most: int = 5) -> str:
    shown = [f"{name}: {number:,}" for name, number in [*counts.items()][:at_most]]
    rest = len(counts) - at_most
    return ", ".join(shown) + (f", and {rest} more" if rest > 0 else "")


def _spread(one: Spread, unit: str) -> str:
    at = one.percentiles
    return f"median {one.median:,} {unit}, 5 to 95 % {at[5]:,} to {at[95]:,}, longest {one.largest:,}"


def _tokens(tokens: Tokens) -> Iterator[tuple[str, str]]:
    sampled = (
        f", counted on {tokens.pairs:,} of {tokens.of_pairs:,} pairs drawn at random"
        if tokens.pairs < tokens.of_pairs
        else ""
    )
    yield "tokens", f"of {tokens.model}{sampled}"
    for name in ("prompt", "chosen", "rejected"):
        one = getattr(tokens, name)
        if one is not None:
            yield "", f"{name}: {_spread(one, 'tokens')}"
    for line in tokens.counts.lines()[1:]:
        yield "", line
    for one in tokens.limits:
        is_set = " (set)" if one.max_length == tokens.max_length else ""
        if not one.cut + one.dropped:
            yield (
                "max_length",
                f"{one.max_length}{is_set if one == tokens.limits[-1] else ''} and more: every pair whole",
            )
            break
        yield (
            "max_length",
            f"{one.max_length}{is_set}: {one.whole:,} whole, {one.cut:,} cut, {one.dropped:,} dropped;"
            f" {short(one.shared_tokens)} tokens an epoch",
        )
    cost = tokens.set_limit
    yield (
        "cost",
        f"{short(cost.shared_tokens)} tokens an epoch at max_length {cost.max_length},"
        f" {short(round(tokens.epochs * cost.shared_tokens))} in {tokens.epochs:g} epochs; a trainer that"
        f" pads batches of {tokens.batch_size}: {short(cost.padded_tokens)} an epoch",
    )


def _repeats(found: Inspection) -> Iterator[tuple[str, str]]:
    findings = found.findings
    counted = {
        "duplicates": findings.duplicates, "near-duplicate prompts": findings.near_duplicates,
        "contradictions": findings.contradictions, "identical sides": found.identical,
        "nearly identical sides": found.nearly_identical.number,
    }  # fmt: skip
    yield "repeats", ", ".join(f"{name} {number:,}" for name, number in counted.items())
    if len(found.splits) > 1:
        shared = [
            f"{several(one.prompts, 'prompt')} in {one.splits[0]} and {one.splits[1]}" for one in found.shared
        ]
        yield "splits", f"{', '.join(found.splits)}; in two of them: {', '.join(shared) or 'no prompt'}"
    for one in found.overlaps:
        yield (
            "against",
            f"{one.name} ({several(one.questions, 'question')}): same prompt {one.exact.number:,},"
            f" nearly the same {one.near.number:,}, 13 words in a row {one.runs.number:,}"
            + (f" (“{one.run}”)" if one.run else ""),
        )


def _wording(found: Inspection) -> Iterator[tuple[str, str]]:
    yield "encoding", ", ".join(f"{name} {one.number:,}" for name, one in found.encoding.items())
    seen = found.refusals
    yield "refusals", f"{share(seen.chosen, 1)} of chosen, {share(seen.rejected, 1)} of rejected answers"
    if found.languages is not None and found.languages.shares:
        shown = {name: part for name, part in found.languages.shares.items() if part >= 0.01}
        parts = ", ".join(f"{name} {share(part, 1)}" for name, part in [*shown.items()][:6])
        yield "languages", f"{parts}; of {told_of(found)}"


def told_of(found: Inspection) -> str:
    """Of which answers the language was told."""
    told = found.languages
    assert told is not None
    drawn = " drawn at random" if told.of_answers < found.pairs else ""
    return f"{told.answers:,} chosen answers that are long enough, among {told.of_answers:,}{drawn}"


def _audit(looked: Audit, pairs: int) -> Iterator[tuple[str, str]]:
    if not looked.looks:
        yield "audit", looked.sentence()
        return
    sampled = f"{looked.pairs:,} pairs" + (" drawn at random" if looked.pairs < pairs else "")
    yield "audit", f"what tells chosen from rejected in held-out pairs, 95 % intervals; {sampled}"
    for look in looked.looks:
        yield "", f"{look.title:<21}{look.accuracy!s:<20} AUC {look.auc.share:.2f}"
