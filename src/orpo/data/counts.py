"""What became of the rows: how many were kept, changed or dropped, by reason.

Nothing in the data path is dropped, cut or defaulted without a line here. One `RowCounts` travels from
reading to tokenizing, so that its total is the number of rows the user gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orpo.errors import DataError


@dataclass
class RowCounts:
    """Counts by reason; the reasons are sentences fit for printing.

    Attributes:
        total: Rows read, malformed ones included, plus the extra pairs that several-answer rows expand to.
        skipped: Malformed rows left out under `on_bad_row: skip`.
        dropped: Well-formed rows that cannot train.
        changed: Rows that train, though not as written (oldest turns dropped, system text folded, ...).
        lost: Rows that train without a part of their answers; each row counts once.
        doubtful: Rows of a stream that train as written, although something speaks against it.
        examples: Where the first row of each reason came from.
        more_examples: Where the second and the third came from; not saved.
    """

    total: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    doubtful: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    more_examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_dropped(self) -> int:
        """Rows that do not train, skipped malformed ones included."""
        return sum(self.skipped.values()) + sum(self.dropped.values())

    @property
    def kept(self) -> int:
        """Rows that train."""
        return self.total - self.num_dropped

    def skip(self, reason: str, source: str) -> None:
        """Count a malformed row."""
        self._add(self.skipped, reason, source)

    def drop(self, reason: str, source: str) -> None:
        """Count a row that cannot train."""
        self._add(self.dropped, reason, source)

    def change(self, reason: str, source: str) -> None:
        """Count a row that trains in a changed form."""
        self._add(self.changed, reason, source)

    def lose(self, reason: str, source: str) -> None:
        """Count a row that trains without a part of its answers."""
        self._add(self.lost, reason, source)

    def doubt(self, reason: str, source: str) -> None:
        """Count a row that trains as written, although something speaks against it."""
        self._add(self.doubtful, reason, source)

    def _add(self, table: dict[str, int], reason: str, source: str) -> None:
        table[reason] = table.get(reason, 0) + 1
        self.name(reason, source)

    def name(self, reason: str, source: str) -> None:
        """Remember where a row of a reason came from, if it is one of the first three."""
        if reason not in self.examples:
            self.examples[reason] = source
        elif len(more := self.more_examples.setdefault(reason, [])) < 2:
            more.append(source)

    def first_rows(self, reason: str) -> list[str]:
        """Where the first rows of a reason came from, at most three."""
        return [self.examples[reason], *self.more_examples.get(reason, [])]

    def add(self, other: RowCounts) -> None:
        """Take over the counts of `other`, which looked at further rows."""
        self.total += other.total
        self.add_reasons(other)

    def add_reasons(self, other: RowCounts) -> None:
        """Take over the reasons of `other`, which looked at rows counted here already."""
        for mine, theirs in (
            (self.skipped, other.skipped),
            (self.dropped, other.dropped),
            (self.changed, other.changed),
            (self.lost, other.lost),
            (self.doubtful, other.doubtful),
        ):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        for reason in other.examples:
            for source in other.first_rows(reason):
                self.name(reason, source)

    def lines(self) -> list[str]:
        """The table, one printable line per reason, the most frequent first."""
        lines = [f"using {self.kept} of {self.total} rows"]
        tables = {"skipped": self.skipped, "dropped": self.dropped}
        tables |= {"incomplete": self.lost, "changed": self.changed, "doubtful": self.doubtful}
        for verb, table in tables.items():
            for reason, count in sorted(table.items(), key=lambda item: -item[1]):
                lines.append(f"{verb} {count}: {reason} (first: {self.examples[reason]})")
        return lines

    def check(self, max_dropped: float, name: str = "the data") -> None:
        """Stop where too much of the data would not be used.

        Args:
            max_dropped: Largest share of rows that are not used, or not whole, in [0, 1].
            name: Of the data set, for the message.

        Raises:
            DataError: No row is left, or the share is exceeded.
        """
        reasons = "; ".join(self.lines()[1:]) or "it is empty"
        if self.kept <= 0:
            raise DataError(f"{name}: no row can be used: {reasons}")
        num_lost = sum(self.lost.values())
        number = self.num_dropped + num_lost
        share = number / self.total
        if share > max_dropped:
            whole = " whole" if num_lost else ""
            raise DataError(
                f"{name}: {number} of {self.total} rows ({share:.0%}) cannot be used{whole}, more than"
                f" max_dropped allows ({max_dropped:.0%}): {reasons}; fix the data or raise max_dropped"
            )

    def to_dict(self) -> dict[str, Any]:
        """For data_report.json and the cache."""
        return {
            "total": self.total,
            "kept": self.kept,
            "skipped": self.skipped,
            "dropped": self.dropped,
            "changed": self.changed,
            "lost": self.lost,
            "doubtful": self.doubtful,
            "examples": self.examples,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RowCounts:
        """Inverse of `to_dict`."""
        names = ("skipped", "dropped", "changed", "lost", "doubtful", "examples")
        return cls(total=data["total"], **{name: dict(data.get(name, {})) for name in names})
