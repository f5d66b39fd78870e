"""`orpo data show`: one row as the model reads it, token by token."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.console import LongWork
from orpo.errors import ConfigError

if TYPE_CHECKING:
    from orpo.data.one_row import OneRow
    from orpo.data.show import Layout


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the word to the command line."""
    parser = words.add_parser(
        "show",
        help="print one row as the model reads it, token by token",
        description="Print one row as the model reads it: template, prompt and both sides, special tokens, "
        "what the NLL and the odds are over, and what was cut or changed.",
        epilog="Any setting of a recipe is accepted too: --max_length 1024, --nll_on response, ...",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", help="local file or folder, or hub name of the pairs")
    parser.add_argument("--model", metavar="M", help="run directory, model or adapter folder, or hub name")
    parser.add_argument(
        "--row", default="0", metavar="K", help="index from 0, or pairs.jsonl:118 (default 0)"
    )
    parser.add_argument("--recipe", metavar="R", help="recipe, or run directory, whose settings are used")
    parser.add_argument("--split", help="split of the data (default: all of a file, else train)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the row as a page too")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Read one row, print it, and write the page."""
    from orpo.run.checkpoints import model_folder, run_recipe
    from orpo.settings.config import OrpoSettings, check_recipe, inherited_by_evaluation, resolve_objective
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides=[*args.settings, "--dataset_name", args.data])
    recipe.say_notices(error=True)
    model = args.model or recipe.settings.get("model_name_or_path")
    if not model:
        raise ConfigError("no model is named, and a pair has the tokens of one; add --model M")
    given = inherited_by_evaluation(run_recipe(model), recipe.settings) | recipe.settings
    check_recipe(given)
    settings = OrpoSettings.from_recipe(given)
    objective, _ = resolve_objective(settings)
    from orpo.data.named_templates import tokens_to_add
    from orpo.data.one_row import find_row, read_row
    from orpo.data.show import lay_out
    from orpo.data.stages import following
    from orpo.data.token_ids import check_ids

    found, folder = find_row(args.data, args.row, settings, args.split), model_folder(model)
    from orpo.engine.loading import load_tokenizer  # heavy: only now, when there is a row to show
    from orpo.engine.packing import nll_ranges
    from orpo.engine.stop_tokens import saved_stop_token_ids
    from orpo.evaluation.generation import saved_vocabulary

    revision = None if args.model else settings.model_revision
    tokenizer = load_tokenizer(folder, revision=revision, trust_remote_code=settings.trust_remote_code)
    if settings.resize_embeddings:
        tokenizer.add_tokens(tokens_to_add(tokenizer, settings.chat_template), special_tokens=True)
    with LongWork() as work, following(work):
        row = read_row(found, settings, tokenizer, stop_tokens=saved_stop_token_ids(folder))
    nll = [nll_ranges(pair, objective) if objective.nll_weight > 0 else [] for pair in row.pairs]
    pairs = zip(row.pairs, nll, strict=True)
    layouts = [
        lay_out(pair, tokenizer, ranges, odds=objective.preference_weight > 0) for pair, ranges in pairs
    ]
    _draw(row, layouts, args.html)
    if not settings.resize_embeddings:
        number = saved_vocabulary(folder, replace(settings, model_revision=revision))
        for pair in row.pairs:
            check_ids([*pair.prompt, *pair.chosen, *pair.rejected], number, tokenizer, pair.source)
    return 0


def _draw(row: OneRow, layouts: Sequence[Layout], page: Path | None) -> None:
    from rich.console import Console

    from orpo.data.show import draw_page, draw_text

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign must not end the command
    console = Console(highlight=False)
    console.print(draw_text(row, layouts, console), soft_wrap=True)
    if page is None:
        return
    try:
        page.write_text(draw_page(row, layouts), encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--html {page}: cannot be written ({error.strerror}); name another file") from None
    print(f"\npage        {page}")
