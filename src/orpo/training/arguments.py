"""`ORPOConfig`: our settings joined with `transformers.TrainingArguments`, and the defaults that differ.

A recipe and a Python script set the same flat keys. A default that depends on the hardware or on other
settings is written as None and filled in here, so that "not set" differs from "set to the default".
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any, ClassVar, Literal, get_origin

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from orpo.engine.loading import supports_bf16
from orpo.errors import ConfigError, raised_as
from orpo.run.public import without_secrets
from orpo.settings.config import (
    OWN,
    Objective,
    OrpoSettings,
    check_settings,
    idle_lines,
    objective_keys,
    resolve_objective,
    settings_where,
)
from orpo.settings.inherited import INHERITED, inherited
from orpo.settings.kinds import members, usable
from orpo.settings.recipe import nearest
from orpo.settings.renamed import NO_EFFECT, current_keywords
from orpo.settings.schema import known_settings


@dataclass
class _Arguments(OrpoSettings, TrainingArguments):
    """The fields of `ORPOConfig`, with what is filled in where they are not set."""

    # Defaults that differ from those of TrainingArguments (settings/inherited.py).
    learning_rate: float = inherited("learning_rate")
    bf16: bool | None = inherited("bf16")  # type: ignore[assignment]
    logging_steps: float = inherited("logging_steps")
    logging_first_step: bool = inherited("logging_first_step")
    logging_nan_inf_filter: bool = inherited("logging_nan_inf_filter")
    eval_strategy: str | None = inherited("eval_strategy")  # type: ignore[assignment]
    eval_on_start: bool | None = inherited("eval_on_start")  # type: ignore[assignment]
    save_steps: float = inherited("save_steps")
    save_total_limit: int | None = inherited("save_total_limit")
    load_best_model_at_end: bool | None = inherited("load_best_model_at_end")  # type: ignore[assignment]
    restore_callback_states_from_checkpoint: bool = inherited("restore_callback_states_from_checkpoint")
    remove_unused_columns: bool = inherited("remove_unused_columns")
    ddp_find_unused_parameters: bool | None = inherited("ddp_find_unused_parameters")
    # Keywords of TRL's configuration that do nothing here.
    max_prompt_length: int | None = inherited("max_prompt_length")
    truncation_mode: str | None = inherited("truncation_mode")
    padding_value: int | None = inherited("padding_value")
    label_pad_token_id: int | None = inherited("label_pad_token_id")
    is_encoder_decoder: bool | None = inherited("is_encoder_decoder")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "chat_template_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        self.convert_values()
        _, notices = resolve_objective(self)
        for key, value in objective_keys(self).items():
            setattr(self, key, value)
        self.notices: list[str] = notices + [
            f"{key} has no effect: {NO_EFFECT[key]}"
            for key, default in _defaults().items()
            if key in NO_EFFECT and getattr(self, key) != default
        ]
        if self.generate_during_eval and not self.num_samples:
            self.num_samples = 4
        if not self.use_cpu and not torch.accelerator.is_available():
            self.use_cpu = True  # else torchrun would start independent runs, each with the whole data
        if self.bf16 is None:
            self.bf16 = supports_bf16() and not self.fp16 and not self.use_cpu
        self.evaluation_is_open = self.eval_strategy is None
        self.left_open = [
            name for name in ("eval_on_start", "load_best_model_at_end") if getattr(self, name) is None
        ]
        self.saving_follows = False
        self._settle_evaluation()
        self.better_is_open = self.greater_is_better is None
        check_settings(self)
        self.notices += self.idle(on_the_hub=False)
        with raised_as(ConfigError, "these settings cannot be used"):
            super().__post_init__()
        if self.deepspeed_plugin is not None:  # DeepSpeed clips at 1.0 where its own file says nothing
            self.deepspeed_plugin.deepspeed_config.setdefault("gradient_clipping", self.max_grad_norm)

    def convert_values(self) -> None:
        """Convert our settings, and those of `TrainingArguments` that are numbers, switches or choices.

        Raises:
            ConfigError: A value cannot be converted.
        """
        super().convert_values()
        for name, known in known_settings().items():
            if name not in OWN and all(_is_plain(member) for member in members(known.kind)):
                setattr(self, name, usable(name, getattr(self, name), known.kind))

    def idle(self, *, on_the_hub: bool) -> list[str]:
        """Lines on settings that wait for another one: those of pushing to the hub, or all others.

        Where a script trains, it may call `push_to_hub` itself.
        """
        defaults = _defaults()
        settings = {name: getattr(self, name) for name in defaults}
        if self.evaluation_is_open and self.eval_strategy == "no":
            settings["eval_strategy"] = None  # until the data is known
        return [line for line in idle_lines(settings, defaults) if line.startswith("hub_") == on_the_hub]

    @property
    def objective_settings(self) -> Objective:
        """What is minimised."""
        return resolve_objective(self)[0]

    @property
    def pairs_per_step(self) -> int:
        """Pairs that one optimizer step sees, over all ranks."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * int(self.world_size)

    def evaluate_by_default(self) -> None:
        """Turn evaluation on where the user left it open and there turns out to be data for it."""
        if not self.evaluation_is_open or self.eval_strategy != IntervalStrategy.NO:
            return
        self.eval_strategy = None
        for name in self.left_open:
            setattr(self, name, None)
        self._settle_evaluation(has_data=True)
        self.eval_strategy = IntervalStrategy(self.eval_strategy)
        self.do_eval = True
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "loss", False

    def _settle_evaluation(self, has_data: bool | None = None) -> None:
        """Fill in what depends on whether, and how often, there is evaluation."""
        if self.eval_strategy is None:
            held_out = self.dataset_name and self.eval_split and not self.streaming
            named = self.eval_dataset_name or self.dataset_test_split or held_out
            if not (named if has_data is None else has_data):
                self.eval_strategy = "no"
            else:
                saving = SaveStrategy(self.save_strategy)
                self.eval_strategy = "epoch" if saving == SaveStrategy.EPOCH else "steps"
                self.eval_steps = self.eval_steps or self.save_steps
        evaluating = IntervalStrategy(self.eval_strategy)
        if self.eval_on_start is None:
            self.eval_on_start = evaluating != IntervalStrategy.NO
        if self.eval_steps is not None and self._may_save_as_it_evaluates(evaluating):
            self.save_steps, self.saving_follows = self.eval_steps, True
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self._evaluates_checkpoints()
            if not self.load_best_model_at_end and evaluating != IntervalStrategy.NO:
                self._say_that_no_best_is_kept()
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"

    def _may_save_as_it_evaluates(self, evaluating: IntervalStrategy) -> bool:
        """Whether checkpoints are left open beside the steps of evaluations, and the best is to be kept."""
        return (
            evaluating == IntervalStrategy.STEPS
            and SaveStrategy(self.save_strategy) == SaveStrategy.STEPS
            and self.save_steps == INHERITED["save_steps"].default
            and self.eval_steps != self.save_steps
            and self.load_best_model_at_end is not False
        )

    def _say_that_no_best_is_kept(self) -> None:
        if SaveStrategy(self.save_strategy) != SaveStrategy.NO:
            self.notices.append(
                "the run ends with its last weights, not the best: checkpoints are not each evaluated; make"
                " save_strategy that of eval_strategy, and save_steps a multiple of eval_steps"
            )

    def _evaluates_checkpoints(self) -> bool:
        """Whether every checkpoint is written right after an evaluation."""
        evaluating, saving = IntervalStrategy(self.eval_strategy), SaveStrategy(self.save_strategy)
        if evaluating == IntervalStrategy.NO:
            return False
        if saving == SaveStrategy.BEST:
            return True
        if evaluating.value != saving.value:
            return False
        if evaluating == IntervalStrategy.EPOCH:
            return True
        every = self.eval_steps or self.logging_steps
        same_unit = (self.save_steps < 1) == (every < 1)
        ratio = self.save_steps / every
        return same_unit and ratio >= 1 and ratio == int(ratio)

    def plain_settings(self) -> dict[str, Any]:
        """Every setting as a value that YAML and JSON can hold; secrets and plug-in objects left out."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}
        shown = without_secrets({name: value for name, value in values.items() if value is not _OBJECT})
        # A mapping of secrets alone is as good as none: a run must resume without them.
        return {name: None if value == {} and values[name] else value for name, value in shown.items()}

    def recipe(self) -> dict[str, Any]:
        """The settings for recipe.yaml: ours, the usual ones, and all that are not at their default."""
        values = self.plain_settings()
        defaults = ORPOConfig(output_dir=self.output_dir).plain_settings()
        never = settings_where(lambda facts: facts.in_recipe == "never")
        always = settings_where(lambda facts: facts.in_recipe == "always")
        shown = [name for name in values if name in always or values[name] != defaults[name]]
        names = dict.fromkeys([*OWN, "output_dir", *shown])
        return {
            name: values[name]
            for name in names
            if name not in never and not (values[name] is None and defaults[name] is None)
        }


def _is_plain(member: Any) -> bool:
    return member in (bool, int, float, NoneType) or get_origin(member) is Literal


def _defaults() -> dict[str, Any]:
    """Every setting that can be given, at its default."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(_Arguments)
        if f.init
    }


_OF_TRL_SCRIPTS = {"trl.scripts.utils": "ScriptArguments", "trl.trainer.model_config": "ModelConfig"}


class _Fields:
    """The fields of a configuration, as `dataclasses.fields` asks for them.

    TRL's scripts parse `HfArgumentParser((ScriptArguments, ORPOConfig, ModelConfig))`, and argparse takes no
    option twice. Where a script has imported these classes, the options they have in common with us are
    theirs, as with TRL's own ORPOConfig. An object has all its fields everywhere.
    """

    def __get__(self, instance: Any, owner: type) -> dict[str, Any]:
        found: dict[str, Any] = _Arguments.__dataclass_fields__
        if instance is not None:
            return found
        theirs: set[str] = set()
        for module, name in _OF_TRL_SCRIPTS.items():
            if (known := getattr(sys.modules.get(module), name, None)) is not None:
                theirs.update(f.name for f in dataclasses.fields(known))
        return {name: field for name, field in found.items() if name not in theirs}


class ORPOConfig(_Arguments):
    """Arguments of `ORPOTrainer`; every keyword of TRL's class of the same name is accepted.

    Names that other tools use, or that transformers has renamed, are understood as in a recipe.

    Attributes:
        notices: Lines about what was renamed, resolved or has no effect, for the trainer to print.
    """

    __signature__ = inspect.signature(_Arguments)
    __dataclass_fields__: ClassVar[Any] = _Fields()

    def __init__(self, *args: Any, **given: Any) -> None:
        known = [f.name for f in dataclasses.fields(_Arguments)]
        settings, renamed = current_keywords(given, known)
        for name in settings.keys() - set(known):
            raise TypeError(f"ORPOConfig has no setting {name!r}{nearest(name)}")
        super().__init__(*args, **settings)
        self.notices = renamed + self.notices


_OBJECT = object()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else _OBJECT
