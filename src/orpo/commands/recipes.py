"""`orpo recipes`: the recipes that come with the package; with a name, a copy of one."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from orpo.console import say

_WIDTH = 80


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo recipes` to the command line."""
    parser = words.add_parser(
        "recipes",
        help="list the recipes that come with orpo, or copy one",
        description="List the recipes that come with orpo; with a NAME, copy that one, to be changed.",
        epilog="orpo recipes qwen3-lora, then: orpo plan qwen3-lora.yaml --gpu h100-80",
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to copy it (default: NAME.yaml here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List, or copy."""
    from orpo.settings.shipped import copy_shipped, shipped

    if args.name is None:
        listed = shipped()
        width = max(len(one.name) for one in listed)
        for one in listed:
            beside = " " * (width + 2)
            say(textwrap.fill(f"{one.name:<{width}}  {one.title}", _WIDTH, subsequent_indent=beside))
        say("\n`orpo recipes NAME` copies one here")
        return 0
    name = args.name.removesuffix(".yaml")
    out = args.out or Path(f"{name.rpartition('/')[2]}.yaml")
    say(f"{copy_shipped(name, out)}: copied; orpo plan {out}")
    return 0
