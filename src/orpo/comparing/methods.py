"""What can be compared: each method is a list of stages, and each stage a handful of settings.

`sft` and `orpo` are one stage, `sft+simpo` is two: the second starts from the model of the first. All stages
of a method share its budget. A new stage is one entry of `STAGES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from orpo.errors import ConfigError
from orpo.settings.config import PRESETS

Recipe = Mapping[str, Any]
Choice = Mapping[str, float]
"""Values of the settings that are chosen on validation pairs: `{"learning_rate": 1e-3, "beta": 2.0}`."""

_OF_AN_OBJECTIVE = ("objective", "beta", "nll_weight", "odds_scale", "compares", "target_margin")
_ORPO_LIKE = ("orpo", "response", "llamafactory")
"""Objectives whose own settings in a recipe are meant for ORPO."""
RATE = "learning_rate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One training.

    Attributes:
        settings: Put over those of the recipe.
        knob: The setting that is chosen together with the learning rate; None: the rate alone.
        reads_rejected: Whether rejected answers go through the model.
        takes_recipe: Whether the objective's settings in the recipe are meant for it.
    """

    settings: Recipe
    knob: str | None = None
    reads_rejected: bool = True
    takes_recipe: bool = False


STAGES: Mapping[str, Stage] = {
    "sft": Stage(settings={"beta": 0.0}, reads_rejected=False),
    "orpo": Stage(settings={}, knob="beta", takes_recipe=True),
    "tempered": Stage(settings={"objective": "tempered"}, knob="odds_scale"),
    "simpo": Stage(settings={"objective": "simpo"}, knob="odds_scale"),
    "cpo_simpo": Stage(settings={"objective": "cpo_simpo"}, knob="odds_scale"),
}
MODELS_HELD = 1
"""Models in memory while any of these trains: none of them has a reference model."""
DEFAULT = ("sft", "orpo")


def stages_of(method: str) -> list[str]:
    """The names of the stages of a method: `sft+simpo` -> `["sft", "simpo"]`.

    Raises:
        ConfigError: One is not known, or stands twice.
    """
    names = method.split("+")
    for name in names:
        if name not in STAGES:
            raise ConfigError(
                f"methods: {name!r} in {method!r} is not one of {', '.join(STAGES)}; join stages with +,"
                " as in sft+simpo"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"methods: {method!r} has a stage twice")
    return names


def knobs(stage: str) -> list[str]:
    """The settings of a stage that are chosen."""
    knob = STAGES[stage].knob
    return [RATE] if knob is None else [RATE, knob]


def stage_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """A recipe with the settings of a stage.

    Of the recipe's objective, ORPO takes everything and the others what their NLL is over.
    """
    one = STAGES[stage]
    own = {name: recipe[name] for name in _OF_AN_OBJECTIVE if recipe.get(name) is not None}
    if own.get("objective", "orpo") not in _ORPO_LIKE:  # meant for another method than any of those below
        own = {}
    kept = own if one.takes_recipe else {}
    if stage == "sft" and "objective" in own:
        kept = {"objective": own["objective"]}
    others = {name: value for name, value in recipe.items() if name not in _OF_AN_OBJECTIVE}
    return others | kept | dict(one.settings)


def recipe_choice(recipe: Recipe, stage: str, *, rate: float) -> dict[str, float]:
    """What the recipe itself says for the settings that are chosen.

    Args:
        recipe: The recipe.
        stage: Whose settings.
        rate: The learning rate where the recipe names none.
    """
    settings = stage_settings(recipe, stage)
    preset = PRESETS[settings.get("objective", "orpo")]
    found = {RATE: float(settings.get(RATE) or rate)}
    knob = STAGES[stage].knob
    if knob is not None:
        value = settings.get(knob)
        found[knob] = float(getattr(preset, knob) if value is None else value)
    return found


def candidates(start: Choice, number: int, factor: float = 2.0) -> list[dict[str, float]]:
    """Settings to try: those of the recipe first, then ever further from it, in steps of a factor.

    With one setting that is x1, x2, x1/2, x4, ...; with two, every pair of such factors whose steps add up to
    1, then to 2, and so on.

    Args:
        start: Of the recipe.
        number: How many, at least 1.
        factor: Above 1.
    """
    names = [name for name in start if start[name] > 0]
    return [
        {name: _moved(value, factor, powers.get(name, 0)) for name, value in start.items()}
        for powers in islice(_powers(names), number)
    ]


def _moved(value: float, factor: float, power: int) -> float:
    """A value so many steps away, with three digits; the value itself is left as it is."""
    return float(f"{value * factor**power:.3g}") if power else value


def _powers(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Whole powers for each name, by the sum of their sizes: larger before smaller, the first name first."""
    reach = 0
    while True:
        for first in range(reach, -1, -1):
            rest = reach - first
            if len(names) < 2 and rest:
                continue
            for one in _signs(first):
                for other in _signs(rest):
                    yield dict(zip(names, (one, other), strict=False))
        reach += 1


def _signs(size: int) -> tuple[int, ...]:
    return (size, -size) if size else (0,)
