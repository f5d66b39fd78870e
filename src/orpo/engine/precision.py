"""The precision in which a product is computed: that of its tensors, or autocast's."""

import torch

HALF = (torch.float16, torch.bfloat16)


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Precision of a matrix product of tensors of `dtype` on `device`: autocast's where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
