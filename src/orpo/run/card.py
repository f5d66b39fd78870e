"""The model card, README.md: from what, on what, how, and with what result on held-out pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orpo
from orpo.run.directory import RunDirectory, dump_yaml, is_adapter
from orpo.run.disk import replace_text
from orpo.run.public import is_local, public, public_name


def write_model_card(
    folder: Path,
    recipe: Mapping[str, Any],
    results: Sequence[tuple[str, str]] = (),
    step: int = 0,
    *,
    name: str | None = None,
    more: str | None = None,
) -> None:
    """Write the card next to a model.

    Args:
        folder: Where the model is.
        recipe: The resolved settings.
        results: Names and values of what held-out pairs say.
        step: The step these are of.
        name: Of the model; None: that of the folder.
        more: Sections in front of the recipe; None: how a run is loaded and exported.
    """
    base, names = recipe.get("model_name_or_path"), data_names(recipe)
    on_data = f" on {', '.join(_code(public_name(name)) for name in names)}" if names else ""
    settings = dump_yaml(public(recipe))
    fence = _fence(settings, 3)
    text = f"""---
{_metadata(folder, recipe)}
---

# {_plain(name or folder.resolve().name)}

{_code(public_name(base)) if base else "A language model"} trained{on_data}
with ORPO ([Hong, Lee and Thorne, 2024](https://arxiv.org/abs/2403.07691)): one stage, no reference model.
Made with `orpo` {orpo.__version__} and transformers {version("transformers")}.
"""
    if results:
        rows = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in results)
        text += f"\n## On held-out pairs, after {step} steps\n\n| | |\n|---|---|\n{rows}\n"
    text += f"\n{_usage(folder, base) if more is None else more}"
    text += f"\n## Recipe\n\n{fence}yaml\n{settings}{fence}\n"
    replace_text(RunDirectory(folder).card, text)


def _usage(folder: Path, base: str | None) -> str:
    """How the model of a run is loaded and served: an adapter is no model to most programs."""
    name = folder.resolve().name
    if is_adapter(folder):
        on = _code(public_name(base)) if base else "its base model"
        return f"""## How to use it

An adapter on {on}; its configuration names the base as it was found in training. Where that is elsewhere:
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "{name}")
model.generation_config = GenerationConfig.from_pretrained("{name}")  # where answers end
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
Servers want a whole model: `orpo export {name} --base BASE` merges the adapter, checks the result, and prints
the commands that serve it.
"""
    return f"""## How to use it

```python
from transformers import pipeline

ask = pipeline("text-generation", model="{name}")
print(ask([{{"role": "user", "content": "Hello"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```
`orpo export {name}` writes it in the dtype of its base, as GGUF too, and prints the commands that serve it.
"""


def _plain(text: str) -> str:
    """A name as Markdown shows it, whatever it holds: folders and sets of pairs may have any name."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#$])", r"\\\1", one_line)


def _code(text: str) -> str:
    """A name in a code span, which it cannot end."""
    one_line = " ".join(text.split())
    fence = _fence(one_line, 1)
    space = " " if "`" in one_line else ""
    return f"{fence}{space}{one_line}{space}{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than stand together anywhere in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _metadata(folder: Path, recipe: Mapping[str, Any]) -> str:
    """What the hub reads: YAML at the head of the card."""
    from huggingface_hub import ModelCardData

    base = recipe.get("model_name_or_path")
    return ModelCardData(
        base_model=base if base and not is_local(base) else None,
        datasets=[name for name in data_names(recipe) if not is_local(name)] or None,
        library_name="peft" if is_adapter(folder) else "transformers",
        tags=["orpo", "trl", "preference-optimization"],
        pipeline_tag="text-generation",
    ).to_yaml()


def data_names(recipe: Mapping[str, Any]) -> list[str]:
    """The data sets that a recipe trains on."""
    data = recipe.get("dataset_name")
    return [data] if isinstance(data, str) else list(data or [])
