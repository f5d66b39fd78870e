"""Do several processes train what one process trains? DDP, FSDP2, DeepSpeed and Ray Train; 1 if not.

    python benchmarks/distributed_check.py                                      # DDP and FSDP2
    pip install 'orpo[deepspeed]' && python benchmarks/distributed_check.py --engines zero1 zero2 zero3
    pip install 'ray[train]' && python benchmarks/distributed_check.py --engines ray

Two CPU processes on gloo. DeepSpeed builds its communication when it is first used, a few minutes, and needs
a C++ compiler and ninja. Rows are uneven, micro-batches too. Compared are losses and weights after four steps
and the evaluation, for all weights and LoRA, with tied embeddings, checkpointing, a clipped gradient, DPO
after SFT, a model loaded by name, and a run that one process began and several resume; and a loss that is
not finite stops every rank before a weight moves.
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

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "ray")
CASES: dict[str, dict[str, Any]] = {
    "all weights": {},
    "tied embeddings": {"model": {"tie_word_embeddings": True}},
    "checkpointing": {"gradient_checkpointing": True},
    "clipped at 0.5": {"max_grad_norm": 0.5},
    "LoRA": {"lora": True},
    "DPO after SFT": {
        "stages": [{"objective": "sft", "share": 0.5}, {"objective": "dpo", "beta": 0.5}],
        "learning_rate": 0.1,
    },
    "by name": {"by_name": True},
    "resumed": {"save_strategy": "steps", "save_steps": 2, "resumed": True},
    "not finite": {"learning_rate": 1e30},
}
"""Case -> what differs from the plain one."""
LIMIT = 1e-5
BASE = "base"


def engine_settings(engine: str) -> dict[str, Any]:
    """Settings of a run on this engine."""
    if engine == "fsdp2":
        from test_distributed import _as_if_on_gpus

        _as_if_on_gpus()
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": wrapped}
    if engine.startswith("zero"):
        cut = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        return {
            "deepspeed": {
                "zero_optimization": cut,
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
        }
    return {}


def train(case: str, engine: str, folder: Path) -> dict[str, Any]:
    """Train one case in this process, which may be one of several; losses and evaluation."""
    import tiny_models
    import torch
    from peft import LoraConfig
    from tiny_training import logged, random_pairs, tiny_trainer

    from orpo.errors import RunError

    settings = dict(CASES[case])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shape = settings.pop("model", {})
    model: Any = tiny_models.build("Llama", **shape)
    if settings.pop("by_name", False):
        model = str(folder / BASE)
    if settings.pop("lora", False):
        adapter = LoraConfig(r=4, init_lora_weights="gaussian", target_modules="all-linear")
        settings["arguments"] = {"peft_config": adapter}
    is_resumed = settings.pop("resumed", False)

    def make(model: Any, **more: Any) -> Any:
        return tiny_trainer(
            folder, model=model, evaluation=random_pairs(7, seed=1), eval_strategy="no", use_cpu=True,
            per_device_train_batch_size=4 // world, tokens_per_micro_batch=30, **{**settings, **more},
        )  # fmt: skip

    if is_resumed and engine != "one":
        again = tiny_models.build("Llama", **shape)  # before ZeRO-3 is asked for, which would cut it
        make(model, **engine_settings(engine), max_steps=2).train()
        model = again
    trainer = make(model, **engine_settings(engine))
    try:
        trainer.train()
    except RunError as error:
        return {"stopped": str(error)}
    evaluation = trainer.evaluate()
    trainer.save_model(str(folder))
    names = ("eval_loss", "eval_accuracy", "eval_log_odds_ratio", "eval_nll")
    torch.distributed.barrier() if world > 1 else None
    return {"losses": logged(trainer), "evaluation": [evaluation[name] for name in names]}


def train_and_write(case: str, engine: str, folder: Path) -> None:
    """Train one case; the first rank writes what it found."""
    found = train(case, engine, folder)
    if os.environ.get("RANK", "0") == "0":
        (folder / "found.json").write_text(json.dumps(found))


def train_on_ray(case: str, folder: Path) -> None:
    """Train one case on two workers of Ray Train, set up as by the script of `orpo launch --on ray`."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    def worker() -> None:
        from orpo.launch.ranks import adopt_ray

        adopt_ray()
        sys.path[:0] = [str(Path(__file__).parent), str(TESTS)]
        import distributed_check

        distributed_check.train_and_write(case, "ray", folder)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    TorchTrainer(
        worker,
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(name="check", storage_path=str(folder / "ray")),
    ).fit()


def difference(folder: Path, other: Path) -> float:
    """The largest difference of two saved models' weights."""
    from safetensors.torch import load_file

    adapter = "adapter_model.safetensors"
    name = adapter if (folder / adapter).exists() else "model.safetensors"
    ours, theirs = load_file(folder / name), load_file(other / name)
    # DeepSpeed writes a vocabulary matrix that is tied to the embeddings a second time.
    assert ours.keys() - theirs.keys() <= {"lm_head.weight"}
    return max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)


def write_base(folder: Path) -> None:
    """Write the model of a case that loads one by name."""
    import tiny_models
    from tiny_tokenizer import tiny_tokenizer

    tiny_models.build("Llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def run(case: str, engine: str, folder: Path) -> dict[str, Any] | None:
    """Train one case in processes of its own; None, and a line, where they fail."""
    folder.mkdir()
    if CASES[case].get("by_name"):
        write_base(folder / BASE)
    words = [__file__, "--one-case", case, engine, str(folder)]
    several = engine not in ("one", "ray")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if several else []
    process = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True)
    found = folder / "found.json"
    if not found.exists():
        print(f"| {case} | {engine} | failed: {process.stderr.strip().splitlines()[-3:]} |", flush=True)
        return None
    answer: dict[str, Any] = json.loads(found.read_text())
    return answer


def main() -> int:
    """Run every case with every engine, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "fsdp2"])
    parser.add_argument("--one-case", nargs=3, metavar=("CASE", "ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_case:
        case, engine, folder = args.one_case
        if engine == "ray":
            train_on_ray(case, Path(folder))
        else:
            train_and_write(case, engine, Path(folder))
        return 0
    failed = 0
    print("| case | engine | loss | evaluation | weights |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for case in (case for case in CASES if args.only in case):
            start = Path(name) / case.replace(" ", "-")
            start.mkdir()
            plain = run(case, "one", start / "one")
            for engine in args.engines:
                ours = run(case, engine, start / engine)
                is_good = plain and ours and is_same(case, engine, ours, plain, start)
                failed += not is_good
    return int(failed > 0)


def is_same(case: str, engine: str, ours: dict[str, Any], plain: dict[str, Any], start: Path) -> bool:
    """Print how far two trainings are apart, and say whether that is near enough."""
    if "stopped" in ours or "stopped" in plain:
        same = ours.get("stopped", "")[:46] == plain.get("stopped", "")[:46]
        good = same and "no weight was changed" in ours["stopped"]
        print(f"| {case} | {engine} | {ours.get('stopped')} | | {'' if good else 'NO'} |", flush=True)
        return good
    kept = len(ours["losses"])  # a resumed run logs the rest alone
    pairs = zip(ours["losses"], plain["losses"][-kept:], strict=True)
    loss = max(abs(a - b) for a, b in pairs)
    evaluation = max(abs(a - b) for a, b in zip(ours["evaluation"], plain["evaluation"], strict=True))
    weights = difference(start / engine, start / "one")
    good = max(loss, evaluation, weights) <= LIMIT
    print(
        f"| {case} | {engine} | {loss:.0e} | {evaluation:.0e} | {weights:.0e}{'' if good else ' NO'} |",
        flush=True,
    )
    return good


if __name__ == "__main__":
    sys.exit(main())
