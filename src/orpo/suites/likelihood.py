"""How likely a model finds texts: the sum of log-probs of a continuation after a context, in batches.

Plain forward passes of the model as it was loaded, padded on the right, the longest first. Only positions
that are asked for are turned into log-probs, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from orpo.data.stages import report
from orpo.engine.logits import plain_logprobs
from orpo.engine.scorer import num_embeddings
from orpo.errors import DataError
from orpo.evaluation.kept_values import KeptValues, content_key

_TOKENS, _LOGITS = 4096, 2**27
"""Most tokens of one batch, padding included, and most logits: half a gibibyte of them in float32."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to be scored.

    Attributes:
        context: What comes before, at least one token.
        tokens: What is scored, at least one.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    def key(self) -> str:
        """Equal for the same tokens."""
        return content_key(self.context, self.tokens)


def continuation(tokenizer: Any, context: str, text: str) -> Continuation:
    """A text after a context, split where lm-evaluation-harness splits them.

    Blanks at the end of the context belong to the text; both are tokenized together, and the context's own
    tokens are taken off the front. Without a context a model starts from BOS, or EOS where it has none.

    Raises:
        DataError: There is nothing to score.
    """
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    if not stripped:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        first: list[int] = [start]
    else:
        first = tokenizer(stripped)["input_ids"]
        tokens = tokenizer(stripped + text)["input_ids"][len(first) :]
    if not tokens or first[0] is None:
        raise DataError(f"{text!r} after {context[-40:]!r}: the tokenizer leaves nothing to score")
    return Continuation(tuple(first), tuple(tokens))


def log_likelihoods(
    model: nn.Module, asked: Sequence[Continuation], kept: KeptValues, stage: str
) -> list[float]:
    """The sum of the log-probs of each continuation, in nats.

    Args:
        model: A causal language model in evaluation mode.
        asked: What to score.
        kept: Values that were found before; new ones are added.
        stage: What is shown while it works.
    """
    keys = [one.key() for one in asked]
    missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in kept}
    order = sorted(missing, key=lambda key: -_length(missing[key]))
    most = min(_TOKENS, _LOGITS // max(1, num_embeddings(model)))
    start = 0
    while start < len(order):
        report(stage, start, len(order))
        size = max(1, most // _length(missing[order[start]]))
        batch = order[start : start + size]
        found = _forward(model, [missing[key] for key in batch])
        kept.add(dict(zip(batch, found, strict=True)))
        start += size
    report(stage, len(order), len(order))
    return [float(kept[key]) for key in keys]


def _length(one: Continuation) -> int:
    return len(one.context) + len(one.tokens)


@torch.inference_mode()
def _forward(model: nn.Module, batch: Sequence[Continuation]) -> list[float]:
    device = next(model.parameters()).device
    width = max(_length(one) for one in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, : _length(one)] = torch.tensor([*one.context, *one.tokens])
        mask[row, : _length(one)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    found = []
    for row, one in enumerate(batch):
        first = len(one.context)
        scored = logits[row, first - 1 : _length(one) - 1].float()
        logprob_T = plain_logprobs(scored, ids[row, first : _length(one)].to(device))
        found.append(float(logprob_T.double().sum()))
    return found
