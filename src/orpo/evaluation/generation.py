"""A trained model on this machine: loaded as it was saved, and made to answer.

What is loaded is a run directory, a model, an adapter on its base, or a hub name. An answer ends where the
model was taught to end it: at EOS or at the end-of-turn token of its chat template. A model without a
template was trained on plain text, and continues what it is given.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from orpo.data.chat_template import ChatTemplate
from orpo.data.templates import prepare_template
from orpo.engine.loading import load_model, load_tokenizer
from orpo.engine.scorer import base_model
from orpo.engine.stop_tokens import saved_stop_token_ids, stop_token_ids
from orpo.errors import ConfigError, ModelError
from orpo.pairs import Message
from orpo.run.checkpoints import model_folder, run_recipe
from orpo.run.directory import is_adapter
from orpo.settings.config import OrpoSettings


def this_device() -> torch.device:
    """The accelerator, or the CPU where there is none, whatever torch was built for."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def load_trained(name: str, settings: OrpoSettings) -> nn.Module:
    """Load a model for use, on this machine's device, in evaluation mode.

    Args:
        name: Run directory, model or adapter folder, or hub name.
        settings: How to load it; where `dtype` is unset, as saved on an accelerator and in float32 on a CPU.

    Raises:
        ModelError: There is no such model.
    """
    dtype = settings.dtype or ("auto" if torch.accelerator.is_available() else "float32")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folder = model_folder(name)
    model: nn.Module = load_model(replace(settings, model_name_or_path=folder, dtype=dtype, use_peft=False))
    stops = saved_stop_token_ids(folder) if is_adapter(folder) else []
    if stops:  # PEFT does not read what a run has written next to its adapter
        base_model(model).generation_config.eos_token_id = stops
    return model.to(this_device()).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: At least 0; 0 takes the likeliest token.
        top_p: Share of the probability that tokens are drawn from, in (0, 1].
        max_tokens: Longest answer, in tokens.
        seed: Of the draws; None: a new one each time.

    Raises:
        ConfigError: A value is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("max_tokens", "at least 1", self.max_tokens >= 1),
        ):
            if not holds:
                value = getattr(self, name)
                raise ConfigError(f"{name}: {value} is out of range; expected {expected}")


class _Streamer(TextStreamer):
    """Prints an answer as it is made, without control characters that a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print what is certain not to change."""
        seen = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
        super().on_finalized_text(seen, stream_end=stream_end)


class ChatModel:
    """A model with its tokenizer and a conversation.

    Attributes:
        name: For the screen.
        turns: The conversation so far, without a system turn.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        """Probe the template.

        Args:
            name: For the screen.
            model: On its device.
            tokenizer: Its tokenizer.
            chat_template: A template to use instead of the tokenizer's own.
        """
        self.name = name
        self.model = model
        self.tokenizer: Any = tokenizer
        has_template = chat_template is not None or self.tokenizer.chat_template is not None
        self.template: ChatTemplate | None = (
            prepare_template(tokenizer, chat_template) if has_template else None
        )
        self.turns: list[Message] = []

    @classmethod
    def load(cls, name: str, settings: OrpoSettings | None = None, chat_template: str | None = None) -> Self:
        """Load a model and its tokenizer to talk to.

        Args:
            name: Run directory, model or adapter folder, or hub name.
            settings: How to load it (`dtype`, `trust_remote_code`).
            chat_template: A template to use instead of the tokenizer's own.

        Raises:
            OrpoError: One of them cannot be loaded.
        """
        settings = settings or OrpoSettings()
        tokenizer = load_tokenizer(model_folder(name), trust_remote_code=settings.trust_remote_code)
        if run_recipe(name).get("text_rows") == "plain":
            tokenizer.chat_template = None  # it never saw one
        return cls(name, load_trained(name, settings), tokenizer, chat_template)

    def answer(
        self, text: str, sampling: Sampling, *, system: str | None = None, stream: bool = False
    ) -> str:
        """Answer a user's turn, and remember both.

        Args:
            text: What the user says.
            sampling: How the answer is drawn.
            system: The system turn.
            stream: Print the answer while it is made.

        Raises:
            ModelError: The turn alone is longer than what the model can read.
        """
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fitting(opening, sampling.max_tokens)
            answer = self._generate(ids, sampling, stream)
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _fitting(self, opening: Sequence[Message], max_tokens: int) -> torch.Tensor:
        """The conversation as tokens, shape [1, N]; its oldest turns are left out where it grows too long."""
        config: Any = self.model.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        while True:
            ids = self._tokens([*opening, *self.turns])
            if most is None or ids.shape[1] + max_tokens <= most:
                return ids
            if len(self.turns) < 3:
                raise ModelError(
                    f"{ids.shape[1]} tokens and an answer of {max_tokens} do not fit into the {most} tokens "
                    f"{self.name} can read; say less or lower --max_tokens"
                )
            del self.turns[:2]

    def _tokens(self, turns: Sequence[Message]) -> torch.Tensor:
        if self.template is None:
            text, adds = str(turns[-1]["content"]), True
        else:
            text, adds = self.template.render(self.tokenizer, turns, None, ask=True), False
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=adds, return_tensors="pt")["input_ids"]
        return ids

    def _generate(self, ids: torch.Tensor, sampling: Sampling, stream: bool) -> str:
        ids = ids.to(next(self.model.parameters()).device)
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ends = {self.tokenizer.eos_token_id, *stop_token_ids(self.model)}
        if self.template is not None:
            ends.add(self.tokenizer.convert_tokens_to_ids(self.template.end_token))
        with torch.no_grad(), _seeded(sampling.seed):
            output = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sampling.max_tokens,
                eos_token_id=sorted(end for end in ends if end is not None),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=_Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
                if stream
                else None,
                **options,
            )
        answer: str = self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return answer.strip()


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` inside, and leave the generators outside as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
