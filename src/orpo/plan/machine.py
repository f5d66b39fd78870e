"""Machines to plan for: what a GPU holds, how fast it multiplies, how fast it talks, what an hour costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from orpo.errors import ConfigError

RESERVE_GIB = 2.0
"""Memory of a GPU that no tensor gets: the CUDA context, the workspaces of libraries, gaps between blocks."""


class Gpu(NamedTuple):
    """One kind of GPU.

    Attributes:
        memory_gib: Memory in GiB.
        tflops: Peak rate of dense bfloat16 matrix products with float32 sums, in 1e12 operations a second;
            of float32 ones where it has no bfloat16.
        link: Rate at which it sends to another one of its node, in GB (1e9 bytes) a second.
        network: Its share of the node's network, in GB a second.
        price: Dollars an hour; what clouds ask differs by a factor of three.
        has_bf16: Whether it computes in bfloat16.
    """

    memory_gib: float
    tflops: float
    link: float
    network: float
    price: float
    has_bf16: bool = True


GPUS: Mapping[str, Gpu] = {
    "b200-180": Gpu(178.0, 2250, 900, 50, 5.00),
    "h200-141": Gpu(140.4, 989, 450, 50, 3.50),
    "h100-80": Gpu(79.6, 989, 450, 50, 2.50),
    "a100-80": Gpu(79.2, 312, 300, 25, 1.60),
    "a100-40": Gpu(39.4, 312, 300, 12.5, 1.20),
    "mi300x-192": Gpu(191.5, 1307, 448, 50, 2.50),
    "l40s-48": Gpu(44.4, 362, 32, 12.5, 1.00),
    "a10-24": Gpu(22.1, 125, 32, 3, 0.75),
    "l4-24": Gpu(22.0, 121, 32, 3, 0.60),
    "rtx4090-24": Gpu(23.5, 165, 32, 3, 0.50),
    "rtx3090-24": Gpu(23.5, 71, 32, 3, 0.30),
    "t4-16": Gpu(14.6, 8.1, 16, 3, 0.35, has_bf16=False),
}
"""Name -> GPU: data sheets, dense rates; prices are round figures of 2026, to be set with `--price`."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs of one kind, in nodes.

    Attributes:
        gpu: Their kind.
        name: Its name.
        gpus: GPUs of a node.
        nodes: Nodes.
        mfu: Share of the peak rate that training reaches, in (0, 1].
    """

    gpu: Gpu
    name: str
    gpus: int = 1
    nodes: int = 1
    mfu: float = 0.4

    @property
    def ranks(self) -> int:
        """Processes, one for each GPU."""
        return self.gpus * self.nodes

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a collective over all GPUs: rings run over all cards of a node at once."""
        network = self.gpu.network * self.gpus if self.nodes > 1 else self.gpu.link
        return 1e9 * min(self.gpu.link, network)


def cluster(
    name: str, gpus: int = 1, nodes: int = 1, *, mfu: float = 0.4, price: float | None = None
) -> Cluster:
    """A cluster of GPUs by the name of their kind.

    Raises:
        ConfigError: The kind is unknown, or a number is out of range.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; one of {', '.join(GPUS)}")
    for option, value in (("--gpus", gpus), ("--nodes", nodes)):
        if value < 1:
            raise ConfigError(f"{option} {value}: at least 1 is needed")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: a share of the GPU's peak rate, above 0 and at most 1, is needed")
    if price is not None and price < 0:
        raise ConfigError(f"--price {price:g}: dollars for a GPU and hour, at least 0, are needed")
    kind = GPUS[name] if price is None else GPUS[name]._replace(price=price)
    return Cluster(kind, name, gpus, nodes, mfu)
