"""What a probe may spend: a share of the tokens that a run reads, over settings and held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo.data.source import read_pairs
from orpo.engine.loading import load_tokenizer
from orpo.errors import ConfigError
from orpo.settings.config import OrpoSettings
from orpo.settings.schema import known_settings

FEWEST_STEPS, FEWEST_PAIRS = 4, 20
"""Below so many steps for each setting, or held-out pairs, nothing can be learned from a probe."""
_HELD_OUT = 1 / 3
"""Share of the probe's tokens that are held out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a probe may spend.

    Attributes:
        run_tokens: That the run of the recipe reads.
        steps: Of each setting.
        held_out: Pairs that every setting is scored on, and the base.
    """

    run_tokens: float
    steps: int
    held_out: int


def budget_of(recipe: Mapping[str, Any], share: float, trials: int) -> Budget:
    """Steps and held-out pairs that a share of the run's tokens allows.

    Raises:
        ConfigError: They are too few to learn anything from; the message says what share would do.
    """
    settings = OrpoSettings.from_recipe(recipe)
    if not settings.model_name_or_path or not settings.dataset_name:
        raise ConfigError("a probe needs model_name_or_path and dataset_name; set them in the recipe")
    tokenizer = load_tokenizer(settings.model_name_or_path, trust_remote_code=settings.trust_remote_code)
    split = settings.dataset_train_split
    read = read_pairs(settings.dataset_name, settings, tokenizer, split=split, name="train")
    pairs, total = len(read.pairs), float(read.pairs.lengths.sum())
    batch = _pairs_per_step(recipe)
    steps = int(recipe.get("max_steps") or -1)
    usual = float(known_settings()["num_train_epochs"].default)
    passes = steps * batch / pairs if steps > 0 else float(recipe.get("num_train_epochs") or usual)
    return divided(share, pairs * passes, total / pairs, trials, batch)


def divided(share: float, pairs_read: float, a_pair: float, trials: int, batch: int) -> Budget:
    """How a share of a run's tokens is divided into training and held-out pairs.

    Args:
        share: Of its tokens.
        pairs_read: Pairs that the run reads, each as often as it does.
        a_pair: Tokens of one.
        trials: Settings.
        batch: Pairs of an optimizer step.

    Raises:
        ConfigError: As `budget_of`.
    """
    allowed = share * pairs_read
    held_out = int(_HELD_OUT * allowed / (trials + 1))
    each = int((allowed - held_out * (trials + 1)) / trials / batch)
    if each < FEWEST_STEPS or held_out < FEWEST_PAIRS:
        needed = trials * batch * FEWEST_STEPS / (1 - _HELD_OUT), (trials + 1) * FEWEST_PAIRS / _HELD_OUT
        enough = -(-max(needed) / pairs_read * 1.05 // 0.01) * 0.01
        what = (
            f"--share {enough:g} would do"
            if enough <= 1
            else "this run is too short to be probed: train it twice instead, with two settings"
        )
        raise ConfigError(
            f"share: {share:g} of this run is {allowed:,.0f} pairs, too few for {trials} settings of"
            f" {FEWEST_STEPS} steps of {batch} pairs, each scored on {FEWEST_PAIRS}; {what}"
        )
    return Budget(run_tokens=pairs_read * a_pair, steps=each, held_out=held_out)


def _pairs_per_step(recipe: Mapping[str, Any]) -> int:
    known = known_settings()
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    each, accumulated = (int(recipe.get(name) or known[name].default) for name in names)
    return each * accumulated


def tokens_of(pairs: Path, recipe: Mapping[str, Any]) -> float:
    """Tokens of a file of pairs, read with the settings of an arm."""
    settings = OrpoSettings.from_recipe(recipe)
    tokenizer = load_tokenizer(str(settings.model_name_or_path), trust_remote_code=settings.trust_remote_code)
    plain = OrpoSettings(
        max_length=settings.max_length, chat_template=settings.chat_template, text_rows=settings.text_rows
    )
    return float(read_pairs(pairs, plain, tokenizer, split=None).pairs.lengths.sum())
