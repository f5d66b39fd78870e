"""`orpo demo`: ORPO beside SFT, on shipped pairs and from a shipped base model, offline, in minutes."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from orpo.demo.experiment import Plan


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
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tell what will happen, train twice, judge, write the page."""
    from rich.console import Console

    from orpo.demo import screen
    from orpo.demo.experiment import FAST, PLANS

    if args.seed < 0:
        raise ConfigError(f"--seed: {args.seed} is out of range; expected at least 0")
    began = time.perf_counter()
    plan = replace(PLANS[args.data], seed=args.seed, **(FAST if args.fast else {}))
    plan.check()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign must not end the run
    # The stream itself: study.py sends what the trainer prints elsewhere.
    console = Console(file=sys.stdout, highlight=False)
    screen.opening(console, plan)
    folder = free_directory(args.output_dir)
    if folder != args.output_dir:
        console.print(f"{args.output_dir} is there already and stays as it is; this run goes to {folder}")
    _experiment(console, plan, folder)
    screen.closing(console, folder, time.perf_counter() - began)
    return 0


def _experiment(console: Console, plan: Plan, folder: Path) -> None:
    from orpo.demo import screen

    with console.status("loading the libraries"):
        from transformers.utils import logging

        from orpo.demo.study import Judge, train, write_results
        from orpo.report.page import write_report

    logging.disable_progress_bar()
    folders = {"SFT": folder / "sft", "ORPO": folder}
    betas = {"SFT": 0.0, "ORPO": plan.beta}
    with screen.watching(console, list(folders)) as watches:
        trainings = {name: train(plan, betas[name], folders[name], watches[name]) for name in folders}
    with console.status("scoring test pairs and asking for answers"):
        judge = Judge(plan)
        verdicts = {name: judge.look(place) for name, place in ({"base": plan.base} | folders).items()}
        write_results(folder, plan, judge, verdicts, trainings)
        figures = {name: verdict.figures for name, verdict in verdicts.items()}
        note = screen.note(plan, len(judge))
        write_report(folder, contrast={"SFT": folders["SFT"]}, test=figures, note=note)
    screen.results(console, verdicts, trainings, len(judge))
    screen.samples(console, [str(prompt[-1]["content"]) for prompt in judge.prompts], verdicts)


def free_directory(wanted: Path) -> Path:
    """Make the run directory, or the first of `wanted-2`, `wanted-3`, ... that is not taken."""
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir() or any(folder.iterdir()):
                continue
        except OSError as error:
            raise ConfigError(
                f"--output_dir: {folder} cannot be made ({error.strerror}); name another"
            ) from error
        return folder
    raise AssertionError
