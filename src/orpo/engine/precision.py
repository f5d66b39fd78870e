"""The precision in which a product is computed: that of its tensors, or autocast's."""

import time

import torch

HALF = (torch.float16, torch.bfloat16)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of a matrix product of tensors of `dtype` on `device`: autocast's where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def bfloat16_gain(size: int = 512, rounds: int = 4) -> float:
    """How many times as fast this CPU multiplies bfloat16 matrices as float32 ones.

    Args:
        size: Lines and columns of the matrices.
        rounds: Products of each kind; the first only warms up, and the fastest counts.
    """
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for number in range(rounds):
        for dtype in best:
            left, right = torch.ones(2, size, size, dtype=dtype)
            start = time.perf_counter()
            torch.mm(left, right)
            if number:
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
