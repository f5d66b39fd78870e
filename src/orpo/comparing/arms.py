"""An arm is a method with chosen settings, a training set and a seed: one training, an ordinary run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.methods import RATE, Choice, method_settings
from orpo.comparing.splits import VALIDATION, Splits

_OF_THE_DATA = (
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name",
    "eval_split", "columns", "data_format",
)  # fmt: skip
_NOT_OF_AN_ARM = (
    "output_dir", "seed", "run_name", "push_to_hub", "dry_run", "force", "resume_from_checkpoint",
)  # fmt: skip
_UNLESS_SAID = {"num_samples": 0, "report_to": "none"}
"""Settings of an arm where the recipe says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One training.

    Attributes:
        method: Its name.
        choice: The chosen settings.
        size: Pairs of the training set.
        seed: Of the order of the pairs.
        folder: Its run directory.
        settings: Of its recipe.
    """

    method: str
    choice: Choice
    size: int
    seed: int
    folder: Path
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For people: `orpo, learning_rate 0.001, beta 2, seed 0`."""
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.choice.items())
        return f"{self.method}, {chosen}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes arms of one comparison.

    Attributes:
        recipe: Its recipe.
        splits: Its pairs.
        reading: Settings that read them.
        folder: Where run directories go.
    """

    recipe: Mapping[str, Any]
    splits: Splits
    reading: Mapping[str, Any]
    folder: Path

    def arm(self, method: str, choice: Choice, size: int, seed: int) -> Arm:
        """The arm of a method.

        Args:
            method: Its name.
            choice: Its settings.
            size: Pairs of the training set.
            seed: Of the order of the pairs.
        """
        chosen = "-".join(f"{'lr' if name == RATE else name}{value:g}" for name, value in choice.items())
        name = f"{method}-{chosen}-seed{seed}"
        if size != self.splits.sizes[-1]:
            name = f"{size}-pairs-{name}"
        settings = _UNLESS_SAID | method_settings(self.common(), method, choice)
        settings |= {
            "dataset_name": str(self.splits.training(size)),
            "eval_dataset_name": str(self.splits.path(VALIDATION)),
            "fail_if_worse": False,
            "seed": seed,
            "output_dir": str(self.folder / name),
        }
        return Arm(
            method=method, choice=choice, size=size, seed=seed, folder=self.folder / name, settings=settings
        )

    def common(self) -> dict[str, Any]:
        """What all arms have of the recipe: everything but where its pairs come from and where it goes."""
        left_out = {*_OF_THE_DATA, *_NOT_OF_AN_ARM}
        kept = {name: value for name, value in self.recipe.items() if name not in left_out}
        if kept.get("eval_strategy") == "no":  # curves and the choice need validation pairs
            del kept["eval_strategy"]
        return kept | dict(self.reading)
