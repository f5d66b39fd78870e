"""RewardBench's arithmetic with scores that need no reference model.

Rows are those of its data set: prompt, chosen, rejected, subset. The score of a section is the mean over its
subsets, weighted by how many examples RewardBench counts them as (math-prm counts as much as the code); the
score of the whole is the mean over its four sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orpo.errors import DataError
from orpo.suites.measured import Column, Measured, by_group

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.scored_pairs import ScoredPair
    from orpo.suites.subject import Subject

NAME = "rewardbench"
ABOUT = "RewardBench: accuracy by section, by mean and by sum of log-probs; rows of its data set"
TAKES = "FILE"

SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 250,
        "xstest-should-respond": 154, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
"""How many examples each subset counts as.

Source:
    `EXAMPLE_COUNTS` and `SUBSET_MAPPING` of rewardbench/constants.py in allenai/reward-bench.
"""
_SECTION_OF = {subset: section for section, subsets in SECTIONS.items() for subset in subsets}


def check(about: str | None, options: Options) -> None:
    """Rows are checked as they are read."""


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Score the rows of a file."""
    from orpo.suites.scored_pairs import scored_pairs

    assert about is not None
    pairs, notices = scored_pairs(subject, NAME, about, options, {"columns": {"source": "subset"}})
    unknown = sorted({str(pair.group) for pair in pairs} - set(_SECTION_OF))
    if unknown:
        raise DataError(
            f"{about}: {unknown[0]!r} is no subset of RewardBench; expected its column 'subset' "
            f"(pairs:{about} takes any pairs)"
        )
    return measured(pairs, notices)


def measured(pairs: list[ScoredPair], notices: list[str]) -> Measured:
    """The scores of pairs whose groups are subsets."""
    from orpo.suites.scored_pairs import preference_columns

    subsets = [str(pair.group) for pair in pairs]
    plain = preference_columns(pairs)
    columns = {}
    for name in ("accuracy", "accuracy by sum"):
        sums = plain[name].sums
        weights = _weights(subsets)
        columns[name] = _weighted(sums, weights)
        for section in SECTIONS:
            if any(_SECTION_OF[subset] == section for subset in subsets):
                inside = [
                    weight * (_SECTION_OF[subset] == section)
                    for subset, weight in zip(subsets, weights, strict=True)
                ]
                columns[f"{name} ({section})"] = _weighted(sums, inside)
    columns["log odds ratio"] = plain["log odds ratio"]
    columns |= by_group("accuracy", plain["accuracy"], subsets)
    missing = sorted(set(_SECTION_OF) - set(subsets))
    if missing:
        notices = [*notices, f"subsets of RewardBench that the file lacks: {', '.join(missing)}"]
    return Measured(
        items=[pair.item for pair in pairs],
        columns=columns,
        clusters=[str(pair.prompt) for pair in pairs],
        notices=notices,
    )


def _weights(subsets: list[str]) -> list[float]:
    """Of each pair, so that sections weigh the same and subsets in them as they count."""
    present = set(subsets)
    in_section = {
        section: sum(count for subset, count in counts.items() if subset in present)
        for section, counts in SECTIONS.items()
    }
    share = {
        subset: SECTIONS[_SECTION_OF[subset]][subset]
        / in_section[_SECTION_OF[subset]]
        / subsets.count(subset)
        for subset in present
    }
    return [share[subset] for subset in subsets]


def _weighted(sums: Sequence[float], weights: list[float]) -> Column:
    return Column([weight * one for weight, one in zip(weights, sums, strict=True)], weights)
