"""`orpo judge A.jsonl B.jsonl --by JUDGE`: whose answers are better, by how much, and how sure that is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from orpo.console import LongWork
from orpo.evaluation.answer_options import add_endpoint, endpoint_of, progress

if TYPE_CHECKING:
    from orpo.judging.job import Judgement


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo judge` to the command line."""
    parser = words.add_parser(
        "judge",
        help="say whose answers are better: win rate by a reward model or a judge",
        description="Count how often the second model's answers are better than the first's, on the prompts "
        "that both have answered (orpo generate). Verdicts are kept; the same command goes on where it was "
        "stopped.",
        usage="orpo judge [A B] --by JUDGE [options]",
        epilog="Any setting of a recipe is accepted too, for a judge on this machine: --dtype bfloat16, ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "answers", metavar="FILE", nargs="*", help="answers of the first and the second model"
    )
    ways = (
        "reward:MODEL, a sequence classifier; endpoint:URL or model:MODEL, a language model; or "
        "alpaca_eval:FILE, annotations that are there already"
    )
    parser.add_argument("--by", required=True, metavar="JUDGE", help=ways)
    parser.add_argument("--out", metavar="FILE", help="write each verdict as a JSON line")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, nothing else")
    group = parser.add_argument_group("a language model that judges")
    orders = "each pair in both orders, or in one that is drawn (default both)"
    group.add_argument("--orders", choices=("both", "drawn"), default="both", help=orders)
    longest = "longest verdict, in tokens (default 1024)"
    group.add_argument("--max_tokens", "--max-tokens", type=int, default=1024, metavar="N", help=longest)
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    most = "verdicts at once of a model here (default: as many as memory has room for)"
    group.add_argument("--batch_size", "--batch-size", type=int, metavar="N", help=most)
    add_endpoint(parser, address=False)
    group = parser.add_argument_group("AlpacaEval's length-controlled rate")
    group.add_argument("--difficulty", metavar="FILE", help="its instruction_difficulty.csv")
    group.add_argument("--gamed", metavar="FILE", help="its df_gamed.csv")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Judge, print."""
    from orpo.settings.recipe import load_recipe

    settings = load_recipe(overrides=args.settings).settings
    from orpo.data.stages import following
    from orpo.errors import ConfigError
    from orpo.evaluation.generation import Sampling
    from orpo.judging.job import judge

    if len(args.answers) not in (0, 2):
        raise ConfigError(f"judge compares two files of answers; {len(args.answers)} are named")
    first, second = args.answers or (None, None)
    kind, _, url = args.by.partition(":")
    with progress("verdicts") as shown, LongWork() as work, following(work):
        found = judge(
            first,
            second,
            args.by,
            endpoint=endpoint_of(args, url if kind == "endpoint" else None),
            orders=args.orders,
            sampling=Sampling(
                temperature=args.temperature, top_p=1.0, max_tokens=args.max_tokens, seed=args.seed
            ),
            difficulty=args.difficulty,
            gamed=args.gamed,
            out=args.out,
            batch_size=args.batch_size,
            progress=shown,
            **settings,
        )
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)
    found.check()
    return 0


def _print(found: Judgement) -> None:
    from orpo.judging.table import lines

    print("\n".join(lines(found)))
