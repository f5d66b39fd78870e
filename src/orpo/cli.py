"""The `orpo` command: one word, one job; `orpo WORD --help` for each.

Nothing heavy is imported before a command needs it, so help and errors in a recipe appear right away.
What a user can fix is one line on stderr and exit status 2; the rest are bugs and keep their traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

from orpo import __version__
from orpo.commands import COMMANDS
from orpo.console import is_text, say, say_error, speaking_aside
from orpo.errors import ConfigError, OrpoError, RunError

_EPILOG = """examples:
  orpo demo
  orpo data inspect pairs.jsonl --model M
  orpo data show pairs.jsonl --model M
  orpo train recipe.yaml --learning_rate 1e-5
  orpo train --model_name_or_path M --dataset_name pairs.jsonl --output_dir runs/first
  orpo eval runs/first --data test.jsonl
  orpo chat runs/first --compare M
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 2 for a mistake in the input, 130 after Ctrl-C; that of a command, such as 3.
    """
    try:
        return _run(argv)
    except OrpoError as error:
        say_error(error, everywhere=isinstance(error, RunError))
        return 2
    except KeyboardInterrupt:
        say("orpo: stopped", error=True)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; keep the interpreter from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: Sequence[str] | None) -> int:
    _check_encoding(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args, settings = parser.parse_known_args(argv)
    if args.word is None:
        parser.print_help()
        return 0
    if settings and not args.takes_settings:
        parser.error(f"orpo {args.word}: unrecognized arguments: {' '.join(settings)}")
    args.settings = settings
    # What PEFT and everybody's recipes call `gradient_checkpointing` will not have that name for ever.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(.*[/\\])?transformers\b")
    with speaking_aside() if getattr(args, "json", False) else nullcontext():
        return int(args.run(args))


def _check_encoding(words: Sequence[str]) -> None:
    """Refuse bytes that no file of a run could be written with, nor any tokenizer read."""
    for word in words:
        if not is_text(word):
            raise ConfigError(f"command line: {word!r} holds bytes that are not UTF-8; write it in UTF-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo",
        description="From preference pairs to an aligned language model in one stage, with ORPO.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"orpo {__version__}")
    parser.set_defaults(takes_settings=False)
    words = parser.add_subparsers(dest="word", metavar="WORD", title="words")
    for command in COMMANDS:
        command.add_parser(words)
    return parser


if __name__ == "__main__":
    sys.exit(main())
