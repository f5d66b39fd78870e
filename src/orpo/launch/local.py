"""`orpo train --launch N`: this machine's part of a run on N processes, by torchrun, within this process.

torchrun starts the processes, lets them find each other, and starts all of them again when one dies; the run
then resumes from its newest checkpoint, as it does whenever the same command is given again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orpo.console import say
from orpo.errors import ConfigError, RunError
from orpo.launch.ranks import LAUNCHED

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Where processes find each other: one store for all starts, torch's default, still has the addresses of
those that died, and gloo cannot connect after a restart (torch 2.13, LOG.md). With 1 each has its own."""
SECONDS_TO_SAVE = 600
"""Seconds that processes get for their last checkpoint when they are told to stop."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes a run has, and where.

    Attributes:
        processes: Of each node.
        nodes: Nodes; or `2:4`, at least 2 and at most 4.
        endpoint: `HOST:PORT` where nodes meet; needed where there are several.
        restarts: How often all processes are started again when one of them dies.
    """

    processes: int
    nodes: str = "1"
    endpoint: str | None = None
    restarts: int = 0

    def check(self) -> None:
        """Refuse what cannot be started.

        Raises:
            ConfigError: A number is out of range, or nodes do not know where to meet.
        """
        if "RANK" in os.environ:
            raise ConfigError(
                "--launch: this process was started by a launcher already (RANK is set); leave --launch out"
            )
        if self.processes < 1:
            raise ConfigError(f"--launch {self.processes}: at least 1 process is needed")
        if self.restarts < 0:
            raise ConfigError(f"--max_restarts {self.restarts}: at least 0 is needed")
        if self.nodes != "1" and not self.endpoint:
            raise ConfigError(
                f"--nnodes {self.nodes}: the nodes need a place to meet; write --rdzv_endpoint HOST:PORT with"
                " the name of one of them, the same on each"
            )

    def words(self) -> list[str]:
        """As torchrun's command line."""
        meeting = ["--standalone"]
        if self.endpoint:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint, "--rdzv-id", "orpo"]
        return [
            *meeting, "--nnodes", self.nodes, "--nproc-per-node", str(self.processes),
            "--max-restarts", str(self.restarts),
        ]  # fmt: skip


def train_here(launch: Launch, arguments: Sequence[str], settings: Mapping[str, Any]) -> int:
    """Train on several processes of this machine.

    Args:
        launch: How many, and how they meet the others.
        arguments: Recipe and settings as typed.
        settings: What they come to; `output_dir` is among them.

    Returns:
        The exit status of `orpo train`. torchrun takes any but 0 for a crash, so a result that is worse than
        its base is judged here, after the processes have ended.

    Raises:
        OrpoError: The processes could not be started.
    """
    status = run_processes(launch, "orpo", ["train", *arguments])
    if status or settings.get("dry_run"):
        return status
    from orpo.training.job import finished_status

    return finished_status(settings)


def run_processes(launch: Launch, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m MODULE ARGUMENTS` in all processes of this machine.

    Returns:
        An exit status: 0, that of the process that failed first, or 128 and the number of a signal.

    Raises:
        RunError: The processes could not be started.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args
    from torch.distributed.run import run as torchrun

    launch.check()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.processes)))
    os.environ.setdefault(SHUTDOWN, str(SECONDS_TO_SAVE))
    os.environ.setdefault(SHARED_STORE, "1")
    os.environ[LAUNCHED] = "1"
    # A scheduler's warning reaches the processes as the signal that torchrun passes on.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    try:
        torchrun(parse_args([*launch.words(), "-m", module, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != 2:  # which has said its line
            say(f"orpo: process {rank} ended with status {failure.exitcode}", error=True)
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        raise RunError(f"--launch: the processes could not meet ({error}); check --rdzv_endpoint") from error
    finally:
        os.environ.pop(LAUNCHED, None)
    return 0
