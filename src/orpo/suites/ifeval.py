"""IFEval: instructions that a program can check, scored by lm-evaluation-harness's own code.

541 prompts with 834 instructions (`ifeval_data/`), answered greedily with at most 1280 tokens, as the task
`ifeval` of lm-evaluation-harness does with a chat template. Loose scoring also takes an answer without its
first or last line, or without asterisks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from typing import TYPE_CHECKING, Any

from orpo.errors import ConfigError
from orpo.suites.measured import Column, Measured, first_of

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "ifeval"
ABOUT = "IFEval: 541 prompts with checkable instructions, strict and loose (needs orpo[eval])"
TAKES = ""
MAX_TOKENS = 1280
_LEVELS = ("strict", "loose")


def prompts() -> list[dict[str, Any]]:
    """Rows of IFEval: key, prompt, instruction_id_list, kwargs."""
    text = (files("orpo.suites") / "ifeval_data" / "prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def check(about: str | None, options: Options) -> None:
    """lm-evaluation-harness must be there."""
    scoring()


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Answer the prompts and check the answers."""
    from orpo.evaluation.generation import Sampling

    check = scoring()
    longest = options.max_tokens or MAX_TOKENS
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=longest, seed=0)
    rows = first_of(prompts(), options.limit)
    turns = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    asked = [subject.as_asked(turn, f"ifeval:{row['key']}") for turn, row in zip(turns, rows, strict=True)]
    answers = [answer.output for answer in subject.answers(NAME, asked, greedy)]
    found = measured(rows, answers, check)
    return replace(found, settings={**found.settings, "max_tokens": longest})


def measured(
    rows: list[dict[str, Any]], answers: list[str], check: Callable[[Any, list[str]], Mapping[str, Any]]
) -> Measured:
    """The scores of answers; prompts that cannot be checked here are left out, and said."""
    found: list[Mapping[str, Any] | None] = []
    reasons: list[str] = []
    for row, answer in zip(rows, answers, strict=True):
        try:
            found.append(check(row, [answer]))
        except LookupError as error:  # of nltk, which has not got its data
            found.append(None)
            reasons.append(_resource(error))
    columns = {}
    for level in _LEVELS:
        columns[f"prompts, {level}"] = Column(
            [float(one is not None and one[f"prompt_level_{level}_acc"]) for one in found],
            [float(one is not None) for one in found],
        )
    for level in _LEVELS:
        followed = [[] if one is None else one[f"inst_level_{level}_acc"] for one in found]
        columns[f"instructions, {level}"] = Column(
            [float(sum(one)) for one in followed], [float(len(one)) for one in followed]
        )
    notices = []
    if reasons:
        notices.append(
            f"{len(reasons)} of {len(rows)} prompts cannot be checked without nltk's {reasons[0]}, and are "
            f"left out: python -m nltk.downloader {reasons[0]}"
        )
    settings = {"temperature": 0.0, "not_checked": len(reasons)}
    return Measured(
        items=[str(row["key"]) for row in rows], columns=columns, notices=notices, settings=settings
    )


def scoring() -> Callable[[Any, list[str]], Mapping[str, Any]]:
    """lm-evaluation-harness's function from a row and its answer to what was followed.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # it says what it could not download
            from langdetect import DetectorFactory
            from lm_eval.tasks.ifeval.utils import process_results
    except ImportError as error:
        raise ConfigError(
            f"ifeval is scored by lm-evaluation-harness, which lacks {error.name}: pip install 'orpo[eval]'"
        ) from None
    DetectorFactory.seed = 0  # else it names another language now and then
    check: Callable[[Any, list[str]], Mapping[str, Any]] = process_results
    return check


def _resource(error: LookupError) -> str:
    words = str(error).split()
    return next((word.strip("'\")") for word in words if "punkt" in word and "/" not in word), "punkt_tab")
