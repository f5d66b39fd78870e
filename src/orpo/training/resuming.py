"""Whether a run may resume from a checkpoint: only with the settings and the data that made it.

A resumed run equals an uninterrupted one, so a change that could move a weight is refused, with the list of
differences; `force` lets it pass.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orpo.data.dataset import TokenizedDataset
from orpo.errors import RunError
from orpo.settings.config import FACTS
from orpo.settings.facts import Facts
from orpo.training.arguments import ORPOConfig


def run_identity(args: ORPOConfig, pairs: Any) -> dict[str, Any]:
    """Everything that decides where a run goes, as values JSON can hold."""
    settings = {
        name: value
        for name, value in args.plain_settings().items()
        if FACTS.get(name, Facts()).resume == "fixed"
    }
    identity = settings | {"pairs_per_step": args.pairs_per_step}
    if isinstance(pairs, TokenizedDataset):
        identity |= {
            "num_pairs": len(pairs),
            "pairs_checksum": zlib.crc32(np.ascontiguousarray(pairs.tokens).data),
        }
    return identity


def refuse_changes(checkpoint: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Stop where the run that made `checkpoint` was another one; a checkpoint that names none may pass.

    Raises:
        RunError: With the list of differences.
    """
    changes = [
        f"{name}: {before[name]} -> {now[name]}"
        for name in sorted(now.keys() & (before or {}).keys())
        if before is not None and before[name] != now[name]
    ]
    if changes:
        raise RunError(
            f"{checkpoint} was made with other settings ({'; '.join(changes)}); set them back, name another"
            " output_dir for a fresh run, or set force: true"
        )
