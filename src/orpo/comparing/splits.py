"""The pairs that every arm sees: training, validation and test, split by prompt once and kept in a folder.

Settings are chosen on the validation pairs, and the test pairs judge what was chosen. Smaller training sets
are nested: each holds every prompt of the one before it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.curation.folder import check_out, describe_input, write_folder
from orpo.curation.parting import TRAIN, part_pairs
from orpo.data.rows import splits_of
from orpo.data.source import read_texts
from orpo.data.splits import DEFAULT, MANIFEST, evaluation_split
from orpo.engine.loading import load_tokenizer
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair
from orpo.run.directory import read_json
from orpo.settings.config import OrpoSettings

VALIDATION, TEST = "validation", "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """Where the pairs of each side come from.

    Attributes:
        test: Test pairs; None: a split of the data that is named so, else held out.
        validation_share: Share of the pairs held out for choosing, where the recipe names none, in (0, 1).
        test_share: The same for the test; 0: no test.
        most_validation: Most validation pairs; None: all there are.
        seed: Of the split, and of which prompts a smaller set has.
    """

    test: str | None = None
    validation_share: float = 0.1
    test_share: float = 0.2
    most_validation: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Splits:
    """The files of the pairs.

    Attributes:
        folder: Where they are.
        counts: Name of each split -> its pairs.
        sizes: Sizes of the training set, in order; the last is all of it.
    """

    folder: Path
    counts: Mapping[str, int]
    sizes: tuple[int, ...]

    def path(self, name: str) -> Path:
        """The file of a split."""
        return self.folder / f"{name}.parquet"

    def training(self, size: int) -> Path:
        """The file of a training set."""
        return self.path(_name_of(size) if size != self.sizes[-1] else TRAIN)


def _name_of(size: int) -> str:
    return f"{TRAIN}_{size}"


def settle_splits(
    recipe: Mapping[str, Any],
    folder: Path,
    sizes: Sequence[int],
    options: SplitOptions,
    *,
    is_fixed: bool = True,
) -> tuple[Splits, dict[str, Any]]:
    """Split the pairs of a recipe, or read how they were split before.

    Args:
        recipe: Names data and model.
        folder: Where the splits are, or are to be.
        sizes: Pairs of smaller training sets; the whole one is always there.
        options: Where the pairs come from.
        is_fixed: Whether a split of other data that lies there is an error; else it is replaced.

    Returns:
        The splits, and the settings that read them.

    Raises:
        OrpoError: The data cannot be read, or another split lies there.
    """
    settings = OrpoSettings.from_recipe(recipe)
    _check(settings)
    about = {
        "command": "orpo compare",
        "options": asdict(options),
        "input": _inputs(settings, options),
    }
    manifest = read_json(folder / MANIFEST, {})
    is_same = {name: manifest.get(name) for name in about} == about
    if manifest and not is_same and not is_fixed:
        manifest = {}
    if manifest and not is_same:
        raise ConfigError(f"{folder}: pairs of other data or of another split lie there; name another --out")
    wanted = sorted(set(sizes))
    kept = sorted(manifest.get("sizes", []))
    if not manifest or not set(wanted) <= set(kept):
        wanted = sorted({*wanted, *kept})
        manifest = _write(settings, folder, wanted, options, about)
    counts = {name: int(one["pairs"]) for name, one in manifest["splits"].items()}
    splits = Splits(folder, counts, (*sorted(set(sizes)), counts[TRAIN]))
    text_rows = manifest["text_rows"]
    return splits, {} if text_rows is None else {"text_rows": text_rows}


def _check(settings: OrpoSettings) -> None:
    if not settings.model_name_or_path or not settings.dataset_name:
        raise ConfigError("a comparison needs model_name_or_path and dataset_name; set them in the recipe")
    if settings.streaming:
        raise ConfigError("streaming: a comparison reads the same pairs many times; leave streaming out")
    if settings.adapter_name_or_path:
        raise ConfigError("adapter_name_or_path: arms start from a base; merge the adapter first")


def _inputs(settings: OrpoSettings, options: SplitOptions) -> list[Any]:
    """What is read, with checksums of local files."""
    names = settings.dataset_name
    trained = list(names) if isinstance(names, (list, dict)) else names
    found = describe_input(trained, settings.dataset_train_split, settings.dataset_config)
    for data, split in _given(settings, options).values():
        found += describe_input(data, split, settings.dataset_config if data == names else None)
    return found


def _write(
    settings: OrpoSettings,
    folder: Path,
    sizes: Sequence[int],
    options: SplitOptions,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    tokenizer = load_tokenizer(str(settings.model_name_or_path), trust_remote_code=settings.trust_remote_code)
    read = read_texts(
        settings.dataset_name, settings, tokenizer, split=settings.dataset_train_split, name=TRAIN
    )
    parts = {TRAIN: read.pairs}
    for name, source in _given(settings, options).items():
        data, split = source
        parts[name] = read_texts(data, settings, tokenizer, split=split, name=name).pairs
        say(f"{name}: {len(parts[name]):,} pairs of {data}{f', split {split}' if split else ''}")
    shares = {VALIDATION: options.validation_share, TEST: options.test_share}
    open_shares = {name: share for name, share in shares.items() if share > 0 and name not in parts}
    if open_shares:
        indices, line = part_pairs(parts[TRAIN], open_shares, seed=options.seed)
        say(line)
        whole = parts[TRAIN]
        parts |= {name: [whole[index] for index in found] for name, found in indices.items()}
    parts[TRAIN] = _without_prompts_of(parts)
    if options.most_validation is not None:
        parts[VALIDATION] = nested(parts[VALIDATION], options.most_validation, seed=options.seed)
    for size in sizes:
        if size < 1 or size > len(parts[TRAIN]):
            raise ConfigError(f"sizes: {size} is out of range; there are {len(parts[TRAIN])} training pairs")
    smaller = {_name_of(size): nested(parts[TRAIN], size, seed=options.seed) for size in sizes}
    if folder.is_dir():
        check_out(folder, None, force=True)
    further = {"sizes": list(sizes), "text_rows": read.text_rows}
    return dict(write_folder(folder, parts | smaller, [], dict(about) | further).manifest)


def _given(settings: OrpoSettings, options: SplitOptions) -> dict[str, tuple[Any, str | None]]:
    """Validation and test pairs that need not be held out: data and split of each."""
    found: dict[str, tuple[Any, str | None]] = {}
    if settings.eval_dataset_name is not None:
        found[VALIDATION] = (settings.eval_dataset_name, settings.dataset_test_split or DEFAULT)
    elif settings.dataset_test_split is not None:
        found[VALIDATION] = (settings.dataset_name, settings.dataset_test_split)
    if options.test is not None and options.test_share > 0:
        found[TEST] = (options.test, None if Path(options.test).is_file() else DEFAULT)
    name = settings.dataset_name
    if isinstance(name, str) and not found:
        names = list(splits_of(name, settings.dataset_config))
        chooser = evaluation_split(names, settings.dataset_train_split)
        others = [one for one in names if one not in (chooser, settings.dataset_train_split)]
        tester = evaluation_split([one for one in others if TEST in one], settings.dataset_train_split)
        if chooser is not None and tester is not None:
            found = {VALIDATION: (name, chooser), TEST: (name, tester)}
        if options.test_share == 0:
            found.pop(TEST, None)
    return found


def _without_prompts_of(parts: Mapping[str, Sequence[PreferencePair]]) -> list[PreferencePair]:
    """The training pairs whose prompts are in no other part."""
    prompts = {name: {pair.prompt_key() for pair in parts.get(name, ())} for name in (VALIDATION, TEST)}
    held = prompts[VALIDATION] | prompts[TEST]
    kept = [pair for pair in parts[TRAIN] if pair.prompt_key() not in held]
    left_out = len(parts[TRAIN]) - len(kept)
    if left_out:
        say(f"{left_out} training pairs are left out: their prompts are among validation or test pairs")
    if not kept:
        raise DataError("no training pair is left: all their prompts are among validation or test pairs")
    both = prompts[VALIDATION] & prompts[TEST]
    if both:
        raise DataError(f"{len(both)} prompts are among validation and test pairs; hold them apart")
    return kept


def nested(pairs: Sequence[PreferencePair], size: int, *, seed: int) -> list[PreferencePair]:
    """Whole prompts of at most so many pairs, in the order of `pairs`.

    Prompts come in an order that depends on the seed alone, and as many of them are taken as fit: of the same
    pairs, a larger size has all that a smaller one has.

    Args:
        pairs: All of them.
        size: Pairs wanted, at least 1; one prompt is always taken.
        seed: Of the order.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        members[pair.prompt_key()].append(index)
    prompts = list(members.values())
    random.Random(seed).shuffle(prompts)
    taken = list(prompts[0])
    for group in prompts[1:]:
        if len(taken) + len(group) > size:
            break
        taken += group
    return [pairs[index] for index in sorted(taken)]
