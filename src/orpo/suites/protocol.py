"""What a suite is: a module with a name and `run(subject, about, options)`.

Suites import what is heavy where they use it: `orpo suites` lists them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orpo.evaluation.answering import Answerer
    from orpo.suites.measured import Measured
    from orpo.suites.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How suites are run.

    Attributes:
        limit: Items of each suite, the first so many; None: all.
        max_tokens: Longest answer; None: as the suite says.
        judge: Loads the model that rates answers; None where there is none.
    """

    limit: int | None = None
    max_tokens: int | None = None
    judge: Callable[[], Answerer] | None = None


class Suite(Protocol):
    """A module of this folder.

    Attributes:
        NAME: What is typed after `--suite`.
        ABOUT: One line for the list.
        TAKES: What follows the name after a colon: `FILE`, `TASK`; `[FILE]` where it may be left out, empty
            where nothing does.
    """

    NAME: str
    ABOUT: str
    TAKES: str

    def check(self, about: str | None, options: Options) -> None:
        """Stop before anything is loaded where the suite cannot run.

        Raises:
            OrpoError: A file cannot be read, or a library or a judge is needed.
        """

    def run(self, subject: Subject, about: str | None, options: Options) -> Measured:
        """Measure a model.

        Args:
            subject: The model.
            about: What follows the name of the suite.
            options: How.

        Raises:
            OrpoError: The model or a file cannot be used.
        """
