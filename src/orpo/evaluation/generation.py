"""A trained model on this machine: loaded as it was saved, and made to answer.

What is loaded is a run directory, a model, an adapter on its base, or a hub name. An answer ends where the
model was taught to end it: at EOS or at the end-of-turn token of its chat template. A model without a
template was trained on plain text, and continues what it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from orpo.console import say
from orpo.data.chat_template import ChatTemplate
from orpo.data.templates import prepare_template, with_arguments
from orpo.data.token_ids import check_ids
from orpo.engine.loading import load_model, load_tokenizer
from orpo.engine.scorer import base_model, num_embeddings
from orpo.engine.stop_tokens import saved_stop_token_ids, stop_token_ids
from orpo.errors import ConfigError, ModelError, first_line
from orpo.evaluation.decoding import Decoding, check_decoding, decode
from orpo.pairs import Message
from orpo.run.checkpoints import model_folder, run_recipe
from orpo.run.directory import gguf_file, is_adapter
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


def saved_vocabulary(name: str, settings: OrpoSettings) -> int:
    """Tokens that a saved model has an embedding for, by its configuration; 0 where that does not say it.

    Args:
        name: Model folder or hub name. An adapter may have embeddings of its own, and says nothing.
        settings: How it is loaded.
    """
    if gguf_file(name) is not None or is_adapter(name):
        return 0
    try:
        config = AutoConfig.from_pretrained(
            name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError):  # a folder with nothing but a tokenizer
        return 0
    return int(getattr(config.get_text_config(), "vocab_size", None) or 0)


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
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Probe the template.

        Args:
            name: For the screen.
            model: On its device.
            tokenizer: Its tokenizer.
            chat_template: A template to use instead of the tokenizer's own.
            chat_template_kwargs: Arguments it is written with.
        """
        self.name = name
        self.model = model
        self.tokenizer: Any = tokenizer
        has_template = chat_template is not None or self.tokenizer.chat_template is not None
        self.template: ChatTemplate | None = (
            prepare_template(tokenizer, chat_template, chat_template_kwargs=chat_template_kwargs)
            if has_template
            else None
        )
        self.turns: list[Message] = []

    @classmethod
    def load(cls, name: str, settings: OrpoSettings | None = None, chat_template: str | None = None) -> Self:
        """Load a model and its tokenizer to talk to.

        Args:
            name: Run directory, model or adapter folder, or hub name.
            settings: How to load it (`dtype`, `trust_remote_code`) and to write conversations
                (`chat_template`, `chat_template_kwargs`).
            chat_template: A template to use instead of the tokenizer's own and that of the settings.

        Raises:
            OrpoError: One of them cannot be loaded.
        """
        settings = settings or OrpoSettings()
        tokenizer = load_tokenizer(model_folder(name), trust_remote_code=settings.trust_remote_code)
        if run_recipe(name).get("text_rows") == "plain":
            tokenizer.chat_template = None  # it never saw one
        arguments: Any = settings.chat_template_kwargs
        template = chat_template or settings.chat_template
        model = load_trained(name, settings)
        for line in check_decoding(model):
            say(line, error=True)
        return cls(name, model, tokenizer, template, arguments)

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

    def _fitting(self, opening: Sequence[Message], max_tokens: int) -> list[int]:
        """The conversation as tokens; its oldest turns are left out where it grows too long."""
        most = self.max_context
        while True:
            ids = self._tokens([*opening, *self.turns])
            if most is None or len(ids) + max_tokens <= most:
                return ids
            if len(self.turns) < 3:
                raise ModelError(
                    f"{len(ids)} tokens and an answer of {max_tokens} do not fit into the {most} tokens "
                    f"{self.name} can read; say less or lower --max_tokens"
                )
            del self.turns[:2]

    def _tokens(self, turns: Sequence[Message]) -> list[int]:
        if self.template is None:
            return self.token_ids(str(turns[-1]["content"]), plain=True)
        return self.token_ids(self.prompt(turns), plain=False)

    def prompt(
        self,
        turns: Sequence[Message],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the model reads it when it is asked to answer; it needs a template.

        Args:
            turns: The last is the one to answer.
            tools: Schemas of the tools it may call.
            arguments: Of the chat template, for this conversation; they beat those the model has.

        Raises:
            ConfigError: The template cannot write it.
        """
        if self.template is None:
            raise ConfigError(f"{self.name} has no chat template to write a conversation with; name one")
        template = self.template.for_tools(tools)
        if arguments:
            template = with_arguments(self.tokenizer, template, arguments)
        try:
            return template.render(self.tokenizer, turns, tools, ask=True)
        except Exception as error:  # a template is a program, and says no in any way it likes
            raise ConfigError(f"the chat template refuses the conversation ({first_line(error)})") from error

    def token_ids(self, text: str, *, plain: bool, source: str = "the prompt") -> list[int]:
        """The tokens of what `prompt` has written or, if `plain`, of a text to continue.

        Raises:
            ModelError: The model has no embedding for one of them; the line begins with `source`.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=plain)["input_ids"]
        check_ids(ids, num_embeddings(self.model), self.tokenizer, source)
        return ids

    def check_text(self, ids: Sequence[int], source: str) -> None:
        """Check that a text can be read as a whole; the line begins with `source`.

        Raises:
            ModelError: The model has no embedding for one of its tokens, or too few positions.
        """
        check_ids(ids, num_embeddings(self.model), self.tokenizer, source)
        if self.max_context is not None and len(ids) > self.max_context:
            raise ModelError(
                f"{source}: {len(ids):,} tokens do not fit into the {self.max_context:,} it can read"
            )

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens, with the blanks around it."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer that the model can read; None where its configuration is silent."""
        config: Any = base_model(self.model).config
        most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        return most

    def decoding(self, sampling: Sampling) -> Decoding:
        """How its answers are made token by token: drawn as asked, until any of its end tokens."""
        ends = {self.tokenizer.eos_token_id, *stop_token_ids(self.model)}
        if self.template is not None:
            ends.add(self.tokenizer.convert_tokens_to_ids(self.template.end_token))
        return Decoding(
            max_tokens=sampling.max_tokens,
            ends=sorted(end for end in ends if end is not None),
            pad=pad_id(self.tokenizer),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )

    def _generate(self, ids: Sequence[int], sampling: Sampling, stream: bool) -> str:
        streamer = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        (tokens,) = decode(self.model, [ids], self.decoding(sampling), [sampling.seed], streamer)
        return self.text(tokens).strip()


def pad_id(tokenizer: Any) -> int:
    """What short prompts are filled up with: the padding token, EOS where there is none, or any token."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in known if token is not None), 0)
