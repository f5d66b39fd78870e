"""`orpo launch --on slurm|sky|k8s|ray RECIPE`: write the job that trains a recipe on a cluster."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from orpo.console import say
from orpo.errors import ConfigError

_SUBMIT = {
    "slurm": "sbatch {}", "sky": "sky jobs launch {}", "k8s": "kubectl apply -f {}",
    "ray": "ray job submit --working-dir . -- python {}",
}  # fmt: skip


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo launch` to the command line."""
    parser = words.add_parser(
        "launch",
        help="write the job that trains a recipe on Slurm, SkyPilot, Kubernetes or Ray",
        description="Write a job that trains a recipe on several machines. Nothing is submitted. A job that "
        "was preempted, or whose time was over, resumes from its last checkpoint.",
        usage="orpo launch --on slurm|sky|k8s|ray RECIPE [--gpus N] [--nodes N] [--KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--on", required=True, choices=list(_SUBMIT), help="where it runs")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--gpu", metavar="KIND", help="kind of GPU in the cluster's words: h100, H100, ...")
    parser.add_argument("--hours", type=int, default=24, metavar="N", help="limit of one start (default: 24)")
    parser.add_argument("--image", default="orpo:latest", help="container with orpo, for k8s")
    parser.add_argument("--name", help="of the job (default: the recipe's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Check the recipe, write the job, say how to submit it."""
    from orpo.launch.jobs import WRITERS, Job
    from orpo.settings.config import check_recipe
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    check_recipe(recipe.settings)
    for key in ("model_name_or_path", "dataset_name"):
        if not recipe.settings.get(key):
            raise ConfigError(f"{key} is not set; add it to the recipe, or write --{key}")
    name = args.name or re.sub(r"[^a-z0-9]+", "-", (recipe.name or "orpo").lower()).strip("-")
    job = Job(args.settings, name, args.gpus, args.nodes, args.gpu, args.hours, args.image)
    job.check()
    write, pattern = WRITERS[args.on]
    out = args.out or Path(pattern.format(name))
    if out.exists():
        raise ConfigError(f"{out} is there already; write --out with another name, or delete it")
    try:
        out.write_text(write(job), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}); write --out with another name"
        ) from None
    say(f"{out}: written; submit it with: {_SUBMIT[args.on].format(out)}")
    return 0
