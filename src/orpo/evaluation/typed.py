"""What a user types into `orpo chat`, in a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from orpo.console import is_text
from orpo.errors import DataError


def typed_lines() -> Iterator[str]:
    """What the user types, line by line, without the blanks around it.

    Raises:
        DataError: A line is not UTF-8.
    """
    try:
        for line in _typed():
            if not is_text(line):
                raise DataError(f"{line.strip()!r} holds bytes that are not UTF-8; type it in UTF-8")
            yield line.strip()
    except UnicodeDecodeError as error:
        raise DataError(f"what was typed is not UTF-8 ({error.reason}); type it in UTF-8") from None


def _typed() -> Iterator[str]:
    """The lines of stdin; Ctrl-D and Ctrl-C at the prompt of a terminal end them."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives input() its history and editing)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
