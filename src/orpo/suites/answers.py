"""What answers look like: refusals, length, repetition, whether they end. Between two models: the drift.

The prompts are the first turns of MT-Bench's 80 questions, none of which is a reason to refuse, or a file of
prompts; answers are greedy, of at most 512 tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from orpo.suites.measured import Column, Measured, first_of
from orpo.suites.mt_bench import questions

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "answers"
ABOUT = "refusals, length and repetition of answers to MT-Bench's first turns or to a file of prompts"
TAKES = "[FILE]"


def check(about: str | None, options: Options) -> None:
    """Prompts are checked as they are read."""


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Answer the prompts and look at the answers."""
    from orpo.data.refusals import refuses
    from orpo.data.words import words_of
    from orpo.evaluation.answer_summary import LOOPING, repetition
    from orpo.evaluation.answering import GREEDY
    from orpo.evaluation.prompts import read_prompts

    notices: list[str] = []
    if about is None:
        prompts = [
            subject.as_asked([{"role": "user", "content": row["turns"][0]}], f"mt_bench:{row['question_id']}")
            for row in questions()
        ]
    else:
        read = read_prompts(about, subject.settings, subject.tokenizer)
        prompts, notices = list(read.prompts), list(read.notices)
    prompts = first_of(prompts, options.limit)
    sampling = replace(GREEDY, max_tokens=options.max_tokens or GREEDY.max_tokens)
    answers = subject.answers(NAME, prompts, sampling)
    texts = [answer.output for answer in answers]
    words = [float(len(words_of(text))) for text in texts]
    tokens = [answer.num_tokens for answer in answers]
    repeated = [repetition(text) for text in texts]
    columns = {
        "refusals": Column([float(refuses(text)) for text in texts]),
        "words": Column(words, unit="number"),
        "tokens": Column([float(one or 0) for one in tokens], [float(one is not None) for one in tokens],
                         "number"),
        "ended by itself": Column([float(answer.ended) for answer in answers]),
        "repeated runs of words": Column(repeated),
        "looping": Column([float(share >= LOOPING) for share in repeated]),
        "empty": Column([float(count == 0) for count in words]),
    }  # fmt: skip
    return Measured(
        items=[prompt.source for prompt in prompts],
        columns=columns,
        notices=notices,
        settings={"temperature": sampling.temperature, "max_tokens": sampling.max_tokens},
    )
