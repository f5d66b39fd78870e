"""Odds Ratio Preference Optimization: from preference pairs to an aligned language model in one stage.

Everything the command line does can be called from Python: `train`, `evaluate`, `run_suites`, `compare`,
`probe`, `plan_run`, `generate`, `judge`, `ChatModel`, `write_report`, `inspect_data`, `prepare_data`,
`subset_data`, `export_run`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo.comparing.job import compare
    from orpo.comparing.probe import probe
    from orpo.curation.inspection import inspect_data
    from orpo.curation.prepare import prepare_data
    from orpo.curation.subset import subset_data
    from orpo.evaluation.answering import generate
    from orpo.evaluation.generation import ChatModel
    from orpo.evaluation.preferences import evaluate
    from orpo.export.job import export_run
    from orpo.judging.job import judge
    from orpo.plan.job import plan_run
    from orpo.report.page import write_report
    from orpo.settings.recipe import load_recipe
    from orpo.suites.job import run_suites
    from orpo.training.arguments import ORPOConfig
    from orpo.training.job import train
    from orpo.training.trainer import ORPOTrainer

    __version__: str

__all__ = [
    "ChatModel",
    "ORPOConfig",
    "ORPOTrainer",
    "__version__",
    "compare",
    "evaluate",
    "export_run",
    "generate",
    "inspect_data",
    "judge",
    "load_recipe",
    "plan_run",
    "prepare_data",
    "probe",
    "run_suites",
    "subset_data",
    "train",
    "write_report",
]

_WHERE = {
    "ChatModel": "orpo.evaluation.generation",
    "ORPOConfig": "orpo.training.arguments",
    "ORPOTrainer": "orpo.training.trainer",
    "compare": "orpo.comparing.job",
    "evaluate": "orpo.evaluation.preferences",
    "export_run": "orpo.export.job",
    "generate": "orpo.evaluation.answering",
    "judge": "orpo.judging.job",
    "inspect_data": "orpo.curation.inspection",
    "load_recipe": "orpo.settings.recipe",
    "plan_run": "orpo.plan.job",
    "prepare_data": "orpo.curation.prepare",
    "probe": "orpo.comparing.probe",
    "run_suites": "orpo.suites.job",
    "subset_data": "orpo.curation.subset",
    "train": "orpo.training.job",
    "write_report": "orpo.report.page",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: `orpo --help` must not wait for torch (PEP 562)."""
    if name == "__version__":
        try:
            return version("orpo")
        except PackageNotFoundError:
            return "0+source"
    if name not in _WHERE:
        raise AttributeError(f"module 'orpo' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
