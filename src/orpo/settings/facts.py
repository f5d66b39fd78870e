"""Everything there is to know about one setting besides its type and default, kept with its definition.

`setting` defines one of ours. The settings that `transformers.TrainingArguments` defines are described by the
light table in inherited.py, so that a recipe can be checked without importing torch.
"""

from __future__ import annotations

import sys
from dataclasses import field
from typing import Any, Literal, NamedTuple, Self

from orpo.errors import ConfigError

Resume = Literal["built in", "fixed", "derived", "free"]
InRecipe = Literal["always", "changed", "never"]


class TrlDefault(NamedTuple):
    """A default of TRL 1.16's ORPOConfig that is not ours."""

    value: Any
    why: str
    """Why ours differs."""


class Facts(str):
    """The help text of a setting, which carries the other facts.

    It is a text because transformers' HfArgumentParser passes a field's metadata on to argparse, which takes
    `help` and refuses any other key.

    Attributes:
        at_least: Smallest value allowed.
        above: Largest value too small.
        at_most: Largest value allowed.
        below: Smallest value too large.
        resume: Whether a run may resume with another value. `fixed`: no, it would make another model, unless
            it is forced, which takes effect from there on. `built in`: not even then, since the weights or
            the optimizer's state in the checkpoint were made with it.
            `derived`: it makes another model, but a checkpoint answers for it in another way (a checksum of
            the tokens, the weights themselves, pairs per step). `free`: it cannot change the mathematics.
        in_recipe: Whether recipe.yaml of a run names it: `always`, where it was `changed`, or `never`, since
            it follows from others.
        only_with: Other settings, one of which has to be on, or to have the value in `name: value`, for this
            one to have an effect.
        not_with: Settings beside which this one has no effect, where they are on or have the value in
            `name: value`.
        loading: Whether it says how a model is loaded, and so cannot apply to one that is loaded already.
        evaluation: Whether `orpo eval` takes the value that the run was trained with.
        trl: TRL's default where it differs from ours.
    """

    at_least: float | None
    above: float | None
    at_most: float | None
    below: float | None
    resume: Resume
    in_recipe: InRecipe
    only_with: tuple[str, ...]
    not_with: tuple[str, ...]
    loading: bool
    evaluation: bool
    trl: TrlDefault | None

    def __new__(  # noqa: PLR0913 - one argument for each fact
        cls,
        help_text: str = "",
        *,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
        resume: Resume = "fixed",
        in_recipe: InRecipe = "changed",
        only_with: tuple[str, ...] = (),
        not_with: tuple[str, ...] = (),
        loading: bool = False,
        evaluation: bool = False,
        trl: TrlDefault | None = None,
    ) -> Self:
        """Make the text and hang the facts on it; arguments as the attributes."""
        facts = super().__new__(cls, help_text)
        facts.at_least, facts.above, facts.at_most, facts.below = at_least, above, at_most, below
        facts.resume, facts.in_recipe, facts.loading = resume, in_recipe, loading
        facts.only_with, facts.not_with = only_with, not_with
        facts.evaluation, facts.trl = evaluation, trl
        return facts

    def check(self, key: str, value: Any) -> None:
        """Check a number against the limits; anything else passes.

        Raises:
            ConfigError: Naming the key, its value and what is accepted.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        limits = {
            "at least": (self.at_least, lambda limit: value >= limit),
            "above": (self.above, lambda limit: value > limit),
            "at most": (self.at_most, lambda limit: value <= limit),
            "below": (self.below, lambda limit: value < limit),
        }
        given = {word: (limit, holds) for word, (limit, holds) in limits.items() if limit is not None}
        if not abs(value) <= sys.float_info.max:  # not a number either
            value = value if isinstance(value, float) else "a number of more than 300 digits"
            raise ConfigError(f"{key}: {value} is out of range; expected a finite number")
        if not all(holds(limit) for limit, holds in given.values()):
            expected = " and ".join(f"{word} {limit}" for word, (limit, _) in given.items())
            raise ConfigError(f"{key}: {value} is out of range; expected {expected}")


def setting(default: Any, help_text: str, **facts: Any) -> Any:
    """A dataclass field with its facts.

    Args:
        default: The default value.
        help_text: One line, or all facts.
        facts: As of `Facts`, where `help_text` is a line.
    """
    described = help_text if isinstance(help_text, Facts) else Facts(help_text, **facts)
    return field(default=default, metadata={"help": described})
