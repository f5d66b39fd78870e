"""A training in a process of its own: `python -m orpo.comparing.worker`, its settings as a line of JSON.

Its time and its peak of memory are then its own. What is wrong with it is one line on stderr. Stdin stays
open for as long as the process that has started this one lives; at its end, training stops with a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from orpo.console import say_error
from orpo.errors import OrpoError, RunError

CANNOT_CONTINUE, CANNOT_BEGIN = 4, 2
"""Exit status where a run has failed on the way, and where its settings, data or model cannot be used."""


def main() -> int:
    """Train; the exit status says how it ended."""
    settings = json.loads(os.fdopen(os.dup(0), "rb", buffering=0).readline())
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        from orpo.comparing.cost import measured  # the libraries are loaded before the clock starts

        return measured(settings).exit_status
    except OrpoError as error:
        say_error(error)
        return CANNOT_CONTINUE if isinstance(error, RunError) else CANNOT_BEGIN
    except KeyboardInterrupt:
        return 130


def _stop_when_alone() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
