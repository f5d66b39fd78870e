"""Any task of lm-evaluation-harness by name, or in a YAML file of its own: `lm_eval:hellaswag`.

The harness writes the prompts, runs the model that is loaded here and scores; its data comes from the hub.
`lm_eval:gsm8k+chat` puts the prompts through the chat template. What the model says is kept by the harness
itself, so a task that was stopped goes on; the scores of each question are kept here.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.errors import ConfigError, DataError, RunError, raised_as
from orpo.suites.measured import Column, Measured

if TYPE_CHECKING:
    from orpo.evaluation.generation import ChatModel
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "lm_eval"
ABOUT = "a task of lm-evaluation-harness, or its YAML file; TASK+chat: by chat template (needs orpo[eval])"
TAKES = "TASK"
_CHAT = "+chat"


def check(about: str | None, options: Options) -> None:
    """lm-evaluation-harness must be there."""
    _version()


def _version() -> str:
    try:
        return version("lm_eval")
    except ImportError:
        raise ConfigError("--suite lm_eval needs lm-evaluation-harness: pip install 'orpo[eval]'") from None


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Run a task."""
    from orpo.evaluation.kept_values import KeptValues, content_key, kept_folder

    assert about is not None
    harness = _version()
    chat = subject.chat(NAME)
    identity = subject.answerer.identity
    written = Path(about.removesuffix(_CHAT)).expanduser()
    text = written.read_text(encoding="utf-8") if written.suffix == ".yaml" and written.is_file() else ""
    kept = KeptValues(f"lm-eval-{identity}")
    key = content_key(about, text, options.limit, harness)
    if key not in kept:
        # What the harness prints is for people; stdout is for the result.
        with raised_as(RunError, f"lm-evaluation-harness, task {about}"), redirect_stdout(sys.stderr):
            found = _evaluate(chat, about.removesuffix(_CHAT), about.endswith(_CHAT), options.limit,
                              str(kept_folder() / f"lm-eval-said-{identity}"))  # fmt: skip
        kept.add({key: by_question(found)})
    said = kept[key]
    columns = {
        name: Column([0.0 if value is None else value for value in values],
                     [float(value is not None) for value in values], "number")
        for name, values in said["columns"].items()
    }  # fmt: skip
    return Measured(
        items=said["items"],
        columns=columns,
        notices=said["notices"],
        settings={"lm_eval": harness, "versions": said["versions"]},
    )


def _evaluate(
    chat: ChatModel, task: str, by_template: bool, limit: int | None, said: str
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model: Any = HFLM(pretrained=chat.model, tokenizer=chat.tokenizer, batch_size="auto")
    manager, name = TaskManager(), task
    if task.endswith(".yaml"):
        path = Path(task).expanduser()
        if not path.is_file():
            raise DataError(f"{task}: there is no such file")
        manager = TaskManager(include_path=str(path.parent), include_defaults=False)
        named = re.search(r"^task:\s*(\S+)", path.read_text(encoding="utf-8"), re.M)
        name = named.group(1) if named else path.stem
    elif task not in manager.all_tasks:
        raise ConfigError(
            f"lm_eval: {task!r} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them"
        )
    found: Any = simple_evaluate(
        model=model, tasks=[name], task_manager=manager, limit=limit, use_cache=said, bootstrap_iters=0,
        apply_chat_template=by_template, log_samples=True,
    )  # fmt: skip
    result: Mapping[str, Any] = found
    return result


def by_question(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the harness returns as values of each question, by metric.

    A metric whose mean over questions is not what the harness says (a perplexity, say) becomes a line.
    """
    items: dict[str, int] = {}
    columns: dict[str, dict[str, float]] = {}
    notices = []
    several = len(found["samples"]) > 1
    for task, samples in found["samples"].items():
        ours: dict[str, dict[str, float]] = {}
        for sample in samples:
            item = f"{task}:{sample['doc_id']}"
            items.setdefault(item, len(items))
            for metric in sample["metrics"]:
                value = sample.get(metric)
                if isinstance(value, bool | int | float) and math.isfinite(value):
                    ours.setdefault(f"{metric},{sample.get('filter', 'none')}", {})[item] = float(value)
        for name, value in found["results"][task].items():
            if not isinstance(value, int | float) or "_stderr," in name or "," not in name:
                continue
            mine = ours.get(name, {})
            title = name.removesuffix(",none").replace(",", ", ") + (f" ({task})" if several else "")
            if mine and math.isclose(sum(mine.values()) / len(mine), value, rel_tol=1e-6, abs_tol=1e-9):
                columns[title] = mine
            else:
                notices.append(f"{title} {value:.6g}, which is no mean over questions and has no error here")
    return {
        "items": list(items),
        "columns": {name: [values.get(item) for item in items] for name, values in columns.items()},
        "notices": notices,
        "versions": dict(found.get("versions") or {}),
    }
