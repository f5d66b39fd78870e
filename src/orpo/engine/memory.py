"""How much memory there is, and what follows where the settings leave it open.

The tokens of a micro-batch and the size of a chunk of logits change no loss and no gradient; they trade
memory for speed.
"""

import os
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn

from orpo.engine.precision import compute_dtype
from orpo.engine.scorer import base_model

BYTES_PER_UNIT = {4: 96, 2: 66}
"""Bytes a layer keeps for backward per token and hidden unit, by bytes of a number: Llama shapes (LOG.md)."""
BYTES_PER_TRAINED_WEIGHT = 12
"""A gradient and Adam's two moments, in float32."""
MAX_TOKENS, MAX_TOKENS_ON_CPU = 65536, 2048
"""Larger micro-batches are not faster (on a CPU: benchmarks/RESULTS.md)."""


def default_tokens_per_micro_batch(
    model: nn.Module,
    device: torch.device,
    *,
    trains: bool = True,
    checkpointing: bool = False,
    num_shards: int = 1,
) -> int:
    """Token budget of a micro-batch: what half of the memory left by gradients and moments has room for.

    Args:
        model: On its device.
        device: Where it runs.
        trains: Whether activations are kept for a backward, and the optimizer is still to come.
        checkpointing: Whether layers keep their inputs only.
        num_shards: Over how many devices weights and optimizer are yet to be cut.

    Returns:
        A multiple of 256, at least 1024; at most 65536 on a CUDA device and 2048 elsewhere.
    """
    config = base_model(model).config.get_text_config()
    size = compute_dtype(device, next(model.parameters()).dtype).itemsize
    layer = BYTES_PER_UNIT.get(size, 24 * size)
    if trains and not checkpointing:
        per_unit = config.num_hidden_layers * layer
    else:  # one layer at a time; checkpoints keep the inputs of the others
        per_unit = layer + config.num_hidden_layers * size * trains
    per_token = per_unit * config.hidden_size
    states = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) * trains
    to_come = BYTES_PER_TRAINED_WEIGHT * states
    if num_shards > 1:
        to_come = (to_come + sum(weight.nbytes for weight in model.parameters())) // num_shards
    room = (free_memory(device) - to_come) / 2
    most = MAX_TOKENS if device.type == "cuda" else MAX_TOKENS_ON_CPU
    return int(min(max(room / per_token, 1024), most)) // 256 * 256


def default_logits_memory_mib(device: torch.device) -> int:
    """Largest chunk of logits; on a CUDA device the matrix products want many tokens."""
    return 1024 if device.type == "cuda" else 128


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
