"""`orpo report RUN`: the run as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path

from orpo.errors import ConfigError


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo report` to the command line."""
    parser = words.add_parser(
        "report",
        help="write a run as one self-contained HTML page",
        description="Write RUN/report.html: results, curves, samples, data, configuration.",
    )
    parser.add_argument("run_dir", metavar="RUN", help="run directory")
    parser.add_argument(
        "--contrast",
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="draw another run in the same axes, for instance SFT=runs/sft; may be repeated "
        "(default: those of the page before)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    from orpo.report.page import write_report

    contrast: dict[str, str | Path] = {}
    for text in args.contrast:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--contrast {text}: write NAME=RUN, for instance SFT=runs/sft")
        contrast[name] = Path(folder)
    print(write_report(args.run_dir, contrast or None))
    return 0
