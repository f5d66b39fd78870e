"""`orpo plan RECIPE`: memory, hours and cost of a run on GPUs that need not be there."""

from __future__ import annotations

import argparse
import json

_EPILOG = """examples:
  orpo plan recipe.yaml --gpu h100-80 --gpus 8
  orpo plan recipe.yaml --gpu h100-80 --gpus 8 --nodes 4 --pairs 7000 --lengths 700/300/300
  orpo plan recipe.yaml --gpu rtx4090-24 --use_peft --load_in_4bit

Nothing is downloaded but a configuration, and data and tokenizer unless --pairs and --lengths stand for them.
"""


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo plan` to the command line."""
    parser = words.add_parser(
        "plan",
        help="print the memory, hours and cost of a run on given GPUs",
        description="Plan a run: what each GPU holds, tokens, operations, hours, cost, whether it fits.",
        usage="orpo plan RECIPE [--gpu KIND] [--gpus N] [--nodes N] [--KEY VALUE ...]",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="h100-80", metavar="KIND", help="kind of GPU (default: h100-80)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a node (default: 1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE",
        help="share of the GPUs' peak rate that training reaches (default: 0.4, an assumption)",
    )  # fmt: skip
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU and hour")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs of the data, which is then not read")
    parser.add_argument("--lengths", metavar="P/C/R", help="mean tokens of prompt, chosen, rejected")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, nothing else")
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Read the recipe, plan, print."""
    from orpo.settings.recipe import load_recipe

    recipe = load_recipe(overrides=args.settings)
    recipe.say_notices(error=True)
    from orpo.plan.job import plan_run

    planned = plan_run(
        recipe.settings,
        args.gpu,
        gpus=args.gpus,
        nodes=args.nodes,
        mfu=args.mfu,
        price=args.price,
        pairs=args.pairs,
        lengths=args.lengths,
    )
    print(json.dumps(planned.to_json(), indent=2) if args.json else "\n".join(planned.lines()))
    return 0
