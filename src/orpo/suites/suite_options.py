"""What the command line says of suites: options of `orpo eval`, and what it does with them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from orpo.console import LongWork
from orpo.errors import ConfigError
from orpo.evaluation.answer_options import add_endpoint, endpoint_of

_ONLY_WITH_SUITES = ("limit", "max_tokens", "judge", "judge_model", "judge_key_env", "at_once")


def add_suites(parser: argparse.ArgumentParser) -> None:
    """Add suites to a command that takes one or two models."""
    group = parser.add_argument_group("suites, instead of --data")
    names = "suites to run, with commas between them: ifeval,bias,pairs:FILE (orpo suites lists them)"
    group.add_argument("--suite", action="append", metavar="NAMES", help=names)
    group.add_argument("--limit", type=int, metavar="N", help="the first N items of each suite")
    longest = "longest answer, in tokens (default: each suite's own)"
    group.add_argument("--max_tokens", "--max-tokens", type=int, metavar="N", help=longest)
    judge = "rates answers: endpoint:URL or model:MODEL"
    group.add_argument("--judge", metavar="JUDGE", help=judge)
    group.add_argument(
        "--judge_model", "--judge-model", metavar="NAME", help="its server's name of the model"
    )
    key = "environment variable that holds its key"
    group.add_argument("--judge_key_env", "--judge-key-env", metavar="NAME", help=key)
    most = "prompts answered at once (default: as many as memory has room for)"
    group.add_argument("--at_once", "--at-once", type=int, metavar="N", help=most)
    add_endpoint(parser, address=False)


def check_no_suites(args: argparse.Namespace) -> None:
    """Stop where options of suites are given without one.

    Raises:
        ConfigError: One is.
    """
    for name in _ONLY_WITH_SUITES:
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} is of a suite; name one with --suite")
    endpoint_of(args)


def run_chosen(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Run the suites that were named, print and save."""
    from orpo.data.stages import following
    from orpo.evaluation.endpoint import Endpoint
    from orpo.suites.job import ENDPOINT, run_suites
    from orpo.suites.table import lines

    *first, model = args.models
    url = next((name.partition(":")[2] for name in args.models if name.startswith(f"{ENDPOINT}:")), None)
    judge_url = (args.judge or "").partition(":")[2] if (args.judge or "").startswith(ENDPOINT) else ""
    judge = None
    if judge_url:
        key = args.judge_key_env
        judge = Endpoint(url=judge_url, model=args.judge_model, api_key_env=key, concurrency=args.concurrency)
    with LongWork() as work, following(work):
        found = run_suites(
            model,
            args.suite,
            first=first[0] if first else None,
            limit=args.limit,
            max_tokens=args.max_tokens,
            endpoint=endpoint_of(args, url),
            judge=args.judge,
            judge_endpoint=judge,
            batch_size=args.at_once,
            **settings,
        )
    if args.json:
        print(json.dumps([one.to_json() for one in found], indent=2))
        return 0
    print("\n\n".join("\n".join(lines(one)) for one in found))
    return 0
