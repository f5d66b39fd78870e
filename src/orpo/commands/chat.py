"""`orpo chat RUN`: talk to a model in the terminal, alone or side by side with another."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from orpo.errors import ConfigError
from orpo.evaluation.typed import typed_lines

if TYPE_CHECKING:
    from orpo.evaluation.generation import ChatModel, Sampling

_COMMANDS = "/reset starts over, /system TEXT sets the system prompt, /quit ends"


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo chat` to the command line."""
    parser = words.add_parser(
        "chat",
        help="talk to a model in the terminal, alone or side by side with its base",
        description=f"Talk to the model of a run directory, or to any model or adapter. {_COMMANDS}.",
    )
    parser.add_argument("model", metavar="RUN", help="run directory, model or adapter folder, or hub name")
    second = "answer with a second model too; without a name, the one RUN was trained from"
    parser.add_argument("--compare", nargs="?", const="", metavar="BASE", help=second)
    parser.add_argument("--beside", nargs="?", const="", help=argparse.SUPPRESS)
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: most likely token (default 0.7)")
    parser.add_argument("--top_p", "--top-p", type=float, default=0.95, help="in (0, 1] (default 0.95)")
    parser.add_argument("--max_tokens", "--max-tokens", type=int, default=256, help="default 256")
    parser.add_argument("--seed", type=int, help="random seed, for the same answers each time")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 or auto")
    code = "allow code from the model's repository"
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true", help=code)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, then answer each line of the terminal, or of stdin where that is no terminal."""
    second = _second_model(args)
    from orpo.evaluation.generation import ChatModel, Sampling
    from orpo.settings.config import OrpoSettings

    limits = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
    sampling = Sampling(**limits, seed=args.seed)
    settings = OrpoSettings(dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    models = [ChatModel.load(args.model, settings)]
    template = models[0].template
    if second is not None:
        # A base model has no template of its own; it is asked through that of the trained one.
        models.append(ChatModel.load(second, settings, template.text if template else None))
    if template is None:
        print(f"{args.model} uses no chat template: it continues your text as it is", file=sys.stderr)
    _talk(models, sampling, args.system)
    return 0


def _second_model(args: argparse.Namespace) -> str | None:
    from orpo.run.checkpoints import base_model_name

    if args.beside is not None:
        print("--beside is now called --compare", file=sys.stderr)
        args.compare = args.beside
    if args.compare != "":
        return str(args.compare) if args.compare is not None else None
    base = base_model_name(args.model)
    if base is None:
        raise ConfigError(f"--compare: {args.model} does not say what it was trained from; name the model")
    return base


def _talk(models: list[ChatModel], sampling: Sampling, system: str | None) -> None:
    if sys.stdin.isatty():
        print(f"{' and '.join(model.name for model in models)}. {_COMMANDS}.")
    for text in typed_lines():
        word, _, rest = text.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word in ("/reset", "/system"):
            for model in models:
                model.turns.clear()
            system = rest.strip() or None if word == "/system" else system
            print("(a new conversation)")
        elif text.startswith("/"):
            print(f"({_COMMANDS})")
        elif text:
            _answer_all(models, text, sampling, system)


def _answer_all(models: list[ChatModel], text: str, sampling: Sampling, system: str | None) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for number, model in enumerate(models):
        if len(models) > 1:
            console.print(
                f"[{model.name}]", style="bold cyan" if number == 0 else "bold yellow", markup=False
            )
        try:
            model.answer(text, sampling, system=system, stream=True)
        except KeyboardInterrupt:
            print("\n(stopped)")
            return
