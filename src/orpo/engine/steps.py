"""One item of a data loader = one optimizer step: this rank's micro-batches, and what the step is divided by.

Every rank plans the same steps from the same pairs (planning.py) and packs its own micro-batches, so a loader
is rank-aware by itself, needs no communication, and must not be sharded again. Evaluation uses the same
items, in the order of the data.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from orpo.engine.head import Denominators
from orpo.engine.packing import SHARE_FROM, PackedBatch, find_sharing, num_nll_tokens, pack, runs_rejected
from orpo.engine.planning import plan_epoch, plan_step
from orpo.errors import DataError
from orpo.pairs import TokenizedPair
from orpo.settings.config import LayoutName, Objective, Schedule

EVALUATION_BLOCK = 512
"""Pairs per rank that are packed together when evaluating; only the speed depends on it."""


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How pairs become the micro-batches of one rank.

    Attributes:
        objective: What is minimised, where no schedule says otherwise.
        layout: How they are laid out.
        tokens_per_micro_batch: Most tokens in one; a longer pair has one to itself.
        rank: This process, in [0, num_ranks).
        num_ranks: Processes that share a step.
        score_rejected: Whether rejected sides are run; None: where the objective compares.
        share_from: Fewest tokens that the beginnings of two pairs share; None: each pair is for itself.
        schedule: What is minimised in each step of a run.
    """

    objective: Objective
    layout: LayoutName
    tokens_per_micro_batch: int
    rank: int = 0
    num_ranks: int = 1
    score_rejected: bool | None = None
    share_from: int | None = SHARE_FROM
    schedule: Schedule | None = None

    def at(self, step: int) -> "BatchSettings":
        """Those of a step of the run, counted from 0."""
        return self if self.schedule is None else replace(self, objective=self.schedule.at(step).objective)

    def pack(self, pairs: Sequence[TokenizedPair], index: Sequence[int], *, empty: bool) -> PackedBatch:
        """Lay pairs out in a micro-batch."""
        return pack(
            pairs,
            self.objective,
            layout=self.layout,
            share_from=self.share_from,
            index=index,
            empty=empty,
            score_rejected=self.score_rejected,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one optimizer step.

    Attributes:
        batches: The micro-batches of this rank; every rank has the same number.
        pairs: The pairs of each micro-batch.
        denominators: Counts over the whole step, of all ranks.
        read_before: Of a stream: checksum of all the pairs that it gave before this step.
        read: The same with those of this step.
    """

    batches: tuple[PackedBatch, ...]
    pairs: tuple[tuple[TokenizedPair, ...], ...]
    denominators: Denominators
    read_before: int = 0
    read: int = 0

    @property
    def objective(self) -> Objective:
        """What it minimises."""
        return self.batches[0].objective

    @property
    def num_tokens(self) -> int:
        """Tokens this rank reads."""
        return sum(batch.num_tokens for batch in self.batches if not batch.empty)

    def pin_memory(self) -> "Step":
        """Return the step in page-locked memory; the DataLoader calls this."""
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))


def build_step(pairs: Sequence[TokenizedPair], index: Sequence[int], settings: BatchSettings) -> Step:
    """Spread the pairs of one step over ranks and micro-batches, and pack those of this rank.

    Args:
        pairs: All pairs of the step, of every rank; at least one.
        index: Their indices in the data set.
        settings: How they become micro-batches.
    """
    with_rejected = runs_rejected(settings.objective, settings.score_rejected)
    lengths = np.array([(len(p.prompt), len(p.chosen), with_rejected * len(p.rejected)) for p in pairs])
    share_from = settings.share_from if settings.layout == "shared" else None
    plan = plan_step(
        lengths,
        num_ranks=settings.num_ranks,
        tokens_per_micro_batch=settings.tokens_per_micro_batch,
        layout=settings.layout,
        sharing=None if share_from is None else find_sharing(pairs, share_from, with_rejected=with_rejected),
    )
    batches, batch_pairs = [], []
    for planned in plan[settings.rank]:
        batch_pairs.append(tuple(pairs[i] for i in planned.pairs))
        batches.append(settings.pack(batch_pairs[-1], [index[i] for i in planned.pairs], empty=planned.empty))
    return Step(tuple(batches), tuple(batch_pairs), step_denominators(pairs, settings.objective))


def split_batches(step: Step, settings: BatchSettings) -> Step | None:
    """The same step with each micro-batch split in two; None where every one is a single pair."""
    if all(len(pairs) == 1 for pairs in step.pairs):
        return None
    batches, batch_pairs = [], []
    for batch, pairs in zip(step.batches, step.pairs, strict=True):
        middle = -(-len(pairs) // 2)
        for half in (slice(middle), slice(middle, None)):
            if pairs[half]:
                batch_pairs.append(pairs[half])
                own = replace(settings, objective=batch.objective)
                batches.append(own.pack(pairs[half], batch.index[half], empty=batch.empty))
    return replace(step, batches=tuple(batches), pairs=tuple(batch_pairs))


def step_denominators(pairs: Iterable[TokenizedPair], objective: Objective) -> Denominators:
    """What the sums of a step with these pairs are divided by; at least 1, so that an absent term is 0."""
    nll = preferences = examples = 0
    for pair in pairs:
        examples += 1
        nll += 1 if objective.nll_reduction == "pair" else num_nll_tokens(pair, objective)
        preferences += len(pair.rejected) > 0
    return Denominators(float(max(nll, 1)), float(max(preferences, 1)), float(max(examples, 1)))


class StepDataset(Dataset[Step]):
    """The steps of one epoch, over pairs that can be indexed.

    Args:
        pairs: The pairs.
        settings: How they become micro-batches.
        pairs_per_step: Pairs of a step, over all ranks.
        seed: Of the order.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Leave out what is too little for a step.
        prompts: The same number, from 0 on, for pairs of the same prompt, which come together then; None:
            any order. Shape [pairs].
    """

    def __init__(
        self,
        pairs: Sequence[TokenizedPair],
        settings: BatchSettings,
        *,
        pairs_per_step: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        prompts: np.ndarray | None = None,
    ) -> None:
        self.pairs = pairs
        self.settings = settings
        self._plan = functools.partial(
            plan_epoch, len(pairs), pairs_per_step, seed=seed, shuffle=shuffle, drop_last=drop_last,
            prompts=prompts,
        )  # fmt: skip
        self.set_epoch(0, 0)

    def set_epoch(self, epoch: int, start: int | None = None) -> None:
        """Take the order of `epoch`, which begins with step `start`; None: all epochs before were whole."""
        self._start = epoch * len(self) if start is None else start
        self._steps = self._plan(epoch=epoch)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, step: int) -> Step:
        index = self._steps[step].tolist()
        settings = self.settings.at(self._start + step)
        return build_step([self.pairs[i] for i in index], index, settings)


class StepStream(IterableDataset[Step]):
    """Steps over pairs that come one after the other; starts again where the stream ends, so it has no end.

    Args:
        stream: Called for each pass over the data.
        settings: How pairs become micro-batches.
        pairs_per_step: Pairs of a step, over all ranks.
        seed: Of the order.
        shuffle_buffer: Prompts held back to draw the next one from, with the pairs of each that follow each
            other; 1 keeps the order.
    """

    def __init__(
        self,
        stream: Callable[[], Iterable[TokenizedPair]],
        settings: BatchSettings,
        *,
        pairs_per_step: int,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
    ) -> None:
        self.stream = stream
        self.settings = settings
        self.pairs_per_step = pairs_per_step
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer

    def __iter__(self) -> Iterator[Step]:
        pairs, read = enumerate(self._pairs()), 0
        for number in itertools.count():
            index, step = zip(*itertools.islice(pairs, self.pairs_per_step), strict=True)
            before, read = read, _checksum(step, read)
            yield replace(build_step(step, index, self.settings.at(number)), read_before=before, read=read)

    def _pairs(self) -> Iterator[TokenizedPair]:
        for epoch in itertools.count():
            prompts = by_prompt(self.stream(), self.pairs_per_step)
            pairs = None
            for pairs in shuffled(prompts, self.shuffle_buffer, np.random.default_rng((self.seed, epoch))):
                yield from pairs
            if pairs is None:
                raise DataError("the stream has no row that can train")


def _checksum(pairs: Iterable[TokenizedPair], before: int) -> int:
    """Of the tokens of pairs and of those before, whose checksum is `before`."""
    for pair in pairs:
        parts = (pair.prompt, pair.chosen, pair.rejected)
        about = [len(part) for part in parts] + [pair.chosen_context, pair.rejected_context]
        before = zlib.crc32(np.array([*about, *itertools.chain(*parts)], np.int64).data, before)
    return before


def by_prompt(pairs: Iterable[TokenizedPair], most: int) -> Iterator[list[TokenizedPair]]:
    """Put pairs of one prompt that follow each other together, at most `most` of them."""
    for _, same in itertools.groupby(pairs, lambda pair: list(pair.prompt)):
        while some := list(itertools.islice(same, most)):
            yield some


_Item = TypeVar("_Item")


def shuffled(items: Iterable[_Item], buffer_size: int, generator: np.random.Generator) -> Iterator[_Item]:
    """Yield each item once, in an order drawn from a buffer of the next `buffer_size` ones."""
    buffer: list[_Item] = []
    for item in items:
        buffer.append(item)
        if len(buffer) >= buffer_size:
            yield _draw(buffer, generator)
    while buffer:
        yield _draw(buffer, generator)


def _draw(buffer: list[_Item], generator: np.random.Generator) -> _Item:
    drawn = int(generator.integers(len(buffer)))
    buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
    return buffer.pop()


def step_loader(
    steps: StepDataset | StepStream, *, num_workers: int = 0, pin_memory: bool = False, **options: Any
) -> DataLoader[dict[str, Step]]:
    """A loader whose items are `{"step": Step}`: the Trainer wants mappings at its boundary.

    The loader has a generator of its own. Otherwise each pass over it, an evaluation's too, would draw from
    the global one and change the training's randomness.
    """
    if isinstance(steps, StepStream):
        num_workers = min(num_workers, 1)  # several workers would each read all of the stream
    if num_workers == 0:
        options = {}
    dataset: Any = steps
    return DataLoader(
        dataset,
        # A batch of one, not none: the Trainer can skip the items of a batch sampler when it resumes.
        batch_size=None if isinstance(steps, StepStream) else 1,
        collate_fn=_as_mapping,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        **options,
    )


def _as_mapping(item: Step | list[Step]) -> dict[str, Step]:
    return {"step": item[0] if isinstance(item, list) else item}
