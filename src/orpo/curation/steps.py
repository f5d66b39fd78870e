"""What each step of preparing data did: how many pairs came in, what was removed or changed and why.

No step is silent and the numbers add up: what came in, plus what was added, minus what was removed is what
goes on. A `Sieve` counts while a step looks at pairs; a `Step` is what it found, fit for a line and for a
manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from orpo.data.counts import RowCounts
from orpo.pairs import PreferencePair

EXAMPLES = 3
"""Sources that are named for each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, in numbers of pairs.

    Attributes:
        name: Of the step.
        before: That came in.
        added: That the step made of them besides.
        removed: Reason -> number.
        changed: What was changed or noticed -> number; these stay.
        examples: Reason -> where the first few are.
        remark: What else there is to say.
    """

    name: str
    before: int
    added: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    remark: str = ""

    @property
    def after(self) -> int:
        """Pairs that go on."""
        return self.before + self.added - sum(self.removed.values())

    def line(self) -> str:
        """The step as a printable line."""
        parts = [f"{self.after:,} of {self.before:,} pairs"]
        if self.added:
            parts.append(f"added {self.added:,}")
        for verb, table in (("removed", self.removed), ("", self.changed)):
            for reason, number in sorted(table.items(), key=lambda item: -item[1]):
                where = ", ".join(self.examples.get(reason, ()))
                parts.append(f"{verb} {number:,}: {reason} ({where})".strip())
        return f"{self.name}: " + "; ".join([*parts, *([self.remark] if self.remark else [])])

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {"after": self.after}


class Sieve:
    """Counts what a step removes and changes.

    Args:
        name: Of the step.
        pairs: That come in.
    """

    def __init__(self, name: str, pairs: Sequence[PreferencePair]) -> None:
        self._name = name
        self._pairs = pairs
        self._removed: dict[int, str] = {}
        self._counts: dict[str, dict[str, int]] = {"removed": {}, "changed": {}}
        self._examples: dict[str, list[str]] = {}

    def remove(self, index: int, reason: str) -> None:
        """Remove a pair; the first reason counts."""
        if index not in self._removed:
            self._removed[index] = reason
            self._count("removed", index, reason)

    def change(self, index: int, what: str) -> None:
        """Count a pair that stays in a changed form, or that is only noticed."""
        self._count("changed", index, what)

    def _count(self, table: str, index: int, reason: str) -> None:
        self._counts[table][reason] = self._counts[table].get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(self._pairs[index].source)

    @property
    def kept(self) -> list[int]:
        """Indices of the pairs that stay."""
        return [index for index in range(len(self._pairs)) if index not in self._removed]

    def step(self, remark: str = "") -> Step:
        """What the step did."""
        return Step(
            name=self._name,
            before=len(self._pairs),
            removed=self._counts["removed"],
            changed=self._counts["changed"],
            examples=self._examples,
            remark=remark,
        )


def reading_step(counts: RowCounts) -> Step:
    """What became of the rows while they were read."""
    removed = dict(counts.dropped)
    for reason, number in counts.skipped.items():
        removed[f"malformed: {reason}"] = number
    examples = {reason: [counts.examples[reason.removeprefix("malformed: ")]] for reason in removed}
    return Step(name="read", before=counts.total, removed=removed, examples=examples)
