"""What the model says of every pair before DPO trains it: the reference, without a second model.

The log-probs of a set of pairs are computed once, before the first step of the stage that needs them, by the
model that is about to be trained (for a fresh adapter: by its base), and kept in a file of the run directory.
Its name is made from everything they depend on: the weights, the tokens of the pairs with their boundaries,
and the precision. So a resumed run reads what the first one has written, and a pass that was cut off goes on
where it stopped: a row of zeros is not known yet, since the log-prob of an answer is below 0. Where another
stage comes first, a checkpoint made later than that model names it, since it cannot be asked again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orpo.console import say
from orpo.data.dataset import TokenizedDataset
from orpo.data.stages import report
from orpo.engine.head import PairScores
from orpo.engine.packing import PackedBatch
from orpo.engine.scorer import base_model
from orpo.engine.steps import EVALUATION_BLOCK
from orpo.errors import ConfigError, RunError, first_line
from orpo.pairs import TokenizedPair
from orpo.run.directory import RunDirectory
from orpo.training.arguments import ORPOConfig
from orpo.training.resuming import add_weight, first_rank_decides

SCORING = "scoring the reference"

Score = Callable[[Sequence[TokenizedPair]], PairScores]
"""Scores pairs by the model that is about to be trained; all ranks call it for the same pairs."""


class Reference:
    """What the reference says of each set of pairs, once it was asked.

    Args:
        args: Name the run directory, and this rank.
        start: The first step that needs it, counted from 0; None where none does.
    """

    def __init__(self, args: ORPOConfig, start: int | None) -> None:
        self._args = args
        self._start = start
        self._identity = ""
        self._tables: dict[str, Tensor] = {}
        self._training: tuple[TokenizedDataset, Tensor] | None = None  # the set that is trained on

    @property
    def is_awaited(self) -> bool:
        """Whether there will be a reference, and nobody has asked it yet."""
        return self._start is not None and not self._identity

    def is_due(self, step: int) -> bool:
        """Whether the model has the weights that are the reference, or has had them."""
        return self._start is not None and not self._identity and step >= self._start

    def name_at(self, step: int) -> str:
        """What a checkpoint has to keep; empty where its weights, or those before training, can be asked."""
        return self._identity if self._start and step > self._start else ""

    def restore(self, name: str, step: int, sets: Iterable[Any]) -> None:
        """Go back to where a checkpoint was made, or to where a run begins.

        Args:
            name: As `name_at` has given it to the checkpoint.
            step: Of the checkpoint, by its name; below 0 where that does not say.
            sets: Of pairs, those that the reference was asked about.

        Raises:
            RunError: The checkpoint is of a later step than the reference, and what that said is lost.
        """
        if not self._start:
            return  # it is the model before training, now as then
        if 0 <= step <= self._start:  # the stages are not those of the checkpoint
            name = ""
        self._identity, self._tables, self._training = name, {}, None
        for pairs in sets if name else ():
            if isinstance(pairs, TokenizedDataset):
                path = self._path(pairs)
                found = first_rank_decides(self._args, lambda: _read(path, len(pairs)))  # noqa: B023
                if _unknown(found, pairs).any():
                    raise RunError(
                        f"{path}: what the reference of dpo said is lost, and it was the model of step"
                        f" {self._start}; resume from a checkpoint of that step or an earlier one"
                    )
                self._tables[self._name(pairs)] = torch.from_numpy(found)

    def ask(self, model: nn.Module, sets: Iterable[Any], score: Score) -> None:
        """Have the model score the sets that hold tokenized pairs; a second time there is nothing to do.

        Raises:
            ConfigError: This rank does not have the model's weights.
        """
        if self._identity:
            return
        precision = "bf16" if self._args.bf16 else "fp16" if self._args.fp16 else ""
        with as_reference(model) as weights:
            self._identity = f"{weights} {precision}"
            for pairs in sets:
                if isinstance(pairs, TokenizedDataset):
                    found = reference_logprobs(pairs, self._path(pairs), score, self._args)
                    self._tables[self._name(pairs)] = found

    def _name(self, pairs: TokenizedDataset) -> str:
        """A name made from the model's, and from the tokens of pairs and what is scored of them."""
        digest = xxhash.xxh3_64(self._identity.encode())
        for array in (pairs.tokens, pairs.offsets, pairs.contexts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _path(self, pairs: TokenizedDataset) -> Path:
        return RunDirectory(Path(str(self._args.output_dir))).reference(self._name(pairs))

    def attached(self, batch: PackedBatch, pairs: TokenizedDataset) -> PackedBatch:
        """A micro-batch of pairs of a set, with what the reference says of them where it is asked for."""
        if not batch.objective.needs_reference:
            return batch
        if self._training is None or self._training[0] is not pairs:
            self._training = pairs, self._tables[self._name(pairs)]
        return replace(batch, reference_PS=self._training[1][list(batch.index)])

    def beside(self, scores: PairScores, pairs: TokenizedDataset) -> PairScores:
        """The scores of a set, with what the reference says of its pairs where that is known."""
        table = self._tables.get(self._name(pairs)) if self._identity else None
        if table is None:
            return scores
        chosen_P, rejected_P = table.to(scores.chosen_logprob_P.dtype).unbind(1)
        return scores._replace(chosen_reference_P=chosen_P, rejected_reference_P=rejected_P)


@contextlib.contextmanager
def as_reference(model: nn.Module) -> Iterator[str]:
    """The model before training within the block, and a name made from its weights.

    An adapter that does nothing yet is turned off, so that neither its random part nor its cost counts. All
    ranks call this together where each has a part of the weights.
    """
    parts = list(_own_parts(model))
    fresh = _has_fresh_adapter(parts)
    with model.disable_adapter() if fresh else contextlib.nullcontext():  # type: ignore[operator]
        yield _identity(model, parts, without_adapter=fresh)


def _own_parts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of weights and buffers: what this rank has of them where FSDP or ZeRO-3 has cut them."""
    cut = {
        name: weight.ds_tensor for name, weight in model.named_parameters() if hasattr(weight, "ds_tensor")
    }
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor):
            part = cut.get(name, weight)
            yield name, part.to_local() if isinstance(part, DTensor) else part


def _has_fresh_adapter(parts: Iterable[tuple[str, Tensor]]) -> bool:
    """Whether there is a LoRA adapter, all of whose second factors are still zero."""
    factors = [part for name, part in parts if "lora_B" in name or "lora_embedding_B" in name]
    return bool(factors) and not any(gather_object([any(bool(part.any()) for part in factors)]))


def _identity(model: nn.Module, parts: Iterable[tuple[str, Tensor]], *, without_adapter: bool) -> str:
    """A name made from all weights and the configuration, the same on all ranks.

    Raises:
        ConfigError: This process does not have the weights.
    """
    digest = xxhash.xxh3_128()
    config = base_model(model).config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, part in parts:
        if without_adapter and "lora_" in name:
            continue
        if part.is_meta:
            raise ConfigError(
                "objective dpo: this rank does not have the model's weights; set"
                " fsdp_config: {cpu_ram_efficient_loading: false}"
            )
        add_weight(digest, name, part)
    digests: list[str] = gather_object([digest.hexdigest()])
    if len(set(digests)) == 1:
        return digests[0]
    return xxhash.xxh3_128("".join(digests).encode()).hexdigest()


def reference_logprobs(pairs: TokenizedDataset, path: Path, score: Score, args: ORPOConfig) -> Tensor:
    """The mean log-probabilities of all (chosen, rejected) answers by the reference, [n, 2].

    Args:
        pairs: On every rank the same.
        path: Where the first rank keeps them; its name says of which model and pairs they are.
        score: By that model; all ranks call it for the same pairs.
        args: Say which rank this is.
    """
    found = first_rank_decides(args, lambda: _read(path, len(pairs)))
    kept = _Kept(path, found) if args.process_index == 0 else None
    unknown = _unknown(found, pairs)
    report(SCORING, 0, len(pairs))
    for start in range(0, len(pairs), EVALUATION_BLOCK):
        at = slice(start, min(start + EVALUATION_BLOCK, len(pairs)))
        if not unknown[at].any():
            continue
        scores = score([pairs[number] for number in range(at.start, at.stop)])
        found[at] = torch.stack([scores.chosen_logprob_P, scores.rejected_logprob_P], 1).numpy()
        report(SCORING, at.stop, len(pairs))
        if kept is not None:
            kept.write(at)
    return torch.from_numpy(found)


def _read(path: Path, number: int) -> np.ndarray:
    """What is known already; zeros elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        stored = np.load(path)
        if stored.shape == (number, 2) and stored.dtype == np.float32:
            return np.array(stored)
    return np.zeros((number, 2), np.float32)


def _unknown(found: np.ndarray, pairs: TokenizedDataset) -> np.ndarray:
    """Which pairs the reference has not scored yet. Shape [n]."""
    has_rejected = pairs.lengths[:, 2] > 0
    unknown: np.ndarray = (found[:, 0] >= 0) | (has_rejected & (found[:, 1] >= 0))
    return unknown


class _Kept:
    """The file, written as far as the reference has come; a full disk costs the next start its time."""

    def __init__(self, path: Path, found: np.ndarray) -> None:
        self._path = path
        self._found = found
        self._file: Any = None
        self._failed = False

    def write(self, at: slice) -> None:
        """Write the rows `at`."""
        if self._failed:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                shape = self._found.shape
                self._file = np.lib.format.open_memmap(self._path, mode="w+", dtype=np.float32, shape=shape)
                self._file[:] = self._found
            self._file[at] = self._found[at]
            self._file.flush()
        except OSError as error:
            self._failed = True
            say(f"what the reference says is not kept ({first_line(error)}); a resumed run asks it again")
