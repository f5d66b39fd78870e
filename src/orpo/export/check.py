"""What a copy of a model must agree in with the run, and the comparison; without torch.

`Expected` holds the run's answers. A process that has never seen the run loads the copy and gives its own,
`Found`; `problems` says where they part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo.errors import RunError

LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest mean difference of log-probs, in nats, that rounding to a dtype may cost.

Rounding weights at random places costs the model of the demo 0.009 nat in bfloat16. After 60 steps at 5e-6 it
costs 0.067: it puts 84 % of the weights that moved back where they were, and undoes half of what was learned.
"""

GGUF_LIMITS = {"f32": 2e-4, "f16": 5e-3, "bf16": 3e-2, "q8_0": 0.1}
"""The same for types of GGUF files, computed by llama.cpp."""


class RoundingError(RunError):
    """A copy whose dtype is too coarse for what training changed; everything else about it agrees.

    Attributes:
        problem: By how much.
    """

    def __init__(self, what: str, problem: str, way_out: str) -> None:
        """Say it of `what`, with the way out."""
        self.problem = f"{problem}, since rounding undoes changes as small as this run's"
        super().__init__(f"{what} is refused: {self.problem}; {way_out}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What the run says.

    Attributes:
        texts: Plain texts.
        ids: Of each text, its token ids, no special token added.
        conversations: Lists of messages.
        prompts: Of each, the prompt that asks for an answer.
        sequences: Token ids.
        starts: Of each sequence, its first token that is scored.
        log_probs: Of each sequence, the log-probs of its tokens from there on.
        stops: Ids that end an answer, by what they are called.
        tensors: Checksums of the weights by name, where a copy must hold the very same.
    """

    texts: list[str]
    ids: list[list[int]]
    conversations: list[list[dict[str, Any]]]
    prompts: list[str]
    sequences: list[list[int]]
    starts: list[int]
    log_probs: list[list[float]]
    stops: dict[str, int]
    tensors: dict[str, str] = field(default_factory=dict)

    def questions(self) -> dict[str, Any]:
        """What the other process is told: everything to compute, nothing of the answers."""
        names = ("texts", "conversations", "sequences", "starts", "stops")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a copy says; the attributes answer those of `Expected`.

    Attributes:
        ids: Of each text.
        prompts: Of each conversation.
        log_probs: Of each sequence; None where a token could not be scored.
        stopped: Of each stop, the tokens generated when it came first, and whether generation ended.
        tensors: Checksums of the weights by name.
        also_stops: Further tokens that end an answer.
    """

    ids: list[list[int]]
    prompts: list[str]
    log_probs: list[list[float | None]]
    stopped: dict[str, bool]
    tensors: dict[str, str] = field(default_factory=dict)
    also_stops: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far a copy agrees.

    Attributes:
        problems: Where it does not, each a part of a sentence; empty where it may be used.
        tokens: Log-probs compared.
        mean: Their mean absolute difference, in nats.
        most: The largest.
        texts: Texts whose ids were compared.
        also_stops: Tokens that end an answer of the copy, and not of the run.
    """

    problems: list[str]
    tokens: int
    mean: float
    most: float
    texts: int
    also_stops: list[str] = field(default_factory=list)

    def line(self) -> str:
        """What was compared, for people."""
        return (
            f"{self.texts:,} texts with the same ids; log-probs of {self.tokens:,} tokens differ by "
            f"{self.mean:.2g} nat on average, {self.most:.2g} at most"
        )


def compare(expected: Expected, found: Found, limit: float) -> Comparison:
    """Compare a copy with the run.

    Args:
        expected: What the run says.
        found: What the copy says.
        limit: Largest mean difference of log-probs, in nats.
    """
    problems = _differing_tensors(expected, found)
    if differ := [n for n, ids in enumerate(expected.ids) if found.ids[n] != ids]:
        first = json.dumps(expected.texts[differ[0]][:60], ensure_ascii=False)
        problems.append(f"{len(differ)} of {len(expected.ids):,} texts get other token ids (first: {first})")
    if wrong := [n for n, prompt in enumerate(expected.prompts) if found.prompts[n] != prompt]:
        ours, theirs = (_excerpt(one[wrong[0]], expected.prompts[wrong[0]], found.prompts[wrong[0]])
                        for one in (expected.prompts, found.prompts))  # fmt: skip
        problems.append(f"the prompts of {len(wrong)} of {len(expected.prompts)} conversations differ "
                        f"({ours} in training, {theirs} here)")  # fmt: skip
    if running := [name for name in expected.stops if not found.stopped.get(name)]:
        problems.append(f"generation does not stop at {', '.join(running)}")
    pairs = [
        (ours, theirs)
        for one, other in zip(expected.log_probs, found.log_probs, strict=True)
        for ours, theirs in zip(one, other, strict=True)
        if theirs is not None
    ]
    gaps = [abs(ours - theirs) for ours, theirs in pairs]
    mean, most = (fmean(gaps), max(gaps)) if gaps else (float("nan"), float("nan"))
    if not mean <= limit:  # NaN too
        problems.append(
            f"log-probs of {len(gaps)} tokens differ by {mean:.2g} nat on average (limit {limit:g})"
        )
    return Comparison(
        problems=problems,
        tokens=len(gaps),
        mean=mean,
        most=most,
        texts=len(expected.ids),
        also_stops=found.also_stops,
    )


def refuse(what: str, expected: Expected, found: Found, comparison: Comparison, way_out: str | None) -> None:
    """Refuse a copy that does not agree.

    Args:
        what: Was written (`the exported model`).
        expected: What the run says.
        found: What the copy says.
        comparison: Of the two.
        way_out: Of a copy in a coarser dtype than the run's: what to do where rounding is all that is wrong.

    Raises:
        RunError: It does not.
        RoundingError: It does but for the rounding.
    """
    if not comparison.problems:
        return
    problems = "; ".join(comparison.problems)
    if way_out is None or compare(expected, found, float("inf")).problems:
        raise RunError(f"{what} is refused: {problems}")
    raise RoundingError(what, problems, way_out)


def _differing_tensors(expected: Expected, found: Found) -> list[str]:
    names = expected.tensors.keys() | found.tensors.keys() if expected.tensors else ()
    differ = sorted(name for name in names if expected.tensors.get(name) != found.tensors.get(name))
    more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    return [f"the weights {differ[0]}{more} are not those that were written"] if differ else []


def _excerpt(text: str, one: str, other: str) -> str:
    """A text around the place where two texts part."""
    parts = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    place = next(parts, min(len(one), len(other)))
    return json.dumps(text[max(0, place - 10) : place + 30], ensure_ascii=False)


def ask_another_process(module: str, request: Mapping[str, Any], *, limit_s: float) -> Found:
    """Let a new process load a copy and answer.

    Args:
        module: Run with `python -m`, with the paths of a request and of its answer, both JSON.
        request: What to load, and the questions.
        limit_s: Seconds it may take.

    Raises:
        RunError: It ended otherwise: a wrong file can take down the process that reads it.
    """
    with tempfile.TemporaryDirectory(prefix="orpo-check-") as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        words = [sys.executable, "-m", module, str(asked), str(answer)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=limit_s, env=environment, check=False,
                errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"it could not be checked within {limit_s:.0f} s") from None
        if done.returncode != 0 or not answer.is_file():
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
            raise RunError(f"the process that loaded it ended with {how}{_last_line(done.stderr)}")
        return Found(**json.loads(answer.read_text(encoding="utf-8")))


def _last_line(text: str) -> str:
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    return f" ({lines[-1][:300]})" if lines else ""
