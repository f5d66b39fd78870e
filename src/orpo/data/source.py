"""Whatever a user gives as data -> tokenized pairs to train and evaluate on, and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from orpo.data.dataset import TokenizedDataset, tokenize_pairs
from orpo.data.findings import inspect_pairs
from orpo.data.preferences import (
    PreferenceSet,
    ReadSettings,
    read_preferences,
    split_holdout,
    stream_preferences,
)
from orpo.data.templates import prepare_template
from orpo.data.tokenize import stream_tokenized
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair, TokenizedPair
from orpo.settings.config import OrpoSettings

CACHED_FROM = 5000
"""Sets of fewer pairs are tokenized anew: that takes seconds, and leaves nothing behind."""


@dataclass(frozen=True)
class TokenizedStream:
    """Tokenized pairs that are made anew on each pass; has no length."""

    open: Callable[[], Iterator[TokenizedPair]]

    def __iter__(self) -> Iterator[TokenizedPair]:
        return self.open()


@dataclass
class TrainingData:
    """What a run trains and evaluates on.

    Attributes:
        train: Pairs, or a stream of them; None where there is nothing to train on.
        evals: Evaluation sets by name; the only one is named "".
        report: For data_report.json.
        notices: Lines to print.
    """

    train: TokenizedDataset | TokenizedStream | None = None
    evals: dict[str, TokenizedDataset] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


class DataReader:
    """Reads and tokenizes data as the settings say."""

    def __init__(self, settings: OrpoSettings, tokenizer: Any, seed: int) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.seed = seed
        self.report: dict[str, Any] = {}
        self.notices: list[str] = []
        self._evaluated: list[PreferencePair] = []
        self.chat_template: str | dict[str, str] | None = None
        self.end_token: str | None = None

    def training(self, train: Any, evals: Any, *, evaluates: bool) -> TrainingData:
        """Read the data of a run.

        Args:
            train: A name, `Dataset`, `IterableDataset`, rows or tokenized pairs; None: what the settings
                name.
            evals: The same, or a mapping of names to them.
            evaluates: Whether prompts are to be held out where there is no evaluation data.
        """
        train = self.settings.dataset_name if train is None else train
        if evals is None:
            evals = self._named_evaluation_data()
        sets = {} if evals is None else dict(evals) if _is_named(evals) else {"": evals}
        names = {name: f"eval_{name}" if name else "eval" for name in sets}
        data = TrainingData(
            evals={name: self.whole(rows, names[name], self._eval_split) for name, rows in sets.items()},
            report=self.report,
            notices=self.notices,
        )
        if train is None:
            return data
        if (tokenized := _as_tokenized(train)) is not None:
            data.train = tokenized
        elif self._is_stream(train):
            data.train = self._stream(train)
        else:
            pairs = self._pairs(train, "train", self.settings.dataset_train_split)
            if evaluates and not sets and self.settings.eval_split > 0:
                kept, held_out = self._hold_out(pairs.pairs)
                data.evals[""] = self._tokenized(held_out, "eval")
                self._evaluated = held_out
                # What was dropped while reading is told with the training pairs.
                counts = replace(pairs.report, total=pairs.report.total - len(held_out))
                pairs = replace(pairs, pairs=kept, report=counts)
            data.train = self._tokenized(pairs, "train")
            self._inspect(pairs.pairs, data.train)
        return data

    def whole(self, rows: Any, name: str, split: str) -> TokenizedDataset:
        """Read one set into memory, a stream too: evaluations look at the same pairs each time."""
        if (tokenized := _as_tokenized(rows)) is not None:
            self._remember(tokenized)
            return tokenized
        pairs = self._pairs(rows, name, split)
        self._evaluated += pairs.pairs
        return self._tokenized(pairs, name)

    @property
    def _eval_split(self) -> str:
        return self.settings.dataset_test_split or self.settings.dataset_train_split

    def _named_evaluation_data(self) -> Any:
        if self.settings.eval_dataset_name is not None:
            return self.settings.eval_dataset_name
        return self.settings.dataset_name if self.settings.dataset_test_split else None

    def _hold_out(self, pairs: Sequence[PreferencePair]) -> tuple[list[PreferencePair], list[PreferencePair]]:
        train, held_out = split_holdout(pairs, self.settings.eval_split, self.seed)
        if not held_out:
            raise DataError("too few prompts to hold some out; give evaluation data or set eval_strategy: no")
        self.notices.append(
            f"no evaluation data: {len(held_out)} of {len(pairs)} pairs are held out"
            f" ({self.settings.eval_split:.0%} of the prompts); eval_split: 0 turns this off"
        )
        return train, held_out

    def _is_stream(self, data: Any) -> bool:
        return self.settings.streaming or type(data).__name__ == "IterableDataset"

    def _read_settings(self, split: str) -> ReadSettings:
        s = self.settings
        return ReadSettings(
            split=split, config=s.dataset_config, data_format=s.data_format, columns=s.columns,
            on_bad_row=s.on_bad_row, sft_rows=s.sft_rows,
        )  # fmt: skip

    def _pairs(self, data: Any, name: str, split: str) -> PreferenceSet:
        read = read_preferences(
            data, max_dropped=self.settings.max_dropped, seed=self.seed, settings=self._read_settings(split)
        )
        self.notices += [f"{name}: {line}" for line in read.notices]
        self.report[name] = {"formats": {key: format_.name for key, format_ in read.formats.items()}}
        return read

    def _tokenized(self, pairs: PreferenceSet | Sequence[PreferencePair], name: str) -> TokenizedDataset:
        s = self.settings
        data = tokenize_pairs(
            pairs,
            self.tokenizer,
            max_length=s.max_length,
            chat_template=s.chat_template,
            num_proc=s.dataset_num_proc,
            cache_dir=Path(HF_HOME) / "orpo" if len(pairs) >= CACHED_FROM else None,
            max_dropped=s.max_dropped,
        )
        self.notices += [line for line in data.notices if line not in self.notices]
        lines = data.report.lines()
        if len(lines) > 1:
            self.notices += [f"{name}: {line}" for line in lines]
        self.report.setdefault(name, {})["rows"] = data.report.to_dict()
        self._remember(data)
        return data

    def _inspect(self, train: Sequence[PreferencePair], tokenized: TokenizedDataset) -> None:
        """Report what no single row shows: duplicates, contradictions, shared prompts, length bias."""
        found = inspect_pairs(train, self._evaluated or None, tokenized)
        self.report["train"]["findings"] = found.to_dict()
        self.notices += [f"train: {line}" for line in found.lines()]

    def _remember(self, data: TokenizedDataset) -> None:
        """Keep the template that the data was written with, for saving with the model."""
        self.chat_template = data.chat_template or self.chat_template
        self.end_token = data.end_token or self.end_token

    def _stream(self, data: Any) -> TokenizedStream:
        s = self.settings
        if getattr(s, "max_steps", 0) <= 0:
            raise ConfigError("the length of a stream is not known; set max_steps")
        self.report["train"] = {"streaming": "checks of the whole set are not run"}
        read = self._read_settings(s.dataset_train_split)
        if s.chat_template or self.tokenizer.chat_template:
            template = prepare_template(self.tokenizer, s.chat_template)
            self.chat_template, self.end_token = template.saved, template.end_token

        def tokens() -> Iterator[TokenizedPair]:
            return stream_tokenized(
                stream_preferences(data, settings=read),
                self.tokenizer,
                max_length=s.max_length,
                chat_template=s.chat_template,
            )

        return TokenizedStream(tokens)


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
