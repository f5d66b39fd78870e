"""Errors a user can fix; the command line prints one as a single line and exits with status 2.

    OrpoError
    ├── ConfigError   a setting: in a recipe, on the command line, in Python   (a ValueError too)
    ├── DataError     a row, a data set, a file of a run                       (a ValueError too)
    │   └── BadRow    one field of one row (data/messages.py)
    ├── ModelError    a model, a tokenizer, an adapter                         (a ValueError too)
    └── RunError      a run that cannot continue                               (a RuntimeError too)

Any other exception is a bug in this package and keeps its traceback. Libraries raise what they like, so each
door through which they are fed (a file, a recipe, a model, a run directory) is one `with raised_as(...)`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 400
"""Characters of a library's message that are passed on."""


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OrpoError(Exception):
    """Base class. The message says what is wrong, where, and what to do about it."""


class ConfigError(OrpoError, ValueError):
    """A recipe or an override has a setting we do not know, or a value that cannot be used."""


class DataError(OrpoError, ValueError):
    """A preference row is malformed, or a data set cannot be trained on."""


class ModelError(OrpoError, ValueError):
    """A model or a tokenizer cannot be trained as asked."""


class RunError(OrpoError, RuntimeError):
    """A run cannot continue: a non-finite loss, a damaged checkpoint, a full disk."""


@contextmanager
def raised_as(kind: type[OrpoError], prefix: str, what_to_do: str = "") -> Iterator[None]:
    """Turn what a library or the machine raises in a block into one of our errors.

    What a line of this package raises itself is a bug, and passes unchanged.

    Args:
        kind: The error to raise.
        prefix: What was being done, or with which file.
        what_to_do: Follows the library's message.
    """
    try:
        yield
    except OrpoError:
        raise
    except Exception as error:
        if _is_our_own(error):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        words = words if len(words) <= LONGEST else words[: LONGEST - 4] + " ..."
        raise kind(f"{prefix} ({words.rstrip('.')}){'; ' if what_to_do else ''}{what_to_do}") from error


def _is_our_own(error: Exception) -> bool:
    if isinstance(error, (OSError, ImportError, MemoryError, EOFError, RecursionError)):
        return False
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1]).startswith("orpo.") and frames[-1] != __name__
