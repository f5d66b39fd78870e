"""A model's generation_config, which is saved with its weights: repaired, or refused before the first step.

transformers reads settings that contradict each other with a warning, and refuses to save them: a run that
found out at its end would lose its weights.
"""

import re
from pathlib import Path
from typing import Any

from orpo.engine.scorer import base_model, num_embeddings
from orpo.errors import DataError, ModelError, raised_as
from orpo.run.directory import read_json

_FILE = "generation_config.json"
_MOST_IDS = 2**31
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_generation_file(name: str) -> None:
    """Refuse a folder whose generation_config.json is no JSON object: transformers would pass over it.

    Raises:
        ModelError: It is damaged.
    """
    path = Path(name).expanduser() / _FILE
    try:
        read_json(path, {})
    except DataError:
        raise ModelError(
            f"{path}: no JSON object can be read from it; correct the file, or delete it"
        ) from None


def stop_ids(generation: Any) -> list[int]:
    """The ids that end an answer, but for those that no vocabulary has (-1: none).

    Raises:
        ModelError: The setting holds something else than ids.
    """
    return [one for one in token_ids(generation, "eos_token_id") if 0 <= one < _MOST_IDS]


def token_ids(generation: Any, name: str) -> list[int]:
    """The ids of a setting that names tokens: none, one or several.

    Raises:
        ModelError: It holds something else.
    """
    value = getattr(generation, name)
    ids = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(type(one) is int for one in ids):
        raise ModelError(f"{_FILE}: {name} is {value!r}; expected the id of a token, or a list of ids")
    return ids


def settle_generation_config(model: Any) -> list[str]:
    """Repair a model's generation_config where it could not be saved as it is.

    Returns:
        A line for each thing that was changed, or that means nothing.

    Raises:
        ModelError: It cannot be repaired.
    """
    generation = getattr(base_model(model), "generation_config", None)
    if generation is None:
        return []
    _check_types(generation)
    lines = _beyond_vocabulary(generation, num_embeddings(model))
    if generation.temperature == 0:
        generation.temperature, generation.do_sample = None, False
        lines.append(f"{_FILE}: temperature 0 means the likeliest token: do_sample is set to false instead")
    names = _refused(generation)
    if names and generation.do_sample is None:
        generation.do_sample = True
        left = _refused(generation)
        if of_drawing := [name for name in names if name not in left]:
            written = _written(generation, of_drawing)
            lines.append(f"{_FILE}: do_sample is set to true, without which {written} would mean nothing")
        else:
            generation.do_sample = None
        names = left
    if names:
        written = _written(generation, names)
        for name in names:
            setattr(generation, name, None)
        lines.append(f"{_FILE}: {written} can have no effect beside the other settings, and is left out")
    if _refused(generation):
        raise ModelError(f"{_FILE}: {', '.join(_refused(generation))} cannot be used; correct the file")
    return lines


def _beyond_vocabulary(generation: Any, number: int) -> list[str]:
    """A line for each token that the model does not have; `number` is 0 where its weights are sharded."""
    ids = [(name, one) for name in _TOKENS for one in token_ids(generation, name) if number]
    return [
        f"{_FILE}: {name} {one} is none of the model's {number:,} tokens, so it means nothing"
        for name, one in ids
        if not 0 <= one < number
    ]


def _check_types(generation: Any) -> None:
    for name in _TOKENS:
        token_ids(generation, name)
    defaults: dict[str, Any] = getattr(type(generation), "_get_default_generation_params", dict)()
    for name, default in defaults.items():
        value = getattr(generation, name, None)
        kinds = (int, float) if type(default) in (int, float) else object
        if value is not None and not isinstance(value, kinds):
            raise ModelError(f"{_FILE}: {name} is {value!r}; expected a number, such as {default}")
    if generation.temperature is not None and not generation.temperature >= 0:
        raise ModelError(f"{_FILE}: temperature is {generation.temperature}; expected a number above 0")


def _refused(generation: Any) -> list[str]:
    """Names of the settings for which transformers would not save it."""
    with raised_as(ModelError, f"{_FILE} cannot be used", "correct the file"):
        try:
            generation.validate(strict=True)
        except ValueError as error:
            if names := re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE):
                return names
            raise
    return []


def _written(generation: Any, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(generation, name)}" for name in names)
