"""The mark of a finished run: which recipe it is of, and the checksums of its weights; written last.

A run is finished where its mark says so, of the recipe that lies there now and of the weights that lie there
now. The files beside the weights may be edited by hand; they only have to be there, and not cut off. Training
removes the mark before anything else, so a run that is killed is never taken for finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.errors import DataError
from orpo.run.directory import RunDirectory, read_json, write_json
from orpo.run.disk import describe, difference, text_checksum

_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*")


def weight_files(folder: Path) -> list[Path]:
    """The weights in a folder, whatever library wrote them."""
    found = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def mark_finished(run: RunDirectory) -> None:
    """Say that the weights in a run directory are the result of its recipe."""
    weights = {path.name: dict(describe(path)) for path in weight_files(run.path)}
    beside = [path.name for path in run.model_files() if path.name not in weights]
    write_json(run.finished, {"recipe": _checksum(run.read_recipe()), "weights": weights, "beside": beside})


def unfinished_because(run: RunDirectory) -> str | None:
    """Why a run is not finished; None where it is."""
    try:
        mark, recipe = read_json(run.finished, {}), run.read_recipe()
    except DataError as error:
        return str(error)
    if not mark:
        return "the run is not finished"
    if mark.get("recipe") != _checksum(recipe):
        return "its weights are of another recipe"
    weights = mark.get("weights")
    if not isinstance(weights, Mapping) or not weights:
        return f"{run.finished.name} names no weights"
    beside = mark.get("beside")
    for name in beside if isinstance(beside, list) else ():
        if (what := _damage(run.path / str(name))) is not None:
            return what
    return next((what for name, one in weights.items() if (what := difference(run.path / name, one))), None)


def _damage(path: Path) -> str | None:
    """What is wrong with a file that lies beside weights; None where it looks whole."""
    try:
        end = path.read_bytes()[-64:].rstrip()
    except OSError:
        return f"{path.name} is missing"
    if not end:
        return f"{path.name} is empty"
    return f"{path.name} is cut off" if path.suffix == ".json" and end[-1:] not in b"}]" else None


def _checksum(recipe: Mapping[str, Any]) -> str:
    return text_checksum(json.dumps(recipe, sort_keys=True, default=str))
