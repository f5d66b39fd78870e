"""One measurement in a process of its own: `python measure.py '{"task": ..., ...}'` prints one JSON line.

CPU time is that of the whole process (user + system) around the thing measured, because the machine may be
shared; wall time is given next to it. Peak memory is the kernel's high-water mark (VmHWM), reset once imports
are warm and the model is built; what is reported is the part above model and Adam's two moments, gradients
included.
"""

import copy
import dataclasses
import functools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the oracle in float64

import datasets
import torch
import transformers
from transformers import PreTrainedModel
from workloads import SHAPES, Shape, make_pairs, number_tokenizer, trl_rows, useful_flops

from orpo.pairs import TokenizedPair

BETA = 0.1
TINY = Shape(64, 1, 256)
PACKED = 1024
"""Tokens of a packed sequence of TRL's SFT, about as many as eight pairs of HH-RLHF have."""


def main() -> None:
    """Run the task given and print its result."""
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec.get("threads", 1))
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "train": train, "step": step, "agreement": agreement, "micro_batches": micro_batches, "head": head,
        "sweep": sweep, "data": data,
    }  # fmt: skip
    result = tasks[spec.pop("task")](**{k: v for k, v in spec.items() if k not in ("threads", "rep")})
    print("RESULT " + json.dumps(result))


# ------------------------------------------------------------------------------------------------ tasks


def train(
    side: str, shape: str, data: str, pairs: int, per_step: int, dtype: str = "fp32",
    checkpointing: bool = False, order: str = "random", objective: str = "orpo", apart: bool = False,
    in_backward: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A whole `train()` of one epoch: data order, collation, forward, backward, clipping, AdamW, logging.

    With `apart`, ours has pairs share nothing with each other, as before it knew how. With `in_backward`, its
    AdamW steps in the backward pass, without clipping. The memory of TRL's reference model, which is there
    before training, counts as part of the peak.
    """
    make = functools.partial(
        _trainer, side, dtype=dtype, checkpointing=checkpointing, order=order, objective=objective,
        **({"optimizer_in_backward": True, "max_grad_norm": 0.0} if in_backward else {}),
    )  # fmt: skip
    make(TINY.build(), make_pairs("9/5/4", TINY.vocab, 4), 2).train()
    model, workload = _build(shape), make_pairs(data, SHAPES[shape].vocab, pairs)
    trainer = make(model, workload, per_step)
    if apart:
        prepare = trainer._preparation  # not called yet: the probe is part of the run
        trainer._preparation = lambda: dataclasses.replace(prepare(), share_from=None)
    gemm = [gemm_rate(dtype, SHAPES[shape].hidden)]
    base = _memory("VmRSS")
    _reset_peak()
    timer = _Timer()
    trainer.train()
    result = timer.stop()
    states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    result["peak_mib"] = _memory("VmHWM") - base - states / 2**20
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        result["peak_mib"] += sum(4 * p.numel() for p in reference.parameters()) / 2**20
    result["steps"] = trainer.state.global_step
    result["loss"] = _last_loss(trainer)
    gemm.append(gemm_rate(dtype, SHAPES[shape].hidden))
    return result | {"gemm": max(gemm), "flops": useful_flops(workload, SHAPES[shape], model)}


def step(
    side: str, shape: str, data: str, per_step: int, dtype: str = "fp32", checkpointing: bool = False,
    repeats: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Forward, backward and AdamW on one batch, repeated; medians. Peak memory is that of all repeats.

    `gemm` is the median over the repeats of the best GEMM rate right before and right after each: these
    processors' clocks change by a quarter from one second to the next.
    """
    model, workload = _build(shape), make_pairs(data, SHAPES[shape].vocab, per_step)
    run = _step_of(side, model, workload, dtype, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    gemm = [gemm_rate(dtype, SHAPES[shape].hidden)]
    flops = useful_flops(workload, SHAPES[shape], model)
    base = _memory("VmRSS")
    _reset_peak()
    times, updates, losses, shares, peak = [], [], [], [], 0.0
    for _ in range(repeats + 1):
        timer = _Timer()
        losses.append(run())
        times.append(timer.stop())
        timer = _Timer()
        optimizer.step()
        optimizer.zero_grad()
        updates.append(timer.stop()["cpu"])
        peak = max(peak, _memory("VmHWM") - base)
        gemm.append(gemm_rate(dtype, SHAPES[shape].hidden))
        _reset_peak()
        shares.append(flops / times[-1]["cpu"] / statistics.mean(gemm[-2:]))
    return {
        "cpu": statistics.median(t["cpu"] for t in times[1:]),
        "cpu_all": [t["cpu"] for t in times[1:]],
        "wall": statistics.median(t["wall"] for t in times[1:]),
        "first_cpu": times[0]["cpu"],
        "optimizer_cpu": statistics.median(updates[1:]),
        "peak_mib": peak,
        "loss": losses[0],
        "gemm": statistics.median(gemm),
        "flops": flops,
        "share": statistics.median(shares[1:]),
    }


def agreement(shape: str, data: str, per_step: int, dtype: str = "fp32") -> dict[str, Any]:
    """Loss and every gradient of one batch by both sides, from the same weights, and by an oracle in float64.

    An activation with a kink (OPT's ReLU) may round to its other side by either, and changes a gradient much.
    That reads as a difference of the two sides, and as a distance of one of them from float64.
    """
    from reference import loss_and_gradients

    from orpo.settings.config import Objective

    model, workload = _build(shape), make_pairs(data, SHAPES[shape].vocab, per_step)
    found: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}
    for side in ("trl", "ours"):
        loss = _step_of(side, model, workload, dtype, checkpointing=False)()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[side] = (loss, gradients)
        model.zero_grad(set_to_none=True)
    (trl_loss, trl), (our_loss, ours) = found["trl"], found["ours"]
    _, exact = loss_and_gradients(_build(shape), workload, Objective(preference_weight=BETA))
    whole = sum(gradient.norm().square() for gradient in trl.values()).sqrt()
    # The gradient of a key bias is zero by symmetry, and rounding noise on both sides: 1e-10 of the whole.
    real = [name for name, gradient in trl.items() if gradient.norm() > 1e-8 * whole]
    errors = {name: ((ours[name] - trl[name]).norm() / trl[name].norm()).item() for name in real}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "loss_ours": our_loss, "loss_trl": trl_loss, "loss_difference": abs(our_loss - trl_loss),
        "gradient_error": errors[worst], "parameter": worst, "parameters": len(errors),
        "ours_to_float64": _largest_error(ours, exact, real),
        "trl_to_float64": _largest_error(trl, exact, real),
        "left_out": len(trl) - len(real), "ids_equal": True,
    }  # fmt: skip


def _largest_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], names: list[str]) -> float:
    """The largest relative error of a gradient."""
    return max(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in names)


def micro_batches(
    shape: str, data: str, per_step: int, budgets: list[int], repeats: int = 3
) -> dict[str, Any]:
    """One step of ours under several token budgets of a micro-batch, interleaved: time and peak memory.

    A budget's peak is measured after the heap has been given back, in rising order of the budgets.
    """
    import ctypes

    from orpo.engine.model import prepare_model
    from orpo.engine.steps import build_step
    from orpo.settings.config import Objective

    model, workload = _build(shape), make_pairs(data, SHAPES[shape].vocab, per_step)
    objective = Objective(preference_weight=BETA)
    prepared = prepare_model(model, probe=False)
    steps = {b: build_step(workload, range(len(workload)), prepared.batches(objective, b)) for b in budgets}

    def run(budget: int) -> None:
        for batch in steps[budget].batches:
            model(batch=batch, denominators=steps[budget].denominators).loss.backward()
        model.zero_grad(set_to_none=True)

    run(min(budgets))
    trim = ctypes.CDLL("libc.so.6").malloc_trim
    peaks = {}
    for budget in sorted(budgets):
        trim(0)
        base = _memory("VmRSS")
        _reset_peak()
        run(budget)
        peaks[budget] = _memory("VmHWM") - base
    times: dict[int, list[float]] = {b: [] for b in budgets}
    for _ in range(repeats):
        for budget in budgets:
            timer = _Timer()
            run(budget)
            times[budget].append(timer.stop()["cpu"])
    return {
        "budgets": budgets, "micro_batches": [len(steps[b].batches) for b in budgets],
        "tokens": sum(batch.num_tokens for batch in steps[budgets[0]].batches),
        "cpu": [statistics.median(times[b]) for b in budgets], "cpu_min": [min(times[b]) for b in budgets],
        "peak_mib": [peaks[b] for b in budgets],
    }  # fmt: skip


def data(side: str, rows: int, processes: int) -> dict[str, Any]:
    """From rows of text to a trainer that is ready to train: read, rendered, tokenized, checked; no cache."""
    from importlib.resources import files

    from preference_rows import make_rows

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(files("orpo") / "demo" / "model"))
    tokenizer.model_max_length = 4096
    made = make_rows(rows)

    def ready(chosen: list[dict[str, Any]]) -> None:
        common = {
            "output_dir": tempfile.mkdtemp(prefix="bench-"), "max_length": 4096, "use_cpu": True,
            "report_to": "none", "disable_tqdm": True,
            "dataset_num_proc": processes if processes > 1 else None,
        }  # fmt: skip
        given = datasets.Dataset.from_list(chosen)
        model = Shape(64, 1, len(tokenizer)).build()
        if side == "ours":
            from orpo.training.trainer import ORPOConfig, ORPOTrainer

            settings = ORPOConfig(**common, eval_strategy="no")
            trainer = ORPOTrainer(model=model, args=settings, train_dataset=given, processing_class=tokenizer)
        else:
            from trl.experimental.orpo import ORPOConfig as TrlConfig
            from trl.experimental.orpo import ORPOTrainer as TrlTrainer

            trainer = TrlTrainer(
                model=model, args=TrlConfig(**common), train_dataset=given, processing_class=tokenizer
            )
        assert len(trainer.train_dataset) == len(chosen)

    ready(made[:64])
    timer = _Timer()
    ready(made)
    return timer.stop()


def head(variant: str, shape: str, data: str, pairs: int, repeats: int = 5) -> dict[str, Any]:
    """Loss and gradients from given hidden states by one of `heads.VARIANTS`."""
    from heads import make_head

    loss_of, hidden_ND, weight_VD, _ = make_head(variant, shape, data, pairs)

    def run() -> tuple[float, float]:
        loss = loss_of(hidden_ND, weight_VD)
        loss.backward()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        norm = (hidden_ND.grad.double().square().sum() + weight_VD.grad.double().square().sum()).sqrt().item()
        hidden_ND.grad = weight_VD.grad = None
        return loss.item(), norm

    base = _memory("VmRSS")
    _reset_peak()
    times, found = [], (0.0, 0.0)
    for _ in range(repeats + 1):
        timer = _Timer()
        found = run()
        times.append(timer.stop()["cpu"])
    return {
        "cpu": statistics.median(times[1:]), "cpu_all": times[1:], "first_cpu": times[0],
        "peak_mib": _memory("VmHWM") - base, "loss": found[0], "gradient_norm": found[1],
    }  # fmt: skip


def sweep(side: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """One step of ours or of TRL's for each point: peak memory under the allocator's defaults, then time.

    A point's timed step is its third: the memory of the first is measured, the second grows the heap that is
    kept from then on.
    """
    cpu, peak = [], []
    for point in points:
        model = _build(point["shape"])
        workload = make_pairs(point["data"], SHAPES[point["shape"]].vocab, point["per_step"])
        run = _step_of(side, model, workload, "fp32", checkpointing=False)
        _keep_heap(False)
        base = _memory("VmRSS")
        _reset_peak()
        run()
        peak.append(_memory("VmHWM") - base)
        model.zero_grad(set_to_none=True)
        _keep_heap(True)
        run()
        timer = _Timer()
        run()
        cpu.append(timer.stop()["cpu"])
        del model, run
    return {"cpu": cpu, "peak_mib": peak}


# ------------------------------------------------------------------------------------------------ both sides


def _build(shape: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return SHAPES[shape].build()


def _trainer(
    side: str, model: PreTrainedModel, pairs: list[TokenizedPair], per_step: int, dtype: str,
    checkpointing: bool, order: str, objective: str = "orpo", **settings: Any,
) -> Any:  # fmt: skip
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="bench-"), "per_device_train_batch_size": per_step,
        "num_train_epochs": 1, "learning_rate": 1e-6, "max_length": 4096, "use_cpu": True,
        "bf16": dtype == "bf16", "gradient_checkpointing": checkpointing, "logging_steps": 10,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 0,
    } | ({} if objective == "sft" else {"beta": BETA}) | settings  # fmt: skip
    tokenizer = number_tokenizer(model.config.vocab_size)
    if side == "ours":
        from orpo.data.dataset import TokenizedDataset
        from orpo.training.trainer import ORPOConfig, ORPOTrainer

        data = TokenizedDataset.from_pairs(pairs)
        args = ORPOConfig(**common, eval_split=0.0, objective=objective)
        return ORPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    if order == "grouped":
        common["train_sampling_strategy"] = "group_by_length"
    make = {"orpo": _trl_orpo, "dpo": _trl_dpo, "sft": _trl_sft}[objective]
    return make(model, pairs, tokenizer, common, order)


def _trl_orpo(
    model: PreTrainedModel, pairs: list[TokenizedPair], tokenizer: Any, common: dict[str, Any], order: str
) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=model, args=ORPOConfig(**common), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(trl_rows(pairs)),
    )  # fmt: skip
    _check_same_ids(trainer.train_dataset, pairs)
    return trainer


def _trl_dpo(
    model: PreTrainedModel, pairs: list[TokenizedPair], tokenizer: Any, common: dict[str, Any], order: str
) -> Any:
    """With a reference model in memory, as by default: a copy, since there is no name to load one by."""
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=DPOConfig(**common), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(trl_rows(pairs)),
    )  # fmt: skip
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        for side in ("prompt", "chosen", "rejected"):
            assert row[f"{side}_ids"] == list(getattr(pair, side))
    return trainer


def _trl_sft(
    model: PreTrainedModel, pairs: list[TokenizedPair], tokenizer: Any, common: dict[str, Any], order: str
) -> Any:
    """On prompt and chosen answer, the loss over both; packed into sequences of `PACKED` tokens, or not."""
    from trl import SFTConfig, SFTTrainer

    rows = [[*pair.prompt, *pair.chosen] for pair in pairs]
    if order == "packed":
        longest = max(map(len, rows))
        assert longest <= PACKED, f"packing would cut an example of {longest} tokens"
        common |= {"packing": True, "max_length": PACKED, "per_device_train_batch_size": 1}
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**common), processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows]),
    )  # fmt: skip
    assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == sum(map(len, rows))
    return trainer


def _check_same_ids(rows: Any, pairs: list[TokenizedPair]) -> None:
    """TRL's own columns hold exactly the tokens ours holds, and score the same responses."""
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            answer = list(getattr(pair, side))
            assert row[f"{side}_input_ids"] == [*pair.prompt, *answer]
            assert row[f"{side}_labels"] == [-100] * len(pair.prompt) + answer


def _step_of(
    side: str, model: PreTrainedModel, pairs: list[TokenizedPair], dtype: str, checkpointing: bool
) -> Callable[[], float]:
    """Forward and backward of all pairs as one optimizer step, the batch made beforehand."""
    trainer = _trainer(side, model, pairs, len(pairs), dtype, checkpointing, "random")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    if side == "trl":
        batch = trainer.data_collator(list(trainer.train_dataset))

        def run() -> float:
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, batch)
            loss.backward()
            return loss.item()

        return run
    from orpo.engine.steps import build_step

    settings = trainer._batch_settings(evaluating=False)
    ready = build_step(pairs, range(len(pairs)), settings)

    def run() -> float:
        total = 0.0
        for batch in ready.batches:
            with trainer.accelerator.autocast():
                loss = model(batch=batch, denominators=ready.denominators).loss
            loss.backward()
            total += loss.item()
        return total

    return run


def _last_loss(trainer: Any) -> float | None:
    return next(
        (line["train_loss"] for line in reversed(trainer.state.log_history) if "train_loss" in line), None
    )


# ------------------------------------------------------------------------------------------------ instruments


class _Timer:
    """CPU and wall seconds, and pages the kernel had to hand out, since it was made."""

    def __init__(self) -> None:
        self.start = (_cpu_time(), time.perf_counter(), _page_faults())

    def stop(self) -> dict[str, float]:
        cpu, wall, faults = self.start
        return {
            "cpu": _cpu_time() - cpu,
            "wall": time.perf_counter() - wall,
            "page_faults": _page_faults() - faults,
        }


def _keep_heap(keep: bool) -> None:
    """Have glibc keep and reuse its heap from now on, or give everything back and use its defaults."""
    import ctypes
    import gc

    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    gc.collect()
    libc.malloc_trim(0)
    libc.mallopt(mmap_max, 0 if keep else 65536)
    libc.mallopt(trim_threshold, 2**31 - 1 if keep else 2**17)
    libc.mallopt(mmap_threshold, 2**17)


def _cpu_time() -> float:
    """Seconds of this process and of those it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _memory(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def gemm_rate(dtype: str = "fp32", hidden: int = 256) -> float:
    """Best rate of a matrix product over a few shapes, the model's among them; FLOP per CPU second."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    best = 0.0
    for m, k, n in [(1024, 1024, 1024), (2048, 512, 2048), (1024, 256, 8192), (1536, hidden, 4 * hidden)]:
        a, b = torch.randn(m, k, dtype=kind), torch.randn(n, k, dtype=kind)
        for _ in range(6):
            start = time.process_time()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * m * k * n / (time.process_time() - start))
    return best


if __name__ == "__main__":
    main()
