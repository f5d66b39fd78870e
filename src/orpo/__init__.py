"""Odds Ratio Preference Optimization: from preference pairs to an aligned language model in one stage."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.training.arguments import ORPOConfig
    from orpo.training.trainer import ORPOTrainer

__all__ = ["ORPOConfig", "ORPOTrainer", "__version__"]

_WHERE = {"ORPOConfig": "orpo.training.arguments", "ORPOTrainer": "orpo.training.trainer"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `orpo --help` must not wait for torch (PEP 562)."""
    if name == "__version__":
        try:
            return version("orpo")
        except PackageNotFoundError:
            return "0+source"
    if name not in _WHERE:
        raise AttributeError(f"module 'orpo' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
