"""`orpo plan` against what happened: memory and time of real runs on a CPU, each in a process of its own.

    python benchmarks/plan_check.py [CASE ...]

Peak memory is the kernel's high-water mark of resident memory over a whole training of a few steps, minus
what was resident before the model was made; a nano model is trained before that, so that libraries are
loaded and warm. Under glibc blocks from 64 KiB on are mapped (`MALLOC_MMAP_THRESHOLD_`), so that what is
freed is given back. Time is CPU time of a step, one thread. The plan is made from the configuration and the
lengths; its rate is that of matrix products, timed before each step, times one share (mfu), which is taken
from the first case. So the first case's time says nothing, and the others are predictions.

QLoRA needs bitsandbytes (`pip install 'orpo[quant]'`), which computes in 4 bits on a CPU too; it is left out,
with a line, where that is not installed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from measure import _memory, _reset_peak
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig, TrainerCallback
from workloads import make_pairs, number_tokenizer

from orpo import ORPOConfig, ORPOTrainer
from orpo.plan.lengths import PairLengths
from orpo.plan.machine import Cluster, Gpu
from orpo.plan.plan import make_plan

STEPS, GEMMS = 2, 120
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BAR_MEMORY, BAR_TIME = 0.10, 0.25


class Case(NamedTuple):
    """One run.

    Attributes:
        config: Of its model.
        data: Its pairs (workloads.py).
        settings: Of its recipe.
        ranks: Its processes.
    """

    config: Any
    data: str
    settings: dict[str, Any]
    ranks: int = 1


def llama(hidden: int, layers: int, vocabulary: int, *, tied: bool = False) -> LlamaConfig:
    """The shapes of the other benchmarks."""
    heads = hidden // 64
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=hidden * 11 // 4, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip


LORA = {"use_peft": True, "lora_r": 16}
CASES = {
    "full": Case(llama(384, 6, 32000), "uf", {}),
    "full, one micro-batch": Case(llama(256, 6, 32000), "hh", {"per_device_train_batch_size": 8}),
    "LoRA": Case(llama(384, 6, 32000), "uf", LORA),
    "QLoRA": Case(llama(384, 6, 32000), "uf", LORA | {"load_in_4bit": True}),
    "checkpointing": Case(llama(384, 6, 32000), "uf", {"gradient_checkpointing": True}),
    "large vocabulary": Case(llama(256, 6, 151936, tied=True), "uf", {}),
    "OPT-125M": Case(OPTConfig(dropout=0.0, pad_token_id=1, eos_token_id=2), "uf", {}),
    "OPT-125M, step in backward": Case(
        OPTConfig(dropout=0.0, pad_token_id=1, eos_token_id=2), "hh",
        {"gradient_checkpointing": True, "optimizer_in_backward": True, "max_grad_norm": 0.0},
    ),
    "mixture": Case(
        MixtralConfig(
            vocab_size=32000, hidden_size=256, num_hidden_layers=4, intermediate_size=512,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
            max_position_embeddings=4096,
        ),
        "uf",
        {},
    ),
    "two ranks": Case(llama(384, 6, 32000), "uf", {}, ranks=2),
}  # fmt: skip


def settings_of(case: Case) -> dict[str, Any]:
    """The recipe of a case."""
    return {
        "per_device_train_batch_size": 4, "max_steps": STEPS, "tokens_per_micro_batch": 2048,
        "eval_strategy": "no", "save_strategy": "no", "bf16": False, "optim": "adamw_torch_fused",
    } | case.settings  # fmt: skip


class _Times(TrainerCallback):
    """CPU seconds of steps, and before each the rate of matrix products, which other work slows down too."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.gemms: list[float] = []
        self.left, self.right = torch.randn(512, 384), torch.randn(384, 1056)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        for _ in range(GEMMS):
            self.left @ self.right
        self.gemms.append(time.process_time() - began)
        self.began = time.process_time()

    @property
    def rate(self) -> float:
        """Operations a second of matrix products, on average."""
        return 2 * 512 * 384 * 1056 * GEMMS * len(self.gemms) / sum(self.gemms)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self.began)


def pairs_of(case: Case) -> list[Any]:
    """Enough pairs for all steps."""
    settings = settings_of(case)
    return make_pairs(case.data, 8000, settings["per_device_train_batch_size"] * STEPS * case.ranks)


def run(name: str) -> dict[str, float]:
    """Train a case in this process; peak in MiB and CPU seconds of a step."""
    torch.set_num_threads(1)
    case = CASES[name]
    pairs, folder = pairs_of(case), tempfile.mkdtemp()

    by_name = case.settings.get("load_in_4bit", False)

    def make(config: Any) -> Any:
        """A model of random weights; in a folder, where it is packed when it is loaded."""
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).float()
        if by_name:
            made.save_pretrained(place := tempfile.mkdtemp())
            return place
        return made

    def train(model: Any, clock: _Times) -> None:
        settings = settings_of(case)
        if not by_name and settings.pop("use_peft", False):
            from orpo.engine.adapters import add_adapter, lora_config

            config = lora_config(ORPOConfig(folder, lora_r=settings.pop("lora_r"), use_peft=True))
            model = add_adapter(model, config)
        args = ORPOConfig(folder, disable_tqdm=True, use_cpu=True, logging_steps=1, **settings)
        tokenizer = number_tokenizer(8192)
        trainer = ORPOTrainer(model, args, train_dataset=pairs, processing_class=tokenizer, callbacks=[clock])
        trainer.train()

    nano = case.config.to_dict() | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    nano |= {"num_key_value_heads": 1, "intermediate_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64}
    nano["vocab_size"] = 8192
    train(make(type(case.config)(**nano)), _Times())
    model = make(case.config) if by_name else None
    _reset_peak()
    base, clock = _memory("VmRSS"), _Times()
    train(model or make(case.config), clock)
    peak = _memory("VmHWM") - base
    return {"MiB": peak, "seconds": statistics.median(clock.steps[1:]), "rate": clock.rate}


def plan(name: str, rate: float, mfu: float) -> Any:
    """The plan of a case on this machine."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        case.config.architectures = None
        case.config.save_pretrained(folder)
        import numpy as np

        pairs = pairs_of(case)
        tokens = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])
        where = Cluster(Gpu(16.0, rate / 1e12, 10, 10, 0, has_bf16=False), "CPU", case.ranks, 1, mfu)
        lengths = PairLengths(tokens, len(pairs), 0, case.data)
        settings = settings_of(case) | {"model_name_or_path": folder}
        return make_plan(settings, where, lengths, on_cpu=True)


def measured(name: str) -> dict[str, float]:
    """Run a case in processes of its own."""
    words = [sys.executable, __file__, "--case", name]
    if CASES[name].ranks > 1:
        number = str(CASES[name].ranks)
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", number]
    environment = os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(lines[0][len("RESULT") :])
    return found


def main() -> None:
    """Measure, plan, and print errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        found = run(arguments.case)
        if os.environ.get("RANK", "0") == "0":
            print("RESULT", json.dumps(found), flush=True)
        return
    mfu = None
    print("case | planned MiB | measured | error | planned s | measured | error")
    for name in arguments.cases:
        if CASES[name].settings.get("load_in_4bit") and find_spec("bitsandbytes") is None:
            print(f"{name} | not measured: bitsandbytes is not installed")
            continue
        found = measured(name)
        if mfu is None:
            mfu = plan(name, found["rate"], 1.0).step_seconds / found["seconds"]
        planned = plan(name, found["rate"], mfu)
        memory = planned.memory.peak / 2**20
        errors = memory / found["MiB"] - 1, planned.step_seconds / found["seconds"] - 1
        print(
            f"{name} | {memory:.0f} | {found['MiB']:.0f} | {errors[0]:+.1%} | {planned.step_seconds:.2f}"
            f" | {found['seconds']:.2f} | {errors[1]:+.1%}"
            + ("" if abs(errors[0]) <= BAR_MEMORY and abs(errors[1]) <= BAR_TIME else " | MISSED"),
            flush=True,
        )
        parts = {part: round(getattr(planned.memory, part) / 2**20) for part in planned.memory.__slots__}
        print(f"    {parts}, {planned.largest:.0f} tokens, {planned.micro_batches:.1f} micro-batches")
    print(f"mfu {mfu:.2f} of the GEMM rate")


if __name__ == "__main__":
    main()
