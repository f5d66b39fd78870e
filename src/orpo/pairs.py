"""What crosses from the data to the engine: messages, a preference pair, and a pair as tokens.

Everything in `data` makes these, and everything in `engine` reads them, so neither has to know the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""A turn of a conversation: `role`, `content`, and what else its chat template reads."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two ways to continue it.

    Either all three parts are messages (`{"role": ..., "content": ...}`, for the chat template) or all three
    are text.

    Attributes:
        prompt: What both sides share: system turn, earlier turns, the last question.
        chosen: What follows on the preferred side; its last message is the response. More than one message
            where the conversations part before the last turn.
        rejected: The same for the other side; None in a row that has no rejected answer (trains the NLL
            alone).
        tools: Schemas of the tools the conversation may call.
        source: `pairs.jsonl:118`.
        group: Value of the row's `source` or `dataset` column, for reports by source.
        chat_template_kwargs: Arguments of the chat template for this conversation (`enable_thinking`, ...).
        scores: How good the data says chosen and rejected are, more is better; None where it does not. A
            strength of the preference alone counts against 0.
    """

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str | None
    tools: list[Any] | None = None
    source: str = ""
    group: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    scores: tuple[float, float] | None = None

    @property
    def margin(self) -> float | None:
        """Score of chosen minus that of rejected."""
        return None if self.scores is None else self.scores[0] - self.scores[1]

    @property
    def is_text(self) -> bool:
        """Plain text: no chat template is used."""
        return isinstance(self.prompt, str)

    def prompt_key(self) -> str:
        """Equal for pairs with the same prompt."""
        return side_key(self.prompt)


_write = json.JSONEncoder(sort_keys=True).encode


def side_key(side: list[Message] | str | None) -> str:
    """Equal for messages or texts that are the same word for word."""
    return side if isinstance(side, str) else _write(side)


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One preference pair as token ids.

    Both sides are `prompt ++ side`. Usually a side is the response alone; where the two conversations part
    before the last turn, a side starts with turns of its own, counted by `chosen_context` and
    `rejected_context`.

    Attributes:
        prompt: Tokens both sides start with, cut at a message boundary; at least one.
        chosen: The rest of the chosen side; its response is `chosen[chosen_context:]`, at least one token,
            the end-of-turn token last.
        rejected: The same for the rejected side; empty for a row that trains the NLL alone.
        chosen_context: Leading tokens of `chosen` that belong to earlier turns.
        rejected_context: The same for `rejected`.
        assistant_spans: Half-open ranges of the earlier assistant turns in `prompt ++ chosen`.
        source: Where the pair came from, for messages: `pairs.jsonl:118`.
    """

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    chosen_context: int = 0
    rejected_context: int = 0
    assistant_spans: tuple[tuple[int, int], ...] = ()
    source: str = ""

    def __len__(self) -> int:
        """Tokens the pair occupies in a micro-batch, its prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    def keys(self) -> tuple[str, ...]:
        """The columns of TRL's tokenized rows, by which the pair can be read too: `pair["chosen_labels"]`."""
        sides = ("chosen", "rejected") if len(self.rejected) else ("chosen",)
        parts = [f"{side}_{kind}" for side in sides for kind in ("input_ids", "attention_mask", "labels")]
        return (*parts, "prompt_input_ids", "prompt_attention_mask")

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __getitem__(self, name: str) -> list[int]:
        """A column of TRL's: ids of `prompt ++ side`, ones, or the ids with -100 where no answer is scored.

        Raises:
            KeyError: There is no such column.
        """
        if name not in self.keys():
            raise KeyError(name)
        side, _, kind = name.partition("_")
        context = {"prompt": 0, "chosen": self.chosen_context, "rejected": self.rejected_context}[side]
        ids = [*self.prompt, *(getattr(self, side) if side != "prompt" else ())]
        if kind == "attention_mask":
            return [1] * len(ids)
        unscored = len(self.prompt) + context if kind == "labels" else 0
        return [-100] * unscored + ids[unscored:]
