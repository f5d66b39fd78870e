"""What a comparison is asked for: methods, and the budget that is equal for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orpo.comparing.methods import DEFAULT, stages_of
from orpo.comparing.splits import SplitOptions
from orpo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared, and with what budget.

    Attributes:
        methods: Names of methods (methods.py); the first is the baseline unless one is named.
        seeds: How many times each method is trained with its chosen settings, at least 1.
        sizes: Pairs of smaller training sets, for the curve; the whole set is always there.
        trials: Settings that each method tries before, at least 1.
        baseline: The method that the others are compared with; None: the first.
        answers: Test prompts that the first seed of each method answers, at least 0.
        answer_tokens: Longest answer.
        jobs: Trainings at a time, each a process of its own; they share the cores. 0: in this process.
        split: Where validation and test pairs come from.
    """

    methods: Sequence[str] = DEFAULT
    seeds: int = 3
    sizes: Sequence[int] = ()
    trials: int = 4
    baseline: str | None = None
    answers: int = 32
    answer_tokens: int = 128
    jobs: int = 1
    split: SplitOptions = field(default_factory=SplitOptions)

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return self.baseline or self.methods[0]

    def check(self) -> None:
        """Check what was given.

        Raises:
            ConfigError: Naming the option.
        """
        for name, least in (("seeds", 1), ("trials", 1), ("answers", 0), ("jobs", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name}: {value} is out of range; expected at least {least}")
        if not self.methods:
            raise ConfigError("methods: none is named; write for instance sft,orpo")
        for method in self.methods:
            stages_of(method)
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods: {', '.join(self.methods)} names one twice")
        if self.baseline is not None and self.baseline not in self.methods:
            raise ConfigError(f"baseline: {self.baseline} is not one of {', '.join(self.methods)}")
        for name in ("validation_share", "test_share"):
            if not 0 < getattr(self.split, name) < 0.5:
                raise ConfigError(f"{name}: {getattr(self.split, name)} is out of range; expected 0 to 0.5")
