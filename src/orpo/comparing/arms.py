"""An arm as trainings to make: the settings and the run directory of each, and how much of the budget it has.

An arm is a method with chosen settings, a training set and a seed. Each of its stages is an ordinary run; the
first stages of arms that begin in the same way are the same run, made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.comparing.methods import RATE, STAGES, Choice, stage_settings, stages_of
from orpo.comparing.splits import VALIDATION, Splits
from orpo.settings.schema import known_settings

_OF_THE_DATA = (
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name",
    "eval_split", "columns", "data_format",
)  # fmt: skip
_NOT_OF_AN_ARM = (
    "output_dir", "seed", "run_name", "push_to_hub", "dry_run", "force", "resume_from_checkpoint",
)  # fmt: skip
_UNLESS_SAID = {"num_samples": 0, "report_to": "none"}
"""Settings of an arm where the recipe says nothing."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training.

    Attributes:
        folder: Its run directory.
        settings: Of its recipe.
        after: The run that it starts from; None: the base.
    """

    folder: Path
    settings: Mapping[str, Any]
    after: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method with its settings, on a training set.

    Attributes:
        method: Its name.
        choices: The chosen settings of each stage.
        size: Pairs of the training set.
        seed: Of the order of the pairs.
        jobs: Its trainings, in order; the last one's model is the arm's.
    """

    method: str
    choices: Sequence[Choice]
    size: int
    seed: int
    jobs: Sequence[Job]

    @property
    def folder(self) -> Path:
        """The run directory of its model."""
        return self.jobs[-1].folder

    @property
    def label(self) -> str:
        """For people: `orpo, learning_rate 0.001, beta 2, seed 0`."""
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.choices[-1].items())
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

    def arm(self, method: str, choices: Sequence[Choice], size: int, seed: int) -> Arm:
        """The arm of a method.

        Args:
            method: Its name.
            choices: Settings of each of its stages.
            size: Pairs of the training set.
            seed: Of the order of the pairs.
        """
        stages = stages_of(method)
        jobs: list[Job] = []
        for number in range(len(stages)):
            name = _name(stages[: number + 1], choices[: number + 1], len(stages), seed)
            if size != self.splits.sizes[-1]:
                name = f"{size}-pairs-{name}"
            before = jobs[-1].folder if jobs else None
            settings = self._settings(stages[number], choices[number], size, before)
            settings |= self._budget(number, len(stages))
            settings |= {"seed": seed, "output_dir": str(self.folder / name)}
            jobs.append(Job(self.folder / name, settings, before))
        return Arm(method=method, choices=tuple(choices), size=size, seed=seed, jobs=tuple(jobs))

    def common(self) -> dict[str, Any]:
        """What all arms have of the recipe: everything but where its pairs come from and where it goes."""
        left_out = {*_OF_THE_DATA, *_NOT_OF_AN_ARM}
        kept = {name: value for name, value in self.recipe.items() if name not in left_out}
        if kept.get("eval_strategy") == "no":  # curves and the choice need validation pairs
            del kept["eval_strategy"]
        return kept | dict(self.reading)

    def _settings(self, stage: str, choice: Choice, size: int, before: Path | None) -> dict[str, Any]:
        settings = _UNLESS_SAID | stage_settings(self.common(), stage) | dict(choice)
        settings |= {
            "dataset_name": str(self.splits.training(size)),
            "eval_dataset_name": str(self.splits.path(VALIDATION)),
            "fail_if_worse": False,
        }
        return settings | ({} if before is None else _starting_from(before, settings))

    def _budget(self, number: int, stages: int) -> dict[str, Any]:
        """Equal shares of the recipe's passes, or steps, for each stage of a method."""
        steps = int(self.recipe.get("max_steps") or -1)
        if steps > 0:
            return {"max_steps": max(1, steps * (number + 1) // stages - steps * number // stages)}
        usual = known_settings()["num_train_epochs"].default
        return {"num_train_epochs": float(self.recipe.get("num_train_epochs") or usual) / stages}


def _name(stages: Sequence[str], choices: Sequence[Choice], of: int, seed: int) -> str:
    """`sft-lr0.001-1of2+simpo-lr0.0005-odds_scale2-seed0`: everything that tells one run from another."""
    parts = []
    for number, (stage, choice) in enumerate(zip(stages, choices, strict=True), start=1):
        chosen = [f"{'lr' if name == RATE else name}{value:g}" for name, value in choice.items()]
        parts.append("-".join([stage, *chosen, *([f"{number}of{of}"] if of > 1 else [])]))
    return "+".join(parts) + f"-seed{seed}"


def _starting_from(before: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage that goes on with the model, or the adapter, of the one before it."""
    if settings.get("use_peft"):
        return {"adapter_name_or_path": str(before), "use_peft": False}
    return {"model_name_or_path": str(before), "resize_embeddings": False}


def answers_read(method: str, pairs: float) -> float:
    """Answers that go through the model forward while a method trains on so many pairs in all.

    A stage that compares reads both answers of a pair, SFT one. Stages share the pairs equally.
    """
    stages = stages_of(method)
    return sum(pairs / len(stages) * (2 if STAGES[stage].reads_rejected else 1) for stage in stages)
