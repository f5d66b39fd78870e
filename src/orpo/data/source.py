"""Whatever a user gives as data -> tokenized pairs, with counts, findings and lines to print.

Reading returns a value: pairs, counts, findings, lines to print. Nothing is printed here, so training,
evaluation and inspection of data read in the same way and each says what it must.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HOME

from orpo.data.counts import RowCounts
from orpo.data.dataset import TokenizedDataset, tokenize_pairs
from orpo.data.detect import Detected
from orpo.data.findings import Findings, find, length_bias, pair_key
from orpo.data.preferences import (
    PreferenceSet,
    ReadSettings,
    read_preferences,
    split_holdout,
    stream_preferences,
)
from orpo.data.rows import SAMPLE, splits_of
from orpo.data.splits import evaluation_split
from orpo.data.templates import prepare_template
from orpo.data.text_rows import (
    LINES,
    RENDERED,
    RENDERED_AGAIN,
    THROUGH_TEMPLATE,
    are_rendered,
    as_conversations,
    decide,
    not_rendered,
    read_otherwise,
    reads_otherwise,
)
from orpo.data.tokenize import PairTokenizer, stream_tokenized
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair, TokenizedPair
from orpo.settings.config import OrpoSettings, TextRows

CACHED_FROM = 5000
"""Smaller sets are tokenized each time: that takes seconds, and leaves nothing behind."""
TRAINING, EVALUATION = "train", "eval"


@dataclass(frozen=True, kw_only=True)
class ReadPairs:
    """One set of pairs, as read.

    Attributes:
        name: In lines and in data_report.json: `train`, `eval`, `eval hh`.
        pairs: The pairs as tokens.
        preferences: The pairs as messages or text; empty where they came as tokens.
        formats: By data set, how its rows were read.
        unused_columns: By data set, columns that nothing was read from.
        counts: What became of the rows; None where the pairs came as tokens.
        findings: What is odd about the set; None where nobody looked.
        notices: Further lines to print.
    """

    name: str
    pairs: TokenizedDataset
    preferences: Sequence[PreferencePair] = ()
    formats: Mapping[str, Detected] = field(default_factory=dict)
    unused_columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    counts: RowCounts | None = None
    findings: Findings | None = None
    notices: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Everything to print about the set, each line with its name."""
        counted = self.counts.lines() if self.counts is not None else []
        found = self.findings.lines() if self.findings is not None else []
        return [*self.pairs.notices, *(f"{self.name}: {line}" for line in (*self.notices, *counted, *found))]

    def to_json(self) -> dict[str, Any]:
        """For data_report.json."""
        report: dict[str, Any] = {"formats": {key: format_.name for key, format_ in self.formats.items()}}
        report["unused_columns"] = {key: list(names) for key, names in self.unused_columns.items() if names}
        if self.counts is not None:
            report["rows"] = self.counts.to_dict()
        if self.findings is not None:
            report["findings"] = self.findings.to_dict()
        return report


class SavedTemplate(NamedTuple):
    """The template to save with a model, or all of them by name, and the end-of-turn token it writes."""

    text: str | dict[str, str] | None = None
    end_token: str | None = None


@dataclass(frozen=True)
class TokenizedStream:
    """Tokenized pairs that are made again on each pass; has no length.

    Attributes:
        open: Starts a pass.
        head: Its first rows, which show how the others are read; None where nobody looked.
        counts: What became of the rows of all passes, in the process that reads them.
        chat_template: As of `TokenizedDataset`.
        end_token: As of `TokenizedDataset`.
    """

    open: Callable[[], Iterator[TokenizedPair]]
    head: ReadPairs | None = None
    counts: RowCounts = field(default_factory=RowCounts)
    chat_template: str | dict[str, str] | None = None
    end_token: str | None = None

    def __iter__(self) -> Iterator[TokenizedPair]:
        return self.open()


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains and evaluates on.

    Attributes:
        train: Pairs, or a stream of them; None where there is nothing to train on.
        evals: Evaluation sets by name; the only one is named "".
        notices: Lines to print that are about no one set.
        text_rows: How plain texts were read; None where there were none.
    """

    train: ReadPairs | TokenizedStream | None = None
    evals: Mapping[str, ReadPairs] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    text_rows: TextRows | None = None

    def lines(self) -> list[str]:
        """Everything to print; a line that several sets have in common is printed once."""
        sets = [one for one in (self.train_head, *self.evals.values()) if one is not None]
        return list(dict.fromkeys([*self.notices, *(line for one in sets for line in one.lines())]))

    def to_json(self) -> dict[str, Any]:
        """For data_report.json."""
        report = {one.name: one.to_json() for one in self.evals.values()}
        if isinstance(self.train, ReadPairs):
            return {self.train.name: self.train.to_json()} | report
        if self.train is not None:
            head = {} if self.train.head is None else {self.train.head.name: self.train.head.to_json()}
            report[TRAINING] = {"streaming": "checks of the whole set are not run"} | head
        return report

    @property
    def train_head(self) -> ReadPairs | None:
        """The training pairs, or the first of a stream."""
        return self.train.head if isinstance(self.train, TokenizedStream) else self.train

    @property
    def train_pairs(self) -> TokenizedDataset | TokenizedStream | None:
        """The training pairs as tokens."""
        return self.train.pairs if isinstance(self.train, ReadPairs) else self.train

    @property
    def eval_pairs(self) -> TokenizedDataset | dict[str, TokenizedDataset] | None:
        """The evaluation pairs as the Trainer wants them: those of the only set, or sets by name."""
        sets = {name: read.pairs for name, read in self.evals.items()}
        return sets if set(sets) - {""} else sets.get("")

    @property
    def template(self) -> SavedTemplate:
        """The chat template that the pairs were written with, and its end-of-turn token."""
        sets = [self.train_pairs, *(one.pairs for one in self.evals.values())]
        known = (one for one in sets if one is not None and one.chat_template)
        return next((SavedTemplate(one.chat_template, one.end_token) for one in known), SavedTemplate())


def read_pairs(
    data: Any,
    settings: OrpoSettings,
    tokenizer: Any,
    *,
    split: str | None = "train",
    name: str = EVALUATION,
    stop_tokens: Sequence[int] = (),
) -> ReadPairs:
    """Read one set into memory, a stream too.

    Args:
        data: A name, `Dataset`, `IterableDataset`, rows or tokenized pairs.
        settings: How to read and tokenize.
        tokenizer: Of the model.
        split: Split of a hub data set; None: all of a file or folder.
        name: Of the set, for messages.
        stop_tokens: Ids that generation stops at by the model's own configuration.

    Raises:
        DataError: The data cannot be read, or too many rows are dropped.
    """
    tokenized = _as_tokenized(data)
    if tokenized is not None:
        return ReadPairs(name=name, pairs=tokenized)
    reading = _Reading(settings, tokenizer, stop_tokens)
    return reading.tokenized(reading.preferences(data, split, name), name)


def read_texts(
    data: Any, settings: OrpoSettings, tokenizer: Any = None, *, split: str | None, name: str = EVALUATION
) -> PreferenceSet:
    """The pairs of a set as `read_pairs` reads them, before they become tokens.

    Without a tokenizer, nothing is decided about plain texts; the other arguments are those of `read_pairs`.

    Raises:
        DataError: The data cannot be read, or no row of it can be used.
    """
    return _Reading(settings, tokenizer, ()).preferences(data, split, name)


def pair_tokenizer(settings: OrpoSettings, tokenizer: Any, stop_tokens: Sequence[int] = ()) -> PairTokenizer:
    """What `read_pairs` makes tokens with, for pairs of `read_texts`; arguments as for `read_pairs`."""
    options = _Reading(settings, tokenizer, stop_tokens)._template_options
    return PairTokenizer(
        tokenizer, max_length=settings.max_length, chat_template=settings.chat_template, **options
    )


def read_training(
    train: Any,
    evals: Any,
    settings: OrpoSettings,
    tokenizer: Any,
    *,
    evaluates: bool,
    stop_tokens: Sequence[int] = (),
) -> TrainingData:
    """Read the data of a run.

    Args:
        train: As for `read_pairs`; None: what the settings name.
        evals: The same, or a mapping of names to such; None: what the settings name, or held-out prompts.
        settings: How to read and tokenize.
        tokenizer: Of the model.
        evaluates: Whether prompts are to be held out where there is no evaluation data.
        stop_tokens: As for `read_pairs`.

    Raises:
        DataError: The data cannot be read, too many rows are dropped, or pairs are trained on and evaluated.
        ConfigError: A stream without `max_steps`.
    """
    train = settings.dataset_name if train is None else train
    leaves_out = evals is None  # objects from Python are evaluated as they are, with a line
    evals = _named_evaluation_data(settings) if evals is None else evals
    sets = {} if evals is None else dict(evals) if _is_named(evals) else {"": evals}
    reading = _Reading(settings, tokenizer, stop_tokens)
    notices: tuple[str, ...] = ()
    split = None
    if evaluates and not sets and settings.eval_split > 0:
        split, notices = _own_split(train, settings)
        sets = {"": _unweighted(train)} if split else sets
    if train is not None and _as_tokenized(train) is None and _is_stream(train, settings):
        stream, text_rows = reading.stream(train)
        known_evals = reading.evaluation_sets(sets, text_rows=text_rows, split=split)
        return TrainingData(train=stream, evals=known_evals, notices=notices, text_rows=text_rows)
    if train is None or (tokenized := _as_tokenized(train)) is not None:
        known = None if train is None else ReadPairs(name=TRAINING, pairs=tokenized)  # type: ignore[arg-type]
        return TrainingData(train=known, evals=reading.evaluation_sets(sets))
    read = reading.preferences(train, settings.dataset_train_split, TRAINING)
    text_rows = read.text_rows
    if evaluates and not sets and settings.eval_split > 0:
        read, held_out, line = _hold_out(read, settings)
        notices += (line,)
        known_evals = {"": reading.tokenized(held_out, EVALUATION)}
    else:
        trained = {pair_key(pair) for pair in read.pairs} if sets else set()
        known_evals = reading.evaluation_sets(
            sets, trained, leaves_out=leaves_out, text_rows=text_rows, split=split
        )
    evaluated = [pair for one in known_evals.values() for pair in one.preferences]
    look = cache(lambda: find(read.pairs, evaluated or None))
    tokenized_train = reading.tokenized(read, TRAINING, meanwhile=look)
    findings = replace(look(), length_bias=length_bias(tokenized_train.pairs))
    return TrainingData(
        train=replace(tokenized_train, findings=findings),
        evals=known_evals,
        notices=notices,
        text_rows=text_rows,
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """What every set of a run is read with."""

    settings: OrpoSettings
    tokenizer: Any
    stop_tokens: Sequence[int]

    def preferences(
        self,
        data: Any,
        split: str | None,
        name: str,
        text_rows: TextRows | None = None,
        first: int | None = None,
    ) -> PreferenceSet:
        """Rows -> pairs, nothing of which is dropped yet beyond what cannot train.

        Args:
            data: A name or an object.
            split: Of the data.
            name: For messages.
            text_rows: How texts are read; None: as the settings say, else as the rows decide.
            first: As for `read_preferences`.
        """
        settings, seed = self._read_settings(split), _seed(self.settings)
        try:
            read = read_preferences(data, max_dropped=1.0, seed=seed, first=first, settings=settings)
        except DataError as error:
            raise _of_set(name, error) from None
        if self.tokenizer is None:
            return read
        if self.settings.text_rows == "plain" and (
            conversations := sum(not pair.is_text for pair in read.pairs)
        ):
            read.notices.append(f"{conversations} of {len(read)} pairs are conversations: {THROUGH_TEMPLATE}")
        decided = decide(read.pairs, has_template=self._has_template and _is_name(data))
        if decided is None:
            return read
        if self.settings.data_format is not None:
            decided = "plain"
        decided = text_rows or self.settings.text_rows or decided
        rendered = are_rendered(read.pairs)
        if rendered and decided == "chat":
            raise DataError(f"{name}: {RENDERED_AGAIN}")
        read.notices.append(RENDERED if rendered else LINES[decided])
        line = not_rendered(read.pairs) if rendered else None
        if self._by_rows(data) and not rendered:
            line = read_otherwise(read.pairs, decided)
        if line is not None:
            read.notices.append(line)
        pairs = as_conversations(read.pairs) if decided == "chat" else read.pairs
        return replace(read, pairs=pairs, text_rows=decided)

    def tokenized(
        self, read: PreferenceSet, name: str, meanwhile: Callable[[], object] | None = None
    ) -> ReadPairs:
        """Pairs -> tokens, with the check of how many rows are left; `meanwhile` as for `tokenize_pairs`."""
        try:
            pairs = tokenize_pairs(
                read,
                self.tokenizer,
                max_length=self.settings.max_length,
                chat_template=self.settings.chat_template,
                num_proc=self.settings.dataset_num_proc,
                cache_dir=Path(HF_HOME) / "orpo" if len(read) >= CACHED_FROM else None,
                meanwhile=meanwhile,
                **self._template_options,
            )
        except DataError as error:
            raise _of_set(name, error) from None
        pairs.counts.check(self.settings.max_dropped, name)
        notices = list(read.notices)
        if self.settings.chat_template_kwargs and not pairs.chat_template:
            notices.append("chat_template_kwargs have no effect: plain-text rows use no chat template")
        return ReadPairs(
            name=name,
            pairs=pairs,
            preferences=read.pairs,
            formats=read.formats,
            unused_columns=read.unused_columns,
            counts=pairs.counts,
            notices=tuple(notices),
        )

    def evaluation_sets(
        self,
        sets: Mapping[str, Any],
        trained: Collection[Any] = (),
        *,
        leaves_out: bool = True,
        text_rows: TextRows | None = None,
        split: str | None = None,
    ) -> dict[str, ReadPairs]:
        """Read the evaluation sets; pairs that are `trained` on are left out or named, and counted."""
        split = split or self.settings.dataset_test_split or self.settings.dataset_train_split
        if self.settings.eval_dataset_name is not None and self.settings.dataset_test_split is None:
            split = "train"  # of a file or folder of its own: all of it
        found = {}
        for key, data in sets.items():
            name = evaluation_name(key)
            tokenized = _as_tokenized(data)
            if tokenized is not None:
                found[key] = ReadPairs(name=name, pairs=tokenized)
                continue
            read = self.preferences(data, split, name, text_rows)
            read = _without(read, trained) if leaves_out else _with_warning(read, trained)
            found[key] = self.tokenized(read, name)
        return found

    def stream(self, data: Any) -> tuple[TokenizedStream, TextRows | None]:
        """Rows that are read and tokenized as they come, and how their texts are read.

        The first rows are read at once: they show the format, and stop the run where they cannot train.
        """
        if getattr(self.settings, "max_steps", 0) <= 0:
            raise ConfigError("the length of a stream is not known; set max_steps")
        split, name = self.settings.dataset_train_split, f"{TRAINING}, first {SAMPLE} rows of the stream"
        head = self.preferences(data, split, name, first=SAMPLE)
        counts, by_rows = RowCounts(), self._by_rows(data)  # the trainer notes in its settings what was found

        def tokens() -> Iterator[TokenizedPair]:
            pairs = stream_preferences(data, counts=counts, settings=self._read_settings(split))
            if by_rows:
                pairs = _doubting(pairs, head.text_rows, counts)
            if head.text_rows == "chat":
                pairs = (pair for one in pairs for pair in as_conversations([one]))
            return stream_tokenized(
                pairs,
                self.tokenizer,
                max_length=self.settings.max_length,
                chat_template=self.settings.chat_template,
                counts=counts,
                **self._template_options,
            )

        text = end_token = None
        if self._has_template:
            template = prepare_template(self.tokenizer, self.settings.chat_template, **self._template_options)
            text, end_token = template.saved, template.end_token
        read = self.tokenized(head, name)
        return TokenizedStream(tokens, read, counts, text, end_token), head.text_rows

    @property
    def _has_template(self) -> bool:
        return bool(self.settings.chat_template or self.tokenizer.chat_template)

    def _by_rows(self, data: Any) -> bool:
        """Whether the rows themselves decide how plain texts are read."""
        is_set = self.settings.text_rows is not None or self.settings.data_format is not None
        return self._has_template and _is_name(data) and not is_set

    def _read_settings(self, split: str | None) -> ReadSettings:
        s = self.settings
        return ReadSettings(
            split=split, config=s.dataset_config, data_format=s.data_format, columns=s.columns,
            on_bad_row=s.on_bad_row, sft_rows=s.sft_rows,
        )  # fmt: skip

    @property
    def _template_options(self) -> dict[str, Any]:
        """What `prepare_template` takes besides the template."""
        date = self.settings.template_date
        return {
            "chat_template_kwargs": self.settings.chat_template_kwargs,
            "stop_tokens": self.stop_tokens,
            "date": None if date is None else datetime.fromisoformat(date),
        }


def _doubting(
    pairs: Iterator[PreferencePair], decided: TextRows | None, counts: RowCounts
) -> Iterator[PreferencePair]:
    """The pairs of a stream; texts among them that read otherwise than was decided are counted."""
    for pair in pairs:
        if reads_otherwise(pair, decided):
            counts.doubt("a text that would be read the other way by itself (text_rows)", pair.source)
        yield pair


def _of_set(name: str, error: DataError) -> DataError:
    """An error with the name of the set that it is about in front."""
    said = str(error).removeprefix("the data: ").removeprefix(f"{name}: ")
    return DataError(f"{name}: {said}")


def _with_warning(read: PreferenceSet, trained: Collection[Any]) -> PreferenceSet:
    """The set with a line about the pairs that are trained on."""
    sources = [pair.source for pair in read.pairs if pair_key(pair) in trained]
    if sources:
        read.notices.append(
            f"{len(sources)} of {len(read)} pairs are also trained on (first: {sources[0]});"
            " what they show does not carry over to new data"
        )
    return read


def _without(read: PreferenceSet, trained: Collection[Any]) -> PreferenceSet:
    """The set without the pairs that are trained on."""
    kept = []
    for pair in read.pairs:
        if pair_key(pair) in trained:
            read.counts.drop("the training data has the same pair", pair.source)
        else:
            kept.append(pair)
    return replace(read, pairs=kept)


def _hold_out(read: PreferenceSet, settings: OrpoSettings) -> tuple[PreferenceSet, PreferenceSet, str]:
    """Training pairs, held-out pairs, and a line; what was dropped while reading stays with the former."""
    train, held_out = split_holdout(read.pairs, settings.eval_split, _seed(settings))
    if not held_out:
        raise DataError("too few prompts to hold some out; give evaluation data or set eval_strategy: no")
    line = (
        f"no evaluation data: {len(held_out)} of {len(read)} pairs are held out"
        f" ({settings.eval_split:.0%} of the prompts); eval_split: 0 turns this off"
    )
    counts = replace(read.counts, total=read.counts.total - len(held_out))
    kept = replace(read, pairs=train, counts=counts)
    return kept, PreferenceSet(held_out, counts=RowCounts(total=len(held_out))), line


def _own_split(train: Any, settings: OrpoSettings) -> tuple[str | None, tuple[str, ...]]:
    """The split of the training data's own folder to evaluate on, where it has one, and a line about it."""
    names = _unweighted(train)
    names = names if isinstance(names, list) and _is_name(names) else [names]
    splits = {}
    for name in names:
        found = splits_of(name, settings.dataset_config)
        splits[name if isinstance(name, str | Path) else "the data"] = (
            evaluation_split(found, settings.dataset_train_split),
            found,
        )
    where = ", ".join(str(name) for name, (split, _) in splits.items() if split)
    own = {split for split, _ in splits.values()}
    if own == {None}:
        return None, ()
    if len(own) > 1:
        return None, (f"only {where} of the training data has a split to evaluate on, which is not used",)
    (split,) = own
    others = [name for name in next(iter(splits.values()))[1] if name != split]
    left = [name for name in others if evaluation_split([name], settings.dataset_train_split)]
    rest = f"; {', '.join(left)} is left for orpo eval" if left else ""
    return split, (f"evaluating on the split {split} of {where} (dataset_test_split names another){rest}",)


def _unweighted(data: Any) -> Any:
    """The names of data sets without their weights; any other data as it is."""
    return list(data) if isinstance(data, Mapping) and _is_name(data) else data


def _named_evaluation_data(settings: OrpoSettings) -> Any:
    if settings.eval_dataset_name is not None:
        return settings.eval_dataset_name
    return settings.dataset_name if settings.dataset_test_split else None


def _is_stream(data: Any, settings: OrpoSettings) -> bool:
    return settings.streaming or type(data).__name__ == "IterableDataset"


def evaluation_name(set_name: str) -> str:
    """What lines and data_report.json call an evaluation set; the only one of a run is named ""."""
    return f"{EVALUATION} {set_name}" if set_name else EVALUATION


def _seed(settings: OrpoSettings) -> int:
    """The seed of a run; 0 for settings that are not those of a training."""
    return int(getattr(settings, "seed", 0))


def _is_name(data: Any) -> bool:
    """Whether data is named; objects from Python are read as TRL reads them."""
    if isinstance(data, Mapping):
        return all(isinstance(weight, (int, float)) for weight in data.values())
    return isinstance(data, str | Path) or (
        isinstance(data, list | tuple) and all(isinstance(one, str | Path) for one in data)
    )


def _is_named(evals: Any) -> bool:
    """Whether these are evaluation sets by name, not the rows of one."""
    return isinstance(evals, Mapping) and not any(isinstance(value, (int, float)) for value in evals.values())


def _as_tokenized(data: Any) -> TokenizedDataset | None:
    """The data set, where the pairs are tokenized already."""
    if isinstance(data, TokenizedDataset):
        return data
    if isinstance(data, list) and data and isinstance(data[0], TokenizedPair):
        return TokenizedDataset.from_pairs(data)
    return None
