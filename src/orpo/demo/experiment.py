"""What the demo trains on and how: shipped files and settings. Light, so that it starts immediately."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from orpo.errors import ConfigError, ModelError

DEMO = Path(str(files("orpo.demo")))
BASE = DEMO / "model"

DataName = Literal["politeness", "harmless"]
SplitName = Literal["train", "validation", "test"]
FORMATS: dict[DataName, str] = {"politeness": "instruction", "harmless": "hh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What is trained, on what, and how.

    Attributes:
        data: Shipped set of pairs.
        base: Folder of the model to start from.
        seed: Of the order of the pairs.
        learning_rate: Peak, after a warm-up of a tenth of the steps; falls to 0 linearly.
        num_epochs: Passes over the training pairs.
        max_steps: Optimizer steps, whatever `num_epochs` says; -1: as it says.
        beta: Weight of ORPO's odds-ratio term.
        pairs_per_step: Pairs of an optimizer step.
        max_length: Longest side, prompt and answer, in tokens.
        num_evaluations: Evaluations on the validation split while training, at least 2.
        num_test: Test pairs that are scored; None: all.
        num_asked: Test prompts that every model answers.
        answer_tokens: Longest answer, in tokens.
    """

    data: DataName = "politeness"
    base: Path = BASE
    seed: int = 0
    learning_rate: float = 1e-3
    num_epochs: float = 3.0
    max_steps: int = -1
    beta: float = 2.0
    pairs_per_step: int = 16
    max_length: int = 512
    num_evaluations: int = 8
    num_test: int | None = None
    num_asked: int = 64
    answer_tokens: int = 60

    def split(self, name: SplitName) -> Path:
        """The file of one split."""
        path = DEMO / "data" / self.data / f"{name}.jsonl"
        return path if path.exists() else path.with_suffix(".jsonl.gz")

    def rows(self, name: SplitName) -> list[dict[str, Any]]:
        """The rows of one split, as they are in its file."""
        data = self.split(name).read_bytes()
        text = gzip.decompress(data) if self.split(name).suffix == ".gz" else data
        return [json.loads(line) for line in text.splitlines()]

    def check(self) -> None:
        """See that there is a model to start from.

        Raises:
            ModelError: There is none.
        """
        if not (self.base / "model.safetensors").is_file():
            raise ModelError(
                f"{self.base}: the demo's base model is not in this installation; install orpo again"
            )


EXPERIMENTS: dict[DataName, Experiment] = {
    "politeness": Experiment(),
    "harmless": Experiment(data="harmless", num_epochs=1.0),
}
"""What `--data` runs; the dialogues of `harmless` are four times as long."""

FAST: dict[str, Any] = {
    "max_steps": 6,
    "num_evaluations": 2,
    "num_test": 24,
    "num_asked": 4,
    "answer_tokens": 24,
}
"""What `--fast` changes: long enough to see that everything works, too short to see what ORPO does."""


def sft_folder(folder: Path) -> Path:
    """The run directory of the contrast."""
    return folder / "sft"


def free_directory(wanted: Path) -> Path:
    """Make the run directory, or the first of `wanted-2`, `wanted-3`, ... that is not taken.

    Raises:
        ConfigError: It cannot be made.
    """
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir() or any(folder.iterdir()):
                continue
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be made ({error.strerror}); name another output_dir"
            ) from error
        return folder
    raise AssertionError
