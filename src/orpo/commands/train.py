"""`orpo train RECIPE`: from a recipe to a run directory; the same command again resumes it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from orpo.console import say, say_item

if TYPE_CHECKING:
    from orpo.evaluation.verdict import Verdict
    from orpo.run.directory import Run
    from orpo.training.job import Outcome

_USAGE = "orpo train [RECIPE] [--KEY VALUE ...] [KEY=VALUE ...]"
_EPILOG = """examples:
  orpo train recipe.yaml --learning_rate 1e-5 --bf16
  orpo train --model_name_or_path M --dataset_name pairs.jsonl --output_dir runs/first
  orpo train recipe.yaml --dry_run          check recipe, data and model, print a summary, stop
  orpo train runs/first                     resume a run with the recipe it was started with
  orpo train recipe.yaml --launch 8         on 8 processes, one for each GPU (torchrun underneath)
  orpo train recipe.yaml --launch 8 --nnodes 4 --rdzv_endpoint node1:29500      the same line on each node

It also runs inside torchrun, accelerate launch and srun. `orpo config --all` lists the keys. The command line
beats the recipe.
"""


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo train` to the command line."""
    parser = words.add_parser(
        "train",
        help="train a model on preference pairs",
        description="Train a causal language model on preference pairs, as a recipe says.",
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--launch", type=int, metavar="N", help="processes to start on this machine")
    parser.add_argument("--nnodes", default="1", metavar="N", help="with --launch: machines (default: 1)")
    parser.add_argument("--rdzv_endpoint", metavar="HOST:PORT", help="with --launch: where machines meet")
    parser.add_argument(
        "--max_restarts", type=int, default=0, metavar="N",
        help="with --launch: how often a run resumes by itself when a process dies (default: 0)",
    )  # fmt: skip
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Read the recipe, train, and print what came of it."""
    from orpo.training.stopping import note_warnings

    note_warnings()
    from orpo.launch.ranks import LAUNCHED, adopt_srun
    from orpo.settings.config import check_recipe
    from orpo.settings.needs import check_needs
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    check_recipe(recipe.settings)
    adopt_srun()
    check_needs(recipe.settings, launched=args.launch is not None)
    os.environ.update(recipe.environment)
    for notice in recipe.notices if args.launch is None else ():
        say(notice)
    settings = {"output_dir": f"runs/{recipe.name or 'orpo'}"} | recipe.settings
    if args.launch is not None:
        from orpo.launch.local import Launch, train_here

        launch = Launch(args.launch, args.nnodes, args.rdzv_endpoint, args.max_restarts)
        return train_here(launch, args.settings, settings)
    from orpo.training.job import WORSE, train  # heavy: only now, when the recipe is known to be usable

    outcome = train(settings)
    _print_result(outcome)
    judged_by_launcher = outcome.exit_status == WORSE and LAUNCHED in os.environ
    return 0 if judged_by_launcher else outcome.exit_status


def _print_result(outcome: Outcome) -> None:
    """Held-out numbers before and after, what they come to, and where the model is."""
    run, verdict = outcome.run, outcome.verdict
    if run is None or verdict is None:
        return
    for set_name in verdict.sets or run.evaluation_sets():
        _print_table(run, verdict, set_name)
    if run.shared_prompts:
        say_item(
            "warning",
            f"{run.shared_prompts} held-out pairs share a prompt with training pairs; they flatter",
        )
    say_item("verdict", verdict.sentence)
    for line in verdict.advice:
        say_item("try", line)
    say_item("model", str(outcome.folder))
    if outcome.page is not None:
        say_item("report", str(outcome.page))
    if verdict.kind != "worse":
        say_item("next", f"orpo chat {outcome.folder} --compare")


def _print_table(run: Run, verdict: Verdict, set_name: str) -> None:
    """One evaluation set: before, after, and the change with its own error."""
    from rich.console import Console
    from rich.table import Table

    from orpo.engine.metrics import metric_named, write_change, write_figure

    first = run.first_evaluation(set_name)
    last = run.evaluation_at(set_name, verdict.step) if verdict.sets else run.final_evaluation(set_name)
    if first is None or last is None:
        return
    change = verdict.sets[set_name].change if set_name in verdict.sets else {}
    named = f" ({set_name})" if set_name else ""
    table = Table(title=f"{last.num_pairs:,} held-out pairs{named}", title_justify="left")
    for title in ("", f"step {first.step}", f"step {last.step}", "change"):
        table.add_column(title, justify="right" if title else "left")
    for name, figure in last.metrics.items():
        cells = (write_figure(name, first.metrics.get(name)), write_figure(name, figure))
        table.add_row(metric_named(name).title, *map(str, cells), str(write_change(name, change.get(name))))
    Console().print(table)
