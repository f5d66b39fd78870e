"""Jobs for a scheduler or a cloud, written as files: Slurm, SkyPilot, Kubernetes, Ray.

Each runs `orpo train RECIPE` in one process for each GPU and starts it again when it was preempted; the same
command resumes. Nothing is submitted here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from orpo.errors import ConfigError

PORT = 29500
WARNING_SECONDS = 600
"""How long before its end Slurm tells a job: time for a checkpoint."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to run, and on what.

    Attributes:
        words: What `orpo train` gets: recipe and settings, as typed.
        name: Of the job: letters, digits and dashes.
        gpus: GPUs of a node.
        nodes: Nodes.
        gpu: Their kind in the cluster's words (`h100`), or None.
        hours: Limit of one start.
        image: Container with orpo, for Kubernetes.
    """

    words: Sequence[str]
    name: str
    gpus: int = 8
    nodes: int = 1
    gpu: str | None = None
    hours: int = 24
    image: str = "orpo:latest"

    def check(self) -> None:
        """Refuse what no scheduler would take.

        Raises:
            ConfigError: A number or the name is out of range.
        """
        for option, value in (("--gpus", self.gpus), ("--nodes", self.nodes), ("--hours", self.hours)):
            if value < 1:
                raise ConfigError(f"{option} {value}: at least 1 is needed")
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?", self.name):
            raise ConfigError(f"--name {self.name}: write small letters, digits and dashes, at most 52")

    @property
    def training(self) -> str:
        """The command of one process."""
        return f"orpo train {shlex.join(self.words)}"

    def launched(self, endpoint: str) -> str:
        """The command of one node, which starts its processes; they restart together when one dies."""
        meeting = f" --nnodes {self.nodes} --rdzv_endpoint {endpoint}" if self.nodes > 1 else ""
        return f"{self.training} --launch {self.gpus}{meeting} --max_restarts 3"


def slurm(job: Job) -> str:
    """A batch script for `sbatch`: srun starts every process; a job that was cut off is queued again."""
    kind = f"{job.gpu}:" if job.gpu else ""
    return f"""#!/bin/bash
# sbatch {job.name}.sbatch
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.gpus}
#SBATCH --gpus-per-node={kind}{job.gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time={job.hours}:00:00
#SBATCH --requeue                      # after a preemption
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
#SBATCH --signal=USR1@{WARNING_SECONDS}              # before the time is over: a checkpoint, then the end

srun --kill-on-bad-exit=1 {job.training}
status=$?
# 138 and 143: stopped by a signal, with a checkpoint; the same job resumes from it.
if [ $status -eq 138 ] || [ $status -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


def sky(job: Job) -> str:
    """A task for `sky jobs launch`, whose managed jobs start again by themselves after a preemption."""
    named = any(word.startswith(("--output_dir", "--output-dir", "output_dir=")) for word in job.words)
    folder = "" if named else f" --output_dir /runs/{job.name}"
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{(job.gpu or 'H100').upper()}:{job.gpus}", "use_spot": True},
        "workdir": ".",
        "file_mounts": {"/runs": {"name": f"{job.name}-runs", "mode": "MOUNT"}},
        "setup": "pip install orpo\n",
        "run": (f'HEAD=$(echo "$SKYPILOT_NODE_IPS" | head -n1)\n{job.launched(f"$HEAD:{PORT}")}{folder}\n'),
    }
    head = f"# sky jobs launch {job.name}.sky.yaml\n"
    head += "# The bucket at /runs keeps the run, so that it resumes on another machine.\n"
    return head + _yaml(task)


def kubernetes(job: Job) -> str:
    """An indexed Job and the service by which its pods find each other; a pod that is evicted is replaced."""
    labels = {"app": job.name}
    container = {
        "name": "train",
        "image": job.image,
        "command": ["bash", "-c", job.launched(f"{job.name}-0.{job.name}:{PORT}")],
        "resources": {"limits": {"nvidia.com/gpu": job.gpus}},
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}, {"name": "shm", "mountPath": "/dev/shm"}],
        "workingDir": "/runs",
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # pods of a Job with a policy are replaced, not restarted in place
        "subdomain": job.name,
        "terminationGracePeriodSeconds": WARNING_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": f"{job.name}-runs"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if job.gpu:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": job.gpu}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": job.name},
        "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True},
    }  # fmt: skip
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completions": job.nodes,
            "parallelism": job.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 100,
            "podFailurePolicy": {
                "rules": [
                    {  # 2: a mistake in the recipe or the data, which another start would make again
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "train", "operator": "In", "values": [2, 3]},
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    head = f"# kubectl apply -f {job.name}.k8s.yaml\n"
    head += f"# The claim {job.name}-runs, shared by all nodes, holds recipe, data and run.\n"
    return head + _yaml(service) + "---\n" + _yaml(batch)


def ray(job: Job) -> str:
    """A script for `ray job submit`: Ray Train starts the processes and restarts them after a failure."""
    arguments = json.dumps(["train", *job.words])
    return f'''"""ray job submit --working-dir . -- python {job.name}_ray.py

Ray Train sets up the processes (ranks, the place where they meet); `orpo train` finds them as under torchrun.
The run directory has to be on storage that all nodes share, so that a run that is started again resumes.
"""

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_here() -> int:
    """One process of the run."""
    from orpo.cli import main
    from orpo.launch.ranks import adopt_ray

    adopt_ray()
    status = main({arguments})
    if status not in (0, 2, 3):
        raise SystemExit(status)  # Ray starts the processes again, and the run resumes
    return status  # 2: a mistake in recipe or data, which another start would make again


if __name__ == "__main__":
    result = TorchTrainer(
        train_here,
        scaling_config=ScalingConfig(num_workers={job.gpus * job.nodes}, use_gpu=True),
        run_config=RunConfig(name="{job.name}", failure_config=FailureConfig(max_failures=100)),
    ).fit()
    raise SystemExit(result.return_value)  # the first process's; Ray 2.60
'''


WRITERS: Mapping[str, tuple[Callable[[Job], str], str]] = {
    "slurm": (slurm, "{}.sbatch"),
    "sky": (sky, "{}.sky.yaml"),
    "k8s": (kubernetes, "{}.k8s.yaml"),
    "ray": (ray, "{}_ray.py"),
}
"""Where a job runs -> what writes it, and the name of the file."""


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=110)
