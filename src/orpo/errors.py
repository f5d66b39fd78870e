"""Errors a user can fix; the command line prints one as a single line and exits with status 2.

    OrpoError
    ├── ConfigError   a setting: in a recipe, on the command line, in Python   (a ValueError too)
    ├── DataError     a row, a data set, a file of a run                       (a ValueError too)
    │   └── BadRow    one field of one row (data/messages.py)
    ├── ModelError    a model, a tokenizer, an adapter                         (a ValueError too)
    └── RunError      a run that cannot continue                               (a RuntimeError too)

Any other exception is a bug in this package and keeps its traceback.
"""


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
