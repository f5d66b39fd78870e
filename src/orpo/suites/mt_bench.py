"""MT-Bench: 80 questions with two turns each, answered by the model and rated from 1 to 10 by a judge.

Questions, judge prompts, reference answers (for math, reasoning and coding) and temperatures are FastChat's.
Ratings are read strictly (`[[7]]`); one that cannot be read is left out and counted. The score is the mean
over all turns; the two turns of a question are one piece of evidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from orpo.errors import ConfigError
from orpo.suites.measured import Column, Measured, by_group, first_of

if TYPE_CHECKING:
    from orpo.evaluation.prompts import Prompt
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "mt_bench"
ABOUT = "MT-Bench: 80 questions of two turns, rated from 1 to 10 by a judge (--judge)"
TAKES = ""

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
}  # fmt: skip
ANSWER_TOKENS, RATING_TOKENS = 1024, 2048
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_LOWEST, _HIGHEST = 1.0, 10.0
_SHOWN = 3


def rating_of(said: str) -> float | None:
    """The rating in a judge's words, from 1 to 10; None where there is none, or there are different ones."""
    found = {float(text) for text in _RATING.findall(said)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and _LOWEST <= rating <= _HIGHEST else None


def questions() -> list[dict[str, Any]]:
    """Rows of MT-Bench: question_id, category, turns, and `references`, which are empty without any."""
    references = {row["question_id"]: row["choices"][0]["turns"] for row in _rows("reference_answer.jsonl")}
    return [row | {"references": references.get(row["question_id"], [])} for row in _rows("question.jsonl")]


def check(about: str | None, options: Options) -> None:
    """There must be a judge."""
    if options.judge is None:
        raise ConfigError("--suite mt_bench needs a judge: --judge endpoint:URL or --judge model:MODEL")


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Answer both turns of each question and have the answers rated."""
    from orpo.evaluation.generation import Sampling
    from orpo.suites.subject import kept_answers

    assert options.judge is not None
    asked = first_of(questions(), options.limit)
    longest = options.max_tokens or ANSWER_TOKENS
    first = _answered(subject, asked, [_conversation(row, []) for row in asked], longest)
    following = [_conversation(row, [one]) for row, one in zip(asked, first, strict=True)]
    second = _answered(subject, asked, following, longest)
    answers = list(zip(first, second, strict=True))
    judge = options.judge()
    shown = [judged(row, ours, turn) for row, ours in zip(asked, answers, strict=True) for turn in (0, 1)]
    greedy = Sampling(temperature=0.0, top_p=1.0, max_tokens=RATING_TOKENS, seed=0)
    said = kept_answers(judge, f"{NAME}-ratings", shown, greedy, f"{subject.name}: {NAME} ratings")
    ratings = [rating_of(one.output) for one in said]
    found = measured(asked, ratings, judge.name)
    return replace(found, settings={**found.settings, "max_tokens": longest})


def measured(asked: Sequence[dict[str, Any]], ratings: Sequence[float | None], judge: str) -> Measured:
    """The scores of ratings, two to each question."""
    turns = [1 + number % 2 for number in range(len(ratings))]
    known = [float(rating is not None) for rating in ratings]
    score = Column([rating or 0.0 for rating in ratings], known, "number")
    columns = {"score": score}
    columns |= by_group("score", score, [f"turn {turn}" for turn in turns])
    columns |= by_group("score", score, [row["category"] for row in asked for _ in (0, 1)])
    failed = [number for number, rating in enumerate(ratings) if rating is None]
    where = [f"{asked[number // 2]['question_id']} turn {turns[number]}" for number in failed]
    more = ", ..." if len(where) > _SHOWN else ""
    notices = (
        [f"{len(failed)} of {len(ratings)} ratings cannot be read and do not count: "
         f"{', '.join(where[:_SHOWN])}{more}"]
        if failed
        else []
    )  # fmt: skip
    numbers = [str(row["question_id"]) for row in asked for _ in (0, 1)]
    return Measured(
        items=[f"{number} turn {turn}" for number, turn in zip(numbers, turns, strict=True)],
        clusters=numbers,
        columns=columns,
        notices=notices,
        settings={"judge": judge, "ratings_not_read": len(failed)},
    )


def judged(row: dict[str, Any], answers: Sequence[str], turn: int) -> Prompt:
    """What the judge reads of a question's first or second turn."""
    from orpo.judging.llm_judge import filled

    references = row["references"]
    kind = "single-math-v1" if references else "single-v1"
    source = f"mt_bench:{row['question_id']} turn {turn + 1}"
    parts = {f"ref_answer_{number}": text for number, text in enumerate(references, start=1)}
    if turn == 0:
        parts = dict(list(parts.items())[:1])
        return filled(kind, source, question=row["turns"][0], answer=answers[0], **parts)
    parts |= {f"question_{number}": text for number, text in enumerate(row["turns"], start=1)}
    parts |= {f"answer_{number}": text for number, text in enumerate(answers, start=1)}
    return filled(f"{kind}-multi-turn", source, **parts)


def _conversation(row: dict[str, Any], answers: Sequence[str]) -> list[dict[str, Any]]:
    turns = []
    for question, answer in zip(row["turns"], answers, strict=False):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*turns, {"role": "user", "content": row["turns"][len(answers)]}]


def _answered(
    subject: Subject,
    asked: Sequence[dict[str, Any]],
    conversations: Sequence[list[dict[str, Any]]],
    longest: int,
) -> list[str]:
    """Answers in the order of the questions, each category at its temperature."""
    from orpo.evaluation.generation import Sampling

    found: dict[int, str] = {}
    for temperature in sorted(set(TEMPERATURES.values())):
        chosen = [n for n, row in enumerate(asked) if TEMPERATURES[row["category"]] == temperature]
        if chosen:
            sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=longest, seed=0)
            prompts = [
                subject.as_asked(conversations[n], f"mt_bench:{asked[n]['question_id']}") for n in chosen
            ]
            answers = subject.answers(NAME, prompts, sampling)
            found |= {n: answer.output for n, answer in zip(chosen, answers, strict=True)}
    return [found[n] for n in range(len(asked))]


def _rows(name: str) -> list[dict[str, Any]]:
    text = (files("orpo.judging") / "fastchat" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
