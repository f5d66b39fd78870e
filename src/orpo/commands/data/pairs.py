"""`orpo data pairs`: rejected answers made by the user's own model, for rows with a good answer."""

from __future__ import annotations

import argparse

from orpo.evaluation.answer_options import add_endpoint, add_sampling, endpoint_of, progress, sampling_of


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the word to the command line."""
    parser = words.add_parser(
        "pairs",
        help="let a model make the rejected answers",
        description="Write pairs whose rejected answers your own model has made: each prompt is answered "
        "several times, and one of the answers that differ from the good one is chosen. The same command "
        "goes on where it was stopped.",
        epilog="Any setting of a recipe is accepted too: --dtype bfloat16, --columns '{chosen: answer}', ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "data", metavar="DATA", help="local file or folder, or hub name of rows with a good answer"
    )
    model = "that answers: run directory, model or adapter folder, or hub name"
    parser.add_argument("--model", metavar="M", help=model)
    out = "folder for the pairs, which dataset_name takes"
    parser.add_argument("--out", required=True, metavar="DIR", help=out)
    parser.add_argument("--split", help="split of the data (default: all of a file, else train)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pairs only")
    group = parser.add_argument_group("rejected answers")
    share = "share of the rows with a rejected answer that get one of the model's own (default 1)"
    group.add_argument("--share_own", "--share-own", type=float, default=1.0, metavar="S", help=share)
    rule = "which answer: random, or the least_similar or most_similar to the good one (default random)"
    group.add_argument("--choose", default="random", metavar="RULE", help=rule)
    cut = "use answers that were cut at --max_tokens too"
    group.add_argument("--keep_unfinished", "--keep-unfinished", action="store_true", help=cut)
    add_sampling(parser, temperature=1.0, samples=4)
    add_endpoint(parser)
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Answer, choose, write, print what the pairs look like."""
    from orpo.settings.recipe import load_recipe

    settings = load_recipe(overrides=args.settings).settings
    from orpo.curation.own_negatives import OwnNegatives, make_pairs

    own = OwnNegatives(
        samples=args.samples,
        share_own=args.share_own,
        choose=args.choose,
        keep_unfinished=args.keep_unfinished,
    )
    with progress() as shown:
        result = make_pairs(
            args.model,
            args.data,
            args.out,
            own=own,
            sampling=sampling_of(args),
            endpoint=endpoint_of(args),
            split=args.split,
            limit=args.limit,
            batch_size=args.batch_size,
            progress=shown,
            **settings,
        )
    print("\n".join(result.lines()))
    print(f"written     {result.path}")
    result.asked.check()
    return 0
