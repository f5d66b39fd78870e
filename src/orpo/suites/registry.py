"""The suites there are, and how they are named on the command line: `ifeval`, `pairs:test.jsonl`, `bias`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orpo.errors import ConfigError
from orpo.suites import (
    answers,
    bbq,
    crows_pairs,
    ifeval,
    lm_eval_task,
    mt_bench,
    pairs,
    rewardbench,
)
from orpo.suites.protocol import Suite

_ALL: tuple[Suite, ...] = (pairs, rewardbench, ifeval, mt_bench, answers, crows_pairs, bbq, lm_eval_task)
SUITES: Mapping[str, Suite] = {suite.NAME: suite for suite in _ALL}
BIAS = "bias"
BIAS_ABOUT = "crows_pairs and answers together, and bbq with its FILE"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A suite to run.

    Attributes:
        suite: The suite.
        about: What stands after its name; None: nothing.
    """

    suite: Suite
    about: str | None

    @property
    def name(self) -> str:
        """As it is typed."""
        return self.suite.NAME + (f":{self.about}" if self.about is not None else "")


def chosen(words: Sequence[str]) -> list[Chosen]:
    """Suites from what was typed, each once: names with commas between them, `NAME:ABOUT`.

    Raises:
        ConfigError: A suite is unknown, or lacks what it takes.
    """
    found: dict[str, Chosen] = {}
    for word in (part.strip() for text in words for part in text.split(",")):
        for one in _expanded(word):
            found.setdefault(one.name, one)
    if not found:
        raise ConfigError("--suite: name at least one suite; orpo suites lists them")
    return list(found.values())


def _expanded(word: str) -> list[Chosen]:
    name, _, about = word.partition(":")
    if name == BIAS:
        more = [_one("bbq", about)] if about else []
        return [_one("crows_pairs", ""), _one("answers", ""), *more]
    return [_one(name, about)]


def _one(name: str, about: str) -> Chosen:
    suite = SUITES.get(name)
    if suite is None:
        near = difflib.get_close_matches(name, [*SUITES, BIAS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUITES)} and {BIAS}"
        raise ConfigError(f"--suite: {name!r} is unknown; {hint} (orpo suites lists them)")
    if about and not suite.TAKES:
        raise ConfigError(f"--suite {name}: takes nothing after its name, not {about!r}")
    if not about and suite.TAKES and not suite.TAKES.startswith("["):
        raise ConfigError(f"--suite {name}: name what it is to run on, {name}:{suite.TAKES}")
    return Chosen(suite, about or None)


def listing() -> list[str]:
    """A line for each suite: its name with what it takes, and what it is."""
    rows = [
        (suite.NAME + (f":{suite.TAKES}" if suite.TAKES else ""), suite.ABOUT) for suite in SUITES.values()
    ]
    rows.append((f"{BIAS}:[FILE]", BIAS_ABOUT))
    width = max(len(name) for name, _ in rows) + 2
    return [f"{name:<{width}}{about}" for name, about in rows]
