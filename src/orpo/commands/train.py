"""`orpo train RECIPE`: from a recipe to a run directory; the same command again resumes it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from orpo.console import say

if TYPE_CHECKING:
    from orpo.training.job import Outcome

_USAGE = "orpo train [RECIPE] [--KEY VALUE ...] [KEY=VALUE ...]"
_EPILOG = """examples:
  orpo train recipe.yaml --learning_rate 1e-5 --bf16
  orpo train --model_name_or_path M --dataset_name pairs.jsonl --output_dir runs/first
  orpo train recipe.yaml --dry_run          check recipe, data and model, print a summary, stop
  orpo train runs/first                     resume a run with the recipe it was started with
  torchrun --nproc_per_node 8 -m orpo train recipe.yaml

`orpo config --all` lists the keys. The command line beats the recipe.
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
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Read the recipe, train, and print what came of it."""
    from orpo.training.stopping import note_warnings

    note_warnings()
    from orpo.settings.config import check_recipe
    from orpo.settings.needs import check_needs
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    check_recipe(recipe.settings)
    check_needs(recipe.settings)
    os.environ.update(recipe.environment)
    for notice in recipe.notices:
        say(notice)
    from orpo.training.job import train  # heavy: only now, when the recipe is known to be usable

    outcome = train({"output_dir": f"runs/{recipe.name or 'orpo'}"} | recipe.settings)
    _print_result(outcome)
    return outcome.exit_status


def _print_result(outcome: Outcome) -> None:
    """Held-out numbers before and after, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    from orpo.engine.metrics import metric_named, write_figure

    run = outcome.run
    if run is None:
        return
    for set_name in run.evaluation_sets():
        first, last = run.first_evaluation(set_name), run.final_evaluation(set_name)
        if first is None or last is None:
            continue
        table = Table(title=f"Held-out pairs{f' ({set_name})' if set_name else ''}", title_justify="left")
        table.add_column("")
        for name, record in (("before", first), ("after", last)):
            table.add_column(f"{name} (step {record.step})", justify="right")
        for name, figure in last.metrics.items():
            before = first.metrics.get(name)
            table.add_row(
                metric_named(name).title, *(str(write_figure(name, one)) for one in (before, figure))
            )
        Console().print(table)
    if run.shared_prompts:
        print(
            f"warning    {run.shared_prompts} held-out pairs share a prompt with training pairs; they flatter"
        )
    print(f"model      {outcome.folder}")
    print(f"report     {outcome.page}")
    print(f"next       orpo chat {outcome.folder} --compare")
