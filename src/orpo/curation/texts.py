"""The texts of pairs, column by column, and a part of them that is drawn where all would take too long."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from orpo.data.words import text_of
from orpo.pairs import PreferencePair


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Texts of pairs.

    Attributes:
        prompts: All turns of the prompt but the system's.
        chosen: The chosen answers.
        rejected: The rejected answers; empty where there is none.
        sources: Where each pair came from.
    """

    prompts: Sequence[str]
    chosen: Sequence[str]
    rejected: Sequence[str]
    sources: Sequence[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, index: Sequence[int]) -> PairTexts:
        """The pairs at `index`."""
        columns = (self.prompts, self.chosen, self.rejected, self.sources)
        return PairTexts(*([column[place] for place in index] for column in columns))


def pair_texts(pairs: Sequence[PreferencePair]) -> PairTexts:
    """The texts of pairs."""
    return PairTexts(
        [asked(pair) for pair in pairs],
        [text_of(pair.chosen) for pair in pairs],
        [text_of(pair.rejected) for pair in pairs],
        [pair.source for pair in pairs],
    )


def asked(pair: PreferencePair) -> str:
    """The prompt without its system turn."""
    prompt = pair.prompt
    return text_of(prompt if isinstance(prompt, str) else [one for one in prompt if one["role"] != "system"])


def drawn(number: int, at_most: int, seed: int) -> list[int]:
    """Which of `number` things are looked at: all, or a random part, in order; the same for the same seed."""
    if number <= at_most:
        return list(range(number))
    return sorted(random.Random(seed).sample(range(number), at_most))
