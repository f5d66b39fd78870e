"""`orpo data WORD`: see, clean, choose and make what trains, before anything is trained."""

from __future__ import annotations

import argparse

from orpo.commands.data import inspect, pairs, prepare, show, subset

WORDS = (inspect, show, prepare, subset, pairs)


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo data` and its words to the command line."""
    parser = words.add_parser(
        "data",
        help="before training: see what trains, clean and choose pairs, make rejected answers",
        description="See, clean, choose and make what trains, before anything is trained.",
    )
    parser.set_defaults(run=lambda args: print(parser.format_help(), end="") or 0)
    words_of_data = parser.add_subparsers(dest="data_word", metavar="WORD", title="words")
    for word in WORDS:
        word.add_parser(words_of_data)
