"""The program: `orpo`, or `python -m orpo` for launchers that want a module (`torchrun -m orpo train ...`).

It is entered here, not in cli.py, so that Ctrl-C is one line while the libraries are still being imported.
"""

import os
import signal
import sys
from types import FrameType


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C; an import left in the middle fails in its own ways, so there the process ends at once."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            os.write(2, b"orpo: stopped\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

from orpo.cli import main  # noqa: E402 - the handler comes first

if __name__ == "__main__":
    sys.exit(main())
