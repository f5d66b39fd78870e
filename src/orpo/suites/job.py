"""Suites on one model, or on two and what changed: what `orpo eval --suite` does, for Python too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.errors import ConfigError
from orpo.evaluation.answering import Answerer, load_answerer
from orpo.evaluation.endpoint import Endpoint
from orpo.run.checkpoints import model_folder, run_recipe
from orpo.run.directory import RunDirectory, write_json
from orpo.settings.config import OrpoSettings, check_recipe, inherited_by_evaluation
from orpo.suites.measured import Measured, Value
from orpo.suites.protocol import Options
from orpo.suites.registry import Chosen, chosen
from orpo.suites.subject import Subject

ENDPOINT, MODEL = "endpoint", "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What a suite has found.

    Attributes:
        suite: As it was typed.
        model: The model, the second of two.
        measured: What was measured on it.
        first: The model that it is compared with; None where there is one model.
        before: What was measured on that.
        path: Where it was saved; None where the model is in no run directory.
    """

    suite: str
    model: str
    measured: Measured
    first: str | None = None
    before: Measured | None = None
    path: Path | None = None

    @property
    def metrics(self) -> dict[str, Value]:
        """Mean, error and number of items of each metric."""
        return self.measured.values()

    @property
    def changes(self) -> dict[str, Value]:
        """What changed from the first model to the second, item by item; empty with one model."""
        return {} if self.before is None else self.before.changes_to(self.measured)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        found = {
            "suite": self.suite,
            "model": self.model,
            "metrics": self._to_json(self.metrics),
            "settings": dict(self.measured.settings),
            "notices": list(self.measured.notices),
        }
        if self.before is None:
            return found
        other = {"model": self.first, "metrics": self._to_json(self.before.values())}
        return found | {"compared_with": other | {"change": self._to_json(self.changes)}}

    def _to_json(self, values: Mapping[str, Value]) -> dict[str, Any]:
        return {name: value.to_json() | {"unit": self.measured.unit(name)} for name, value in values.items()}


def run_suites(  # noqa: PLR0913 - one argument for each option of the command
    model: str,
    suites: Sequence[str],
    *,
    first: str | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    endpoint: Endpoint | None = None,
    judge: str | None = None,
    judge_endpoint: Endpoint | None = None,
    batch_size: int | None = None,
    **settings: Any,
) -> list[SuiteResult]:
    """Run suites on a model; with `first`, on both, and say what changed from `first` to `model`.

    What models say is kept by weights, prompts and settings, so the same call goes on where it was stopped.
    The result of a model in a run directory is saved there.

    Args:
        model: Run directory, model or adapter folder, hub name, or `endpoint:URL`.
        suites: Names, `NAME:ABOUT`, or several with commas between them, as `orpo suites` lists them.
        first: The model to compare with.
        limit: Items of each suite, the first so many; None: all.
        max_tokens: Longest answer; None: as each suite says.
        endpoint: How a server is asked, where `model` is one; None: as its defaults say.
        judge: `endpoint:URL` or `model:MODEL`, for suites that have answers rated.
        judge_endpoint: How the judge's server is asked.
        batch_size: Most prompts answered at once by a model here; None: as many as fit.
        settings: Of a recipe (`dtype`, `max_length`, `columns`, ...).

    Raises:
        OrpoError: A suite, a model, a file or a setting cannot be used.
    """
    check_recipe(settings)
    for name, number in (("limit", limit), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: {number} is out of range; expected at least 1")
    wanted = chosen(suites)
    asking = _judge(judge, judge_endpoint, settings, batch_size)
    options = Options(limit=limit, max_tokens=max_tokens, judge=asking)
    for one in wanted:
        one.suite.check(one.about, options)
    names = [model] if first is None else [first, model]
    for name in names:
        if not _address(name):
            model_folder(name)  # a name that is wrong is said before anything takes time
    shared = {} if _address(model) else inherited_by_evaluation(run_recipe(model), settings)
    measured = []
    for name in names:
        subject = _subject(name, settings, shared | settings, endpoint, batch_size)
        measured.append({one.name: _run(one, subject, options, limit) for one in wanted})
    return [_saved(_result(one.name, model, first, measured)) for one in wanted]


def _run(one: Chosen, subject: Subject, options: Options, limit: int | None) -> Measured:
    found = one.suite.run(subject, one.about, options)
    for notice in found.notices:
        say(f"{subject.name}: {one.name}: {notice}")
    return replace(found, settings={**found.settings, "limit": limit})


def _result(
    suite: str, model: str, first: str | None, measured: Sequence[Mapping[str, Measured]]
) -> SuiteResult:
    before = measured[0][suite] if first is not None else None
    return SuiteResult(suite=suite, model=model, measured=measured[-1][suite], first=first, before=before)


def _saved(result: SuiteResult) -> SuiteResult:
    run = RunDirectory(Path(result.model))
    if not run.log.is_file():
        return result
    suite, _, about = result.suite.partition(":")
    name = f"{suite}-{Path(about).name}" if about else suite
    path = run.suite(re.sub(r"[^\w.=+-]+", "-", name))
    write_json(path, result.to_json())
    return replace(result, path=path)


def _address(name: str) -> str | None:
    """The address, where a model is named as `endpoint:URL`."""
    kind, _, url = name.partition(":")
    return url if kind == ENDPOINT else None


def _subject(
    name: str,
    settings: Mapping[str, Any],
    pair_settings: Mapping[str, Any],
    endpoint: Endpoint | None,
    batch_size: int | None,
) -> Subject:
    url = _address(name)
    if url is None:
        return Subject(name, settings, pair_settings=pair_settings, batch_size=batch_size)
    server = Endpoint(url=url) if endpoint is None else replace(endpoint, url=url)
    return Subject(None, settings, endpoint=server)


def _judge(
    by: str | None, endpoint: Endpoint | None, settings: Mapping[str, Any], batch_size: int | None
) -> Any:
    if by is None:
        return None
    kind, _, name = by.partition(":")
    if kind not in (ENDPOINT, MODEL) or not name:
        raise ConfigError(f"--judge {by}: expected {ENDPOINT}:URL or {MODEL}:MODEL")
    loaded: list[Answerer] = []

    def load() -> Answerer:
        if not loaded:
            server = None
            if kind == ENDPOINT:
                server = Endpoint(url=name) if endpoint is None else replace(endpoint, url=name)
            resolved = OrpoSettings.from_recipe(settings)
            here = name if server is None else None
            loaded.append(load_answerer(here, resolved, endpoint=server, batch_size=batch_size))
        return loaded[0]

    return load
