"""Which of several processes this one is: what `srun` or Ray Train says, in the words that torchrun uses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

LAUNCHED = "ORPO_LAUNCHED"
"""Set in the processes of `orpo train --launch`, whose result the first process judges (local.py)."""
_FIRST_PORT, _PORTS = 20000, 20000


def adopt_srun(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set `RANK` and its like where `srun` has started several processes and no other launcher has.

    Returns:
        Whether they were set. The main process meets the others on the first node of the step, at a port made
        from the number of the job; `MASTER_ADDR` and `MASTER_PORT` beat both.
    """
    number = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or int(number) < 2:
        return False
    job = int(environment.get("SLURM_JOB_ID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = number
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["LOCAL_WORLD_SIZE"] = _tasks_here(environment)
    environment.setdefault("MASTER_ADDR", first_node(nodes))
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))
    return True


def adopt_ray() -> None:
    """Set `RANK` and its like in a worker of Ray Train, which has set where they meet."""
    from ray.train import get_context

    context = get_context()
    os.environ["RANK"] = str(context.get_world_rank())
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())


def _tasks_here(environment: Mapping[str, str]) -> str:
    """Processes of this node: `8(x4)`, or `8,7` by node."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["WORLD_SIZE"])
    each = [
        number
        for part in tasks.split(",")
        for number, times in [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()).groups("1")]  # type: ignore[union-attr]
        for _ in range(int(times))
    ]
    return each[min(int(environment.get("SLURM_NODEID", "0")), len(each) - 1)]


def first_node(nodes: str) -> str:
    """The first of a list of nodes in Slurm's form: `gpu[07-09,12],cpu1` -> `gpu07`."""
    found = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if found is None:
        return nodes
    prefix, ranges, suffix = found.groups()
    if ranges is None:
        return prefix + suffix
    return prefix + re.split(r"[,-]", ranges)[0] + suffix
