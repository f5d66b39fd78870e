"""The pairs that preparing and choosing start from, and lines about how they were read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orpo.curation.steps import Step, reading_step
from orpo.data.preferences import PreferenceSet, ReadSettings, read_preferences
from orpo.data.rows import splits_of
from orpo.data.splits import parse_split
from orpo.data.verdicts import is_score_column
from orpo.errors import ConfigError
from orpo.settings.config import OrpoSettings

_MODULES = {"ftfy": "ftfy", "py3langid": "py3langid", "sklearn": "scikit-learn"}


def check_packages(modules: Iterable[str], what: str) -> None:
    """Stop where a package of the extra `data` is missing.

    Raises:
        ConfigError: With the command that installs it.
    """
    for module in modules:
        if find_spec(module) is None:
            raise ConfigError(f"{what} needs {_MODULES[module]}; pip install 'orpo[data]'")


def only_name(data: Any) -> Any:
    """The name of a data set that is given as a list of one; any other data as it is."""
    if isinstance(data, list | tuple) and len(data) == 1 and isinstance(data[0], str | Path):
        return data[0]
    return data


def read_input(data: Any, split: str | None, settings: OrpoSettings) -> tuple[PreferenceSet, Step, list[str]]:
    """Read one split; malformed rows are counted and left out.

    Raises:
        DataError: The data cannot be read, or has no row that can be used.
        ConfigError: The data has weights.
    """
    if isinstance(data, dict) and data and all(isinstance(value, int | float) for value in data.values()):
        raise ConfigError("weights belong to a training; give the names of the data sets alone")
    read = read_preferences(
        data,
        max_dropped=1.0,
        settings=ReadSettings(
            split=split,
            config=settings.dataset_config,
            data_format=settings.data_format,
            columns=settings.columns,
            on_bad_row=settings.on_bad_row,
            sft_rows=settings.sft_rows,
        ),
    )
    lines = [line for line in read.notices if "columns not used" not in line]
    for name, columns in read.unused_columns.items():
        if left := [column for column in columns if not is_score_column(column)]:
            lines.append(f"{name}: columns not kept: {', '.join(left)}")
    return read, reading_step(read.counts), lines


def other_splits(data: Any, split: str | None, config: str | None) -> list[str]:
    """Splits of the data that are not read."""
    names = data if isinstance(data, list | tuple) else [data]
    read = {part.name for part in parse_split(split)}
    found = dict.fromkeys(name for one in names for name in splits_of(one, config))
    return [name for name in found if name not in read and len(found) > 1]


def curation_settings(settings: dict[str, Any] | None) -> OrpoSettings:
    """Settings of a recipe; malformed rows are skipped and counted, unless the recipe says otherwise."""
    given = {"on_bad_row": "skip"} | (settings or {})
    return replace(OrpoSettings.from_recipe(given), max_dropped=1.0)
