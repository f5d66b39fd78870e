"""A training in a process of its own: `python -m orpo.comparing.worker`, its settings as JSON on stdin.

Its time and its peak of memory are then its own. What is wrong with it is one line on stderr.
"""

from __future__ import annotations

import json
import sys

from orpo.console import say_error
from orpo.errors import OrpoError, RunError

CANNOT_CONTINUE, CANNOT_BEGIN = 4, 2
"""Exit status where a run has failed on the way, and where its settings, data or model cannot be used."""


def main() -> int:
    """Train; the exit status says how it ended."""
    settings = json.load(sys.stdin)
    try:
        from orpo.comparing.cost import measured  # the libraries are loaded before the clock starts

        return measured(settings).exit_status
    except OrpoError as error:
        say_error(error)
        return CANNOT_CONTINUE if isinstance(error, RunError) else CANNOT_BEGIN
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
