"""What `ORPOTrainer` was given -> settings of its own, a model and a tokenizer that fit each other."""

import copy
import inspect
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.trainer_utils import IntervalStrategy

from orpo.data.dataset import TokenizedDataset
from orpo.data.kept import read_training_once
from orpo.data.named_templates import tokens_to_add
from orpo.data.show import first_pair_lines
from orpo.data.source import SavedTemplate, TokenizedStream, TrainingData
from orpo.data.token_ids import check_token_ids, checked_token_ids
from orpo.engine.adapters import adapter_lines, add_adapter
from orpo.engine.generation_config import settle_generation_config
from orpo.engine.lengths import check_length
from orpo.engine.loading import load_model, load_tokenizer
from orpo.engine.model import LAYER_DROPS
from orpo.engine.scorer import base_model, num_embeddings
from orpo.engine.stop_tokens import stop_at, stop_token_ids
from orpo.errors import ConfigError, ModelError, raised_as
from orpo.evaluation.per_pair import evaluated_metrics
from orpo.run.checkpoints import earlier_recipe
from orpo.run.directory import at_home
from orpo.run.log import flat_name
from orpo.settings.config import settings_where
from orpo.training.arguments import ORPOConfig
from orpo.training.in_backward import check_in_backward
from orpo.training.interruptible import changed


def own_arguments(args: ORPOConfig | None) -> ORPOConfig:
    """A copy of the arguments, checked against what the process has been started as."""
    if args is None:
        args = ORPOConfig(output_dir="orpo_output")
    if not isinstance(args, ORPOConfig):
        raise ConfigError(f"args is a {type(args).__name__}; ORPOTrainer needs an ORPOConfig")
    args = copy.copy(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and args.world_size == 1:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this process would train alone; "
            "set use_cpu: true, or start it with torchrun on a machine with accelerators"
        )
    check_in_backward(args)
    _check_checkpointing(args)
    _check_compilation(args)
    args.notices = list(args.notices)
    if args.template_date is None:  # a run that resumes on another day trains on the same tokens
        before = earlier_recipe(Path(str(args.output_dir))).get("template_date")
        args.template_date = str(before or date.today())
    if args.n_gpu > 1:
        args.notices.append(f"one of {args.n_gpu} GPUs is used; write --launch {args.n_gpu} for all")
        args._n_gpu = 1
    if args.auto_find_batch_size:
        args.notices.append(
            "auto_find_batch_size has no effect: tokens_per_micro_batch bounds the memory, not the batch size"
        )
        args.auto_find_batch_size = False
    return args


def _check_checkpointing(args: ORPOConfig) -> None:
    """Checkpoint a function of a single number, so that what torch refuses is refused now."""
    kwargs: Any = args.gradient_checkpointing_kwargs
    if not (args.gradient_checkpointing and kwargs):
        return
    given = dict(kwargs)
    of_transformers = {"every_n_layers", "offload"}
    of_torch = inspect.signature(checkpoint).parameters.keys() - {"function", "args", "kwargs"}
    known = of_torch | of_transformers | {"preserve_rng_state"}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(
            f"gradient_checkpointing_kwargs: {unknown[0]} is not one of {', '.join(sorted(known))}"
        )
    passed_on = {name: value for name, value in given.items() if name not in of_transformers}
    with raised_as(ConfigError, "gradient_checkpointing_kwargs cannot be used"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **passed_on).backward()


def _check_compilation(args: ORPOConfig) -> None:
    """Have torch.compile read its settings, so that what it refuses is refused now."""
    if not args.torch_compile:
        return
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    with raised_as(
        ConfigError, f"torch_compile_backend: {backend} with torch_compile_mode: {mode} cannot be used"
    ):
        torch.compile(torch.nn.Identity(), backend=backend, mode=mode)


def resolve_model(model: Any, args: ORPOConfig, model_init: Any, peft_config: Any) -> Any:
    """The model to train, loaded where it is named, with the adapter asked for; None with `model_init`."""
    if model is None and model_init is not None:
        if peft_config is not None or args.resize_embeddings:
            raise ConfigError(
                "model_init makes the model as it is trained; leave peft_config and resize_embeddings to it"
            )
        return None
    if model is None or isinstance(model, str):
        args.model_name_or_path = at_home(model or args.model_name_or_path)
        args.adapter_name_or_path = at_home(args.adapter_name_or_path)
        # Whole, whatever DeepSpeed is going to do: it is checked and probed first.
        with changed(hf_deepspeed, _hf_deepspeed_config_weak_ref=None):
            model = load_model(args)
    else:
        _refuse_loading_settings(model, args)
        if any(hasattr(weight, "ds_id") for weight in model.parameters()):
            raise ModelError(
                "the model was loaded after its ORPOConfig, so ZeRO-3 has cut it already, before it could be"
                " checked; pass its name, or load it first"
            )
    args.model_name_or_path = args.model_name_or_path or base_model(model).config._name_or_path or None
    args.notices += check_model(model, args)
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ModelError(
                "the model has an adapter already; leave peft_config out, or merge the adapter first"
            )
        model = add_adapter(model, peft_config)
    args.notices += adapter_lines(model)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ModelError("no weight of the model is trained; load its adapter with is_trainable=True")
    return model


def _refuse_loading_settings(model: Any, args: ORPOConfig) -> None:
    """Settings of how a model is loaded would be ignored in silence where it is loaded already."""
    for name in settings_where(lambda facts: facts.loading):
        adapted = hasattr(model, "peft_config") and name != "model_init_kwargs"  # it has what they ask for
        if getattr(args, name) and not adapted:
            raise ConfigError(f"{name} is set, but the model is loaded already; pass its name instead")


ADAPTER = "default"
"""What PEFT calls an adapter that nobody has named; others are saved in folders of their own."""


def check_model(model: Any, args: ORPOConfig) -> list[str]:
    """Refuse what cannot be trained or saved, and turn dropout off where asked.

    Returns:
        A line for each thing that was repaired.
    """
    inner = base_model(model)  # refuses
    if args.gradient_checkpointing and not inner.supports_gradient_checkpointing:
        raise ConfigError(f"gradient_checkpointing: {type(inner).__name__} has none; set it to false")
    if hasattr(model, "peft_config"):
        _check_adapter(model)
    if args.disable_dropout:
        _disable_dropout(model)
    return settle_generation_config(model)


def _check_adapter(model: Any) -> None:
    """Refuse adapters of which another one, or none, would lie in the folder of the result."""
    if not hasattr(model, "get_base_model"):
        raise ModelError(
            "the model's adapter was added by its own add_adapter, not by PEFT; pass the model without it,"
            " and peft_config, or make it with peft.get_peft_model"
        )
    if (names := list(model.active_adapters)) != [ADAPTER]:
        raise ModelError(
            f"the model trains its adapter{'s' * (len(names) > 1)} {', '.join(names)}; what is saved, and"
            f" loaded from there, is the one that is called {ADAPTER!r}: train that one alone"
        )


_DROPS = ("dropout", "pdrop", "drop_path", *LAYER_DROPS)
"""Parts of the names under which models keep what share of units or layers they leave out in training."""


def _drops(holder: Any) -> list[str]:
    """Names of its attributes that are such shares."""
    return [
        name
        for name, value in vars(holder).items()
        if isinstance(value, float) and any(part in name for part in _DROPS)
    ]


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0, that of layers too, but an adapter's own, which is asked for by name.

    Some layers (Falcon, Persimmon) read theirs from the configuration while they run. They get a copy of it,
    so that the one that is saved with the model stays what it was.
    """
    copies: dict[int, Any] = {}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in _drops(module):
            setattr(module, attribute, 0.0)
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            found = _drops(config)
            if any(getattr(config, key) for key in found):
                if id(config) not in copies:
                    copies[id(config)] = copy.copy(config)
                    vars(copies[id(config)]).update(dict.fromkeys(found, 0.0))
                module.config = copies[id(config)]


def resolve_tokenizer(processing_class: Any, args: ORPOConfig) -> Any:
    """The tokenizer or processor given, or the model's own."""
    if processing_class is not None:
        return processing_class
    name = args.model_name_or_path
    if not name:
        raise ModelError("the model does not say where it comes from; pass its tokenizer as processing_class")
    init = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = args.model_revision or init.get("revision")
    return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)


def add_template_tokens(model: Any, tokenizer: Any, template: str | None) -> list[str]:
    """Add the tokens of a named chat template that the vocabulary lacks, with new rows in the embeddings.

    Args:
        model: Trained in full; its embeddings are resized in place.
        tokenizer: Gets the tokens, in place.
        template: Name of a template; None: the one a tokenizer without a template is given.

    Returns:
        A line to print where tokens were added.

    Raises:
        ConfigError: The model trains an adapter, which would leave the new rows as they were drawn.
    """
    missing = tokens_to_add(tokenizer, template)
    if not missing:
        return []
    if hasattr(model, "peft_config"):
        raise ConfigError("resize_embeddings adds rows that an adapter does not train; train all weights")
    tokenizer.add_tokens(missing, special_tokens=True)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    return [f"resize_embeddings: {', '.join(missing)} added to the vocabulary; their rows are trained"]


def text_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer inside a multimodal processor, or itself."""
    tokenizer: PreTrainedTokenizerBase = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer


def read_for_training(
    train: Any, evals: Any, args: ORPOConfig, tokenizer: PreTrainedTokenizerBase, model: Any
) -> TrainingData:
    """Read what there is to train and evaluate on; prompts are held out unless evaluation is off."""
    evaluates = args.eval_strategy != IntervalStrategy.NO
    stops = stop_token_ids(model)
    data = read_training_once(train, evals, args, tokenizer, evaluates=evaluates, stop_tokens=stops)
    if model is not None:
        args.notices += check_length(base_model(model), _longest(data, args.max_length))
    number = num_embeddings(model) if model is not None else 0
    for pairs in [data.train_pairs, *(one.pairs for one in data.evals.values())]:
        if number and isinstance(pairs, TokenizedDataset):
            check_token_ids(pairs, number, tokenizer)
    if number and isinstance(data.train, TokenizedStream):
        unchecked = data.train.open
        checked = replace(data.train, open=lambda: checked_token_ids(unchecked(), number, tokenizer))
        return replace(data, train=checked)
    return data


def _longest(data: TrainingData, max_length: int | None) -> int | None:
    """Tokens of the longest side; of a stream, the most that the settings allow, None for any number."""
    if isinstance(data.train, TokenizedStream):
        return max_length
    sets = [data.train_pairs, *(one.pairs for one in data.evals.values())]
    return max((pairs.longest for pairs in sets if isinstance(pairs, TokenizedDataset)), default=0)


def opening_lines(args: ORPOConfig, data: TrainingData, processing_class: Any) -> list[str]:
    """What a run says first: how settings and rows were understood, and the first pair as it trains."""
    lines = [*args.notices, *data.lines()]
    head = data.train_head
    if head is not None and head.counts is not None:
        width = shutil.get_terminal_size((100, 24)).columns
        lines += first_pair_lines(head.pairs[0], text_tokenizer(processing_class), width)
    return lines


def keep_template(template: SavedTemplate, processing_class: Any, model: Any) -> None:
    """Keep the template the data was written with, and let generation stop at its end of turn."""
    text, end_token = template
    tokenizer = text_tokenizer(processing_class)
    if text is None:
        return
    processing_class.chat_template = tokenizer.chat_template = text
    if end_token is not None:
        stop_at(end_token, tokenizer, model)


def settle_evaluation(args: ORPOConfig, set_names: Sequence[str], *, has_own_metrics: bool = False) -> None:
    """Turn evaluation on where it was left open and there is data, and off where there is none.

    Args:
        args: The settings; what was left open is filled in.
        set_names: Of the evaluation sets.
        has_own_metrics: Whether the user computes metrics, whose names show only then.

    Raises:
        ConfigError: Evaluation is asked for without data, or by a metric that there is not.
    """
    if set_names:
        args.evaluate_by_default()
    elif args.eval_strategy != IntervalStrategy.NO:
        raise ConfigError(
            f"eval_strategy is {IntervalStrategy(args.eval_strategy).value}, but there is no evaluation data;"
            " give some, or set eval_split above 0 to hold some out"
        )
    if any(set_names) and args.metric_for_best_model in ("loss", flat_name("loss")):
        args.metric_for_best_model = flat_name("loss", set_names[0])
        args.notices.append(
            f"the best checkpoint is chosen by {args.metric_for_best_model}; see metric_for_best_model"
        )
    if args.load_best_model_at_end and args.metric_for_best_model is not None:
        _settle_best(args, set_names, has_own_metrics)


def _settle_best(args: ORPOConfig, set_names: Sequence[str], has_own_metrics: bool) -> None:
    """Check the metric that checkpoints are chosen by, and fill in which way it gets better."""
    chosen_by = str(args.metric_for_best_model)
    metrics = [metric for metric in evaluated_metrics() if metric.is_of(args.objective_settings)]
    known = {flat_name(metric.name, name): metric for name in set_names for metric in metrics}
    metric = known.get(chosen_by) or known.get(flat_name(chosen_by))
    if metric is None:
        if not has_own_metrics:
            raise ConfigError(f"metric_for_best_model: {chosen_by!r} is none of {', '.join(known)}")
    elif metric.better == 0:
        raise ConfigError(f"metric_for_best_model: neither more nor less of {chosen_by!r} is better")
    elif args.better_is_open:  # transformers goes by whether a name ends in "loss"
        args.greater_is_better = metric.better > 0
    elif bool(args.greater_is_better) != (metric.better > 0) and not has_own_metrics:
        better = "more" if metric.better > 0 else "less"
        raise ConfigError(
            f"greater_is_better: {str(bool(args.greater_is_better)).lower()}: {better} of {chosen_by!r} is"
            " better; leave it out"
        )


def unused(**given: Any) -> list[str]:
    """A line for each argument that was given and has no effect."""
    reasons = {
        "data_collator": "pairs are packed without padding",
        "preprocess_logits_for_metrics": "compute_metrics receives per-pair log-probs, there are no logits",
    }
    return [f"{name} has no effect: {reasons[name]}" for name, value in given.items() if value is not None]
