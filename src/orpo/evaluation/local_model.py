"""A model on this machine that answers many prompts, in batches of like lengths that fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from orpo.console import say
from orpo.engine.memory import free_memory
from orpo.engine.scorer import base_model
from orpo.errors import ConfigError, ModelError
from orpo.evaluation.answers import Failure, Reply
from orpo.evaluation.decoding import decode
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.evaluation.prompts import Prompt

LARGEST_BATCH, LARGEST_BATCH_ON_CPU = 256, 32
"""Answers made at once; a batch is as slow as its longest answer, and more at once gain little."""
_SAMPLED = 256
"""Numbers of each weight that tell one model from another."""


class LocalModel:
    """A loaded model as a source of answers.

    Args:
        chat: Model, tokenizer and template.
        batch_size: Most prompts answered at once; None: as many as fit, at most `LARGEST_BATCH`.

    Attributes:
        name: As given.
        identity: Equal for the same weights, with the same end tokens and precision.
    """

    def __init__(self, chat: ChatModel, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is out of range; expected at least 1")
        self.chat = chat
        self.name = chat.name
        self.identity = fingerprint(chat.model, chat.decoding(Sampling()).ends)
        self._device = next(chat.model.parameters()).device
        on_gpu = self._device.type != "cpu"
        self._largest = batch_size or (LARGEST_BATCH if on_gpu else LARGEST_BATCH_ON_CPU)

    def prepare(self, prompt: Prompt) -> str:
        """The text the model reads.

        Raises:
            ConfigError: The chat template cannot write the conversation.
        """
        if isinstance(prompt.asked, str):
            return prompt.asked
        try:
            return self.chat.prompt(prompt.asked, prompt.tools, prompt.chat_template_kwargs)
        except ConfigError as error:
            raise ConfigError(f"{prompt.source}: {error}") from None

    def answers(
        self, prompts: Sequence[tuple[Prompt, str]], sampling: Sampling, seeds: Sequence[int | None]
    ) -> Iterator[tuple[int, Reply | Failure]]:
        """Answer, the longest prompts first; yields the index of each prompt with its answer.

        Args:
            prompts: Each with what `prepare` has made of it.
            sampling: How answers are drawn.
            seeds: One for each prompt.

        Raises:
            ModelError: A prompt has a token that the model has no embedding for.
        """
        ids = [
            self.chat.token_ids(text, plain=isinstance(prompt.asked, str), source=prompt.source)
            for prompt, text in prompts
        ]
        most = self.chat.max_context
        fitting = []
        for index, tokens in enumerate(ids):
            if not tokens:
                yield index, Failure("there are no tokens in it")
            elif most is not None and len(tokens) + sampling.max_tokens > most:
                yield (
                    index,
                    Failure(
                        f"{len(tokens)} tokens and an answer of {sampling.max_tokens} do not fit into the "
                        f"{most} tokens the model can read; lower --max_tokens"
                    ),
                )
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: -len(ids[index]))
        start = 0
        while start < len(fitting):
            width = len(ids[fitting[start]]) + sampling.max_tokens
            size = min(self._largest, self._room_for(width))
            batch = fitting[start : start + size]
            try:
                tokens_of = decode(
                    self.chat.model,
                    [ids[index] for index in batch],
                    self.chat.decoding(sampling),
                    [seeds[index] for index in batch],
                )
            except torch.OutOfMemoryError as error:
                self._largest = self._half(len(batch), error)
                continue
            start += len(batch)
            for index, tokens in zip(batch, tokens_of, strict=True):
                yield index, self._reply(tokens, prompts[index][0], sampling)

    def _reply(self, tokens: Sequence[int], prompt: Prompt, sampling: Sampling) -> Reply:
        text = self.chat.text(tokens)
        # The blank before a continuation is part of it.
        return Reply(
            text if isinstance(prompt.asked, str) else text.strip(),
            tokens[-1] in self.chat.decoding(sampling).ends,
            len(tokens),
        )

    def _half(self, size: int, error: BaseException) -> int:
        if size == 1:
            raise ModelError(
                "the memory does not suffice to answer one prompt; lower --max_tokens"
            ) from error
        say(f"out of memory: {size // 2} prompts at once instead of {size}", error=True)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return size // 2

    def _room_for(self, width: int) -> int:
        """How many sequences of `width` tokens half of the free memory has room for, at least 1."""
        config: Any = base_model(self.chat.model).config.get_text_config()
        size = next(self.chat.model.parameters()).dtype.itemsize
        heads = getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head
        # Keys and values, one layer's activations, and the logits of one position with what draws from them.
        per_token = 2 * keys * size + 24 * size * config.hidden_size
        per_sequence = width * per_token + 32 * config.vocab_size
        return max(1, int(free_memory(self._device) / 2 / per_sequence))


def fingerprint(model: nn.Module, ends: Sequence[int]) -> str:
    """Equal for the same weights in the same precision, by a few numbers of each, and the same end tokens."""
    digest = hashlib.sha256(repr(list(ends)).encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu()
        if some.is_floating_point():
            some = some.float()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
