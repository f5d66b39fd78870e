"""A merged model as one GGUF file, for models of Llama's shape: llama, mistral, qwen2, qwen3.

The names of tensors and keys and the numbers of each type are those of the package `gguf`. What it leaves to
the converter is here: which heads' rows change places, what is left out, which ids have a role.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orpo.errors import ModelError, RunError, raised_as
from orpo.export.gguf_vocabulary import CONVERTER, Vocabulary

TYPES = ("f32", "f16", "bf16", "q8_0")
FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""By `model_type`, the architecture in `gguf`."""


def check_family(config: Any) -> None:
    """Refuse a model that is not written here, before it is loaded and merged.

    Raises:
        ModelError: It is not; the message names the converter to use.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"a GGUF file of a {kind} model is not written here (only of {', '.join(FAMILIES)}): "
            f"export the folder, then {CONVERTER}"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise ModelError(f"a GGUF file cannot be written for a model with a sliding window: {CONVERTER}")


def write_gguf(path: Path, model: Any, vocabulary: Vocabulary, kind: str) -> list[str]:
    """Write a file.

    Args:
        path: To write.
        model: Merged, in float32.
        vocabulary: As `vocabulary_of` read it; rows of the embeddings beyond it are left out.
        kind: One of `TYPES`, for matrices; vectors stay in float32.

    Returns:
        Lines to print: what was left out or kept in another type.

    Raises:
        ModelError: The model has something that this file cannot hold.
        RunError: The disk is full, or the like.
    """
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, FAMILIES[model.config.model_type])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _add_shape(writer, model.config, vocabulary, getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    _add_vocabulary(writer, vocabulary)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    wanted, kept = getattr(gguf.GGMLQuantizationType, kind.upper()), 0
    tensors: list[tuple[str, torch.Tensor, Any]] = []
    for name, tensor in _tensors(model, len(vocabulary.tokens)):
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ModelError(f"a GGUF file has no place for {name}: {CONVERTER}")
        own = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else wanted
        if own == gguf.GGMLQuantizationType.Q8_0 and tensor.shape[-1] % 32:
            own, kept = gguf.GGMLQuantizationType.F16, kept + 1
        tensors.append((mapped, tensor, own))
    if (factors := _rope_factors(model)) is not None:
        tensors.append(("rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32))
    with raised_as(RunError, f"{path}: the file could not be written"):
        _write(writer, gguf, tensors)
    rows = model.get_input_embeddings().weight.shape[0] - len(vocabulary.tokens)
    lines = (
        [f"{rows} spare rows of the embeddings are left out: the tokenizer has no ids for them"]
        if rows
        else []
    )
    if kept:
        lines.append(f"{kept} matrices stay in f16: their rows do not divide into blocks of 32")
    if vocabulary.normalises:
        lines.append(
            "the tokenizer brings text to NFC and llama.cpp does not: decomposed letters get other ids"
        )
    return lines


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _write(writer: Any, gguf: Any, tensors: list[tuple[str, torch.Tensor, Any]]) -> None:
    """Announce the tensors, then write one after the other: a second copy of the model is never in memory."""
    for name, tensor, kind in tensors:
        shape = tuple(tensor.shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = tensor.numel() // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, kind in tensors:
        writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), kind))
    writer.close()


@torch.no_grad()
def _tensors(model: Any, vocabulary: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by name, as llama.cpp lays them out; a head that is the embedding itself is left out."""
    config = model.config
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    swaps = FAMILIES[config.model_type] == "LLAMA"
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach()
        if name == "lm_head.weight" and head.data_ptr() == embedding.data_ptr():
            continue
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = tensor[:vocabulary]
        elif swaps and ".q_proj." in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        elif swaps and ".k_proj." in name:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        yield name, tensor


def _interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection in the order that llama.cpp turns: a pair side by side, not half a head apart."""
    size = rows.shape[0] // heads
    return rows.view(heads, 2, size // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _rope_factors(model: Any) -> torch.Tensor | None:
    """What the frequencies of the positions are divided by; None where they are the plain ones."""
    config, rotary = model.config, model.model.rotary_emb
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("llama3", "linear") or FAMILIES[config.model_type] != "LLAMA":
        raise ModelError(f"a GGUF file cannot be written with positions of type {kind}: {CONVERTER}")
    factors: torch.Tensor = plain / rotary.inv_freq.float().cpu()
    return factors


def _add_shape(writer: Any, config: Any, vocabulary: Vocabulary, file_type: int) -> None:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(str(config._name_or_path).rstrip("/").rsplit("/", 1)[-1] or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(vocabulary.adds_bos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
