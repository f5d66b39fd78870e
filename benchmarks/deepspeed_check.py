"""Does DeepSpeed train what one process trains? ZeRO 1, 2 and 3 on two CPU processes, on gloo; 1 if not.

    pip install 'orpo[deepspeed]' && python benchmarks/deepspeed_check.py

Needs a C++ compiler and ninja: DeepSpeed builds its communication when it is first used, a few minutes. Rows
are uneven, micro-batches too. Compared are losses and weights after four steps and the evaluation, for all
weights and LoRA, with tied embeddings, checkpointing, a clipped gradient, a model loaded by name, and a run
that is stopped and resumed; and a loss that is not finite stops every rank before a weight moves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "tied embeddings": {"model": {"tie_word_embeddings": True}},
    "checkpointing": {"gradient_checkpointing": True},
    "clipped at 0.5": {"max_grad_norm": 0.5},
    "LoRA": {"lora": True},
    "by name": {"by_name": True},
    "resumed": {"save_strategy": "steps", "save_steps": 2, "resumed": True},
    "not finite": {"learning_rate": 1e30},
}
"""Case -> what differs from the plain one."""
LIMIT = 1e-5


def train(case: str, stage: int, folder: Path) -> dict[str, Any] | None:
    """Train one case; the first rank's losses, evaluation and file of weights."""
    import tiny_models
    import torch
    from peft import LoraConfig
    from tiny_tokenizer import tiny_tokenizer
    from tiny_training import logged, random_pairs, tiny_trainer

    from orpo.errors import RunError

    settings = dict(CASES[case])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model, again = (tiny_models.build("Llama", **settings.get("model", {})) for _ in range(2))
    settings.pop("model", None)
    if settings.pop("by_name", False):
        base = folder / f"base-{os.environ.get('RANK', 0)}"
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        model = str(base)
    resumed = settings.pop("resumed", False)
    if settings.pop("lora", False):
        adapter = LoraConfig(r=4, init_lora_weights="gaussian", target_modules="all-linear")
        settings["arguments"] = {"peft_config": adapter}
    if stage:
        settings["deepspeed"] = {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def make(**more: Any) -> Any:
        return tiny_trainer(
            folder, model=model, evaluation=random_pairs(7, seed=1), eval_strategy="no", use_cpu=True,
            per_device_train_batch_size=4 // world, tokens_per_micro_batch=30, **{**settings, **more},
        )  # fmt: skip

    if resumed and stage:
        make(max_steps=2).train()
        model = again  # made before ZeRO-3 was asked for, which would cut it
    trainer = make()
    try:
        trainer.train()
    except RunError as error:
        return {"stopped": str(error)}
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder))
    names = ("eval_loss", "eval_accuracy", "eval_log_odds_ratio", "eval_nll")
    torch.distributed.barrier() if world > 1 else None
    return {"losses": logged(trainer), "evaluation": [evaluation[name] for name in names]}


def difference(folder: Path, other: Path) -> float:
    """The largest difference of two saved models' weights."""
    from safetensors.torch import load_file

    name = (
        "adapter_model.safetensors"
        if (folder / "adapter_model.safetensors").exists()
        else "model.safetensors"
    )
    ours, theirs = load_file(folder / name), load_file(other / name)
    # DeepSpeed writes a vocabulary matrix that is tied to the embeddings a second time.
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


def main() -> int:
    """Run every case with every stage, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--one-case", nargs=3, metavar=("CASE", "STAGE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_case:
        case, stage, folder = args.one_case
        found = train(case, int(stage), Path(folder))
        if os.environ.get("RANK", "0") == "0":
            (Path(folder) / "found.json").write_text(json.dumps(found))
        return 0
    failed = 0
    print("| case | stage | loss | evaluation | weights |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for case in (case for case in CASES if args.only in case):
            results = {}
            for stage in (0, *args.stages):
                folder = Path(name) / f"{case}-{stage}".replace(" ", "-")
                folder.mkdir()
                words = [__file__, "--one-case", case, str(stage), str(folder)]
                launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if stage else []
                process = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True)
                found = folder / "found.json"
                results[stage] = (folder, json.loads(found.read_text()) if found.exists() else None)
                if results[stage][1] is None:
                    failed += 1
                    print(
                        f"| {case} | {stage} | failed: {process.stderr.strip().splitlines()[-3:]} |",
                        flush=True,
                    )
                elif stage:
                    failed += not _said(case, stage, results[0], results[stage])
    return int(failed > 0)


def _said(case: str, stage: int, one: tuple[Path, Any], other: tuple[Path, Any]) -> bool:
    (folder, ours), (reference, plain) = other, one
    if "stopped" in ours or "stopped" in plain:
        same = ours.get("stopped", "")[:46] == plain.get("stopped", "")[:46]
        good = same and "no weight was changed" in ours["stopped"]
        print(f"| {case} | {stage} | {ours.get('stopped')} | | {'' if good else 'NO'} |", flush=True)
        return good
    kept = len(ours["losses"])  # a resumed run logs the rest alone
    pairs = zip(ours["losses"], plain["losses"][-kept:], strict=True)
    loss = max(abs(a - b) for a, b in pairs)
    evaluation = max(abs(a - b) for a, b in zip(ours["evaluation"], plain["evaluation"], strict=True))
    weights = difference(folder, reference)
    good = max(loss, evaluation, weights) <= LIMIT
    print(
        f"| {case} | {stage} | {loss:.0e} | {evaluation:.0e} | {weights:.0e}{'' if good else ' NO'} |",
        flush=True,
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
