"""The model card, README.md: from what, on what, how, and with what result on held-out pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orpo
from orpo.run.directory import RunDirectory, dump_yaml, is_adapter


def write_model_card(
    folder: Path, recipe: Mapping[str, Any], results: Sequence[tuple[str, str]] = (), step: int = 0
) -> None:
    """Write the card next to a model.

    Args:
        folder: Where the model is.
        recipe: The resolved settings.
        results: Names and values of what held-out pairs say.
        step: The step these are of.
    """
    from huggingface_hub import ModelCard

    base, names = recipe.get("model_name_or_path"), _data_names(recipe)
    on_data = f" on `{', '.join(_shown(name) for name in names)}`" if names else ""
    public = {key: _public(value) for key, value in recipe.items()}
    text = f"""---
{_metadata(folder, recipe)}
---

# {folder.resolve().name}

{f"`{_shown(base)}`" if base else "A language model"} trained{on_data}
with ORPO ([Hong, Lee and Thorne, 2024](https://arxiv.org/abs/2403.07691)): one stage, no reference model.
Made with `orpo` {orpo.__version__} and transformers {version("transformers")}.
"""
    if results:
        rows = "\n".join(f"| {_cell(name)} | {value} |" for name, value in results)
        text += f"\n## On held-out pairs, after {step} steps\n\n| | |\n|---|---|\n{rows}\n"
    text += f"\n## Recipe\n\n```yaml\n{dump_yaml(public)}```\n"
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(text).save(RunDirectory(folder).card)


def _cell(text: str) -> str:
    """Text that cannot end its cell of a Markdown table: sets of pairs may have any name."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _metadata(folder: Path, recipe: Mapping[str, Any]) -> str:
    """What the hub reads: YAML at the head of the card."""
    from huggingface_hub import ModelCardData

    base = recipe.get("model_name_or_path")
    return ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=[name for name in _data_names(recipe) if not Path(name).exists()] or None,
        library_name="peft" if is_adapter(folder) else "transformers",
        tags=["orpo", "trl", "preference-optimization"],
        pipeline_tag="text-generation",
    ).to_yaml()


def _data_names(recipe: Mapping[str, Any]) -> list[str]:
    data = recipe.get("dataset_name")
    return [data] if isinstance(data, str) else list(data or [])


def _shown(name: str) -> str:
    """A hub name as it is, of a local one the last part: cards are published."""
    return Path(name).name if Path(name).exists() else name


def _public(value: Any) -> Any:
    """A setting without the folders of this machine."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    return _shown(value) if isinstance(value, str) and "/" in value else value
