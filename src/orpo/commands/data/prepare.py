"""`orpo data prepare`: preference data cleaned, deduplicated, filtered and split, in a folder to train on."""

from __future__ import annotations

import argparse

from orpo.console import LongWork, say


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the word to the command line."""
    parser = words.add_parser(
        "prepare",
        help="clean, deduplicate, filter and split pairs; write a folder to train on",
        description="Clean, deduplicate, filter and split preference pairs. Each step says what it removed "
        "and why. `orpo train --dataset_name DIR` trains on the result.",
        epilog="Settings of a recipe that say how rows are read are accepted too: --data_format, --columns, "
        "--sft_rows, --on_bad_row stop, ...",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", nargs="+", help="local files or folders, or hub names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, not there or empty")
    parser.add_argument("--test", type=float, default=0.05, help="share of pairs in the test split (0.05)")
    parser.add_argument("--validation", type=float, default=0.0, help="the same for validation (0)")
    parser.add_argument("--split", default="train", help="split of the data to read (train)")
    cleaning = parser.add_argument_group("cleaning")
    cleaning.add_argument("--fix_text", action="store_true", help="repair encodings read wrongly (ftfy)")
    cleaning.add_argument("--drop_broken", action="store_true", help="remove pairs with U+FFFD in them")
    cleaning.add_argument(
        "--keep", nargs="+", default=[], metavar="WHAT",
        help="keep duplicates, near_duplicates, contradictions, similar_sides (removed by default)",
    )  # fmt: skip
    choice = parser.add_argument_group("filters and choice")
    choice.add_argument("--pairs", default="best-each", help="of ranked answers: best-each (default), "
                        "best-worst, best-random or all")  # fmt: skip
    choice.add_argument("--source", nargs="+", default=[], help="keep pairs of these sources")
    choice.add_argument("--language", nargs="+", default=[], help="keep pairs in these languages (en, de)")
    choice.add_argument("--min_margin", type=float, help="least difference of the scores of the sides")
    choice.add_argument("--min_length", type=int, help="least length of an answer, in characters")
    choice.add_argument("--max_length", type=int, help="most of prompt and answer, in characters")
    choice.add_argument("--model", metavar="M", help="count lengths in tokens of this model instead")
    choice.add_argument("--balance", choices=["length"], help="even out longer chosen and rejected answers")
    choice.add_argument("--limit", type=int, metavar="N", help="most pairs, by source and length")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (0)")
    parser.add_argument("--recipe", metavar="R", help="recipe whose settings say how rows are read")
    parser.add_argument("--force", action="store_true", help="replace data prepared before in DIR")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Prepare, and print a line for each step."""
    from orpo.settings.config import check_recipe
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides=args.settings)
    recipe.say_notices(error=True)
    check_recipe(recipe.settings)
    from orpo.curation.prepare import PrepareOptions, prepare_data
    from orpo.data.stages import following

    options = PrepareOptions(
        split=args.split, pairs=args.pairs, fix_text=args.fix_text, drop_broken=args.drop_broken,
        keep=tuple(args.keep), source=tuple(args.source), language=tuple(args.language),
        min_margin=args.min_margin, min_length=args.min_length, max_length=args.max_length,
        model=args.model, balance=args.balance, limit=args.limit, test=args.test,
        validation=args.validation, seed=args.seed,
    )  # fmt: skip
    with LongWork() as shown, following(shown):
        prepared = prepare_data(
            args.data,
            args.out,
            options,
            settings=dict(recipe.settings),
            force=args.force,
            say=say,
        )
    for line in prepared.lines():
        say(line)
    return 0
