"""The log of a run, metrics.jsonl: one typed record a line.

    {"step": 10, "kind": "train", "epoch": 0.5, "seconds": 3.1, "metrics": {"loss": 2.3, "accuracy": 0.5}}
    {"step": 10, "kind": "eval", "set": "hh", "num_pairs": 9, ..., "metrics": {"nll": {"mean": 2, "se": 0.1}}}
    {"step": 20, "kind": "stage", "stage": "simpo", ...}
    {"step": 40, "kind": "saved", "model_step": 30, ...}

A training record covers the steps since the last one. An evaluation record is one evaluation of one set, so a
set may have any name. A stage record is written where another objective begins, of a run that has several; a
saved record says whose step's weights the run directory holds. Only dashboards see flat names
(`eval_hh_accuracy`), which `flat_name` makes and nothing takes apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from orpo.errors import DataError
from orpo.run.disk import cannot_write, replace_text

Kind = Literal["train", "eval", "stage", "saved"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean, with its standard error where it has one."""

    mean: float
    se: float | None = None

    def to_json(self) -> Any:
        """A number, or a mapping of `mean` and `se`."""
        return self.mean if self.se is None else {"mean": self.mean, "se": self.se}

    @classmethod
    def from_json(cls, value: Any) -> Figure:
        """Inverse of `to_json`."""
        return cls(value["mean"], value.get("se")) if isinstance(value, Mapping) else cls(value)


Figures = Mapping[str, Figure]
"""Figures by the name of their metric."""


def figures_to_json(figures: Figures) -> dict[str, Any]:
    """Figures as plain values."""
    return {name: figure.to_json() for name, figure in figures.items()}


def figures_from_json(values: Any, where: object) -> dict[str, Figure]:
    """Figures of a saved result, as `figures_to_json` has written them.

    Raises:
        DataError: A value is no figure: damaged, or of version 0.1 of this package; `where` is named.
    """
    if not _are_figures(values) or any(name.endswith("_se") for name in values):
        raise DataError(
            f"{where}: not the figures of this version of orpo; delete the file and make it again"
        )
    return {name: Figure.from_json(value) for name, value in values.items()}


def _are_figures(values: Any) -> bool:
    return isinstance(values, Mapping) and all(is_number(_mean(value)) for value in values.values())


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, Mapping) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of metrics.jsonl.

    Attributes:
        step: Optimizer steps made when it was written.
        kind: `train`, `eval`, `stage` or `saved`.
        metrics: Figures by metric; standard errors in evaluations only.
        set: Name of the evaluation set; the only one of a run is named "".
        num_pairs: Pairs scored; None in other records.
        stage: In a stage record, the name of the objective that begins after this step.
        model_step: In a saved record, the step whose weights were saved.
        epoch: Passes over the training data so far.
        seconds: Since the run began.
    """

    step: int
    kind: Kind
    metrics: Figures = field(default_factory=dict)
    set: str = ""
    num_pairs: int | None = None
    stage: str = ""
    model_step: int | None = None
    epoch: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The record as its line, without what its kind does not have."""
        line: dict[str, Any] = {"step": self.step, "kind": self.kind}
        if self.kind == "eval":
            line |= {"set": self.set, "num_pairs": self.num_pairs}
        if self.kind == "stage":
            line["stage"] = self.stage
        if self.kind == "saved":
            line["model_step"] = self.model_step
        line |= {"epoch": round(self.epoch, 6), "seconds": round(self.seconds, 3)}
        return line | ({"metrics": figures_to_json(self.metrics)} if self.metrics else {})

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Record:
        """Inverse of `to_json`.

        Raises:
            TypeError: A value has another type than the record's.
        """
        values = line.get("metrics", {})
        if not _are_figures(values):
            raise TypeError("its metrics are no numbers")
        record = cls(**{**line, "metrics": {name: Figure.from_json(value) for name, value in values.items()}})
        counted = record.num_pairs if record.kind == "eval" else record.step
        if not (isinstance(record.step, int) and isinstance(record.set, str) and isinstance(counted, int)):
            raise TypeError("its step, set or num_pairs has another type")
        return record


def flat_name(metric: str, set_name: str = "") -> str:
    """The name of an evaluated metric on dashboards and in `metric_for_best_model`: `eval_hh_accuracy`."""
    return f"eval_{set_name}_{metric}" if set_name else f"eval_{metric}"


def flat(figures: Figures, prefix: str) -> dict[str, float]:
    """Figures under flat names, each standard error under its metric's name with `_se`."""
    means = {f"{prefix}_{name}": figure.mean for name, figure in figures.items()}
    errors = {name: figure.se for name, figure in figures.items() if figure.se is not None}
    return means | {f"{prefix}_{name}_se": se for name, se in errors.items()}


def is_number(value: Any) -> bool:
    """Whether this is a number, true and false not counted."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: It is not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: damaged (not UTF-8 text)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_records(path: Path) -> list[Record]:
    """Read the records of a file; none where there is no file. A last line cut short by a crash is left out.

    Raises:
        DataError: A line is damaged, or was written by a version of this package that wrote no records.
    """
    records, problems = _read_lines(path)
    if problems:
        raise DataError(problems[0])
    return records


def readable_records(path: Path) -> tuple[list[Record], int]:
    """The records that can be read, and the number of damaged lines between them.

    Raises:
        DataError: The file cannot be read at all.
    """
    records, problems = _read_lines(path)
    return records, len(problems)


def _read_lines(path: Path) -> tuple[list[Record], list[str]]:
    """The records of a file, and what is wrong with each line that is none."""
    records: list[Record] = []
    problems: list[str] = []
    lines = read_text(path).split("\n") if path.exists() else []
    for number, text in enumerate(lines, start=1):
        if number == len(lines) and not text:
            break
        try:
            records.append(_record(json.loads(text), f"{path}:{number}"))
        except (json.JSONDecodeError, RecursionError):
            if number < len(lines):  # else it has no end: what a crash leaves
                problems.append(f"{path}:{number}: not valid JSON; delete this line")
        except DataError as error:
            problems.append(str(error))
    return records, problems


def _record(line: Any, where: str) -> Record:
    if not isinstance(line, dict) or line.get("kind") not in get_args(Kind):
        raise DataError(
            f"{where}: not a record of this version of orpo (0.1 wrote flat lines);"
            " move the file away to continue without its curves"
        )
    try:
        return Record.from_json(line)
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: damaged record ({error}); delete this line") from None


def append_record(path: Path, record: Record) -> None:
    """Add a record to a file, which is made where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json()) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a file from scratch."""
    replace_text(path, "".join(json.dumps(record.to_json()) + "\n" for record in records))
