"""`orpo suites`: what `orpo eval MODEL --suite` can run."""

from __future__ import annotations

import argparse


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo suites` to the command line."""
    parser = words.add_parser(
        "suites",
        help="list what orpo eval --suite can run",
        description="List the suites that `orpo eval MODEL [OTHER] --suite NAMES` runs, and what each takes.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    from orpo.suites.registry import listing

    print("\n".join(listing()))
    return 0
