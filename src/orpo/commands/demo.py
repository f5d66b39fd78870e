"""`orpo demo`: ORPO and SFT side by side, on shipped pairs and a shipped base model, offline, in minutes."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from orpo.errors import ConfigError


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo demo` to the command line."""
    parser = words.add_parser(
        "demo",
        help="see ORPO at work: a real run on shipped data, offline, on a CPU",
        description="Train a small shipped model with ORPO, and with SFT for contrast, and compare them on "
        "pairs neither has seen. Takes about two minutes on a CPU and needs no network.",
    )
    parser.add_argument("--fast", action="store_true", help="a few steps only: to see that everything works")
    parser.add_argument(
        "--data",
        choices=("politeness", "harmless"),
        default="politeness",
        help="politeness: AI-written; harmless: human preferences, offensive content (default politeness)",
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        type=Path,
        default=Path("runs/demo"),
        help="run directory; where it is taken, the next free number is added (default runs/demo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for the order of pairs (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Say what will happen, train twice, compare, write the page."""
    from rich.console import Console

    from orpo.demo import screen
    from orpo.demo.experiment import EXPERIMENTS, FAST, free_directory

    if args.seed < 0:
        raise ConfigError(f"--seed: {args.seed} is out of range; expected at least 0")
    began = time.perf_counter()
    experiment = replace(EXPERIMENTS[args.data], seed=args.seed, **(FAST if args.fast else {}))
    experiment.check()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign must not end the run
    # The stream itself: study.py sends what the trainer prints elsewhere.
    console = Console(file=sys.stdout, highlight=False)
    screen.opening(console, experiment)
    folder = free_directory(args.output_dir)
    if folder != args.output_dir:
        console.print(f"{args.output_dir} is already there and stays as it is; this run goes to {folder}")
    with console.status("loading the libraries"):
        from orpo.demo.study import run_demo
    run_demo(console, experiment, folder)
    screen.closing(console, folder, time.perf_counter() - began)
    return 0
