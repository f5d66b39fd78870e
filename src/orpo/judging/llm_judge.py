"""A language model as a judge of two answers, with MT-Bench's prompt, both orders, and strict reading.

A judge likes the answer that it reads first, or last. So each pair is shown in both orders, and only a judge
that prefers the same answer twice gives it the win; or, for half the price, in one order that is drawn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from orpo.errors import ConfigError
from orpo.evaluation.answering import Answerer, Progress, ask
from orpo.evaluation.answers import AnswerFile
from orpo.evaluation.generation import Sampling
from orpo.evaluation.kept_values import content_key, kept_folder
from orpo.evaluation.prompts import Prompt
from orpo.judging.contests import Contest

BOTH, DRAWN = "both", "drawn"
ORDERS = (BOTH, DRAWN)
"""How often a pair is shown: once in each order, or once in an order that is drawn."""
CAREFUL = Sampling(temperature=0.0, top_p=1.0, max_tokens=1024, seed=0)
_VERDICT = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, slots=True)
class Shown:
    """What the judge said of one pair in one order.

    Attributes:
        contest: Number of the pair.
        swapped: Whether the second model's answer was shown first.
        score: 1: the second model's answer is better, 0: the first's, 0.5: a tie; None where no verdict can
            be read.
        said: The judge's words, or why there are none.
    """

    contest: int
    swapped: bool
    score: float | None
    said: str

    @property
    def first_shown_won(self) -> float | None:
        """The score of the answer that was shown first."""
        return None if self.score is None else self.score if self.swapped else 1 - self.score


@cache
def judge_prompt(name: str) -> Mapping[str, Any]:
    """A judge prompt of MT-Bench by its name."""
    lines = (files("orpo.judging") / "fastchat" / "judge_prompts.jsonl").read_text(encoding="utf-8")
    found = {prompt["name"]: prompt for prompt in map(json.loads, lines.splitlines())}
    prompt: Mapping[str, Any] = found[name]
    return prompt


def filled(name: str, source: str, **parts: str) -> Prompt:
    """A judge prompt of MT-Bench with its parts put in, as it is asked."""
    prompt = judge_prompt(name)
    turns = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**parts)},
    ]
    return Prompt(asked=turns, source=source)


def verdict_of(said: str) -> str | None:
    """`A`, `B` or `C` (a tie), where a judge gives exactly one verdict, however often; else None."""
    found = set(_VERDICT.findall(said))
    return found.pop() if len(found) == 1 else None


def show(
    judge: Answerer,
    contests: Sequence[Contest],
    *,
    orders: str = BOTH,
    sampling: Sampling = CAREFUL,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Shown]:
    """Have pairs judged. What was judged before is taken from the disk.

    Args:
        judge: The model that judges.
        contests: Pairs of answers; pairs that are the same word for word are a tie without asking.
        orders: One of `ORDERS`.
        sampling: How the judge's words are drawn.
        seed: Of the orders that are drawn.
        progress: Called as verdicts come.

    Raises:
        ConfigError: `orders` is unknown.
        OrpoError: The judge cannot be asked.
    """
    if orders not in ORDERS:
        raise ConfigError(f"orders: {orders!r} is not one of {', '.join(ORDERS)}")
    wanted = [
        (number, swapped)
        for number, contest in enumerate(contests)
        for swapped in ((False, True) if orders == BOTH else (_drawn(contest, seed),))
    ]
    prompts = {place: _prompt(contests[place[0]], place[1]) for place in wanted}
    asked = {place: prompt for place, prompt in prompts.items() if not _same(contests[place[0]])}
    unique = {prompt.key(): prompt for prompt in asked.values()}
    said: dict[str, str] = {}
    if unique:
        replies = ask(judge, list(unique.values()), _file(judge, unique, sampling), sampling=sampling,
                      progress=progress)  # fmt: skip
        reasons = dict(replies.failures)
        for (key, prompt), answers in zip(unique.items(), replies.by_prompt, strict=True):
            said[key] = (
                answers[0].output if answers else f"no answer: {reasons.get(prompt.source, 'unknown')}"
            )
    return [
        Shown(*place, *_read(said[asked[place].key()], place[1]))
        if place in asked
        else Shown(*place, 0.5, "the same word for word")
        for place in wanted
    ]


def _same(contest: Contest) -> bool:
    return contest.first == contest.second


def _drawn(contest: Contest, seed: int) -> bool:
    return int(content_key(seed, contest.prompt, contest.first, contest.second), 16) % 2 == 1


def _prompt(contest: Contest, swapped: bool) -> Prompt:
    first, second = (contest.second, contest.first) if swapped else (contest.first, contest.second)
    source = f"{contest.source}{' swapped' if swapped else ''}"
    return filled("pair-v2", source, question=contest.question, answer_a=first, answer_b=second)


def _read(said: str, swapped: bool) -> tuple[float | None, str]:
    verdict = verdict_of(said)
    if verdict is None:
        return None, said
    second_won = {"A": 0.0, "B": 1.0, "C": 0.5}[verdict]
    return (1 - second_won if swapped else second_won), said


def _file(judge: Answerer, prompts: Mapping[str, Prompt], sampling: Sampling) -> AnswerFile:
    """Where a judge's words on these prompts are kept."""
    drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed]
    key = content_key(judge.identity, drawn, list(prompts))
    return AnswerFile(kept_folder() / f"verdicts-{key}.jsonl")
