"""What cannot change within the folder of a comparison, once a training has begun there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.errors import ConfigError
from orpo.run.directory import read_json, write_json
from orpo.run.lock import LOCK, check_output_dir
from orpo.run.public import without_secrets

_PLAN, DATA, RUNS = "plan.json", "data", "runs"


def has_begun(folder: Path) -> bool:
    """Whether a training has begun in the folder of a comparison; before that, everything may change."""
    return (folder / RUNS).is_dir()


def usable(out: str | Path) -> Path:
    """The whole path of the folder of a comparison.

    Raises:
        ConfigError: It is no folder, or something else is there.
    """
    check_output_dir(str(out), [])
    folder = Path(out).expanduser().resolve()
    is_ours = (folder / _PLAN).exists()
    if folder.is_dir() and not is_ours and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigError(f"--out {out}: something else is there already; name another folder")
    return folder


def absolute(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the whole path of a local model: runs are read from other folders."""
    model = str(recipe.get("model_name_or_path") or "")
    path = Path(model).expanduser()
    return dict(recipe) | ({"model_name_or_path": str(path.resolve())} if model and path.exists() else {})


def settle_plan(folder: Path, recipe: Mapping[str, Any], **budget: Any) -> None:
    """Keep what cannot change within a folder: the choice must not be made again once the test is known.

    Args:
        folder: Of the comparison.
        recipe: Its recipe.
        budget: What else is fixed, by name, as plain values.

    Raises:
        ConfigError: The folder is of another recipe or another budget.
    """
    left_out = ("output_dir", "dataset_num_proc")
    settings = {name: value for name, value in without_secrets(recipe).items() if name not in left_out}
    now = {"recipe": settings} | budget
    before = read_json(folder / _PLAN, {}) if has_begun(folder) else {}
    differing = [name for name in now if before and before.get(name) != now[name]]
    if "recipe" in differing:
        earlier = before.get("recipe", {})
        keys = sorted({*settings, *earlier})
        differing = [name for name in keys if earlier.get(name) != settings.get(name)]
    if differing:
        raise ConfigError(
            f"{folder.name} holds a comparison with other settings ({', '.join(differing)}); name another"
            " --out"
        )
    if not before:
        write_json(folder / _PLAN, now)
