"""Preference data as it should be trained on: cleaned, without repeats, filtered, split, with a manifest.

    read -> pairs -> clean -> deduplicate
         -> source -> language -> margin -> length -> balance -> limit -> split

Each step takes pairs and gives pairs, and says in one line what it removed and why (steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orpo.curation import filters
from orpo.curation.cleaning import clean
from orpo.curation.deduplication import KINDS, remove_repeats
from orpo.curation.folder import PreparedData, check_out, describe_input, write_folder
from orpo.curation.measuring import Lengths, in_characters, in_tokens
from orpo.curation.pairing import PAIRINGS, Pairing, pair_answers
from orpo.curation.parting import part_pairs
from orpo.curation.reading import check_packages, curation_settings, only_name, other_splits, read_input
from orpo.curation.sampling import balance_length, limit
from orpo.curation.steps import Step
from orpo.data.stages import report
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair
from orpo.settings.config import OrpoSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """What `prepare_data` does.

    Attributes:
        split: Split of the data to read.
        pairs: How several ranked answers are paired: `best-each`, `best-worst`, `best-random` or `all`.
        fix_text: Repair encodings that were read wrongly.
        drop_broken: Remove pairs with the sign of a lost character.
        keep: Of `duplicates`, `near_duplicates`, `contradictions`, `similar_sides`: what stays, counted.
        source: Values of the source column to keep; none: all.
        language: Language codes to keep; none: all.
        min_margin: Least difference of the scores of chosen and rejected; None: any.
        min_length: Least length of each answer, in characters, or in tokens with `model`.
        max_length: Most of prompt and longer answer together, in the same unit.
        model: Run directory, model folder or hub name whose tokens are counted.
        balance: `length`: as many longer chosen as longer rejected answers.
        limit: Most pairs to keep, by source and length; None: all.
        test: Share of the pairs in the test split, in [0, 1).
        validation: The same for a validation split.
        seed: Of every random choice.
    """

    split: str = "train"
    pairs: Pairing = "best-each"
    fix_text: bool = False
    drop_broken: bool = False
    keep: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    min_margin: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    model: str | None = None
    balance: Literal["length"] | None = None
    limit: int | None = None
    test: float = 0.05
    validation: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Check what was given.

        Raises:
            ConfigError: Naming the option.
        """
        if self.pairs not in PAIRINGS:
            raise ConfigError(f"pairs: {self.pairs!r} is not one of {', '.join(PAIRINGS)}")
        if unknown := [name for name in self.keep if name not in KINDS]:
            raise ConfigError(f"keep: {', '.join(unknown)} is not one of {', '.join(KINDS)}")
        if self.balance not in (None, "length"):
            raise ConfigError(f"balance: {self.balance!r} is unknown; the only one is length")
        for name in ("limit", "min_length", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is out of range; expected at least 1")
        for name in ("test", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is out of range; expected a share in [0, 1)"
                )
        if self.test + self.validation >= 1:
            raise ConfigError("test and validation leave nothing to train on; lower one of them")


def prepare_data(
    data: Any,
    out: str | Path,
    options: PrepareOptions | None = None,
    *,
    settings: dict[str, Any] | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    **given: Any,
) -> PreparedData:
    """Clean, deduplicate, filter, balance and split preference pairs, and write them to a folder.

    Args:
        data: A file, folder, hub name or object, or a list of names, as for `dataset_name`.
        out: Folder to write; it must be empty or not there.
        options: What to do.
        settings: Of a recipe, for how rows are read: `columns`, `data_format`, `sft_rows`, ...
        force: Replace a folder that was prepared before.
        say: Gets each line as it is known.
        given: Fields of `PrepareOptions`, instead of `options`.

    Raises:
        ConfigError: An option is out of range, the folder is not empty, or a package is missing.
        DataError: The data cannot be read, or no pair is left.
    """
    options = replace(options or PrepareOptions(), **given)
    options.check()
    check_packages(["ftfy", *(["py3langid"] if options.language else [])], "preparing data")
    folder = check_out(out, data, force=force)
    data = only_name(data)
    work = _Work(options, curation_settings(settings), say or (lambda line: None))
    pairs = work.read(data)
    pairs = work.filtered(work.cleaned(pairs))
    parts, line = part_pairs(
        pairs, {"validation": options.validation, "test": options.test}, seed=options.seed
    )
    work.say(line)
    splits = {name: [pairs[index] for index in indices] for name, indices in parts.items()}
    about = {
        "command": "orpo data prepare",
        "options": asdict(options),
        "settings": settings or {},
        "input": describe_input(data, options.split, work.settings.dataset_config),
        "split": line,
    }
    return write_folder(folder, splits, work.steps, about)


class _Work:
    """The steps in their order; each is said and remembered."""

    def __init__(self, options: PrepareOptions, settings: OrpoSettings, say: Callable[[str], None]) -> None:
        self.options = options
        self.settings = settings
        self.say = say
        self.steps: list[Step] = []

    def done(self, step: Step) -> None:
        """Remember a step and say its line.

        Raises:
            DataError: No pair is left.
        """
        self.steps.append(step)
        self.say(step.line())
        if step.after == 0:
            raise DataError(f"no pair is left after the step {step.name!r}: {step.line()}")

    def read(self, data: Any) -> list[PreferencePair]:
        """The pairs of the data, in the pairing that is asked for."""
        report("reading", 0, None)
        read, step, lines = read_input(data, self.options.split, self.settings)
        for line in lines:
            self.say(line)
        if others := other_splits(data, self.options.split, self.settings.dataset_config):
            every = "+".join([self.options.split, *others])
            self.say(f"not read: the splits {', '.join(others)} (--split {every} reads them too)")
        self.done(step)
        if self.options.pairs == "best-each":
            return read.pairs
        pairs, step = pair_answers(read.pairs, self.options.pairs, seed=self.options.seed)
        self.done(step)
        return pairs

    def cleaned(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        """Cleaned pairs without repeats."""
        options = self.options
        pairs, step = clean(pairs, fix_text=options.fix_text, drop_broken=options.drop_broken)
        self.done(step)
        return self._kept(pairs, remove_repeats(pairs, keep=options.keep))

    def filtered(self, pairs: list[PreferencePair]) -> list[PreferencePair]:
        """The pairs that are wanted, and no more than are wanted."""
        options = self.options
        if options.source:
            pairs = self._kept(pairs, filters.by_source(pairs, options.source))
        if options.language:
            pairs = self._kept(pairs, filters.by_language(pairs, options.language))
        if options.min_margin is not None:
            pairs = self._kept(pairs, filters.by_margin(pairs, options.min_margin))
        if not (
            options.model or options.min_length or options.max_length or options.balance or options.limit
        ):
            return pairs
        pairs, lengths = self._measured(pairs)
        if options.min_length or options.max_length:
            found = filters.by_length(pairs, lengths, options.min_length, options.max_length)
            pairs, lengths = self._kept(pairs, found), lengths.take(found[0])
        if options.balance:
            found = balance_length(pairs, lengths, seed=options.seed)
            pairs, lengths = self._kept(pairs, found), lengths.take(found[0])
        if options.limit:
            pairs = self._kept(pairs, limit(pairs, lengths, options.limit, seed=options.seed))
        return pairs

    def _kept(self, pairs: Sequence[PreferencePair], found: tuple[list[int], Step]) -> list[PreferencePair]:
        kept, step = found
        self.done(step)
        return [pairs[index] for index in kept]

    def _measured(self, pairs: list[PreferencePair]) -> tuple[list[PreferencePair], Lengths]:
        if self.options.model is None:
            return pairs, in_characters(pairs)
        from orpo.engine.loading import load_tokenizer
        from orpo.engine.stop_tokens import saved_stop_token_ids
        from orpo.run.checkpoints import model_folder

        folder = model_folder(self.options.model)
        tokenizer = load_tokenizer(folder, trust_remote_code=self.settings.trust_remote_code)
        stops = saved_stop_token_ids(folder)
        kept, lengths, step = in_tokens(pairs, tokenizer, self.settings, stop_tokens=stops)
        return self._kept(pairs, (kept, step)), lengths
