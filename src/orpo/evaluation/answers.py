"""Answers, and the file they are written to as they come.

A file holds the answers of one model, drawn in one way. Each line says what it answers by a key of the prompt
as the model read it, so that a run that was stopped goes on where it was, and never mixes models. The names
`instruction`, `output` and `generator` are those of AlpacaEval's `model_outputs`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from orpo.console import say
from orpo.errors import ConfigError, DataError
from orpo.pairs import Message
from orpo.run.disk import cannot_write, remove_file, replace_text

_SUFFIXES = (".jsonl", ".json")
_SETTINGS = ("temperature", "top_p", "max_tokens", "seed")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model says to one prompt.

    Attributes:
        text: The answer.
        ended: Whether it ended by itself, rather than at the limit.
        num_tokens: Of the answer; None where a server does not tell.
        reasoning: What it thought before, where a server gives that apart.
    """

    text: str
    ended: bool
    num_tokens: int | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a prompt has no answer."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One line of a file of answers.

    Attributes:
        instruction: The text that is answered: the last turn.
        output: The answer.
        generator: Name of the model.
        prompt: The whole conversation, where it is more than `instruction`.
        reasoning: As of `Reply`.
        sample: Number of the answer among those to the same prompt, from 0.
        ended: As of `Reply`.
        num_tokens: As of `Reply`.
        source: Where the prompt came from: `prompts.jsonl:118`.
        temperature: How it was drawn, like the three that follow.
        date: When: 2026-11-27.
        model: Equal for models that answer the same.
        key: Equal for the same prompt, as the model read it, and the same `sample`.
    """

    instruction: str
    output: str
    generator: str
    prompt: list[Message] | None = None
    reasoning: str | None = None
    sample: int
    ended: bool
    num_tokens: int | None
    source: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    date: str
    model: str
    key: str

    def to_json(self) -> dict[str, Any]:
        """As plain values; what is not there is left out."""
        optional = ("prompt", "reasoning")
        return {
            name: value for name, value in asdict(self).items() if value is not None or name not in optional
        }

    def prompt_key(self) -> str:
        """Equal for answers to the same prompt."""
        return json.dumps([self.instruction, self.prompt], sort_keys=True)

    @property
    def drawn(self) -> dict[str, Any]:
        """How it was drawn."""
        return {name: getattr(self, name) for name in _SETTINGS}


_NAMES = {field.name for field in fields(Answer)}


class AnswerFile:
    """A file of answers: JSON lines, or one JSON list with the lines in a second file until it is whole.

    Args:
        path: `answers.jsonl` or `answers.json`.

    Raises:
        ConfigError: Neither of them, or a folder.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in _SUFFIXES or path.is_dir():
            raise ConfigError(
                f"--out {path}: name a file that ends in .jsonl (an answer a line) or .json (a list)"
            )
        self.path = path
        self.lines = path if path.suffix == ".jsonl" else path.with_name(f"{path.name}.unfinished")
        self._open: IO[str] | None = None

    def read(self) -> list[Answer]:
        """The answers that are there; a line that was cut off as it was written is taken away, and said.

        Raises:
            DataError: The file holds something else.
        """
        found = []
        if self.path != self.lines and self.path.exists():
            found += [_answer(row, str(self.path)) for row in _json_list(self.path)]
        if self.lines.exists():
            found += list(self._read_lines())
        return found

    def _read_lines(self) -> Iterator[Answer]:
        try:
            lines = self.lines.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise DataError(f"{self.lines}: cannot be read ({error.strerror})") from None
        whole = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if number == len(lines) and not line.endswith(b"\n"):
                    say(f"{self.lines}: the last line was cut off, and is asked again", error=True)
                    os.truncate(self.lines, whole)
                    return
                raise DataError(
                    f"{self.lines}:{number}: is not JSON; repair the line or name another place"
                ) from None
            whole += len(line)
            yield _answer(row, f"{self.lines}:{number}")
        if lines and not lines[-1].endswith(b"\n"):
            with self.lines.open("ab") as file:
                file.write(b"\n")

    def append(self, answer: Answer) -> None:
        """Add a line, and wait until it is on the disk.

        Raises:
            RunError: It cannot be written.
        """
        try:
            if self._open is None:
                self.lines.parent.mkdir(parents=True, exist_ok=True)
                self._open = self.lines.open("a", encoding="utf-8", errors="replace")
            self._open.write(json.dumps(answer.to_json(), ensure_ascii=False) + "\n")
            self._open.flush()
            os.fsync(self._open.fileno())
        except OSError as error:
            raise cannot_write(self.lines, error) from error

    def close(self) -> None:
        """Close the file that lines are added to."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def finish(self, answers: Sequence[Answer]) -> None:
        """Write all answers in this order, at once or not at all.

        Raises:
            RunError: They cannot be written.
        """
        self.close()
        rows = [answer.to_json() for answer in answers]
        if self.path == self.lines:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            text = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
        replace_text(self.path, text)
        if self.path != self.lines:
            remove_file(self.lines)


def _json_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    if not isinstance(rows, list):
        raise DataError(f"{path}: is there already, and is no list of answers; name another place")
    return rows


def _answer(row: object, source: str) -> Answer:
    if not isinstance(row, dict) or not {"key", "model", "output"} <= row.keys() <= _NAMES:
        raise DataError(
            f"{source}: is there already, and was not written by orpo generate; name another place"
        )
    try:
        return Answer(**row)
    except TypeError:
        raise DataError(
            f"{source}: lacks a part of an answer; delete the line or name another place"
        ) from None


def check_same(
    known: Sequence[Answer],
    name: str,
    model: str,
    drawn: Mapping[str, Any],
    wanted: Collection[str],
    path: Path,
) -> None:
    """Stop where a file holds answers that do not belong to what is asked.

    Args:
        known: The answers it holds.
        name: Of the model that is to answer.
        model: Its identity.
        drawn: How its answers are to be drawn.
        wanted: Keys of what is asked.
        path: Of the file.

    Raises:
        ConfigError: One of them is of another model, was drawn differently, or answers something else.
    """
    remedy = "name another place, or delete it"
    for answer in known:
        if answer.model != model:
            other = answer.generator if answer.generator != name else f"other weights of {name}"
            raise ConfigError(f"{path}: holds answers of {other}; {remedy}")
        differs = [f"{key} {answer.drawn[key]}, not {value}" for key, value in drawn.items()
                   if answer.drawn[key] != value]  # fmt: skip
        if differs:
            raise ConfigError(f"{path}: holds answers drawn with {'; '.join(differs)}; {remedy}")
    left = [answer for answer in known if answer.key not in wanted]
    if left:
        raise ConfigError(
            f"{path}: {len(left)} of its {len(known)} answers are to prompts that are not asked now "
            f"(first: {left[0].source}); {remedy}"
        )
