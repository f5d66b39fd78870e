"""Many prompts, one or several answers each, from a model here or at an endpoint, into a file that resumes.

`generate` does all of it by name, for `orpo generate` and for Python; other commands ask through `ask`. What
an answer is drawn with depends on the seed, the prompt and its number, not on the other prompts or the batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from orpo.console import say
from orpo.errors import ConfigError, RunError
from orpo.evaluation.answer_summary import AnswerSummary, summarise
from orpo.evaluation.answers import Answer, AnswerFile, Failure, Reply, check_same
from orpo.evaluation.endpoint import Endpoint, EndpointModel
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.evaluation.local_model import LocalModel
from orpo.evaluation.prompts import Prompt, read_prompts
from orpo.settings.config import OrpoSettings, check_recipe

Progress = Callable[[int, int], None]
"""Called with the number of answers that are there and the number of all."""
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=512, seed=0)


class Answerer(Protocol):
    """A source of answers: `LocalModel` or `EndpointModel`."""

    @property
    def name(self) -> str:
        """Of the model, for people."""

    @property
    def identity(self) -> str:
        """Equal for models that answer the same."""

    def prepare(self, prompt: Prompt) -> str:
        """What the model is given."""

    def answers(
        self, prompts: Sequence[tuple[Prompt, str]], sampling: Sampling, seeds: Sequence[int | None]
    ) -> Iterator[tuple[int, Reply | Failure]]:
        """Index of each prompt and its answer, in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What came of asking.

    Attributes:
        answers: In the order of the prompts, samples of one prompt together.
        by_prompt: The same for each prompt, fewer than were asked for where some have failed.
        failures: Source of each prompt without an answer, and why.
        num_known: Answers that were there before.
    """

    answers: Sequence[Answer]
    by_prompt: Sequence[Sequence[Answer]]
    failures: Sequence[tuple[str, str]] = ()
    num_known: int = 0

    def notices(self) -> list[str]:
        """Lines to print about what came of asking."""
        lines = [f"{self.num_known} answers were there already"] if self.num_known else []
        texts = [[answer.output for answer in ours] for ours in self.by_prompt]
        num_same = sum(len(ours) > 1 and len(set(ours)) == 1 for ours in texts)
        if num_same * 2 > len(texts):
            lines.append(
                f"{num_same} of {len(texts)} prompts got the same answer each time; a server may have to be "
                "told to draw its answers (--request)"
            )
        return lines

    def check(self, again: str = "run the same command again to ask them once more") -> None:
        """Stop where prompts have no answer.

        Raises:
            RunError: It names the first of them.
        """
        if self.failures:
            source, reason = self.failures[0]
            number = len(self.failures)
            which = "1 prompt has" if number == 1 else f"{number} prompts have"
            raise RunError(f"{which} no answer (first: {source}: {reason}); {again}")


def load_answerer(
    model: str | None,
    settings: OrpoSettings,
    *,
    endpoint: Endpoint | None = None,
    batch_size: int | None = None,
) -> Answerer:
    """The model that answers.

    Args:
        model: Run directory, model or adapter folder, or hub name; None with an endpoint.
        settings: How it is loaded and conversations are written.
        endpoint: A server to ask instead.
        batch_size: As for `LocalModel`.

    Raises:
        OrpoError: It cannot be loaded or reached.
    """
    if (model is None) == (endpoint is None):
        raise ConfigError("name one model: MODEL, or --endpoint URL with --endpoint_model NAME")
    if endpoint is None:
        return LocalModel(ChatModel.load(str(model), settings), batch_size)
    if settings.chat_template is not None or settings.chat_template_kwargs:
        raise ConfigError(
            "chat_template, chat_template_kwargs: at an endpoint the server writes conversations"
        )
    return EndpointModel(endpoint)


def tokenizer_of(answerer: Answerer) -> Any:
    """The tokenizer of a model here; None at an endpoint."""
    return answerer.chat.tokenizer if isinstance(answerer, LocalModel) else None


def ask(
    answerer: Answerer,
    prompts: Sequence[Prompt],
    file: AnswerFile,
    *,
    sampling: Sampling,
    samples: int = 1,
    progress: Progress | None = None,
) -> Asked:
    """Answer what the file does not answer yet, and leave it in the order of the prompts.

    Raises:
        ConfigError: The file holds answers that are not of these prompts, this model or this sampling.
        RunError: The file cannot be written, or the server is lost.
    """
    prepared = [(prompt, answerer.prepare(prompt)) for prompt in prompts]
    wanted = {
        _key(text, number): (prompt, text, number) for prompt, text in prepared for number in range(samples)
    }
    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    known = file.read()
    check_same(known, answerer.name, answerer.identity, drawn, wanted, file.path)
    found = {answer.key: answer for answer in reversed(known)}
    num_known = len(found)
    missing = [key for key in wanted if key not in found]
    failures: dict[str, str] = {}
    if progress is not None:
        progress(num_known, len(wanted))
    try:
        asked = [wanted[key][:2] for key in missing]
        seeds = [_seed(sampling.seed, key) for key in missing]
        for index, reply in answerer.answers(asked, sampling, seeds):
            key = missing[index]
            prompt, _, number = wanted[key]
            if isinstance(reply, Failure):
                failures.setdefault(prompt.source, reply.reason)
                continue
            found[key] = _answer(prompt, number, reply, key, answerer, drawn)
            file.append(found[key])
            if progress is not None:
                progress(len(found), len(wanted))
    except BaseException:
        if found:
            say(
                f"{len(found)} of {len(wanted)} answers are kept; the same command goes on from there",
                error=True,
            )
        raise
    finally:
        file.close()
    answers = [found[key] for key in wanted if key in found]
    if answers and (missing or answers != known):
        file.finish(answers)
    keys = [[_key(text, number) for number in range(samples)] for _, text in prepared]
    by_prompt = [[found[key] for key in ours if key in found] for ours in keys]
    return Asked(answers=answers, by_prompt=by_prompt, failures=list(failures.items()), num_known=num_known)


def check_samples(samples: int, sampling: Sampling) -> None:
    """Check how many answers a prompt is to get.

    Raises:
        ConfigError: Fewer than one, or several that would be the same.
    """
    if samples < 1:
        raise ConfigError(f"samples: {samples} is out of range; expected at least 1")
    if samples > 1 and sampling.temperature == 0:
        raise ConfigError(f"samples: {samples} answers at temperature 0 are the same; set --temperature")


def _key(prepared: str, number: int) -> str:
    return hashlib.sha256(json.dumps([prepared, number]).encode()).hexdigest()[:24]


def _seed(seed: int | None, key: str) -> int | None:
    """The seed of one answer: 31 bits, which every server takes."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4], "big") >> 1


def _answer(
    prompt: Prompt, number: int, reply: Reply, key: str, answerer: Answerer, drawn: Mapping[str, Any]
) -> Answer:
    alone = isinstance(prompt.asked, str) or len(prompt.asked) == 1
    return Answer(
        instruction=prompt.instruction,
        output=reply.text,
        generator=answerer.name,
        prompt=None if alone else prompt.asked,  # type: ignore[arg-type]
        reasoning=reply.reasoning,
        sample=number,
        ended=reply.ended,
        num_tokens=reply.num_tokens,
        source=prompt.source,
        date=str(date.today()),
        model=answerer.identity,
        key=key,
        **drawn,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated(Asked):
    """Answers to prompts.

    Attributes:
        summary: Figures of the answers; None where there are none.
        path: The file they are in.
    """

    summary: AnswerSummary | None
    path: Path


def generate(  # noqa: PLR0913 - one argument for each option of the command
    model: str | None,
    prompts: Any,
    out: str | Path,
    *,
    samples: int = 1,
    sampling: Sampling = GREEDY,
    system: str | None = None,
    endpoint: Endpoint | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    embeddings: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Generated:
    """Answer prompts, and write the answers as AlpacaEval reads them. What is answered already is kept.

    Args:
        model: Run directory, model or adapter folder, or hub name; None with an endpoint.
        prompts: Texts, a file of them, or rows of a data set, as for `read_prompts`.
        out: File to write or to go on with: `.jsonl`, an answer a line, or `.json`, one list.
        samples: Answers to each prompt, at least 1.
        sampling: How they are drawn; by default the likeliest token each time, at most 512 tokens.
        system: A system turn for conversations that have none.
        endpoint: A server to ask instead of a model here.
        split: Split of a data set; None: all of a file, else what the settings name, or `test`.
        limit: Prompts to ask, the first so many; None: all.
        batch_size: Most prompts answered at once here; None: as many as fit.
        embeddings: As for `summarise`.
        progress: Called as answers come.
        settings: Of a recipe (`dtype`, `chat_template`, `columns`, `text_rows`, ...).

    Raises:
        OrpoError: Model, prompts, file or settings cannot be used.
    """
    check_recipe(settings)
    check_samples(samples, sampling)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: {limit} is out of range; expected at least 1")
    resolved, file = OrpoSettings.from_recipe(settings), AnswerFile(Path(out).expanduser())
    answerer = load_answerer(model, resolved, endpoint=endpoint, batch_size=batch_size)
    split = split or _default_split(prompts, resolved)
    tokenizer = tokenizer_of(answerer)
    asked = read_prompts(prompts, resolved, tokenizer, split=split, system=system, limit=limit)
    for notice in asked.notices:
        say(notice)
    got = ask(answerer, asked.prompts, file, sampling=sampling, samples=samples, progress=progress)
    for notice in got.notices():
        say(notice)
    return Generated(
        answers=got.answers,
        by_prompt=got.by_prompt,
        failures=got.failures,
        num_known=got.num_known,
        summary=summarise(got.answers, embeddings) if got.answers else None,
        path=file.path,
    )


def _default_split(prompts: Any, settings: OrpoSettings) -> str | None:
    """A single file is asked whole; elsewhere it is the recipe's test split, or `test`."""
    is_whole = not isinstance(prompts, str | Path) or Path(prompts).expanduser().is_file()
    return None if is_whole else settings.dataset_test_split or "test"
