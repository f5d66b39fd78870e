"""Rejected answers that the model to be trained makes itself, for rows with a good answer.

A model learns more from what it would say than from what another model said, and most from both (mixed
policies, arXiv 2509.25100). Every prompt is answered several times; answers that are as good as the good one
or no answers at all are left out, and one of the others becomes the rejected side by a rule that is chosen.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.curation.likeness import likeness, normalised, says_the_same
from orpo.data import turn_markers
from orpo.data.columns import PROVENANCE
from orpo.data.source import read_texts
from orpo.data.splits import parse_split
from orpo.data.text_rows import as_conversations
from orpo.data.words import text_of, words_of
from orpo.errors import ConfigError, DataError
from orpo.evaluation.answering import Asked, Progress, ask, check_samples, load_answerer, tokenizer_of
from orpo.evaluation.answers import Answer, AnswerFile
from orpo.evaluation.endpoint import Endpoint
from orpo.evaluation.generation import Sampling
from orpo.evaluation.prompts import Prompt, prompt_of
from orpo.pairs import Message, PreferencePair
from orpo.run.disk import replace_text
from orpo.settings.config import OrpoSettings, check_recipe

RULES = ("random", "least_similar", "most_similar")
"""Which of the answers that are left becomes the rejected one, by likeness to the good answer."""
HOT = Sampling(temperature=1.0, top_p=1.0, max_tokens=512, seed=0)
TELLING = 0.8
"""Share of pairs whose rejected side is the longer, or the shorter, from which length tells."""
_ANSWERS = "answers.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNegatives:
    """Which rows get a rejected answer of the model's own, and which answer.

    Attributes:
        samples: Answers to each prompt to choose from, at least 1.
        share_own: Share of the rows with a rejected answer that get another one, in [0, 1].
        choose: One of `RULES`.
        keep_unfinished: Whether an answer that was cut at the limit may be chosen.

    Raises:
        ConfigError: A value is out of range.
    """

    samples: int = 4
    share_own: float = 1.0
    choose: str = "random"
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share_own <= 1:
            raise ConfigError(f"share_own: {self.share_own:g} is out of range; expected a share from 0 to 1")
        if self.choose not in RULES:
            raise ConfigError(f"choose: {self.choose!r} is not one of {', '.join(RULES)}")


@dataclass
class _Tally:
    """What became of rows and answers: reason -> how many, and where the first was."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, source: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, source)

    def lines(self, verb: str) -> list[str]:
        return [
            f"{verb} {count}: {why} (first: {self.first[why]})" for why, count in self.counts.most_common()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class MadePairs:
    """Pairs with rejected answers of the model's own.

    Attributes:
        rows: As written.
        num_own: Pairs whose rejected answer is the model's own.
        asked: What came of asking the model.
        counted: Lines about rows and answers that were not used.
        path: The file that holds the pairs.
    """

    rows: Sequence[Mapping[str, Any]]
    num_own: int
    asked: Asked
    counted: Sequence[str]
    path: Path

    def lines(self) -> list[str]:
        """To print: the first pair in short, how long the sides are, what was left out."""
        first = self.rows[0]
        shown = [f"{name:<12}{_short(first[name])}" for name in ("prompt", "chosen", "rejected")]
        number = f"{len(self.rows):,}, {self.num_own:,} with a rejected answer of the model's own"
        return [*self.counted, *shown, *_length_lines(self.rows), f"pairs       {number}"]


def _short(side: Any) -> str:
    text = " ".join((side if isinstance(side, str) else str(side[-1]["content"])).split())
    return text if len(text) <= 66 else f"{text[:65]}…"


def _length_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lengths = [(_num_words(row["chosen"]), _num_words(row["rejected"])) for row in rows]
    chosen, rejected = (sum(side) / len(rows) for side in zip(*lengths, strict=True))
    longer = sum(other > own for own, other in lengths) / len(rows)
    shorter = sum(other < own for own, other in lengths) / len(rows)
    lines = [
        f"length      chosen {chosen:.1f} words, rejected {rejected:.1f} on average; the rejected answer "
        f"is longer in {longer:.0%}"
    ]
    if max(longer, shorter) >= TELLING:
        which = "longer" if longer >= TELLING else "shorter"
        lines.append(
            f"warning     the rejected answer is nearly always the {which} one: length alone tells the "
            "sides apart"
        )
    return lines


def _num_words(side: Any) -> int:
    return len(words_of(text_of(side)))


def make_pairs(  # noqa: PLR0913 - one argument for each group of options of the command
    model: str | None,
    data: Any,
    out: str | Path,
    *,
    own: OwnNegatives | None = None,
    sampling: Sampling = HOT,
    endpoint: Endpoint | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MadePairs:
    """Write pairs whose rejected answers the model has made. What is answered already is kept.

    Args:
        model: Run directory, model or adapter folder, or hub name; None with an endpoint.
        data: Rows with a good answer, in any format that trains.
        out: Folder for the pairs, which `dataset_name` takes, and for the model's answers.
        own: Which rows, and which answer.
        sampling: How answers are drawn.
        endpoint: A server to ask instead of a model here.
        split: Of the data; None: all of a file, else what the settings name.
        limit: Rows to use, the first so many; None: all.
        batch_size: Most prompts answered at once here; None: as many as fit.
        progress: Called as answers come.
        settings: Of a recipe (`dtype`, `chat_template`, `columns`, `text_rows`, ...).

    Raises:
        OrpoError: Model, data, folder or settings cannot be used, or no pair is left.
    """
    own = own or OwnNegatives()
    check_recipe(settings)
    check_samples(own.samples, sampling)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: {limit} is out of range; expected at least 1")
    resolved = OrpoSettings.from_recipe(settings)
    split = split or resolved.dataset_train_split
    folder = Path(out).expanduser()
    path = folder / f"{parse_split(split)[0].name}.jsonl"
    _check_folder(folder)
    answerer = load_answerer(model, resolved, endpoint=endpoint, batch_size=batch_size)
    pairs = _read(data, resolved, tokenizer_of(answerer), split, limit)
    chosen = _own_rows(pairs, own.share_own, sampling.seed)
    prompts = {prompt.key(): prompt for pair, is_own in zip(pairs, chosen, strict=True) if is_own
               for prompt in [prompt_of(pair)]}  # fmt: skip
    file = AnswerFile(folder / _ANSWERS)
    got = ask(
        answerer, list(prompts.values()), file, sampling=sampling, samples=own.samples, progress=progress
    )
    for notice in got.notices():
        say(notice)
    answers = dict(zip(prompts, got.by_prompt, strict=True))
    rows, counted = _join(pairs, chosen, answers, own, sampling)
    if not rows:
        raise DataError(f"{data}: no pair is left: {'; '.join(counted)}")
    _write(folder, path, rows)
    num_own = sum(row[PROVENANCE]["rejected_by"] == "own" for row in rows)
    return MadePairs(rows=rows, num_own=num_own, asked=got, counted=counted, path=path)


def _check_folder(folder: Path) -> None:
    """Stop where the folder holds something that is not ours to write over."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _ANSWERS).is_file():
        raise ConfigError(f"--out {folder}: something else is there already; name another folder")


def _read(
    data: Any, settings: OrpoSettings, tokenizer: Any, split: str, limit: int | None
) -> list[PreferencePair]:
    lenient = replace(settings, sft_rows="use", max_dropped=1.0)
    read = read_texts(data, lenient, tokenizer, split=split, name="rows")
    for line in (*read.notices, *read.counts.lines()):
        say(line)
    pairs = read.pairs
    if tokenizer is None and settings.text_rows != "plain":
        pairs = as_conversations(pairs)
    if limit is not None and limit < len(pairs):
        say(f"the first {limit} of {len(pairs)} pairs are used (--limit)")
        pairs = pairs[:limit]
    if not pairs:
        raise DataError(f"{data}: there is no row with a good answer")
    return list(pairs)


def _own_rows(pairs: Sequence[PreferencePair], share: float, seed: int | None) -> list[bool]:
    """Which pairs get an answer of the model's own: all without a rejected one, a share of the others."""
    given = [index for index, pair in enumerate(pairs) if pair.rejected is not None]
    kept = set(random.Random(seed or 0).sample(given, len(given) - round(share * len(given))))
    return [index not in kept for index in range(len(pairs))]


def _join(
    pairs: Sequence[PreferencePair],
    chosen: Sequence[bool],
    answers: Mapping[str, Sequence[Answer]],
    own: OwnNegatives,
    sampling: Sampling,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Each pair with its rejected answer; pairs of one prompt get different ones as far as there are some."""
    left, rows_without = _Tally(), _Tally()
    candidates: dict[tuple[str, str], Iterator[Answer]] = {}
    rows = []
    for pair, is_own in zip(pairs, chosen, strict=True):
        prompt, good = prompt_of(pair), _answer_text(pair.chosen)
        taken: Answer | None = None
        if is_own:
            key = (prompt.key(), good)
            if key not in candidates:
                usable = _usable(answers[prompt.key()], good, own, left)
                candidates[key] = iter(_ordered(usable, good, own.choose, f"{sampling.seed} {key}"))
            taken = next(candidates[key], None)
            if taken is None:
                kept = "no answer of the model's own is left; the given one is kept"
                gone = "no answer of the model's own is left, and none is given"
                rows_without.add(gone if pair.rejected is None else kept, pair.source)
        if taken is not None or pair.rejected is not None:
            rows.append(_row(pair, prompt, taken))
    return rows, [*left.lines("answers left out"), *rows_without.lines("rows")]


def _usable(answers: Sequence[Answer], good: str, own: OwnNegatives, left: _Tally) -> list[Answer]:
    """The answers that can be a rejected side next to `good`, each once."""
    usable: dict[str, Answer] = {}
    for answer in answers:
        reason = _unusable(answer, good, own.keep_unfinished)
        if reason is None and normalised(answer.output) in usable:
            reason = "the same as another sample"
        if reason is None:
            usable[normalised(answer.output)] = answer
        else:
            left.add(reason, answer.source)
    return list(usable.values())


def _unusable(answer: Answer, good: str, keep_unfinished: bool) -> str | None:
    """Why an answer cannot be the rejected side next to a good one; None where it can."""
    if not words_of(answer.output):
        return "empty"
    if not answer.ended and not keep_unfinished:
        return "cut at --max_tokens (--keep_unfinished uses them)"
    if turn_markers.is_rendered(answer.output) or turn_markers.asks(answer.output):
        return "runs on past its turn: it holds the tokens of a chat template"
    return "the same as the good answer, or nearly" if says_the_same(answer.output, good) else None


def _ordered(answers: list[Answer], good: str, rule: str, seed: str) -> list[Answer]:
    """The answers in the order in which they are taken."""
    if rule == "random":
        return random.Random(seed).sample(answers, len(answers))
    by: Callable[[Answer], float] = lambda answer: likeness(answer.output, good)  # noqa: E731
    return sorted(answers, key=by, reverse=rule == "most_similar")


def _answer_text(side: list[Message] | str) -> str:
    return side if isinstance(side, str) else str(side[-1]["content"])


def _row(pair: PreferencePair, prompt: Prompt, own: Answer | None) -> dict[str, Any]:
    """A row of the file, in a format that every reader of pairs takes."""
    if own is None:
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        about: dict[str, Any] = {"row": pair.source, "rejected_by": "given"}
    else:
        is_text = isinstance(prompt.asked, str)
        row = {
            "prompt": prompt.asked,
            "chosen": pair.chosen if is_text else pair.chosen[-1:],
            "rejected": own.output if is_text else [{"role": "assistant", "content": own.output}],
        }
        about = {"row": pair.source, "rejected_by": "own", "model": own.generator, "sample": own.sample}
        about |= {**own.drawn, "date": own.date}
    extra = {"tools": pair.tools, "chat_template_kwargs": pair.chat_template_kwargs, "source": pair.group}
    return row | {name: value for name, value in extra.items() if value} | {PROVENANCE: about}


_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: {file}
---
# Preference pairs with rejected answers of a model's own

{number} pairs, written by `orpo data pairs`. The column `{provenance}` says of each pair which row it is from
and how its rejected answer was made. `{answers}` holds all answers, also those that were not chosen.
"""


def _write(folder: Path, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write pairs and card, each whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    names = {"split": path.stem, "file": path.name, "answers": _ANSWERS, "provenance": PROVENANCE}
    card = _CARD.format(number=len(rows), **names)
    replace_text(folder / "README.md", card)
    replace_text(path, text)
