"""What a person should know before training: a few sentences, each with its number and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from orpo.curation.bias import Audit, Look

if TYPE_CHECKING:
    from orpo.curation.inspection import Inspection

FEWEST, MOST = 3, 6
Level = Literal["act", "know", "fine"]
_ORDER: tuple[Level, ...] = ("act", "know", "fine")
STRONG = 0.55
"""Accuracy from which a trivial feature is worth doing something about."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A finding.

    Attributes:
        level: `act`: do something about it; `know`: it may be as you want it; `fine`: nothing is wrong.
        sentence: The finding with its number, and what to do.
    """

    level: Level
    sentence: str


def advice(found: Inspection) -> list[Advice]:
    """Three to six sentences, those to act on first."""
    every = [one for part in _PARTS for one in part(found)]
    every.sort(key=lambda one: _ORDER.index(one.level))
    serious = [one for one in every if one.level != "fine"]
    return (every if len(serious) < FEWEST else serious)[
        : MOST if len(serious) > FEWEST else max(FEWEST, len(serious))
    ]


def share(number: float, total: float) -> str:
    """A part of a whole in percent, with a digit behind the point where it is small."""
    percent = 100 * number / total if total else 0.0
    if 0 < percent < 0.1:
        return "under 0.1 %"
    return f"{percent:.1f} %" if 0 < percent < 9.95 else f"{percent:.0f} %"


def several(number: int, one: str, more: str | None = None) -> str:
    """A number with its noun: `1 pair`, `2,000 pairs`."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _audit(found: Inspection) -> Iterator[Advice]:
    looked = found.audit
    if looked is None:
        return
    if not looked.looks:
        yield Advice("know", looked.sentence())
        return
    best = looked.strongest
    if best is None and not looked.looks[-1].predicts:
        yield Advice("fine", looked.sentence())
    elif max(look.accuracy.share for look in looked.looks if look.predicts) < STRONG:
        yield Advice("know", f"{looked.sentence()} That is little to learn from.")
    else:
        yield Advice("act", f"{looked.sentence()} {_remedy(looked, best)}")


def _remedy(looked: Audit, best: Look | None) -> str:
    """What to do about the strongest look."""
    name = best.name if best is not None else looked.looks[-1].name
    if name == "refusal" and best is not None and best.leaning.startswith("chosen"):
        return (
            "Add pairs in which the answer that helps is the chosen one, or the model will refuse too much."
        )
    return {
        "length": "A model can gain by length alone: judge it at equal length, or use"
        " `orpo data prepare --balance length`.",
        "markdown": "A model can gain by layout alone: keep it only if that layout is what you want.",
        "refusal": "Add pairs in which refusing is right, or the model will stop refusing.",
        "echo": "Read a few such pairs, and keep this only if that is what you want.",
    }.get(name, "Read a few pairs: a model can gain by these words alone.")


def _rows(found: Inspection) -> Iterator[Advice]:
    rows = found.rows
    malformed, unusable = sum(rows.skipped.values()), sum(rows.dropped.values())
    if malformed:
        first = rows.first_rows(max(rows.skipped, key=lambda reason: rows.skipped[reason]))[0]
        yield Advice(
            "act",
            f"{several(malformed, 'row')} of {rows.total:,} ({share(malformed, rows.total)})"
            f" {'is' if malformed == 1 else 'are'} malformed, the first at {first}: fix them, or set"
            " on_bad_row: skip, or a run stops there.",
        )
    if unusable:
        reason = max(rows.dropped, key=lambda reason: rows.dropped[reason])
        too_many = unusable > 0.1 * rows.total
        todo = "a run stops unless you fix them or raise max_dropped" if too_many else "a run leaves them out"
        yield Advice(
            "act" if too_many else "know",
            f"{several(unusable, 'row')} of {rows.total:,} ({share(unusable, rows.total)}) cannot train,"
            f" mostly: {reason}; {todo}.",
        )


def _contradictions(found: Inspection) -> Iterator[Advice]:
    number = found.findings.contradictions
    if number:
        yield Advice(
            "act",
            f"{several(number, 'pair')} ({share(number, found.pairs)}) contradict another: same prompt, sides"
            f" swapped, first {found.first('contradictions')[0]}. They cancel out; `orpo data prepare`"
            " removes them.",
        )


def _duplicates(found: Inspection) -> Iterator[Advice]:
    findings = found.findings
    same, near = findings.duplicates, findings.near_duplicates
    parts = []
    if same:
        verb = "repeats" if same == 1 else "repeat"
        parts.append(
            f"{several(same, 'pair')} ({share(same, found.pairs)}) {verb} an earlier one word for word"
        )
    if near:
        verb = "repeats" if near == 1 else "repeat"
        parts.append(f"{several(near, 'prompt')} ({share(near, found.pairs)}) nearly {verb} an earlier one")
    if parts:
        first = found.first("duplicates" if same else "near_duplicates")[0]
        yield Advice(
            "act" if same + near > 0.05 * found.pairs else "know",
            f"{' and '.join(parts)}, first {first}: what is said twice weighs twice;"
            " `orpo data prepare` removes them.",
        )


def _sides(found: Inspection) -> Iterator[Advice]:
    number = found.nearly_identical.number
    if number:
        yield Advice(
            "act" if number > 0.05 * found.pairs else "know",
            f"In {several(number, 'pair')} ({share(number, found.pairs)}) the two answers have nine tenths of"
            f" their words in common, first {found.nearly_identical.first[0]}: check that the difference"
            " is the one you mean.",
        )


def _splits(found: Inspection) -> Iterator[Advice]:
    for one in found.shared:
        first, second = one.splits
        yield Advice(
            "act",
            f"{several(one.prompts, 'prompt')} {'stands' if one.prompts == 1 else 'stand'} in {first} and in"
            f" {second} ({several(one.rows.number, 'pair')} there, first {one.rows.first[0]}): scores on"
            f" {second} will flatter; take them out of one.",
        )


def _overlaps(found: Inspection) -> Iterator[Advice]:
    for one in found.overlaps:
        if one.pairs:
            first = (*one.exact.first, *one.near.first, *one.runs.first)[0]
            yield Advice(
                "act",
                f"{several(one.pairs, 'pair')} ({share(one.pairs, found.pairs)}) overlap with {one.name}:"
                f" {one.exact.number:,} with the same prompt, {one.near.number:,} with nearly the same,"
                f" {one.runs.number:,} with 13 words in a row, first {first}. Drop them, or do not report"
                " that score.",
            )
        else:
            yield Advice(
                "fine", f"Nothing overlaps with the {several(one.questions, 'question')} of {one.name}."
            )


def _encoding(found: Inspection) -> Iterator[Advice]:
    broken = {name: one for name, one in found.encoding.items() if one.number}
    if broken:
        listed = ", ".join(f"{name} in {several(one.number, 'pair')}" for name, one in broken.items())
        first = next(iter(broken.values())).first[0]
        yield Advice("act", f"Text is broken: {listed}, first {first}. Read the source again as UTF-8.")


def _limits(found: Inspection) -> Iterator[Advice]:
    tokens = found.tokens
    if tokens is None:
        yield Advice(
            "fine", "Lengths are in characters: --model M adds tokens, cost and what max_length does."
        )
        return
    limit = tokens.set_limit
    about = "" if tokens.pairs == tokens.of_pairs else "about "
    if limit.dropped + limit.cut:
        more = next((one for one in tokens.limits if one.max_length > limit.max_length), None)
        instead = f"; {more.max_length} would drop {more.dropped:,}" if more is not None else ""
        yield Advice(
            "act" if limit.dropped > 0.02 * found.pairs else "know",
            f"max_length {limit.max_length} drops {about}{several(limit.dropped, 'pair')}"
            f" ({share(limit.dropped, found.pairs)}) and takes the oldest turns of"
            f" {about}{limit.cut:,}{instead}.",
        )
    elif tokens.max_length is not None:
        yield Advice("fine", f"max_length {limit.max_length} keeps every pair whole.")
    if limit.shared_tokens:
        yield Advice(
            "fine",
            f"An epoch is {about}{short(limit.shared_tokens)} tokens here; a trainer that pads batches of"
            f" {tokens.batch_size} and runs each prompt twice would pay {short(limit.padded_tokens)},"
            f" {limit.padded_tokens / limit.shared_tokens:.1f} times as many.",
        )


def short(number: int) -> str:
    """A large number as a person says it: 12.3 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"


def _refusals(found: Inspection) -> Iterator[Advice]:
    seen = found.refusals
    if max(seen.chosen, seen.rejected) >= 0.05:
        yield Advice(
            "know",
            f"{share(seen.chosen, 1)} of the chosen and {share(seen.rejected, 1)} of the rejected answers"
            " refuse: the model will learn that balance, so check that you want it.",
        )


def _languages(found: Inspection) -> Iterator[Advice]:
    told = found.languages
    if told is not None and told.shares:
        code, most = next(iter(told.shares.items()))
        if most < 0.95:
            others = [f"{name} {share(part, 1)}" for name, part in [*told.shares.items()][1:4]]
            yield Advice(
                "know",
                f"{share(most, 1)} of {told.answers:,} answers looked at are {code}, others"
                f" {', '.join(others)}: a small language is learned from few pairs.",
            )


def _clean(found: Inspection) -> Iterator[Advice]:
    none = []
    if not found.findings.duplicates + found.findings.near_duplicates + found.findings.contradictions:
        none.append("no pair repeats or contradicts another")
    if not any(one.number for one in found.encoding.values()):
        none.append("no text is broken")
    if len(found.splits) > 1 and not found.shared:
        none.append("no prompt stands in two splits")
    if not found.rows.num_dropped:
        none.append("every row can train")
    if none:
        text = ", ".join(none)
        yield Advice("fine", f"{text[0].upper()}{text[1:]}.")


_PARTS: tuple[Callable[[Inspection], Iterator[Advice]], ...] = (
    _splits, _overlaps, _audit, _rows, _contradictions, _duplicates, _sides, _encoding, _limits, _refusals,
    _languages, _clean,
)  # fmt: skip
