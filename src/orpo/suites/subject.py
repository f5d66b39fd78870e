"""The model that suites ask: loaded when the first of them needs it, and what it says kept on the disk.

Answers and log-likelihoods are kept by what they depend on: the weights (or the server and its name of the
model), the prompts as the model reads them, and the sampling. A suite that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.console import say
from orpo.data.stages import report
from orpo.engine.logits import DAMAGED
from orpo.errors import ConfigError, ModelError, RunError
from orpo.evaluation.answering import Answerer, ask, load_answerer, tokenizer_of
from orpo.evaluation.answers import Answer, AnswerFile
from orpo.evaluation.endpoint import Endpoint
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.evaluation.kept_values import KeptValues, content_key, kept_folder
from orpo.evaluation.local_model import LocalModel
from orpo.evaluation.prompts import Prompt
from orpo.settings.config import OrpoSettings
from orpo.suites.likelihood import Continuation, log_likelihoods


class Subject:
    """A model to be measured.

    Args:
        name: Run directory, model or adapter folder, or hub name; None with an endpoint.
        settings: Of a recipe, as given.
        pair_settings: With which preference pairs are read, the same for two models; None: `settings`.
        endpoint: A server to ask instead.
        batch_size: Most prompts answered at once here; None: as many as fit.

    Attributes:
        settings: Resolved.
        pair_settings: As given.
    """

    def __init__(
        self,
        name: str | None,
        settings: Mapping[str, Any],
        *,
        pair_settings: Mapping[str, Any] | None = None,
        endpoint: Endpoint | None = None,
        batch_size: int | None = None,
    ) -> None:
        if (name is None) == (endpoint is None):
            raise ConfigError("name one model: MODEL, or --endpoint URL with --endpoint_model NAME")
        self._model, self._endpoint, self._batch_size = name, endpoint, batch_size
        self.settings = OrpoSettings.from_recipe(dict(settings))
        self.pair_settings = dict(settings if pair_settings is None else pair_settings)
        self._answerer: Answerer | None = None

    @property
    def name(self) -> str:
        """Of the model, for people."""
        return self._model if self._model is not None else self.answerer.name

    @property
    def answerer(self) -> Answerer:
        """The model as a source of answers."""
        if self._answerer is None:
            self._answerer = load_answerer(
                self._model, self.settings, endpoint=self._endpoint, batch_size=self._batch_size
            )
        return self._answerer

    @property
    def tokenizer(self) -> Any:
        """Of a model here; None at an endpoint."""
        return tokenizer_of(self.answerer)

    def path(self, suite: str) -> str:
        """Name of the model, for a suite that loads it in its own way; what is loaded here is let go.

        Raises:
            ConfigError: The model is behind an endpoint.
        """
        if self._model is None:
            raise ConfigError(f"{suite} reads log-probs, which an endpoint does not give; name a MODEL here")
        self._answerer = None
        return self._model

    def chat(self, suite: str) -> ChatModel:
        """Model, tokenizer and template.

        Raises:
            ConfigError: The model is behind an endpoint.
        """
        if not isinstance(self.answerer, LocalModel):
            raise ConfigError(f"{suite} reads log-probs, which an endpoint does not give; name a MODEL here")
        return self.answerer.chat

    def as_asked(self, turns: Sequence[Mapping[str, Any]], source: str) -> Prompt:
        """A conversation as the model takes it: without a chat template it continues the turns' text."""
        answerer = self.answerer
        if isinstance(answerer, LocalModel) and answerer.chat.template is None:
            return Prompt(asked="\n\n".join(str(turn["content"]) for turn in turns), source=source)
        return Prompt(asked=[dict(turn) for turn in turns], source=source)

    def answers(self, suite: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """An answer to each prompt; prompts that ask the same share one.

        Raises:
            RunError: A prompt has no answer; the others are kept.
        """
        return kept_answers(self.answerer, suite, prompts, sampling, f"{self.name}: {suite}", self._server)

    @property
    def _server(self) -> str | None:
        return None if self._endpoint is None else self._endpoint.url

    def log_likelihoods(self, suite: str, asked: Sequence[Continuation]) -> list[float]:
        """The sum of the log-probs of each continuation, in nats.

        Raises:
            ModelError: The model has no embedding for a token, reads no text of that length, or its logits
                are not numbers.
        """
        chat = self.chat(suite)
        for number, one in enumerate(asked, start=1):
            source = f"{self.name}: {suite}: text {number}"
            chat.check_text([*one.context, *one.tokens], source)
        identity = self.answerer.identity
        kept = KeptValues(f"likelihoods-{identity}")
        found = log_likelihoods(chat.model, asked, kept, f"{self.name}: {suite}")
        for number, value in enumerate(found, start=1):
            if not math.isfinite(value):
                raise ModelError(f"{self.name}: {suite}: the log-prob of text {number} is {value}; {DAMAGED}")
        return found


class _Advance:
    """Reports answers made now, in whole batches: the time left is that of answers, not of what was there.

    The answers of a batch come at once. The first of them says little about the speed, so a batch is reported
    when the next one comes.
    """

    PAUSE = 0.1
    """Seconds between two answers of different batches."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._known: int | None = None
        self._seen, self._at = 0, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._known is None:
            self._known = self._seen = done
        whole = done if done >= total else self._seen
        if done >= total or now - self._at > self.PAUSE:
            report(self._stage, whole - self._known, total - self._known)
        self._seen, self._at = done, now


def kept_answers(
    answerer: Answerer,
    suite: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    stage: str,
    server: str | None = None,
) -> list[Answer]:
    """An answer to each prompt, from the disk where it is there.

    Args:
        answerer: The model.
        suite: Part of the name of the file.
        prompts: At least one.
        sampling: How answers are drawn.
        stage: What is shown while it is answered.
        server: Address of the model's server: two servers may call different models the same.

    Raises:
        RunError: A prompt has no answer.
    """
    unique = list({prompt.key(): prompt for prompt in prompts}.values())
    drawn = [sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed]
    key = content_key(answerer.identity, server, drawn, [answerer.prepare(prompt) for prompt in unique])
    file = AnswerFile(kept_folder() / f"answers-{suite}-{key}.jsonl")
    asked = ask(answerer, unique, file, sampling=sampling, progress=_Advance(stage))
    if server is not None and asked.num_known:
        say(f"{stage}: {asked.num_known} answers of {server} were there already ({file.path})")
    asked.check()
    by_prompt = {prompt.key(): ours[0] for prompt, ours in zip(unique, asked.by_prompt, strict=True) if ours}
    missing = next((prompt for prompt in prompts if prompt.key() not in by_prompt), None)
    if missing is not None:
        raise RunError(f"{stage}: {missing.source} has no answer")
    return [by_prompt[prompt.key()] for prompt in prompts]
