"""How long pairs are: in tokens of a model, with its chat template, or in characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.curation.fingerprints import written
from orpo.curation.steps import Step
from orpo.data.dataset import tokenize_pairs
from orpo.data.stages import report
from orpo.data.text_rows import as_conversations, decide
from orpo.pairs import PreferencePair
from orpo.settings.config import OrpoSettings

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of some pairs.

    Attributes:
        whole: Prompt and the longer side, [n].
        chosen: Chosen answer, [n].
        rejected: Rejected answer, [n]; 0 where there is none.
        unit: `tokens` or `characters`.
    """

    whole: Int64
    chosen: Int64
    rejected: Int64
    unit: str

    def take(self, index: Sequence[int] | Int64) -> Lengths:
        """Those of some of the pairs."""
        where = np.asarray(index, dtype=np.int64)
        return Lengths(self.whole[where], self.chosen[where], self.rejected[where], self.unit)


def in_characters(pairs: Sequence[PreferencePair]) -> Lengths:
    """Lengths of texts."""
    counted = [
        (len(written(pair.prompt)), len(written(pair.chosen)), len(written(pair.rejected))) for pair in pairs
    ]
    prompt, chosen, rejected = np.array(counted, dtype=np.int64).reshape(-1, 3).T
    return Lengths(prompt + np.maximum(chosen, rejected), chosen, rejected, "characters")


def in_tokens(
    pairs: Sequence[PreferencePair],
    tokenizer: Any,
    settings: OrpoSettings,
    *,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[int], Lengths, Step]:
    """Lengths of tokens as they would train.

    Args:
        pairs: To measure.
        tokenizer: Of the model.
        settings: Its template, and how texts are read.
        stop_tokens: Ids that generation stops at by the model's own configuration.

    Returns:
        Indices of the pairs that can train with this model, their lengths, and what became of the others.
    """
    report("counting tokens", 0, len(pairs))
    template = settings.chat_template or tokenizer.chat_template
    reading = settings.text_rows or decide(pairs, has_template=bool(template))
    shown = as_conversations(pairs) if reading == "chat" else pairs
    tokens = tokenize_pairs(
        shown,
        tokenizer,
        max_length=None,
        chat_template=settings.chat_template,
        num_proc=settings.dataset_num_proc,
        chat_template_kwargs=settings.chat_template_kwargs,
        stop_tokens=stop_tokens,
    )
    prompt, chosen, rejected = tokens.lengths.T
    lengths = Lengths(
        prompt + np.maximum(chosen, rejected),
        chosen - tokens.contexts[:, 0],
        rejected - tokens.contexts[:, 1],
        "tokens",
    )
    counts = tokens.counts
    examples = {reason: [counts.examples[reason]] for reason in counts.dropped}
    step = Step(name="tokenize", before=len(pairs), removed=counts.dropped, examples=examples)
    report("counting tokens", len(pairs), len(pairs))
    return tokens.pair_index.tolist(), lengths, step
