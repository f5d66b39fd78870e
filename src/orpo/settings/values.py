"""What the value of a setting of `transformers.TrainingArguments` must be, beyond its type and range.

transformers takes each of these without a word, or names no setting where it refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo.errors import ConfigError

_CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
_MAPPINGS = (*_CHECKPOINTING, "lr_scheduler_kwargs", "model_init_kwargs", "chat_template_kwargs")
_OR_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
_SWITCHES = ("use_reentrant", "preserve_rng_state", "debug", "early_stop", "offload")
_FSDP = (
    *("full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2"),
    *("offload", "auto_wrap", "true"),
)
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_WITH_A_NAME = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def check_values(settings: Mapping[str, Any]) -> None:
    """Check what is there of the settings with such values.

    Raises:
        ConfigError: Naming the key, its value and what is accepted.
    """
    steps = settings.get("max_steps")
    if type(steps) is int and steps < 1 and steps != -1:
        raise ConfigError(
            f"max_steps: {steps} makes no step; write -1, or leave it out, for num_train_epochs of the data"
        )
    if settings.get("label_smoothing_factor"):
        raise ConfigError(
            f"label_smoothing_factor: {settings['label_smoothing_factor']}: tokens are trained as they are;"
            " for labels that may be wrong set label_smoothing"
        )
    for key in ("log_level", "log_level_replica"):
        if (level := settings.get(key)) is not None and level not in _LEVELS:
            raise ConfigError(f"{key}: {level!r} is not one of {', '.join(_LEVELS)}")
    for key in (*_MAPPINGS, *_OR_FILES):
        _check_mapping(key, settings.get(key))
    for key in _CHECKPOINTING:
        given = settings.get(key)
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if name in _SWITCHES and not isinstance(value, bool):
                raise ConfigError(f"{key}: {name}: {value!r} is not usable; expected true or false")
    _check_division(settings)
    _check_optimizer_arguments(settings.get("optim_args"))


def _check_division(settings: Mapping[str, Any]) -> None:
    """Check how weights are divided over processes."""
    fsdp = settings.get("fsdp")
    options = fsdp.split() if isinstance(fsdp, str) else fsdp if isinstance(fsdp, list) else []
    for option in map(str, options):
        if option.lower() not in _FSDP:
            raise ConfigError(f"fsdp: {option!r} is not one of {', '.join(_FSDP)}")
    divided = settings.get("parallelism_config")
    if isinstance(divided, (Mapping, str)):
        raise ConfigError(
            f"parallelism_config: {divided!r}: rows and layers are not divided over processes here; leave it"
            " out, fsdp cuts the weights"
        )


def _check_mapping(key: str, value: Any) -> None:
    """Check that a setting that is to be a mapping, or for some a file, is one, of finite numbers."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{key}: {value!r} is no JSON ({error}); write it as {{name: value}}") from None
    elif isinstance(value, str) and key in _OR_FILES:
        if key != "deepspeed" and not Path(value).is_file():
            raise ConfigError(f"{key}: {value} is no file; name a JSON file, or write {{name: value}}")
        return
    elif isinstance(value, (str, int, float, Sequence)):
        raise ConfigError(f"{key}: {value!r} is no mapping; write it as {{name: value}}")
    for name, number in _numbers(value):
        if not math.isfinite(number):
            raise ConfigError(f"{key}: {name}: {number} is out of range; expected a finite number")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a nested value, with the name that it is under."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _numbers(item, str(inner))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, float):
        yield name, value


def _check_optimizer_arguments(given: Any) -> None:
    """Check `optim_args`, a text of `name=value` parts."""
    known: set[str] = set()
    for part in given.split(",") if isinstance(given, str) and given else ():
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value) or "=" in value:
            raise ConfigError(f"optim_args: {part!r} is no name=value; write them as 'momentum=0.9,eps=1e-8'")
        if name in known:
            raise ConfigError(f"optim_args: {name!r} is set twice in {given}")
        known.add(name)
        if name in _WITH_A_NAME:
            raise ConfigError(f"optim_args: {name} is a setting; write {_WITH_A_NAME[name]}: {value}")
        if value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise ConfigError(f"optim_args: {name}: {value} is out of range; expected a finite number")
