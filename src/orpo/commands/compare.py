"""`orpo compare RECIPE`: methods side by side on the same base, data, split and budget."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from orpo.console import say_item
from orpo.errors import ConfigError

_EPILOG = """examples:
  orpo compare recipe.yaml --methods sft,orpo,sft+dpo --out runs/compared
  orpo compare recipe.yaml --sizes 1000,3000 --seeds 3 --jobs 2 --out runs/compared
  orpo compare recipe.yaml --out runs/compared          goes on where it was stopped

Settings of the recipe may be given too: --num_train_epochs 2, beta=0.5, ...
"""


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo compare` to the command line."""
    parser = words.add_parser(
        "compare",
        help="SFT, ORPO and others side by side: quality with intervals, and cost",
        description="Train methods from the same base on the same pairs with the same number of steps. "
        "Learning rate and strength are chosen for each on validation pairs, with equally many trials; test "
        "pairs are scored once, after that.",
        usage="orpo compare RECIPE --out DIR [options]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, or to go on with")
    parser.add_argument(
        "--methods",
        default="sft,orpo",
        metavar="A,B,...",
        help="objectives (sft, orpo, simpo, dpo, ...), or stages of these joined with + (default sft,orpo)",
    )
    parser.add_argument("--baseline", metavar="A", help="what the others are compared with (default: first)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each (default 3)")
    sizes = "smaller training sets too, nested by prompt: 1000,3000"
    parser.add_argument("--sizes", default="", metavar="N,N,...", help=sizes)
    trials = "settings that each method tries on validation pairs (default 4)"
    parser.add_argument("--trials", type=int, default=4, metavar="N", help=trials)
    test = "test pairs (default: the test split of a folder, else 20 %% of the prompts)"
    parser.add_argument("--test", metavar="F", help=test)
    answers = "test prompts that each method answers, for repetition and ends (default 32)"
    parser.add_argument("--answers", type=int, default=32, metavar="N", help=answers)
    jobs = "trainings at a time, each in a process of its own (default 1; 0: in this process)"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs)
    parser.add_argument("--split_seed", "--split-seed", type=int, default=0, metavar="N", help="of the split")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Compare, print the tables, write the page."""
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    os.environ.update(recipe.environment)
    recipe.say_notices()
    names, sizes = _names(args.methods), _numbers(args.sizes)
    from rich.console import Console

    from orpo.comparing.job import compare
    from orpo.comparing.options import Options
    from orpo.comparing.screen import show, watching
    from orpo.comparing.splits import SplitOptions

    options = Options(
        methods=names, baseline=args.baseline, seeds=args.seeds, sizes=sizes, trials=args.trials,
        answers=args.answers, jobs=args.jobs, split=SplitOptions(test=args.test, seed=args.split_seed),
    )  # fmt: skip
    console = Console(highlight=False)
    with watching(console) as watcher:
        result = compare(recipe.settings, Path(args.out), options, watcher=watcher)
    show(console, result)
    say_item("result", str(result.json_path))
    say_item("page", str(result.page_path))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ConfigError(f"--sizes {text}: not whole numbers; write for instance 1000,3000") from None
