"""AlpacaEval's files: annotations as verdicts, and what its length-controlled rate needs besides.

A verdict is AlpacaEval's `preference`, from 1 (the baseline, `output_1`) to 2 (the model, `output_2`).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo.errors import ConfigError, DataError
from orpo.judging.length_control import Control, Gamed
from orpo.judging.win_rate import Ruling

_DRAW = 1.5
_NEEDED = ("preference", "output_1", "output_2", "generator_1", "generator_2")
_GAMED = ("preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """Verdicts on two models.

    Attributes:
        first: Name of the baseline.
        second: Name of the model.
        verdicts: In the order of the file, each on an instruction of its own.
        index: Place in the file of each verdict, from 0.
        failures: Source of each row without a verdict, and why.
    """

    first: str
    second: str
    verdicts: Sequence[Ruling]
    index: Sequence[int]
    failures: Sequence[tuple[str, str]]


def score_of(preference: float) -> float:
    """A preference in [1, 2] as a score in [0, 1]; 0 is AlpacaEval's other way to write a draw.

    Raises:
        ValueError: It is neither.
    """
    if preference == 0:
        preference = _DRAW
    if not 1 <= preference <= 2:
        raise ValueError(f"the preference {preference:g} is not from 1 to 2")
    return preference - 1


def read_annotations(path: str | Path) -> Annotations:
    """Read `annotations.json`.

    Raises:
        DataError: It cannot be read, is of several models, or holds no verdict.
    """
    rows = _rows(Path(path).expanduser())
    verdicts, index, failures = [], [], []
    for number, row in enumerate(rows):
        where = f"{Path(path).name}:{number + 1}"
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise DataError(f"{where}: lacks {missing[0]!r}; expected annotations of AlpacaEval")
        preference = row["preference"]
        if preference is None or (isinstance(preference, float) and math.isnan(preference)):
            failures.append((where, "it has no preference"))
            continue
        try:
            score = score_of(float(preference))
        except (TypeError, ValueError) as error:
            failures.append((where, str(error)))
            continue
        verdicts.append(Ruling(str(number), score, (len(str(row["output_1"])), len(str(row["output_2"])))))
        index.append(number)
    if not verdicts:
        raise DataError(f"{path}: none of its {len(rows)} rows has a preference")
    first, second = (_only_name(rows, f"generator_{side}", path) for side in (1, 2))
    return Annotations(first=first, second=second, verdicts=verdicts, index=index, failures=failures)


def _only_name(rows: Sequence[Mapping[str, Any]], column: str, path: str | Path) -> str:
    names = {str(row[column]) for row in rows}
    if len(names) != 1:
        raise DataError(f"{path}: {column} is {len(names)} different models; give one file for each")
    return names.pop()


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = path.suffix == ".jsonl"
        rows = [json.loads(line) for line in text.splitlines() if line.strip()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as annotations of AlpacaEval ({reason})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of annotations of AlpacaEval")
    return rows


def read_control(
    difficulty: str | Path | None, gamed: str | Path | None, index: Sequence[int] | None = None
) -> Control:
    """Read AlpacaEval's `instruction_difficulty.csv` and `df_gamed.csv`.

    Args:
        difficulty: The first.
        gamed: The second.
        index: Places of the instructions that difficulties are wanted of; None: of all, in order.

    Raises:
        ConfigError: Gamed verdicts without difficulties.
        DataError: A file cannot be read, or knows no difficulty of an instruction.
    """
    if difficulty is None:
        if gamed is not None:
            raise ConfigError("--gamed needs --difficulty: AlpacaEval's regression takes both files")
        return Control()
    by_place = _difficulties(Path(difficulty))
    places = sorted(by_place) if index is None else index
    missing = [place for place in places if place not in by_place]
    if missing:
        raise DataError(f"{difficulty}: knows no difficulty of instruction {missing[0]}")
    hard = [by_place[place] for place in places]
    if gamed is None:
        return Control(difficulty=hard)
    table = [[_number(row[name]) for name in _GAMED] for row in _csv(Path(gamed), _GAMED)]
    return Control(difficulty=hard, gamed=Gamed(*np.array(table, dtype=np.float64).T))


def _difficulties(path: Path) -> dict[int, float]:
    """By place of the instruction, which stands in `index` or in a column without a name."""
    rows = _csv(path, ["instruction_difficulty"])
    place = next((name for name in ("index", "") if name in rows[0]), None)
    try:
        return {
            number if place is None else int(float(row[place])): float(row["instruction_difficulty"])
            for number, row in enumerate(rows)
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None


def _number(text: str) -> float:
    return float(text == "True") if text in ("True", "False") else float(text)


def _csv(path: Path, names: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.expanduser().open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    missing = [name for name in names if not rows or name not in rows[0]]
    if missing:
        raise DataError(f"{path}: lacks the column {missing[0]!r}; expected a file of AlpacaEval")
    return rows
