"""`orpo data subset`: choose a few thousand of many pairs, into a folder to train on."""

from __future__ import annotations

import argparse

from orpo.console import LongWork, say


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the word to the command line."""
    parser = words.add_parser(
        "subset",
        help="choose a few thousand of many pairs: diverse, by margin, or at random",
        description="Choose some of many pairs, and say how well they cover the others. The result is a "
        "folder that `orpo train --dataset_name DIR` takes; a test split is taken over whole.",
        epilog="Settings of a recipe that say how rows are read are accepted too: --data_format, ...",
        allow_abbrev=False,
    )
    parser.add_argument("data", metavar="DATA", nargs="+", help="local files or folders, or hub names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, not there or empty")
    parser.add_argument("--n", type=int, default=7000, help="pairs to choose (7000)")
    parser.add_argument("--by", default="diversity", help="diversity (default), margin or random")
    parser.add_argument("--margin", default="largest", help="with --by margin: largest (default) or middle")
    parser.add_argument(
        "--embeddings",
        metavar="FOLDER",
        help="sentence-embedding model to compare pairs by (default: TF-IDF)",
    )
    parser.add_argument("--split", default="train", help="split of the data to choose from (train)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (0)")
    parser.add_argument("--recipe", metavar="R", help="recipe whose settings say how rows are read")
    parser.add_argument("--force", action="store_true", help="replace data prepared before in DIR")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Choose, and print what was gained."""
    from orpo.settings.config import check_recipe
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides=args.settings)
    recipe.say_notices(error=True)
    check_recipe(recipe.settings)
    from orpo.curation.subset import SubsetOptions, subset_data
    from orpo.data.stages import following

    options = SubsetOptions(
        n=args.n,
        by=args.by,
        margin=args.margin,
        embeddings=args.embeddings,
        split=args.split,
        seed=args.seed,
    )
    with LongWork() as shown, following(shown):
        chosen = subset_data(
            args.data,
            args.out,
            options,
            settings=dict(recipe.settings),
            force=args.force,
            say=say,
        )
    for line in chosen.lines():
        say(line)
    return 0
