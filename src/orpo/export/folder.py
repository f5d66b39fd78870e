"""A merged model as a folder that plain transformers and every server loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig

from orpo.engine.stop_tokens import save_generation_config
from orpo.errors import ModelError, RunError, raised_as
from orpo.export.check import LIMITS, Comparison, Expected, ask_another_process, compare, refuse
from orpo.export.merged import Merged
from orpo.export.reload import checksums

_LIMIT_S = 3600.0


def write_folder(merged: Merged, folder: Path, *, max_shard_size: str = "5GB") -> Expected:
    """Write weights in the base's dtype, configuration, tokenizer, template and generation_config.

    Args:
        merged: What to write; its model is in that dtype afterwards.
        folder: Exists; gets the files.
        max_shard_size: Largest weight file (`5GB`, `500MB`).

    Returns:
        What the folder must answer: what the run says, with the checksums of the weights.

    Raises:
        ModelError: Weights are too large for the dtype.
        RunError: The disk is full, or the like.
    """
    model = merged.model.to(merged.dtype)
    if any(not bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ModelError(
            f"some weights are too large for {merged.dtype_name}; choose --dtype float32 or bfloat16"
        )
    model.config.dtype = merged.dtype
    with raised_as(RunError, f"{folder}: the model could not be written"):
        save_generation_config(folder, model)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        merged.tokenizer.save_pretrained(folder)
    return replace(merged.expected, tensors=checksums(model))


def check_folder(
    folder: Path, expected: Expected, dtype_name: str, *, trust_remote_code: bool = False
) -> Comparison:
    """Let a fresh process load an exported folder, and compare what it computes with the run.

    Args:
        folder: As `write_folder` left it.
        expected: As `write_folder` returned it.
        dtype_name: Decides how much the log-probs may differ (`bfloat16`).
        trust_remote_code: Whether the model needs code of its own.

    Raises:
        RunError: It cannot be loaded, or does not agree with the run.
        RoundingError: Of all that must agree, the log-probs alone do not, and the dtype is a coarse one.
    """
    request = {"folder": str(folder), "trust_remote_code": trust_remote_code, **expected.questions()}
    try:
        found = ask_another_process("orpo.export.reload", request, limit_s=_LIMIT_S)
    except RunError as error:
        raise RunError(f"the exported model is refused: {error}") from error
    comparison = compare(expected, found, LIMITS[dtype_name])
    way_out = None if dtype_name == "float32" else "--dtype float32 keeps them"
    refuse("the exported model", expected, found, comparison, way_out)
    return comparison
