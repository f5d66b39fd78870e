"""How long the pairs of a run are: of its real data, or of data of which only the means are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.data.dataset import TokenizedDataset, prompt_index
from orpo.data.kept import read_training_once
from orpo.engine.loading import load_tokenizer
from orpo.errors import ConfigError
from orpo.pairs import TokenizedPair
from orpo.settings.config import OrpoSettings

SPREAD = (0.6, 0.5, 0.5)
"""Width of the log-normal distributions of lengths where only means are known: UltraFeedback's."""
DRAWN = 4096
"""Pairs that stand for data of which only the means are known."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PairLengths:
    """Lengths of the pairs of a run.

    Attributes:
        tokens: (prompt, chosen, rejected) tokens of each pair that is looked at. Shape [n, 3].
        num_pairs: Pairs that are trained on, which may be more.
        num_held_out: Pairs that are evaluated.
        source: Where they come from, for a line.
        pairs: The pairs themselves, which may share tokens with each other; None where lengths are drawn.
        prompts: The same number for pairs of the same prompt; None: each has its own. Shape [n].
        held_out_tokens: Tokens of the pairs that are evaluated.
    """

    tokens: Int64
    num_pairs: int
    num_held_out: int
    source: str
    pairs: Sequence[TokenizedPair] | TokenizedDataset | None = None
    prompts: Int64 | None = None
    held_out_tokens: float = 0.0


def read_lengths(settings: Mapping[str, Any]) -> PairLengths:
    """Lengths of the data that a recipe names, tokenized as for training.

    Raises:
        OrpoError: Data or tokenizer cannot be read.
    """
    own = OrpoSettings.from_recipe(settings)
    name = own.model_name_or_path or ""
    if not own.dataset_name:
        raise ConfigError("dataset_name is not set; write --pairs N --lengths P/C/R to plan without data")
    if own.streaming:
        raise ConfigError("streaming: the data has no end; write --pairs N --lengths P/C/R to plan for it")
    tokenizer = load_tokenizer(name, revision=own.model_revision, trust_remote_code=own.trust_remote_code)
    evaluates = settings.get("eval_strategy") != "no"
    read = read_training_once(None, None, own, tokenizer, evaluates=evaluates)
    pairs = read.train_pairs
    if not isinstance(pairs, TokenizedDataset):
        raise ConfigError("the data has no length; write --pairs N --lengths P/C/R to plan for it")
    evals = [one.pairs for one in read.evals.values()]
    return PairLengths(
        np.asarray(pairs.lengths),
        len(pairs),
        sum(map(len, evals)),
        str(own.dataset_name),
        pairs,
        prompt_index(pairs),
        float(sum(held_out.lengths.sum() for held_out in evals)),
    )


def drawn_lengths(means: str, num_pairs: int, settings: Mapping[str, Any]) -> PairLengths:
    """Lengths around means, the same at every call.

    Args:
        means: Mean tokens of prompt, chosen and rejected: `149/304/304`.
        num_pairs: Pairs of the data, held-out ones included.
        settings: Of the recipe: `max_length` and `eval_split` are looked at.

    Raises:
        ConfigError: Either is no such number.
    """
    try:
        parts = [int(part) for part in means.split("/")]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) < 1:
        raise ConfigError(f"--lengths {means}: three means in tokens are needed, as in 149/304/304")
    if num_pairs < 1:
        raise ConfigError(f"--pairs {num_pairs}: at least 1 is needed")
    own = OrpoSettings.from_recipe(settings)
    draws = np.random.default_rng(0).standard_normal((min(num_pairs, DRAWN), 3))
    spread = np.array(SPREAD)
    tokens = np.array(parts) * np.exp(spread * draws - spread**2 / 2)
    whole = np.clip(tokens.round(), 2, None)
    if own.max_length is not None:  # what is longer is dropped or cut
        side = whole[:, 0] + whole[:, 1:].max(1)
        whole *= np.minimum(1, own.max_length / side)[:, None]
    evaluates = settings.get("eval_strategy") != "no"
    given = own.eval_dataset_name or own.dataset_test_split
    held_out = 2000 if given else round(own.eval_split * num_pairs) if evaluates else 0
    trained = num_pairs if given else num_pairs - held_out
    source = f"means of {means} tokens, spread as UltraFeedback's"
    drawn = np.maximum(whole.astype(np.int64), 1)
    of_held_out = float(drawn.sum(1).mean()) * held_out
    return PairLengths(drawn, trained, held_out, source, held_out_tokens=of_held_out)
