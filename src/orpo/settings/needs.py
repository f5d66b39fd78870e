"""What a run needs besides valid settings: a model, data, optional packages, credentials of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from orpo.errors import ConfigError

_TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "swanlab")
_EXAMPLES = {"model_name_or_path": "a hub name or folder", "dataset_name": "a hub name or file"}


def check_needs(settings: Mapping[str, Any], *, launched: bool = False) -> None:
    """Stop before anything heavy where something that a run needs is missing.

    Args:
        settings: Of the recipe.
        launched: Whether this process will start those that train.

    Raises:
        ConfigError: No model, no data, a package that is not installed, one process where several are needed,
            or no credentials for the hub.
    """
    for key, example in _EXAMPLES.items():
        if not settings.get(key):
            raise ConfigError(f"{key} is not set; add it to the recipe or write --{key} with {example}")
    for package, reason in _packages(settings):
        if find_spec(package) is None:
            raise ConfigError(f"{reason} needs {package}, which is not installed; pip install {package}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            "WORLD_SIZE asks for several processes, but MASTER_ADDR does not say where they meet; start them"
            " with torchrun, or unset WORLD_SIZE"
        )
    alone = not launched and "RANK" not in os.environ
    if settings.get("fsdp") and not settings.get("dry_run") and alone:
        raise ConfigError(
            "fsdp shards a model over several processes, and this is one; write --launch N to start N of"
            " them, or --fsdp '' to train in one process"
        )
    if settings.get("push_to_hub"):
        _check_hub(settings)


def _packages(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Optional packages that the settings need, each with the setting."""
    trackers = settings.get("report_to") or []
    for tracker in [trackers] if isinstance(trackers, str) else trackers:
        if tracker in _TRACKERS:
            yield tracker, f"report_to: {tracker}"
    optimizer = str(settings.get("optim", ""))
    of_bitsandbytes = optimizer.endswith(("adamw_8bit", "lion_8bit", "ademamix_8bit"))
    if "bnb" in optimizer or "paged" in optimizer or of_bitsandbytes:
        yield "bitsandbytes", f"optim: {optimizer}"
    for key in ("load_in_4bit", "load_in_8bit"):
        if settings.get(key):
            yield "bitsandbytes", key
    if settings.get("use_liger_kernel"):
        yield "liger_kernel", "use_liger_kernel"
    if settings.get("deepspeed"):
        yield "deepspeed", "deepspeed"


def _check_hub(settings: Mapping[str, Any]) -> None:
    from huggingface_hub import get_token

    if not (settings.get("hub_token") or get_token()):
        raise ConfigError(
            "push_to_hub: no Hugging Face token was found, so the upload at the end would fail; "
            "run `hf auth login`, set HF_TOKEN, or set push_to_hub: false"
        )
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false"):
        raise ConfigError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or set push_to_hub: false")
