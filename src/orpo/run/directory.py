"""What a run directory holds, read without torch: recipe, metrics, data report, environment, samples, model.

Every file may be missing: a run that has only begun, or was made by another tool, is read as far as it goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from orpo.errors import DataError, ModelError

Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Run:
    """The files of one run directory, as read; a missing file is empty."""

    name: str
    metrics: list[dict[str, Any]]
    recipe: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    samples: Samples
    evaluations_saved: dict[str, dict[str, Any]]
    """By name, what `orpo eval` has found."""

    def evaluation_sets(self) -> list[str]:
        """Names of the evaluation sets, in the order met; the only one of a run is named ""."""
        pattern = re.compile(r"eval_(?:(.+)_)?nll_token_mean")
        found = [match[1] or "" for line in self.metrics for key in line if (match := pattern.fullmatch(key))]
        return list(dict.fromkeys(found)) or [""]

    def of_set(self, name: str) -> Run:
        """The run as if it had been evaluated on this set alone."""
        if not name:
            return self

        def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
            mine = {key: key.replace(f"eval_{name}_", "eval_") for key in values}
            return {
                mine[key]: value
                for key, value in values.items()
                if mine[key] != key or not key.startswith("eval_")
            }

        metric = str(self.recipe.get("metric_for_best_model") or "loss").removeprefix(f"eval_{name}_")
        recipe = self.recipe | {"metric_for_best_model": metric}
        return replace(self, metrics=[renamed(line) for line in self.metrics], recipe=recipe)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric over the lines that have it."""
        points = [(line["step"], line[name]) for line in self.metrics if is_number(line.get(name))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines that hold an evaluation, in order of steps."""
        return [line for line in self.metrics if any(key.startswith("eval_") for key in line)]

    def first_evaluation(self) -> dict[str, Any] | None:
        """The evaluation before training, or the earliest there is."""
        return next(iter(self.evaluations()), None)

    def final_evaluation(self) -> dict[str, Any] | None:
        """The evaluation of the weights the run ends with: the best ones where the recipe keeps these."""
        lines = self.evaluations()
        metric = str(self.recipe.get("metric_for_best_model") or "loss")
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        scored = [line for line in lines if line["step"] > 0 and is_number(line.get(name))]
        if self.recipe.get("load_best_model_at_end") and scored:
            sign = 1 if self.recipe.get("greater_is_better") else -1
            return max(scored, key=lambda line: sign * line[name])
        return lines[-1] if lines else None


def read_run(run_dir: Path, name: str | None = None) -> Run:
    """Read what a run directory holds.

    Raises:
        DataError: There is no such directory, it holds no run, or one of its files cannot be parsed.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such run directory")
    metrics_file = run_dir / "metrics.jsonl"
    if not metrics_file.exists() and not (run_dir / "recipe.yaml").exists():
        raise DataError(f"{run_dir}: not a run directory (neither metrics.jsonl nor recipe.yaml in it)")
    return Run(
        name=name or run_dir.resolve().name,
        metrics=read_lines(metrics_file),
        recipe=read_recipe(run_dir / "recipe.yaml"),
        data=read_json(run_dir / "data_report.json", {}),
        environment=read_json(run_dir / "environment.json", {}),
        samples=read_json(run_dir / "samples.json", []),
        evaluations_saved={
            path.stem.removeprefix("eval-"): read_json(path, {})
            for path in sorted(run_dir.glob("eval-*.json"))
        },
    )


def model_folder(name: str) -> str:
    """Where the model of a run directory is; any other name is returned as it is.

    An unfinished run has its model in its newest checkpoint.

    Raises:
        ModelError: A folder that holds no model, or a name that can only be a folder's and there is none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and _must_be_a_folder(name):
        raise ModelError(f"{name}: there is no such folder")
    if not folder.is_dir() or holds_model(folder):
        return str(folder) if folder.is_dir() else name
    checkpoints = [
        path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and holds_model(path)
    ]
    if not checkpoints:
        raise ModelError(f"{name}: no model in this folder (neither config.json nor adapter_config.json)")
    return str(max(checkpoints, key=lambda path: int(path.name[11:])))


def _must_be_a_folder(name: str) -> bool:
    """Whether this is no hub name: else a typing error in `runs/first` would be looked for on the hub."""
    parent = Path(name).parent
    has_runs = parent != Path(".") and any(parent.glob("*/recipe.yaml"))
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or has_runs


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model or an adapter."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def base_model_name(name: str) -> str | None:
    """What the model of a run was trained from, as its recipe or adapter says; None where neither does."""
    folder = Path(name)
    run_dir = folder.parent if folder.name.startswith("checkpoint-") else folder
    recipe = read_recipe(run_dir / "recipe.yaml")
    if recipe.get("model_name_or_path"):
        return str(recipe["model_name_or_path"])
    base = read_json(folder / "adapter_config.json", {}).get("base_model_name_or_path")
    return str(base) if base else None


def is_number(value: Any) -> bool:
    """Whether this is a number, true and false not counted."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A jsonl file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if number == len(texts):
                break
            raise DataError(f"{path}:{number}: not valid JSON") from None
        if isinstance(line, dict) and is_number(line.get("step")):
            lines.append(line)
    return lines


def read_json(path: Path, missing: Any) -> Any:
    """The value in a JSON file; `missing` where there is none."""
    if not path.exists():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe, unchecked; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise DataError(f"{path}: not valid YAML") from None
    return recipe if isinstance(recipe, dict) else {}
