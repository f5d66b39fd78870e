"""Two files of answers -> pairs of answers to the same prompt, in the order of the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.errors import DataError
from orpo.pairs import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Two answers to one prompt.

    Attributes:
        turns: What is answered; the last is the user's.
        first: The first model's answer.
        second: The second model's.
        source: Where the first stands: `a.jsonl:3`.
    """

    turns: Sequence[Message]
    first: str
    second: str
    source: str

    @property
    def prompt(self) -> str:
        """Equal for contests over the same prompt."""
        return json.dumps(list(self.turns), sort_keys=True)

    @property
    def question(self) -> str:
        """The prompt as one text: a single turn as it is, more of them with who speaks."""
        if len(self.turns) == 1:
            return str(self.turns[0]["content"])
        return "\n\n".join(f"### {str(turn['role']).title()}:\n{turn['content']}" for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contests:
    """What two files have in common.

    Attributes:
        first: Name of the first model.
        second: Name of the second.
        contests: At least one.
        notices: Lines to print.
    """

    first: str
    second: str
    contests: Sequence[Contest]
    notices: Sequence[str]


def read_contests(first: str | Path, second: str | Path) -> Contests:
    """Read two files of `orpo generate` or of AlpacaEval's `model_outputs`.

    Several answers to one prompt meet by their number.

    Raises:
        DataError: A file cannot be read, or they have no prompt in common.
    """
    names, answers = zip(*(_read(Path(one).expanduser()) for one in (first, second)), strict=True)
    both = [key for key in answers[0] if key in answers[1]]
    if not both:
        raise DataError(
            f"{first} and {second} answer no prompt in common; generate both from the same prompts"
        )
    contests = [
        Contest(
            turns=answers[0][key].turns,
            first=answers[0][key].text,
            second=answers[1][key].text,
            source=answers[0][key].source,
        )
        for key in both
    ]
    notices = [
        f"{len(ours) - len(both)} answers of {path} have no partner in the other file"
        for path, ours in zip((first, second), answers, strict=True)
        if len(ours) > len(both)
    ]
    if sum(one.first == one.second for one in contests):
        same = sum(one.first == one.second for one in contests)
        notices.append(f"{same} of {len(contests)} pairs of answers are the same word for word, a tie")
    if names[0] == names[1]:
        names = tuple(f"{names[0]} ({Path(path).name})" for path in (first, second))
    return Contests(first=names[0], second=names[1], contests=contests, notices=notices)


@dataclass(frozen=True, slots=True)
class _Row:
    turns: Sequence[Message]
    text: str
    source: str


def _read(path: Path) -> tuple[str, dict[tuple[str, int], _Row]]:
    """Name of the model, and its answers by prompt and number."""
    found: dict[tuple[str, int], _Row] = {}
    names: dict[str, None] = {}
    seen: dict[str, int] = {}
    for number, row in enumerate(_rows(path), start=1):
        source = f"{path.name}:{number}"
        instruction, output = row.get("instruction"), row.get("output")
        if not isinstance(instruction, str) or not isinstance(output, str):
            raise DataError(
                f"{source}: expected texts in 'instruction' and 'output', as orpo generate writes"
            )
        turns = row.get("prompt") or [{"role": "user", "content": instruction}]
        key = json.dumps(turns, sort_keys=True)
        seen[key] = seen.get(key, -1) + 1
        sample = row.get("sample")
        found[key, sample if isinstance(sample, int) else seen[key]] = _Row(turns, output, source)
        names[str(row.get("generator") or path.stem)] = None
    return " and ".join(names), found


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read as answers ({reason})") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{path}: expected answers: a JSON object a line, or one list")
    return rows
