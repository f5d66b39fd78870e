"""Whether two runs may stand side by side: same base, data, held-out pairs and steps; and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.evaluation.per_pair import read_results
from orpo.run.directory import Run, RunDirectory

_SAME = {"model_name_or_path": "another base", "dataset_name": "other training data"}
"""Settings that comparable runs have in common, and what to call it where they do not."""
_OF_NO_MATTER = {"output_dir", "logging_steps", "dataset_num_proc", "text_rows"}


def obstacles(run: Run, other: Run, *, same_pairs: bool) -> list[str]:
    """Why the figures of two runs cannot be compared, in a few words each."""
    found = [
        f"{what} ({_short(other.recipe.get(name))}, not {_short(run.recipe.get(name))})"
        for name, what in _SAME.items()
        if other.recipe.get(name) != run.recipe.get(name)
    ]
    if not same_pairs:
        found.append("other held-out pairs")
    if other.last_step != run.last_step:
        found.append(f"{other.last_step:,} steps, not {run.last_step:,}")
    return found


def differing_settings(run: Run, other: Run) -> list[str]:
    """The settings in which the recipes of two runs differ: `beta 0.0, not 2.0`."""
    names = [*run.recipe, *(name for name in other.recipe if name not in run.recipe)]
    return [
        f"{name} {_short(other.recipe.get(name))}, not {_short(run.recipe.get(name))}"
        for name in names
        if name not in _OF_NO_MATTER and name not in _SAME and other.recipe.get(name) != run.recipe.get(name)
    ]


def same_held_out_pairs(run_dir: Path, run: Run, other_dir: Path, other: Run) -> bool:
    """Whether both runs were evaluated on the same pairs: by where each comes from, else by their number."""
    kept = [read_results(RunDirectory(folder).step_results(0)) for folder in (run_dir, other_dir)]
    if all(kept):
        mine, theirs = ({name: list(one.sources) for name, one in sets.items()} for sets in kept)
        return mine == theirs
    return _sizes(run) == _sizes(other)


def _sizes(run: Run) -> Mapping[str, int | None]:
    firsts = {name: run.first_evaluation(name) for name in run.evaluation_sets()}
    return {name: None if first is None else first.num_pairs for name, first in firsts.items()}


def _short(value: Any) -> str:
    """A setting as text; of a file only its name."""
    if value is None:
        return "unset"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    text = str(value)
    return Path(text).name or text if text.startswith(("/", ".", "~")) else text
