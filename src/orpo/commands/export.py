"""`orpo export RUN`: a folder to serve, GGUF files, a Modelfile; each checked against the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo.export.job import Exported


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo export` to the command line."""
    parser = words.add_parser(
        "export",
        help="write a checked model to serve: merged weights, GGUF files, an Ollama Modelfile",
        description="Write the model of a run as one folder: adapter merged, weights in the dtype of the "
        "base, tokenizer, template, stop tokens, model card. Whatever is written is loaded by another "
        "process and compared with the run; what does not agree is refused.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN", help="run directory, model or adapter folder, or hub name")
    parser.add_argument("--output_dir", "--output-dir", metavar="DIR", help="default: RUN-export")
    parser.add_argument(
        "--gguf",
        nargs="+",
        default=[],
        metavar="TYPE",
        help="GGUF files too: f32, f16, bf16, q8_0; needs orpo[gguf]",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the base model)")
    parser.add_argument("--base", metavar="MODEL", help="base of an adapter, where it is not where it was")
    parser.add_argument("--data", metavar="FILE", help="pairs to compare on (default: the run's own)")
    parser.add_argument("--split", help="split of a hub data set")
    shards = "largest weight file (default 5GB)"
    parser.add_argument("--max_shard_size", "--max-shard-size", default="5GB", metavar="SIZE", help=shards)
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written, how it was checked, and how to serve it."""
    from orpo.export.job import export_run

    done = export_run(
        args.model,
        args.output_dir,
        gguf=args.gguf,
        dtype=args.dtype,
        base=args.base,
        data=args.data,
        split=args.split,
        max_shard_size=args.max_shard_size,
        force=args.force,
        push=args.push,
        private=args.private,
    )
    _print(done)
    return 0


def _print(done: Exported) -> None:
    print(f"{done.folder}: {done.dtype} weights")
    print(f"  checked in a new process: {done.check.line()}")
    for path, found in done.gguf.values():
        size = f"{path.stat().st_size / 2**20:,.1f} MiB"
        print(f"{path}: {size}")
        print(f"  {'not checked' if found is None else f'checked in llama.cpp: {found.line()}'}")
        if found is not None and found.also_stops:
            print(f"  llama.cpp also ends an answer at {', '.join(found.also_stops)}")
    if done.address is not None:
        print(f"uploaded to {done.address}")
    print("serve it, with one of")
    for server, command in done.commands.items():
        print(f"  {server:<13}{command}")
