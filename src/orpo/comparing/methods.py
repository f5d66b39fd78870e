"""What can be compared: a method is an objective, or several joined with +, one after the other in one run.

`sft`, `orpo` and `dpo` are one stage; `sft+dpo` is the setting `stages` with equal shares of the steps. Every
objective is a method, but for the variants of ORPO, which a recipe that names one means by `orpo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

from orpo.errors import ConfigError
from orpo.settings.config import PRESETS, ObjectiveName, OrpoSettings, objective_keys

Recipe = Mapping[str, Any]
Choice = Mapping[str, float]
"""Values of the settings that are chosen on validation pairs: `{"learning_rate": 1e-3, "beta": 2.0}`."""

RATE, STRENGTH = "learning_rate", "beta"
DEFAULT = ("sft", "orpo")
FACTOR = 3.0
"""Between neighbouring values of a setting that is chosen."""
MODELS_HELD = 1
"""Models in memory while any of these trains: what a reference says is asked before, of the same model."""
_VARIANTS = ("response", "llamafactory")
"""Objectives that are ORPO with another NLL."""
OBJECTIVES: tuple[ObjectiveName, ...] = tuple(name for name in PRESETS if name not in _VARIANTS)
_NLL = ("nll_on", "nll_reduction")
"""What an NLL is over is the same for all methods."""


def stages_of(method: str) -> list[ObjectiveName]:
    """The objectives of a method, in order: `sft+dpo` -> `["sft", "dpo"]`.

    Raises:
        ConfigError: One is not known, or stands twice.
    """
    stages: list[ObjectiveName] = []
    for name in method.split("+"):
        known = next((one for one in OBJECTIVES if one == name), None)
        if known is None:
            raise ConfigError(
                f"methods: {name!r} in {method!r} is not one of {', '.join(OBJECTIVES)}; join stages with +,"
                " as in sft+dpo"
            )
        if known in stages:
            raise ConfigError(f"methods: {method!r} has a stage twice")
        stages.append(known)
    return stages


@cache
def _defaults(objective: ObjectiveName) -> Mapping[str, Any]:
    """The settings that an objective has, with their values."""
    return objective_keys(OrpoSettings(objective=objective))


def _own_settings(recipe: Recipe, objective: ObjectiveName) -> dict[str, Any]:
    """What a recipe says of an objective: all where it is the recipe's own, else what the NLL is over."""
    named = recipe.get("objective") or "orpo"
    is_sft = named == "orpo" and recipe.get("beta") == 0
    family = "orpo" if named in _VARIANTS else named
    said = {name: recipe[name] for name in _defaults(named) if recipe.get(name) is not None}
    if recipe.get("stages") is not None:
        return {"objective": objective}
    if family == objective and not is_sft:
        return {"objective": named} | said
    over = {name: _defaults(named)[name] for name in _NLL} if named in _VARIANTS else {}
    over |= {name: said[name] for name in _NLL if name in said}
    return {"objective": objective} | over


def without_objective(recipe: Recipe) -> dict[str, Any]:
    """A recipe without what it says of its objective."""
    left_out = {name for objective in PRESETS for name in _defaults(objective)} | {"objective", "stages"}
    return {name: value for name, value in recipe.items() if name not in left_out}


def method_settings(recipe: Recipe, method: str, choice: Choice) -> dict[str, Any]:
    """A recipe with the objective, or the stages, of a method.

    Args:
        recipe: Of the comparison.
        method: Its name.
        choice: The settings that are chosen; beta is that of the last stage.
    """
    others, names = without_objective(recipe), stages_of(method)
    stages = [_own_settings(recipe, name) for name in names]
    stages[-1] |= {name: value for name, value in choice.items() if name != RATE}
    rate = {RATE: choice[RATE]} if RATE in choice else {}
    if len(stages) == 1:
        return others | stages[0] | rate
    shares: list[dict[str, Any]] = [{"share": round(1 / len(stages), 6)} for _ in stages[1:]]
    return others | rate | {"stages": [one | share for one, share in zip(stages, [*shares, {}], strict=True)]}


def recipe_choice(recipe: Recipe, method: str, *, rate: float) -> dict[str, float]:
    """What the recipe itself says for the settings that are chosen.

    Args:
        recipe: The recipe.
        method: Whose settings.
        rate: The learning rate where the recipe names none.
    """
    last = stages_of(method)[-1]
    found = {RATE: float(recipe.get(RATE) or rate)}
    usual = _defaults(last).get(STRENGTH)
    if usual is not None:
        found[STRENGTH] = float(_own_settings(recipe, last).get(STRENGTH) or usual)
    return found


def method_of(recipe: Recipe) -> str:
    """The method that a recipe trains with.

    Raises:
        ConfigError: It has stages of its own.
    """
    if recipe.get("stages") is not None:
        raise ConfigError("stages: a recipe with stages cannot be probed; probe each objective by itself")
    named = str(recipe.get("objective") or "orpo")
    if named == "orpo" and recipe.get("beta") == 0:
        return "sft"
    return "orpo" if named in _VARIANTS else named


def answers_read(method: str, pairs_seen: float, pairs: int) -> float:
    """Answers that go through the model forward while a method trains.

    A stage that compares reads both answers of a pair, SFT one. A reference is asked once about both answers
    of every pair of the training set.

    Args:
        method: Its name.
        pairs_seen: Pairs trained on, each as often as it was; stages share them equally.
        pairs: Pairs of the training set.
    """
    stages = stages_of(method)
    read = sum(2 if PRESETS[one].preference_weight > 0 else 1 for one in stages) * pairs_seen / len(stages)
    return read + (2 * pairs if needs_reference(method) else 0)


def needs_reference(method: str) -> bool:
    """Whether a method compares with what a reference model says."""
    return any(PRESETS[one].needs_reference for one in stages_of(method))


def candidates(start: Choice, number: int, factor: float = FACTOR) -> list[dict[str, float]]:
    """Settings to try: those of the recipe first, then ever further from it, in steps of a factor.

    With one setting and a factor of 3 that is x1, x3, x1/3, x9, ...; with two, every pair of such factors
    whose steps add up to 1, then to 2, and so on.

    Args:
        start: Of the recipe.
        number: How many, at least 1.
        factor: Above 1.
    """
    names = list(start)
    return [
        {name: _moved(value, factor, powers[name]) for name, value in start.items()}
        for powers in islice(_powers(names), number)
    ]


def _moved(value: float, factor: float, power: int) -> float:
    """A value so many steps away, with three digits; the value itself is left as it is."""
    return float(f"{value * factor**power:.3g}") if power else value


def _powers(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Whole powers for one or two names, by the sum of their sizes; the first name moves first."""
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
