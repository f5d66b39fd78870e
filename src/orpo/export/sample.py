"""What two copies of a model are compared by: texts, conversations and token sequences of the run's own data.

Hard sentences made up for the purpose find few faults of a tokenizer; the texts that the model was trained on
find more, so they come first and the made-up ones are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo.data.chat_template import ChatTemplate, try_rendering
from orpo.data.source import ReadPairs, read_pairs
from orpo.errors import OrpoError
from orpo.pairs import Message
from orpo.settings.config import OrpoSettings

_MOST_TEXTS = 1000
_MOST_SEQUENCES = 12
_LONGEST = 200
"""Tokens of a sequence."""

HARD = (
    "Hello, world!",
    "  two  blanks   and three ",
    "\n\n1) x",
    "\t\ttabs\n\n\nand lines\r\nof Windows",
    "in 1999 he paid $1,234.56 (12%)",
    "    4 blanks, then 42   7",
    "It's they're I'LL don't 'quoted' \"so\"",
    "def f(a, b=2):\n    return a**b  # 3.14\n",
    "na\u00efve fa\u00e7ade \u2014 \u201ccurly\u201d \u2026 \u00bd \u00b2 e\u0301 \u00a0x",
    "\u3053\u3093\u306b\u3061\u306f\u3002\u4f60\u597d\uff01",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u03ba\u03cc\u03c3\u03bc\u03b5!",
    "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f",
    "https://example.org/a?b=c&d=%20#e",
    "A1b2C3 2x3=6" + "x" * 70,
)


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids, and where in them scoring begins."""

    ids: list[int]
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What to compare.

    Attributes:
        source: What it was taken from, for people.
        texts: Their ids must agree.
        conversations: Their prompts, as the template writes them, must agree.
        prompts: What the template writes for each of them.
        sequences: Of each, the log-prob of every token must agree.
    """

    source: str
    texts: list[str]
    conversations: list[list[Message]]
    prompts: list[str]
    sequences: list[Scored]


def read_sample(
    data: Any,
    split: str | None,
    settings: OrpoSettings,
    tokenizer: Any,
    template: ChatTemplate | None,
    stops: Sequence[int],
    *,
    must_be_read: bool = False,
) -> tuple[Sample, list[str]]:
    """Take a sample of a data set; where there is none, or it cannot be read, of made-up texts.

    Args:
        data: A file or name; None: made-up texts.
        split: Of the data.
        settings: How to read it.
        tokenizer: Of the run.
        template: Of the run; None where it trained on plain text.
        stops: Ids that generation stops at.
        must_be_read: Whether the data was named for this, so that made-up texts do not stand in for it.

    Returns:
        The sample, and lines to print.

    Raises:
        OrpoError: Data that must be read cannot be.
    """
    read, lines = None, []
    if data is not None:
        try:
            read = read_pairs(data, settings, tokenizer, split=split, name="rows", stop_tokens=stops)
        except OrpoError as error:
            if must_be_read:
                raise
            lines.append(f"compared on made-up texts, because {data} cannot be read: {error}")
    sequences, texts = _of_pairs(read, tokenizer) if read is not None else ([], [])
    source = f"{data}" if sequences else "made-up texts"
    if not sequences:
        encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in HARD)
        sequences = [Scored([*ids, *stops[:1]], 1) for ids in encoded if len(ids) > 1]
    conversations, prompts = _conversations(read, tokenizer, template)
    whole = list(dict.fromkeys([*HARD, *texts, *prompts]))
    sample = Sample(
        source=source, texts=whole, conversations=conversations, prompts=prompts, sequences=sequences
    )
    return sample, lines


def _of_pairs(read: ReadPairs, tokenizer: Any) -> tuple[list[Scored], list[str]]:
    sequences: list[Scored] = []
    texts: list[str] = []
    for pair in (read.pairs[index] for index in range(min(len(read.pairs), _MOST_TEXTS // 2))):
        for side in (pair.chosen, pair.rejected):
            ids, start = [*map(int, pair.prompt), *map(int, side)], len(pair.prompt)
            if not len(side):
                continue
            texts.append(tokenizer.decode(ids))
            texts.append(tokenizer.decode(list(side), skip_special_tokens=True))
            if len(sequences) < _MOST_SEQUENCES and start < _LONGEST:
                sequences.append(Scored(ids[:_LONGEST], start))
    return sequences, texts


def _conversations(
    read: ReadPairs | None, tokenizer: Any, template: ChatTemplate | None
) -> tuple[list[list[Message]], list[str]]:
    """Conversations that the template writes, with what it writes for each; it may refuse a system turn."""
    if template is None:
        return [], []
    asked: list[Message] = [{"role": "user", "content": text} for text in HARD[:3]]
    if read is not None:
        prompts = [pair.prompt for pair in read.preferences[:4] if not isinstance(pair.prompt, str)]
        asked = [prompt[-1] for prompt in prompts if prompt and prompt[-1]["role"] == "user"] or asked
    answer: Message = {"role": "assistant", "content": HARD[4]}
    system: Message = {"role": "system", "content": "Answer in 1 sentence."}
    tried: list[list[Message]] = [
        *([one] for one in asked),
        [asked[0], answer, asked[-1]],
        [system, asked[0]],
    ]
    pairs = [(turns, try_rendering(tokenizer, template, turns)) for turns in tried]
    written = [(turns, text) for turns, text in pairs if text is not None]
    return [turns for turns, _ in written], [text for _, text in written]
