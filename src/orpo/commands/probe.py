"""`orpo probe RECIPE`: learning rate and strength from short trainings within 2 % of the run's tokens."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.console import say_item

if TYPE_CHECKING:
    from orpo.comparing.probe import Probe


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo probe` to the command line."""
    parser = words.add_parser(
        "probe",
        help="learning rate and beta from short trainings on a share of the tokens",
        description="Train settings around those of the recipe for a few steps each, score all on the same "
        "held-out pairs, and say which is better, where that can be told.",
        usage="orpo probe RECIPE [options]",
        epilog="Settings of the recipe may be given too: --num_train_epochs 2, beta=0.5, ...",
        allow_abbrev=False,
    )
    out = "folder to write, or to go on with (default runs/probe)"
    parser.add_argument("--out", default="runs/probe", metavar="DIR", help=out)
    share = "most of the run's tokens to read, held-out ones included (default 0.02)"
    parser.add_argument("--share", type=float, default=0.02, metavar="S", help=share)
    trials = "settings to try, the recipe's own included; Optuna chooses those after 7 (default 7)"
    parser.add_argument("--trials", type=int, default=7, metavar="N", help=trials)
    factor = "between neighbouring values (default 3)"
    parser.add_argument("--factor", type=float, default=3.0, metavar="F", help=factor)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default 1)")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Probe, print the evidence and the setting."""
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    os.environ.update(recipe.environment)
    recipe.say_notices()
    from rich.console import Console

    from orpo.comparing.probe import probe
    from orpo.comparing.screen import watching

    with watching(Console(highlight=False)) as watcher:
        found = probe(
            recipe.settings, Path(args.out), share=args.share, trials=args.trials, factor=args.factor,
            jobs=args.jobs, watcher=watcher,
        )  # fmt: skip
    _print(found)
    return 0


def _print(found: Probe) -> None:
    from rich.console import Console

    from orpo.comparing.screen import trials_table

    console = Console(highlight=False)
    console.print(f"{found.num_pairs} held-out pairs; * is the best one, and differences are to it")
    console.print(trials_table(found.chosen))
    for line in found.sentences():
        console.print(f"• {line}")
    suggested = "  ".join(f"--{name} {value:g}" for name, value in found.suggestion.items())
    say_item("suggested", suggested if found.is_told_apart else f"{suggested}  (the recipe's own)")
    say_item("result", str(found.path))
