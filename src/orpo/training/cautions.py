"""What is likely to go wrong with a run, said before it is trained; nothing is changed or refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from orpo.data.dataset import TokenizedDataset
from orpo.engine.packing import nll_ranges
from orpo.evaluation.statistics import pairs_needed, visible
from orpo.run.log import Figure
from orpo.training.cadence import number_of_steps
from orpo.training.trainer import ORPOTrainer

FEW_PAIRS = 100
"""Pairs to train on below which a preference is rarely learned."""
CHANGING = 0.2
"""Share of pairs whose order training is taken to change: what held-out pairs can show depends on it."""
WORTH_SEEING = 0.05
"""A change of accuracy that people want to see."""
ADAPTER_RATES, FULL_RATES, SMALL_MODEL_RATES = (1e-5, 5e-3), (1e-7, 2e-4), (1e-6, 2e-2)
"""Peak learning rates between which Adam trains: an adapter, all weights, all weights of a small model."""
SMALL_MODEL = 50_000_000
"""Weights below which a model is small."""
MOSTLY = 0.5
"""Share above which something is most of a whole."""


def cautions(trainer: ORPOTrainer) -> list[str]:
    """Lines to print before training."""
    found = (
        _precision(trainer),
        _rate(trainer),
        _warmup(trainer),
        _checkpoints(trainer),
        _training_pairs(trainer),
        _held_out(trainer),
        _prompts(trainer),
    )
    return [f"warning    {line}" for lines in found for line in lines]


def _is_adam(trainer: ORPOTrainer) -> bool:
    optim: Any = trainer.args.optim
    return "adam" in str(getattr(optim, "value", optim))


def _precision(trainer: ORPOTrainer) -> Iterator[str]:
    if not _is_adam(trainer):
        return
    if any(weight.requires_grad and weight.dtype == torch.float16 for weight in trainer.model.parameters()):
        yield (
            "weights that are trained are float16, where Adam's squares of small gradients are 0 and a step"
            " can be infinite; dtype: float32 and fp16: true compute in float16 without that"
        )


def _rate(trainer: ORPOTrainer) -> Iterator[str]:
    args: Any = trainer.args
    if not _is_adam(trainer):
        return  # the rates of other optimizers are of another size
    is_adapter = hasattr(trainer.model, "peft_config")
    small = trainer.model.num_parameters() < SMALL_MODEL
    what = "an adapter" if is_adapter else "a model this small" if small else "all weights"
    low, high = ADAPTER_RATES if is_adapter else SMALL_MODEL_RATES if small else FULL_RATES
    usual = f"for {what} {low:g} to {high:g} is usual"
    if args.learning_rate < low:
        yield f"learning_rate: {args.learning_rate:g} will hardly move the model; {usual}"
    elif args.learning_rate > high:
        yield f"learning_rate: {args.learning_rate:g} may destroy the model; {usual}"


def _warmup(trainer: ORPOTrainer) -> Iterator[str]:
    args: Any = trainer.args
    steps = number_of_steps(args, trainer.train_dataset, trainer.pairs_per_step)
    warmup = args.get_warmup_steps(steps) if steps else 0
    if warmup and warmup >= steps:
        yield (
            f"warmup_steps: {args.warmup_steps:g} is no shorter than the run of {steps:,} steps, so the"
            " learning rate never reaches its peak; 0.1 is a tenth of the run"
        )
    elif warmup > MOSTLY * steps:
        yield f"warmup_steps: {args.warmup_steps:g} is most of the run of {steps:,} steps; 0.1 is a tenth"


def _checkpoints(trainer: ORPOTrainer) -> Iterator[str]:
    args: Any = trainer.args
    if args.save_only_model and args.save_strategy != SaveStrategy.NO:
        yield "save_only_model: checkpoints without the optimizer's state; a run that is stopped begins again"


def _training_pairs(trainer: ORPOTrainer) -> Iterator[str]:
    pairs: Any = trainer.train_dataset
    if isinstance(pairs, TokenizedDataset) and len(pairs) < FEW_PAIRS:
        one = len(pairs) == 1
        yield (
            f"only {len(pairs)} pair{' is' if one else 's are'} trained on; a preference is rarely learned"
            f" from fewer than {FEW_PAIRS}"
        )


def _held_out(trainer: ORPOTrainer) -> Iterator[str]:
    held_out: Any = trainer.eval_dataset
    if held_out is None or trainer.args.eval_strategy == IntervalStrategy.NO:
        yield "nothing is held out, so the run cannot say whether it worked; eval_split: 0.05 holds pairs out"
        return
    for name, pairs in (held_out if isinstance(held_out, dict) else {"": held_out}).items():
        number = int((pairs.lengths[:, 2] > 0).sum())
        needed = pairs_needed(WORTH_SEEING, math.sqrt(CHANGING))
        if 1 < number < needed:
            seen = visible(Figure(0.0, math.sqrt(CHANGING / number)), number) or 1.0
            of_set = f" ({name})" if name else ""
            yield (
                f"{number} held-out pairs{of_set} will show a change of accuracy of about"
                f" {100 * min(seen, 1):.0f} points or more; {100 * WORTH_SEEING:.0f} points take about"
                f" {float(f'{needed:.1g}'):.0f} pairs"
            )


def _prompts(trainer: ORPOTrainer) -> Iterator[str]:
    """Where the NLL is mostly over prompts, how much of that is the same opening every time."""
    pairs: Any = trainer.train_dataset
    if not isinstance(pairs, TokenizedDataset) or trainer.final_objective.nll_on != "full":
        return
    if trainer.final_objective.nll_weight == 0 or not len(pairs):
        return
    sample = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, min(len(pairs), 2000))]
    ranges = [nll_ranges(pair, trainer.final_objective) for pair in sample]
    total = sum(stop - start for pair in ranges for start, stop in pair)
    context = sum(stop - start for *before, _ in ranges for start, stop in before)
    if context <= MOSTLY * total:
        return
    opening = _common_opening([pair.prompt for pair in sample]) if len(sample) > 1 else 0
    fixed = max(opening - 1, 0) * len(sample) / total
    same = f", {fixed:.0%} an opening that all prompts have in common" if fixed >= 0.05 else ""
    yield (
        f"{context / total:.0%} of the NLL's tokens are prompt{same}; nll_on: response trains on the answers"
        " alone"
    )


def _common_opening(prompts: list[Any]) -> int:
    """Tokens that all prompts begin with."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    return next(
        (number for number, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
