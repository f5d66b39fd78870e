"""Preference rows of any accepted format -> `PreferencePair`, each checked and traceable to file and line.

Two kinds of trouble are kept apart. A malformed row (not parsable, a field missing or of the wrong type)
stops the run, or is skipped and counted. A well-formed row that cannot train (identical sides, an empty
answer) is dropped and counted by reason.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo.console import is_text
from orpo.data import pairwise, ranked, turn_markers
from orpo.data.columns import Columns, NamedRow, quoted
from orpo.data.counts import RowCounts
from orpo.data.detect import Detected, detect, named
from orpo.data.formats import has_text_sides, is_standard_repeated
from orpo.data.messages import MEDIA, BadRow, Untrainable, type_name, without_nulls
from orpo.data.rows import ORIGIN, SAMPLE, KeyTwice, RawRow, nothing_readable, read_rows, strict_json
from orpo.data.stages import EVERY, report
from orpo.data.verdicts import (
    REPEATED,
    UNREAD_LIST,
    contradiction,
    looks_at,
    marked_turn,
    picture,
    repeated_prompt,
    side_scores,
    unpaired_reason,
    unread_conversation,
    unread_list,
)
from orpo.errors import ConfigError, DataError
from orpo.pairs import Message, PreferencePair
from orpo.settings.config import TextRows

MOST_REPEATS = 1000
"""Largest weight of a data set: how often each of its pairs is seen in an epoch."""


@dataclass(frozen=True)
class PreferenceSet:
    """The pairs of one or several data sets.

    Attributes:
        pairs: In the order of the data.
        formats: Name of each data set -> its format and why.
        counts: What became of the rows.
        notices: Lines to print.
        unused_columns: Name of each data set -> its columns that nothing was read from.
        text_rows: How its plain texts are read; None where it has none, or nobody has decided.
    """

    pairs: list[PreferencePair]
    formats: dict[str, Detected] = field(default_factory=dict)
    counts: RowCounts = field(default_factory=RowCounts)
    notices: list[str] = field(default_factory=list)
    unused_columns: dict[str, list[str]] = field(default_factory=dict)
    text_rows: TextRows | None = None

    @property
    def format(self) -> Detected:
        """The format, where there is one data set."""
        return next(iter(self.formats.values()))

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSettings:
    """How rows are read; the names are those of the recipe."""

    split: str | None = "train"
    config: str | None = None
    data_format: str | None = None
    columns: Mapping[str, str | None] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    sft_rows: Literal["drop", "use"] = "drop"


def read_preferences(
    data: object,
    *,
    max_dropped: float = 0.1,
    seed: int = 0,
    first: int | None = None,
    settings: ReadSettings | None = None,
    **options: Any,
) -> PreferenceSet:
    """Read preference pairs.

    Args:
        data: A local file or folder (jsonl, json, csv, also .gz; parquet, arrow), a hub name, a `Dataset`,
            `IterableDataset` or list of dicts; a list of names; or a mapping name -> weight: how often each
            pair of that data set is seen in an epoch (0.5: a random half, 2: twice).
        max_dropped: Largest share of rows that may be dropped or skipped, in [0, 1].
        seed: For the choice of rows where a weight is not whole.
        first: Read this many rows of each data set only; None: all.
        settings: How rows are read.
        options: Fields of `ReadSettings`, instead of `settings`.

    Raises:
        DataError: Nothing to read, a malformed row, or too many rows dropped.
    """
    settings = settings or ReadSettings(**options)
    result = PreferenceSet([])
    sources = _sources(data)
    for name, (source, weight) in sources.items():
        reading = _Reading(settings, RowCounts(), source, one_of_several=len(sources) > 1)
        pairs = list(_reported(reading, name, source, first))
        result.counts.add(reading.counts)
        result.formats[name] = reading.detected
        result.unused_columns[name] = reading.columns.unused
        result.notices.extend(_notices(name, reading))
        if weight is not None:
            taken = resample(pairs, weight, seed)
            result.notices.append(
                f"{name}: weight {weight:g}: {len(taken)} of {len(pairs)} pairs in an epoch"
            )
            pairs = taken
        result.pairs.extend(pairs)
    weights = {name: weight for name, (_, weight) in sources.items() if weight is not None}
    if weights and not result.pairs and result.counts.kept > 0:
        listed = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
        raise DataError(f"the weights leave no pair to train on ({listed}); raise one of them")
    result.counts.check(max_dropped)
    return result


def _reported(reading: _Reading, name: str, data: Any, first: int | None) -> Iterator[PreferencePair]:
    """The pairs of a data set, with reports of how far its reading is."""
    stage = f"reading {Path(name).name}"
    total = len(data) if isinstance(data, Sized) and not isinstance(data, str | Mapping) else None
    known = first if total is None else total if first is None else min(first, total)
    report(stage, 0, known)
    for number, pair in enumerate(reading.pairs(data, first), start=1):
        if number % EVERY == 0:
            report(stage, reading.counts.total, known)
        yield pair
    report(stage, reading.counts.total, reading.counts.total)


def _notices(name: str, reading: _Reading) -> list[str]:
    lines = [f"{name}: format {reading.detected.name} ({reading.detected.reason})"]
    if unused := [quoted(column) for column in reading.columns.unused]:
        lines.append(f"{name}: columns not used: {', '.join(unused)}")
    if reading.unread_keys:
        lines.append(f"{name}: keys of answers not used: {', '.join(map(quoted, reading.unread_keys))}")
    for words, number in reading.contradictions.items():
        first = reading.first_of[words]
        lines.append(
            f"{name}: {number} of {reading.counts.total} rows train although {words} (first: {first})"
        )
    return lines


def stream_preferences(
    data: object, *, counts: RowCounts | None = None, settings: ReadSettings | None = None, **options: Any
) -> Iterator[PreferencePair]:
    """The pairs as they come, for data that is not to be held in memory; arguments as for `read_preferences`.

    Args:
        data: One data set or a list of them, read one after the other; weights need the whole set.
        counts: Filled while reading.
        settings: How rows are read.
        options: Fields of `ReadSettings`, instead of `settings`.
    """
    settings = settings or ReadSettings(**options)
    sources = _sources(data)
    for name, (source, weight) in sources.items():
        if weight not in (None, 1):
            raise ConfigError(f"{name}: a weight needs the whole data set; leave streaming or the weight out")
        counts = RowCounts() if counts is None else counts
        reading = _Reading(settings, counts, source, one_of_several=len(sources) > 1, streams=True)
        yield from reading.pairs(source)


def resample(pairs: Sequence[PreferencePair], weight: float, seed: int) -> list[PreferencePair]:
    """Each pair `floor(weight)` times, and a random share of them once more; the same for the same seed.

    Args:
        pairs: Of one data set.
        weight: From 0 to `MOST_REPEATS`.
        seed: Of the random share.
    """
    if not 0 <= weight <= MOST_REPEATS:
        raise ConfigError(f"the weight {weight:g} of a data set is not in 0 to {MOST_REPEATS}")
    whole, part = divmod(weight, 1)
    extra = random.Random(seed).sample(range(len(pairs)), round(part * len(pairs)))
    return [*(list(pairs) * int(whole)), *(pairs[index] for index in sorted(extra))]


def split_holdout(
    pairs: Sequence[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Hold out a share of the prompts; no prompt ends up on both sides.

    Args:
        pairs: All pairs.
        fraction: Share of the distinct prompts to hold out, in [0, 1); at least one prompt where it is above
            0.
        seed: Of the choice.

    Returns:
        Training pairs and held-out pairs, each in the order of `pairs`.
    """
    keys = [pair.prompt_key() for pair in pairs]
    prompts = list(dict.fromkeys(keys))
    if fraction <= 0 or len(prompts) < 2:
        return list(pairs), []
    number = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = set(random.Random(seed).sample(prompts, number))
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held]


def _sources(data: object) -> dict[str, tuple[object, float | None]]:
    """Name -> (what to read, weight)."""
    if isinstance(data, Mapping) and data and all(isinstance(value, int | float) for value in data.values()):
        return {str(name): (name, float(weight)) for name, weight in data.items()}
    if isinstance(data, list | tuple) and data and all(isinstance(item, str | Path) for item in data):
        return {str(item): (item, None) for item in data}
    return {str(data) if isinstance(data, str | Path) else "data": (data, None)}


class _Reading:
    """The reading of one data set: its format and columns, and what becomes of its rows."""

    detected: Detected
    _signed: frozenset[str]

    def __init__(
        self,
        settings: ReadSettings,
        counts: RowCounts,
        name: object,
        *,
        one_of_several: bool,
        streams: bool = False,
    ) -> None:
        self.settings = settings
        self.name = name if isinstance(name, str | Path) else "the data"
        self.counts = counts
        self.columns = Columns(settings.columns, as_texts=settings.data_format == "standard")
        self.contradictions: Counter[str] = Counter()
        self.first_of: dict[str, str] = {}
        self.unread_keys: dict[str, None] = {}
        self._one_of_several = one_of_several
        self._streams = streams  # then nobody sees the whole set, and `counts` tell all

    def pairs(self, data: object, first: int | None = None) -> Iterator[PreferencePair]:
        """The pairs of a data set, or of its first rows, the others counted; sets `detected` early."""
        rows = read_rows(data, split=self.settings.split, config=self.settings.config)
        raw = itertools.islice(rows, first)
        head = list(itertools.islice(raw, SAMPLE))
        self.detected = self._detect(head)
        if self.settings.columns:
            self._check_names(head)
        for row in itertools.chain(head, raw):
            self.counts.total += 1
            try:
                named_row, pairs = self._row_pairs(row)
            except BadRow as bad:
                if self.settings.on_bad_row == "stop":
                    raise DataError(f"{row.source}: {bad} or set on_bad_row: skip") from None
                self.counts.skip(bad.reason, row.source)
                continue
            except Untrainable as nothing:
                self.counts.drop(str(nothing), row.source)
                continue
            self.counts.total += len(pairs) - 1
            for pair in pairs:
                reason = cannot_train(pair) or self._cannot_use_alone(pair, named_row)
                if reason is None:
                    self._doubt(named_row, pair)
                    yield pair
                else:
                    self.counts.drop(reason, pair.source)
        if not self._streams:  # of a stream the rows are trained on by now
            self._check_repeated()
            self._check_lists()

    def _detect(self, head: Sequence[RawRow]) -> Detected:
        parsed = [row for row in head if not isinstance(row.data, DataError)]
        if head and not parsed:
            raise nothing_readable(head)
        self.columns.check(
            (row.data for row in parsed if isinstance(row.data, dict)), may_lack=self._one_of_several
        )
        self.columns.look(row.data for row in parsed if isinstance(row.data, dict))
        rows: list[tuple[str, NamedRow]] = []
        problems = []
        for row in parsed:
            try:
                rows.append((row.source, self.columns.name(row.data)))  # type: ignore[arg-type]
            except BadRow as bad:
                problems.append(f"{row.source}: {bad}")
        self._signed = pairwise.signed_labels(row for _, row in rows)
        if self.settings.data_format is not None:
            return named(self.settings.data_format)
        if problems and not rows:
            raise DataError(problems[0])
        try:
            detected = detect(row for _, row in rows)
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None
        if detected.name == "standard_repeated" and self.settings.on_bad_row == "stop":
            _refuse_unrepeated(rows)
        self.columns.forget()
        return detected

    def _check_names(self, head: Sequence[RawRow]) -> None:
        """Stop where the settings map a column to a name that reading the first rows asks for nowhere."""
        for row in head:
            with contextlib.suppress(BadRow, Untrainable):
                named_row, pairs = self._row_pairs(row)
                for pair in pairs:
                    contradiction(named_row, pair)
                    self._other_best(named_row)
                    self._cannot_use_alone(pair, named_row)
        if not self._one_of_several and head:
            self.columns.check_names(looks_at)
        self.columns.forget()

    def _row_pairs(self, raw: RawRow) -> tuple[NamedRow, list[PreferencePair]]:
        if isinstance(raw.data, DataError):
            raise BadRow("row", str(raw.data))
        row = self.columns.name(raw.data)
        _refuse_media(row)
        tools, arguments = row_tools(row), template_arguments(row)
        source = row[ORIGIN] if isinstance(dict.get(row, ORIGIN), str) else raw.source
        group = next((row[name] for name in ("source", "dataset") if isinstance(row.get(name), str)), None)
        pairs = [
            PreferencePair(*sides[:3], tools, source, group, arguments, sides.scores or side_scores(row))
            for sides in self.detected.format.read(row)
        ]
        for pair in pairs:
            _check_texts(pair)
        if self.detected.name == "ranked":
            self.unread_keys.update(dict.fromkeys(ranked.unread_keys(row)))
        return row, pairs

    def _doubt(self, row: NamedRow, pair: PreferencePair) -> None:
        """Count what speaks against training a pair as its row says."""
        said = (
            contradiction(row, pair), self._other_best(row), unread_list(row), unread_conversation(row),
            marked_turn(pair), repeated_prompt(pair), picture(pair),
        )  # fmt: skip
        for words in filter(None, said):
            self.contradictions[words] += 1
            self.first_of.setdefault(words, pair.source)
            if self._streams:
                self.counts.doubt(words, pair.source)

    def _check_repeated(self) -> None:
        """Stop where rows behind those that tell the format make most rows repeat their prompt."""
        number, total = self.contradictions[REPEATED], self.counts.total
        if self.settings.data_format is None and self.detected.name == "standard" and number * 2 > total:
            raise DataError(
                f"{self.first_of[REPEATED]}: {number} of {total} rows begin both sides with their prompt,"
                f" this one first, and the first {SAMPLE} mostly do not; {_ONE_WAY}"
            )

    def _check_lists(self) -> None:
        """Stop where most rejected answers are lists written as text, which nobody writes as answers."""
        number, total = self.contradictions[UNREAD_LIST], self.counts.total
        is_settled = self.settings.data_format is not None or self.detected.name == "prepared"
        if not is_settled and number * 2 > total:
            raise DataError(
                f"{self.first_of[UNREAD_LIST]}: the rejected answers of {number} of {total} rows are texts"
                " that write a list, this one first; write lists in all rows if each is several answers, or"
                f" set data_format: {self.detected.name} to read each text as one"
            )

    def _other_best(self, row: NamedRow) -> str | None:
        """Which numbers or labels say that another answer is the best."""
        if self.detected.name == "pairwise":
            return pairwise.other_winner(row, self._signed)
        return ranked.other_best(row) if self.detected.name == "ranked" else None

    def _cannot_use_alone(self, pair: PreferencePair, row: NamedRow) -> str | None:
        """Why a row without a rejected answer does not train; None where it does."""
        if pair.rejected is not None:
            return None
        uses = self.settings.sft_rows == "use"
        near = difflib.get_close_matches("rejected", [name for name in row if name != "rejected"], 1, 0.8)
        where = f"; is it in the column {row.theirs(near[0])!r}?" if near else ""
        reason = f"no rejected answer (sft_rows: drop){where}"
        return unpaired_reason(row, uses=uses) or (None if uses else reason)


_ONE_WAY = "write all rows one way, or set data_format: standard to take all sides as they are"


def _refuse_unrepeated(rows: Sequence[tuple[str, NamedRow]]) -> None:
    """Refuse rows of texts that do not begin with their prompt where the others do, each with its source."""
    pairs = [(source, row) for source, row in rows if has_text_sides(row)]
    others = [source for source, row in pairs if not is_standard_repeated(row)]
    if others:
        repeated = len(pairs) - len(others)
        raise DataError(
            f"{others[0]}: the sides of {repeated} of the first {len(rows)} rows begin with their prompt, and"
            f" those of {len(others)} do not, this one first; {_ONE_WAY}, or set on_bad_row: skip"
        )


def _refuse_media(row: NamedRow) -> None:
    if MEDIA.isdisjoint(row):
        return
    for name in sorted(MEDIA & row.keys()):
        if row[name]:
            raise BadRow(name, "belongs to the question, and only text is trained", "leave the column out")


def _check_texts(pair: PreferencePair) -> None:
    """Stop at text that cannot be encoded, and at answers that would be rendered a second time."""
    for name, side in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        texts = [side] if isinstance(side, str) else [turn["content"] for turn in side or ()]
        _refuse_unwritable(name, texts)
        if not isinstance(side, str):
            _refuse_unwritable(name, [turn for turn in side or () if len(turn) > 2])
        for text in texts:
            if name != "prompt" and turn_markers.is_rendered(text):
                raise BadRow(
                    name, "is rendered already: it begins with the tokens of a chat template",
                    "give the rows as they were before the chat template",
                )  # fmt: skip
    for name, value in (
        ("tools", pair.tools),
        ("source", pair.group),
        ("chat_template_kwargs", pair.chat_template_kwargs),
    ):
        if value is not None:
            _refuse_unwritable(name, value)


def _refuse_unwritable(name: str, value: Any) -> None:
    if (reason := _unwritable(value)) is not None:
        raise BadRow(name, reason)


def _unwritable(value: Any) -> str | None:
    """Why a text, or what holds texts at any depth, cannot be written as JSON in UTF-8; None where it can."""
    if isinstance(value, str):
        return None if is_text(value) else "holds half of a character (a lone surrogate), as cut texts do"
    if isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            return f"has a key that is {type_name(strange[0])}; expected text"
        return next(filter(None, map(_unwritable, (*value.values(), *value))), None)
    if isinstance(value, list | tuple):
        return next(filter(None, map(_unwritable, value)), None)
    return None


def row_tools(row: NamedRow) -> list[Any] | None:
    """Schemas of the tools that a row's conversation may call."""
    tools = _from_json(row, "tools")
    if isinstance(tools, list):
        tools = [_loaded(tool, "tools") if isinstance(tool, str) else tool for tool in tools]
    elif tools is not None:
        raise BadRow("tools", f"is {type_name(tools)}; expected a list of schemas")
    return without_nulls(tools) or None


def template_arguments(row: NamedRow) -> dict[str, Any] | None:
    """A row's own arguments of the chat template."""
    arguments = _from_json(row, "chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise BadRow("chat_template_kwargs", f"is {type_name(arguments)}; expected an object")
    return without_nulls(arguments) or None


def _from_json(row: NamedRow, name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str):
        return value
    return _loaded(value, name) if value.strip() else None


def _loaded(text: str, name: str) -> Any:
    try:
        return strict_json(text)
    except KeyTwice as error:
        raise BadRow(name, f"is JSON as text, which {error}") from None
    except ValueError:
        raise BadRow(name, "is text, but not JSON") from None


def cannot_train(pair: PreferencePair) -> str | None:
    """Why a well-formed row is of no use; None where it is."""
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if side is None:
            continue
        if not isinstance(side, str) and (not side or side[-1]["role"] != "assistant"):
            return f"the last turn of {name} is not the assistant's"
        if _is_empty(side):
            return f"empty {name} answer"
    if not pair.prompt:
        return "no prompt: the sides share no beginning"
    if _asks_nothing(pair.prompt):
        return "no prompt: the question is empty"
    if pair.rejected is None or _last(pair.chosen) != _last(pair.rejected):
        return None
    return "chosen and rejected are identical" if _answer(pair.chosen) == _answer(pair.rejected) else None


def _asks_nothing(prompt: list[Message] | str) -> bool:
    """Whether the last question is blank."""
    if isinstance(prompt, str):
        return not prompt.strip()
    asked = [turn["content"] for turn in prompt if turn["role"] == "user"]
    return bool(asked) and not asked[-1].strip()


def _is_empty(side: list[Message] | str) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return not side[-1]["content"].strip() and not side[-1].get("tool_calls")


def _last(side: list[Message] | str) -> str:
    return (side if isinstance(side, str) else str(side[-1]["content"])).strip()


def _answer(side: list[Message] | str) -> object:
    if isinstance(side, str):
        return side.strip()
    return [{**message, "content": message["content"].strip()} for message in side]
