"""`orpo generate MODEL --prompts F --out answers.jsonl`: a model's answers to many prompts, in batches."""

from __future__ import annotations

import argparse

from orpo.evaluation.answer_options import add_endpoint, add_sampling, endpoint_of, progress, sampling_of


def add_parser(words: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `orpo generate` to the command line."""
    parser = words.add_parser(
        "generate",
        help="answer a file of prompts, in batches; resumes",
        description="Answer prompts with the model of a run directory, with any model or adapter, or with a "
        "server that speaks OpenAI's protocol. Answers are written as they come, in the format of "
        "AlpacaEval's model_outputs; the same command goes on where it was stopped.",
        usage="orpo generate [MODEL] --prompts F --out FILE [options]",
        epilog="MODEL is a run directory, a model or adapter folder, or a hub name. "
        "Any setting of a recipe is accepted too: --dtype bfloat16, --text_rows plain, ...",
        allow_abbrev=False,
    )
    prompts = "lines of text (.txt), rows with prompt, instruction, question or messages, or pairs"
    parser.add_argument("--prompts", required=True, metavar="F", help=prompts)
    out = "FILE.jsonl, an answer a line, or FILE.json, the list that AlpacaEval reads"
    parser.add_argument("--out", required=True, metavar="FILE", help=out)
    parser.add_argument("--split", help="split of a folder or a hub data set (default: test)")
    system = "system turn for conversations that have none"
    parser.add_argument("--system", metavar="TEXT", help=system)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    by = "sentence-embedding model to tell by how diverse the answers are (default: by words)"
    parser.add_argument("--embeddings", metavar="FOLDER", help=by)
    add_sampling(parser, temperature=0.0, samples=1)
    add_endpoint(parser)
    parser.set_defaults(run=run, takes_settings=True)


def run(args: argparse.Namespace) -> int:
    """Answer, write, print what the answers look like."""
    from orpo.settings.recipe import load_recipe

    # Not a positional argument: where a server answers, the value of some setting would be taken for it.
    given = list(args.settings)
    model = given.pop(0) if given and not given[0].startswith("-") else None
    settings = load_recipe(overrides=given).settings
    from orpo.evaluation.answering import generate

    with progress() as shown:
        result = generate(
            model,
            args.prompts,
            args.out,
            samples=args.samples,
            sampling=sampling_of(args),
            system=args.system,
            endpoint=endpoint_of(args),
            split=args.split,
            limit=args.limit,
            batch_size=args.batch_size,
            embeddings=args.embeddings,
            progress=shown,
            **settings,
        )
    if result.summary is not None:
        print("\n".join(result.summary.lines()))
        print(f"written     {result.path}")
    result.check()
    return 0
