"""At which lengths a model changes what it does: windows, chunks, positions, rotary tables that switch.

The start-up probe (probe.py) tries few tokens, so what only begins at some length is read from the
configuration here. The names are those that transformers' own masks and rotary embeddings read.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from orpo.engine.passes import PassLimits
from orpo.errors import ConfigError

MOST_OFFSET = 8
"""Entries that a table of positions may have in front of its first position (OPT has 2)."""


def pass_limits(config: Any) -> PassLimits:
    """What the rotary embedding and the attention temperature of a model ask of a pass."""
    switch, alone = None, False
    for rope in _rope_settings(config):
        kind = str(rope.get("rope_type", rope.get("type", "")))
        limit = config.max_position_embeddings if "dynamic" in kind else None
        if kind == "longrope":
            limit = rope["original_max_position_embeddings"]
        if limit is not None:
            switch = int(limit) if switch is None else min(switch, int(limit))
        alone |= "dynamic" in kind
    floor = getattr(config, "floor_scale", None) if getattr(config, "attn_temperature_tuning", True) else None
    return PassLimits(switch, alone, None if floor is None else max(int(floor) - 1, 1))


def may_share(config: Any) -> bool:
    """Whether pairs may share tokens: not where the length of a pass changes what a token becomes."""
    return pass_limits(config) == PassLimits()


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings of a model, or of each of its kinds of layers."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    yield from nested or [found]


def reset_dynamic_rope(model: nn.Module) -> None:
    """Let each pass choose its frequencies by its own length, not by the longest that came before."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            plain = getattr(module, f"{prefix}original_inv_freq", None)
            current = getattr(module, f"{prefix}inv_freq", None)
            if isinstance(plain, Tensor) and isinstance(current, Tensor):
                setattr(module, f"{prefix}inv_freq", plain.to(current.device))
                setattr(module, name, module.original_max_seq_len)


def mask_window(config: Any) -> int | None:
    """The sliding window that transformers puts into the masks of some layers."""
    return _if_used(config, "sliding_window", "sliding_attention")


def mask_chunk(config: Any) -> int | None:
    """The chunk of positions beyond which some layers do not look; known to their masks alone."""
    return _if_used(config, "attention_chunk_size", "chunked_attention")


def _if_used(config: Any, name: str, kind: str) -> int | None:
    """The setting `name`, unless the configuration lists its layers and none is of this kind."""
    value = getattr(config, name, None)
    kinds = getattr(config, "layer_types", None)
    return int(value) if value and (kinds is None or kind in kinds) else None


def turning_points(config: Any) -> list[int]:
    """Lengths in tokens at which something may begin: every window, chunk, floor and switch there is."""
    limits = pass_limits(config)
    named = [
        value
        for name, value in vars(config).items()
        if any(part in name for part in ("window", "chunk", "floor")) and type(value) is int and value > 0
    ]
    return [*named, *([] if limits.switch is None else [limits.switch])]


def positions_in_window(config: Any) -> int | None:
    """Positions that the configuration says the model is made for; None where it says nothing."""
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def check_length(model: Any, longest: int | None) -> list[str]:
    """Compare the longest side that there is with the positions a model has.

    Args:
        model: The transformers model.
        longest: Tokens of prompt and answer; of a stream, the `max_length`; None: any number.

    Returns:
        A line to print where positions will be extrapolated.

    Raises:
        ConfigError: Positions are looked up in a table that ends before.
    """
    config = model.config.get_text_config()
    most, name = positions_in_window(config), type(model).__name__
    if most is None or (longest is not None and longest <= most):
        return []
    tokens = f"pairs have up to {longest or 0:,} tokens a side"
    tokens = "max_length has no limit" if longest is None else tokens
    if _has_position_table(model, most):
        raise ConfigError(
            f"{tokens}, but {name} knows {most:,} positions and none beyond; set max_length: {most}"
        )
    if longest is None:
        return []
    return [f"{tokens}; beyond the {most:,} positions that {name} was made for, it extrapolates"]


def _has_position_table(model: Any, most: int) -> bool:
    """Whether positions are looked up in a table with one entry each, so that there are none beyond it."""
    vocabulary = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not vocabulary and 0 <= module.num_embeddings - most <= MOST_OFFSET:
                return True
            continue
        tensors = [*module._buffers.values(), *(v for v in vars(module).values() if isinstance(v, Tensor))]
        if any(t is not None and t.ndim == 2 and t.shape[0] == most != t.shape[1] for t in tensors):
            return True
    return False
