"""A run as one ordinary model in memory: an adapter merged into its base, in float32.

The run computes its log-probs before anything is merged or rounded; every copy is compared with those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from orpo.console import say
from orpo.data.chat_template import ChatTemplate
from orpo.data.templates import prepare_template
from orpo.engine.loading import load_model, load_tokenizer
from orpo.engine.scorer import base_model
from orpo.engine.stop_tokens import saved_stop_token_ids, stop_at, stop_token_ids
from orpo.errors import ConfigError, ModelError, raised_as
from orpo.export.check import LIMITS, Expected
from orpo.export.reload import log_probs
from orpo.export.sample import Sample, read_sample
from orpo.run.checkpoints import base_model_name, model_folder, run_recipe
from orpo.run.directory import gguf_file, is_adapter
from orpo.settings.config import OrpoSettings, check_recipe, inherited_by_evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What is exported.

    Attributes:
        folder: Where its weights were read.
        model: Without an adapter, in float32, on the CPU.
        tokenizer: With the run's template; without one where the run trained on plain text.
        template: As trained.
        dtype: To save it in.
        base: What the run was trained from; None where it does not say.
        was_adapter: Whether an adapter was merged.
        recipe: Of the run, or empty.
        source: What the sample was taken from, for people.
        expected: What the run says.
    """

    folder: str
    model: Any
    tokenizer: Any
    template: ChatTemplate | None
    dtype: torch.dtype
    base: str | None
    was_adapter: bool
    recipe: dict[str, Any]
    source: str
    expected: Expected

    @property
    def dtype_name(self) -> str:
        """`bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """Ids of the tokenizer; the model may have more rows."""
        return int(max(self.tokenizer.get_vocab().values())) + 1


def merge_run(
    name: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    data: Any = None,
    split: str | None = None,
) -> Merged:
    """Load a run, have it compute what every copy must, and merge its adapter, if it is one.

    Args:
        name: Run directory, model or adapter folder, GGUF file or hub name.
        base: Of an adapter whose base model is not where it was.
        dtype: To save in; None: the base's.
        data: Pairs to compare copies on; None: those that the run held out or trained on.
        split: Of a hub data set.

    Raises:
        OrpoError: It cannot be loaded or merged.
    """
    folder, recipe = model_folder(name), run_recipe(name)
    if base is not None and not is_adapter(folder):
        raise ConfigError(f"--base: {name} is no adapter, so it needs no base model")
    check_recipe(recipe)
    settings = OrpoSettings.from_recipe(inherited_by_evaluation(recipe))
    tokenizer: Any = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
    if recipe.get("text_rows") == "plain" and tokenizer.chat_template is not None:
        say(f"{name}: trained on plain text, so its chat template was never used and is left out")
        tokenizer.chat_template = None
    model = _loaded(folder, base, settings)
    stops = stop_token_ids(model)
    template = prepare_template(tokenizer, stop_tokens=stops) if tokenizer.chat_template else None
    if template is not None:
        stop_at(template.end_token, tokenizer, model)
        tokenizer.chat_template = template.saved
    named = data is not None
    data, split = (data, split) if named else _own_data(recipe)
    sample, lines = read_sample(data, split, settings, tokenizer, template, stops, must_be_read=named)
    for line in lines:
        say(line)
    trained_from = base or base_model_name(name)
    saved_in = _dtype(dtype, trained_from if is_adapter(folder) or recipe else folder, name)
    ids = [one.ids for one in sample.sequences]
    starts = [one.start for one in sample.sequences]
    before = [log_probs(model, *one) for one in zip(ids, starts, strict=True)]
    if is_adapter(folder):
        model = _without_adapter(model, folder)
        _compare_merge(model, sample, before)
    return Merged(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        template=template,
        dtype=saved_in,
        base=trained_from,
        was_adapter=is_adapter(folder),
        recipe=recipe,
        source=sample.source,
        expected=Expected(
            texts=sample.texts,
            ids=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in sample.texts],
            conversations=[_as_asked(turns, template) for turns in sample.conversations],
            prompts=sample.prompts,
            sequences=ids,
            starts=starts,
            log_probs=before,
            stops=_named_stops(model, tokenizer),
        ),
    )


def _loaded(folder: str, base: str | None, settings: OrpoSettings) -> Any:
    """The model in float32, in evaluation mode, with the run's own generation_config."""
    named = {"model_name_or_path": base or folder, "adapter_name_or_path": folder if base else None}
    model: Any = load_model(replace(settings, **named, dtype="float32", use_peft=False))  # type: ignore[arg-type]
    if getattr(base_model(model).config, "quantization_config", None) is not None:
        raise ModelError(
            f"{folder}: its base model is stored quantized, so an adapter cannot be merged into it exactly; "
            "name the model it was quantized from with --base"
        )
    if is_adapter(folder) and saved_stop_token_ids(folder):  # PEFT does not read what lies next to an adapter
        base_model(model).generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _without_adapter(model: Any, folder: str) -> Any:
    if not hasattr(model, "merge_and_unload"):
        raise ModelError(f"{folder}: this kind of adapter changes no weights, so it cannot be merged")
    with raised_as(ModelError, f"{folder}: the adapter cannot be merged"):
        return model.merge_and_unload(safe_merge=True).eval()


def _compare_merge(model: Any, sample: Sample, before: list[list[float]]) -> None:
    """See that the merged model is the adapted one."""
    gaps = [
        abs(ours - theirs)
        for one, old in zip(sample.sequences, before, strict=True)
        for ours, theirs in zip(log_probs(model, one.ids, one.start), old, strict=True)
    ]
    mean = sum(gaps) / len(gaps)
    if not mean <= LIMITS["float32"]:
        raise ModelError(
            f"merging the adapter changed log-probs by {mean:.2g} nat on average; serve it unmerged, by PEFT"
        )


def _own_data(recipe: dict[str, Any]) -> tuple[Any, str | None]:
    """The pairs that a run held out, or else the first that it trained on."""
    held_out, trained = recipe.get("eval_dataset_name"), recipe.get("dataset_name")
    if isinstance(held_out, list):
        held_out = next(iter(held_out), None)
    if held_out:
        return held_out, None if Path(str(held_out)).is_file() else recipe.get("dataset_test_split") or "test"
    first = next(iter(trained), None) if isinstance(trained, (list, dict)) else trained
    return first, f"{recipe.get('dataset_train_split') or 'train'}[:200]"


def _dtype(asked: str | None, natural: str | None, name: str) -> torch.dtype:
    """The dtype to save in: as asked, or as the base model is stored."""
    if asked is not None:
        return getattr(torch, asked)  # type: ignore[no-any-return]
    if natural is not None and gguf_file(natural) is None:
        try:
            found = AutoConfig.from_pretrained(natural).get_text_config().dtype
        except (OSError, ValueError):
            found = None
        if isinstance(found, torch.dtype) and str(found).removeprefix("torch.") in LIMITS:
            return found
    say(f"{name}: its base does not say in which dtype it is stored: float32; --dtype bfloat16 halves it")
    return torch.float32


def _as_asked(turns: list[Any], template: ChatTemplate | None) -> list[dict[str, Any]]:
    """Turns as a template wants them, which may be in parts."""
    if template is None or not template.takes_parts:
        return [dict(turn) for turn in turns]
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def _named_stops(model: Any, tokenizer: Any) -> dict[str, int]:
    """Every id that ends an answer, by the token's text."""
    ids = stop_token_ids(model) or [tokenizer.eos_token_id]
    return {str(tokenizer.convert_ids_to_tokens(token)): token for token in ids if token is not None}
