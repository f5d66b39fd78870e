"""Whether a model has an embedding for every token of its data: a tokenizer may know more tokens than it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from orpo.data.dataset import TokenizedDataset
from orpo.errors import ModelError
from orpo.pairs import TokenizedPair


def check_token_ids(pairs: TokenizedDataset, number: int, tokenizer: Any) -> None:
    """Check the tokens of a data set, before one of them fails within the model.

    Args:
        pairs: Tokenized.
        number: Embeddings that the model has; ids are in [0, number).
        tokenizer: That made the tokens.

    Raises:
        ModelError: A token has no embedding; the first pair with one is named.
    """
    if len(pairs.tokens) == 0 or int(pairs.tokens.max()) < number:
        return
    position = int(np.argmax(np.asarray(pairs.tokens) >= number))
    index = int(np.searchsorted(pairs.offsets, position, side="right") - 1) // 3
    raise _no_embedding(int(pairs.tokens[position]), pairs.sources[index], number, tokenizer)


def checked_token_ids(pairs: Iterable[TokenizedPair], number: int, tokenizer: Any) -> Iterator[TokenizedPair]:
    """The pairs of a stream, checked one by one; arguments and errors as for `check_token_ids`."""
    for pair in pairs:
        check_ids([*pair.prompt, *pair.chosen, *pair.rejected], number, tokenizer, pair.source)
        yield pair


def check_ids(ids: Sequence[int], number: int, tokenizer: Any, source: str) -> None:
    """Check the tokens of one text; arguments and errors as for `check_token_ids`.

    Args:
        ids: The tokens.
        number: As for `check_token_ids`; 0 where nobody can tell, and all are taken.
        tokenizer: That made the tokens.
        source: Where the text is from.
    """
    if number and (largest := max(ids, default=0)) >= number:
        raise _no_embedding(largest, source, number, tokenizer)


def _no_embedding(token: int, source: str, number: int, tokenizer: Any) -> ModelError:
    text = tokenizer.convert_ids_to_tokens(token)
    return ModelError(
        f"{source}: token {token} ({text!r}) has no embedding in the model, which has {number:,}; use the"
        " tokenizer that the model was trained with, or resize the model's embeddings to the tokenizer"
    )
