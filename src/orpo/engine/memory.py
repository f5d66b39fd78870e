"""How much memory there is, what a run takes of it, and what follows where the settings leave it open.

The tokens of a micro-batch and the size of a chunk of logits change no loss and no gradient; they trade
memory for speed. `orpo plan` asks the same functions about machines that are not there.
"""

import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from orpo.engine.footprint import Footprint, measure_footprint
from orpo.engine.precision import compute_dtype
from orpo.engine.scorer import base_model

BYTES_PER_UNIT = {4: 96, 2: 66}
"""Bytes a layer keeps for backward per token and hidden unit, by bytes of a number, where it cannot be
measured: Llama shapes (LOG.md)."""
OPTIMIZER_BYTES = {
    "adamw": 8.0, "stable_adamw": 8.0, "adagrad": 4.0, "rmsprop": 4.0, "lion": 4.0, "lomo": 0.0, "sgd": 0.0,
    "adafactor": 0.1, "galore": 2.0, "apollo": 0.5, "ademamix": 12.0,
}  # fmt: skip
"""Bytes of an optimizer's state per trained weight, in float32, by the start of its name."""
GRADIENT_BYTES = 4
MAX_TOKENS, MAX_TOKENS_ON_CPU = 65536, 2048
"""Larger micro-batches are not faster (on a CPU: benchmarks/RESULTS.md)."""
MAX_TOKENS_OF_SFT = 1024
"""On a CPU, where nothing is compared: a ranked list is one answer, and larger ones gain nothing (LOG.md)."""


def default_tokens_per_micro_batch(
    model: nn.Module,
    device: torch.device,
    *,
    trains: bool = True,
    checkpointing: bool = False,
    num_shards: int = 1,
    optim: str = "adamw_torch",
    in_backward: bool = False,
    compares: bool = True,
) -> int:
    """Token budget of a micro-batch: what half of the memory left by gradients and moments has room for.

    Args:
        model: On its device.
        device: Where it runs.
        trains: Whether activations are kept for a backward, and the optimizer is still to come.
        checkpointing: Whether layers keep their inputs only.
        num_shards: Over how many devices weights and optimizer are yet to be cut.
        optim: Name of the optimizer.
        in_backward: Whether it frees each gradient in the backward pass; a step that is one micro-batch then
            holds none, and the other half of the memory is there for those of one that is not.
        compares: Whether rejected answers are read too.

    Returns:
        A multiple of 256, at least 1024; at most 65536 on a CUDA device, and elsewhere 2048, or 1024 where
        nothing is compared.
    """
    footprint = footprint_of(model)
    states = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) * trains
    to_come = (GRADIENT_BYTES * (not in_backward) + optimizer_bytes(optim)) * states
    if num_shards > 1:
        to_come = (to_come + sum(weight.nbytes for weight in model.parameters())) / num_shards
    room = free_memory(device) - to_come - footprint.whatever_tokens(checkpointing=checkpointing) * trains
    per_token = footprint.per_token(trains=trains, checkpointing=checkpointing)
    return token_budget(room, per_token, most_tokens(on_cpu=device.type != "cuda", compares=compares))


def most_tokens(*, on_cpu: bool, compares: bool) -> int:
    """The largest micro-batch that is chosen, in tokens, however much memory there is."""
    if not on_cpu:
        return MAX_TOKENS
    return MAX_TOKENS_ON_CPU if compares else MAX_TOKENS_OF_SFT


def token_budget(room: float, per_token: float, most: int) -> int:
    """Tokens that half of `room` bytes hold: a multiple of 256, from 1024 to `most`.

    Layers keep nothing where only the vocabulary matrix is trained.
    """
    return int(min(max(room / 2 / max(per_token, 1.0), 1024), most)) // 256 * 256


def footprint_of(model: nn.Module) -> Footprint:
    """What the layers of a model keep for backward: measured, or as Llama's do where they cannot be run."""
    try:
        return measure_footprint(model)
    except Exception:  # the few tokens that are tried are no batch that every family takes
        config = base_model(model).config.get_text_config()
        dtype = next(model.parameters()).dtype
        size = compute_dtype(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype).itemsize
        layer = BYTES_PER_UNIT.get(size, 24 * size) * config.hidden_size
        inputs = config.hidden_size * dtype.itemsize
        return Footprint(config.num_hidden_layers * layer, config.num_hidden_layers, inputs, 0.0)


def optimizer_bytes(name: str) -> float:
    """Bytes of state that the optimizer of this name keeps for each trained weight; 8 where it is unknown."""
    plain = name.removeprefix("paged_")
    known = [size for start, size in OPTIMIZER_BYTES.items() if plain.startswith(start)]
    full = known[0] if known else 8.0
    return full / 4 if "8bit" in plain else full / 2 if "4bit" in plain else full


def head_bytes(num_tokens: float, hidden: int, vocabulary: int, *, chunk_tokens: int, trained: bool) -> float:
    """Bytes of the head at its peak: a chunk of logits, and float32 gradients of its inputs and matrix.

    Args:
        num_tokens: Of the micro-batch.
        hidden: Size of a hidden state.
        vocabulary: Size of the vocabulary.
        chunk_tokens: Scored tokens whose logits are made together.
        trained: Whether the vocabulary matrix is.
    """
    return 4.0 * (chunk_tokens * vocabulary + num_tokens * hidden + trained * vocabulary * hidden)


def default_logits_memory_mib(*, on_cpu: bool) -> int:
    """Largest chunk of logits; on a GPU the matrix products want many tokens."""
    return 128 if on_cpu else 1024


def free_memory(device: torch.device) -> int:
    """Bytes this process may still take, on its GPU or of the memory it shares with its local ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room: int = min([psutil.virtual_memory().available, *_control_group_rooms()])
    return room // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _control_group_rooms(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """What the limits of this process's control groups (version 2) leave, as in a container or batch job."""
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = root / path.strip("/")
    rooms = []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit, used = (folder / "memory.max").read_text(), (folder / "memory.current").read_text()
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit.strip() != "max":
            rooms.append(int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    return rooms
