"""The files a run leaves beside its weights: recipe, environment, data report, metrics, model card."""

import json
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainerCallback

import orpo

METRICS = "metrics.jsonl"
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy")
_NOT_OURS = (
    "_runtime",
    "samples_per_second",
    "steps_per_second",
    "_preparation_time",
    "nll_loss",
    "log_odds_chosen",
)


class RunFiles(TrainerCallback):
    """Writes the files; metrics.jsonl as the run goes on, one JSON object a line.

    Args:
        recipe: The resolved settings.
        data_report: What became of the rows.
    """

    def __init__(self, recipe: Mapping[str, Any], data_report: Mapping[str, Any]) -> None:
        self.recipe = recipe
        self.data_report = data_report
        self._started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Describe the run; of an earlier attempt's metrics keep what the checkpoint already includes."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        write_json(folder / "data_report.json", self.data_report)
        write_json(folder / "environment.json", environment(args))
        kept = keep_lines(folder / METRICS, state.global_step)
        if state.global_step == 0:  # what was said of the model that was here before
            for stale in (folder / "report.json", *folder.glob("eval-*.json")):
                stale.unlink(missing_ok=True)
        self._started = time.perf_counter() - (kept[-1].get("seconds", 0.0) if kept else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append a line of metrics; clocks and doubled names are left out."""
        if not state.is_world_process_zero or not logs or not _is_metrics(logs):
            return
        line = {
            "step": state.global_step,
            "epoch": round(logs.get("epoch", state.epoch or 0.0), 6),
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        line |= {name: value for name, value in logs.items() if name not in line and _is_ours(name)}
        append_line(Path(args.output_dir) / METRICS, line)


def _is_ours(name: str) -> bool:
    """Whether this is neither a clock nor one of TRL's names for a number that is there already."""
    return "/" not in name and not name.endswith(_NOT_OURS)


def _error(line: Mapping[str, Any], name: str) -> str:
    return f" ± {line[f'{name}_se']:.4f}" if f"{name}_se" in line else ""


def _is_metrics(logs: Mapping[str, Any]) -> bool:
    return "loss" in logs or any(name.startswith("eval_") for name in logs)


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a jsonl file back to the lines up to `step`, all of it at step 0; returns what is left."""
    lines: list[dict[str, Any]] = []
    if step > 0 and path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                break  # the run was killed while writing it
            if line["step"] <= step:
                lines.append(line)
    if lines or path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one JSON object to a jsonl file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def environment(args: Any) -> dict[str, Any]:
    """What the run was made with."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {"orpo": orpo.__version__} | {name: version(name) for name in _LIBRARIES},
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device),
        "num_processes": args.world_size,
        "threads": torch.get_num_threads(),
        "mixed_precision": args.mixed_precision,
    }


def _shown(name: str) -> str:
    """A hub name as it is, of a local one the last part: cards are published."""
    return Path(name).name if Path(name).exists() else name


def _public(value: Any) -> Any:
    """A setting without the folders of this machine."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    return _shown(value) if isinstance(value, str) and "/" in value else value


def write_model_card(
    folder: Path,
    recipe: Mapping[str, Any],
    history: Iterable[Mapping[str, Any]],
    best_step: int | None = None,
) -> None:
    """Write README.md: from what, on what, how, and with what result on held-out pairs.

    Args:
        folder: Where the model is.
        recipe: The resolved settings.
        history: Lines of metrics.
        best_step: The step whose weights these are; None: the last one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, data = recipe.get("model_name_or_path"), recipe.get("dataset_name")
    data_names = [data] if isinstance(data, str) else list(data or [])
    on_hub = [name for name in data_names if not Path(name).exists()]
    evaluations = [line for line in history if any(name.startswith("eval_") for name in line)]
    on_data = f" on `{', '.join(_shown(name) for name in data_names)}`" if data_names else ""
    known = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=on_hub or None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        tags=["orpo", "trl", "preference-optimization"],
        pipeline_tag="text-generation",
    )
    ours = [line for line in evaluations if best_step is None or line.get("step") == best_step]
    last = ours[-1] if ours else {}
    rows = "\n".join(
        f"| {name.removeprefix('eval_')} | {value:.4f}{_error(last, name)} |"
        for name, value in last.items()
        if name.startswith("eval_") and _is_ours(name) and not name.endswith("_se")
    )
    public = {key: _public(value) for key, value in recipe.items()}
    settings = yaml.safe_dump(public, sort_keys=False, allow_unicode=True)
    text = f"""---
{known.to_yaml()}
---

# {folder.resolve().name}

{f"`{_shown(base)}`" if base else "A language model"} trained{on_data}
with ORPO ([Hong, Lee and Thorne, 2024](https://arxiv.org/abs/2403.07691)): one stage, no reference model.
Made with `orpo` {orpo.__version__} and transformers {version("transformers")}.
"""
    if rows:
        text += f"\n## On held-out pairs, after {last.get('step')} steps\n\n| | |\n|---|---|\n{rows}\n"
    text += f"\n## Recipe\n\n```yaml\n{settings}```\n"
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(text).save(folder / "README.md")
