"""Weights of a checkpoint whose names in the file are not those of the model: mixtures of experts.

transformers holds all experts of a layer in one tensor and writes a tensor for each, under the names of the
family's first release. Its Trainer reads a checkpoint without turning that back, and goes on with what it has
of the weights that it could not find (findings/trainer_resumes_experts.sh).
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from orpo.errors import RunError


def load_renamed(model: nn.Module, folder: Path) -> bool:
    """Give a model the weights of a checkpoint, where these have other names there.

    Args:
        model: Whole on this process.
        folder: A checkpoint of it.

    Returns:
        Whether that was so; else nothing has been done.

    Raises:
        RunError: The checkpoint lacks weights of the model.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, PeftModel):
        return False
    stored = {name for path in folder.glob("*.safetensors") for name in _names(path)}
    own = set(model.state_dict()) - set(model.all_tied_weights_keys)
    if not stored or own <= stored:
        return False
    config = copy.deepcopy(model.config)
    config.get_text_config().pad_token_id = None  # that of a tokenizer may be beyond the embeddings
    read: Any = type(model).from_pretrained(
        folder,
        config=config,
        dtype=torch.promote_types(model.dtype, torch.float32),
        output_loading_info=True,
    )
    loaded, found = read
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        raise RunError(
            f"{folder}: cannot resume, {len(lacking)} weights of {type(model).__name__} are not in it"
            f" ({lacking[0]}, ...); take an earlier checkpoint"
        )
    model.load_state_dict(loaded.state_dict())
    return True


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
