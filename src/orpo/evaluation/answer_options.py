"""What the command line says of asking a model many prompts: options, and a bar while it answers.

`orpo generate` and `orpo data pairs` share these. Nothing heavy is imported before an option is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo.evaluation.endpoint import Endpoint
    from orpo.evaluation.generation import Sampling

_SECONDS_BETWEEN_LINES = 30


def add_sampling(parser: argparse.ArgumentParser, *, temperature: float, samples: int) -> None:
    """Add how answers are drawn."""
    group = parser.add_argument_group("answers")
    number = f"answers to each prompt (default {samples})"
    group.add_argument("--samples", type=int, default=samples, metavar="K", help=number)
    likeliest = f"0: the likeliest token (default {temperature:g})"
    group.add_argument("--temperature", type=float, default=temperature, metavar="T", help=likeliest)
    group.add_argument(
        "--top_p", "--top-p", type=float, default=1.0, metavar="P", help="in (0, 1] (default 1)"
    )
    longest = "longest answer, in tokens (default 512)"
    group.add_argument("--max_tokens", "--max-tokens", type=int, default=512, metavar="N", help=longest)
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    most = "prompts answered at once (default: as many as memory has room for)"
    group.add_argument("--batch_size", "--batch-size", type=int, metavar="N", help=most)


def add_endpoint(parser: argparse.ArgumentParser, *, address: bool = True) -> None:
    """Add a server to ask instead of a model on this machine.

    Args:
        parser: Of the command.
        address: Whether the server is named by an option of its own.
    """
    group = parser.add_argument_group("a server that speaks OpenAI's protocol, instead of a model here")
    if address:
        group.add_argument("--endpoint", metavar="URL", help="its address: http://127.0.0.1:8000/v1")
    only = "its name of the model (default: the only one it has)"
    group.add_argument("--endpoint_model", "--endpoint-model", metavar="NAME", help=only)
    key = "environment variable that holds the key (default OPENAI_API_KEY)"
    group.add_argument("--api_key_env", "--api-key-env", metavar="NAME", help=key)
    fields = "further fields of each request, null takes one away"
    group.add_argument("--request", metavar="JSON", help=fields)
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default 8)"
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How answers are drawn, as the options say."""
    from orpo.evaluation.generation import Sampling

    limits = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    return Sampling(**limits, seed=args.seed)


def endpoint_of(args: argparse.Namespace, url: str | None = None) -> Endpoint | None:
    """The server that the options name; None where they name none.

    Args:
        args: With the options of `add_endpoint`.
        url: Its address, where that is no option of its own.
    """
    from orpo.errors import ConfigError
    from orpo.evaluation.endpoint import Endpoint

    if args.concurrency < 1:
        raise ConfigError(f"--concurrency: {args.concurrency} is out of range; expected at least 1")
    url = url or getattr(args, "endpoint", None)
    if url is None:
        if args.endpoint_model or args.api_key_env or args.request:
            raise ConfigError("options of a server without a server: name its address, as --help says")
        return None
    try:
        request = json.loads(args.request or "{}")
    except ValueError:
        request = None
    if not isinstance(request, dict):
        raise ConfigError('--request: expected a JSON object, for instance {"top_k": 20}')
    return Endpoint(
        url=url,
        model=args.endpoint_model,
        api_key_env=args.api_key_env,
        concurrency=args.concurrency,
        request=request,
    )


@contextmanager
def progress(what: str = "answers") -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal, else a line now and then; on stderr.

    Args:
        what: Is made.
    """
    left = _TimeLeft()
    if not sys.stderr.isatty():
        yield _Lines(what, left)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, left="")
        yield lambda done, total: bar.update(task, completed=done, total=total, left=left(done, total))


class _TimeLeft:
    """How long the rest takes at the rate since the start: answers come a batch at a time."""

    def __init__(self) -> None:
        self._began: tuple[float, int] | None = None

    def __call__(self, done: int, total: int) -> str:
        """`0:01:20 left`; nothing before the first answer."""
        now = time.monotonic()
        self._began = self._began or (now, done)
        began, first = self._began
        if done == first:
            return ""
        seconds = int((now - began) / (done - first) * (total - done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class _Lines:
    """Says every half minute how far the work is."""

    def __init__(self, what: str, left: _TimeLeft) -> None:
        self._what = what
        self._left = left
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now, left = time.monotonic(), self._left(done, total)
        if now - self._said < _SECONDS_BETWEEN_LINES or done >= total:
            return
        self._said = now
        far = f"{done:,} of {total:,} {self._what}"
        print(f"{far}, {left}" if left else far, file=sys.stderr, flush=True)
