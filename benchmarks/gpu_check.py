"""Exactness and speed of the engine on one GPU: `python benchmarks/gpu_check.py --out DIR`.

Three parts, each a list of cells. A cell that fails is recorded with its error, and the next one runs.
Results are written after every cell, as DIR/gpu.json and as tables, DIR/gpu.md. Cells already there are not
run again, so a short lease can be used in several calls:

    --parts exactness                    attention, head and model against references (3 minutes)
    --parts steps --models 0.5B          one optimizer step next to TRL's and Liger's (5 minutes a model)
    --parts tuning --models 0.5B,1.5B    compiled layers, micro-batch and chunk sizes, fused AdamW, a profile

`--smoke` runs the same code on a CPU with tiny sizes; its numbers mean nothing.

Times are medians over interleaved repeats, by CUDA events. Useful FLOPs count every token, every key a query
may see and every scored token once: 3 x forward, of which the products with a frozen base 2 x, recomputation
never. MFU is their rate over the data sheet's dense bf16 peak.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_steps import (
    OBJECTIVE,
    Shape,
    Sizes,
    make_pairs,
    our_step,
    padded_loss,
    peer_steps,
    sizes,
    to_padded,
    useful_flops,
)  # fmt: skip

from orpo.engine.attention import KERNEL, attend_by_kernel, output_and_gradients, relative_error
from orpo.engine.head import Denominators, Head, score_batch
from orpo.engine.logits import logprob_slopes, token_logprobs
from orpo.engine.model import prepare_model
from orpo.engine.packing import pack
from orpo.engine.scorer import base_model
from orpo.engine.segments import SEGMENTS, Options, Segments, attend_segments
from orpo.engine.varlen import Case

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by the vendor's data sheets."""


# Running cells


class Report:
    """Cells by name, kept in a file."""

    def __init__(self, folder: Path, only: str, deadline: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.only, self.deadline = folder / "gpu.json", re.compile(only), deadline
        self.content: dict[str, Any] = (
            json.loads(self.path.read_text()) if self.path.exists() else {"cells": {}}
        )

    def cell(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run and record one cell, unless it is there already."""
        known = self.content["cells"].get(name, {"error": ""})
        if "error" not in known or not self.only.search(name):
            return
        if time.monotonic() > self.deadline:
            print(f"{name}: no time left", flush=True)
            return
        start = time.monotonic()
        try:
            result = function()
        except Exception as error:  # the next cell may work
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.content["cells"][name] = {**result, "cell_seconds": round(time.monotonic() - start, 1)}
        self.save()
        print(f"{name}: {json.dumps(self.content['cells'][name])}", flush=True)

    def save(self) -> None:
        """Write the results and their tables."""
        self.path.write_text(json.dumps(self.content, indent=1))
        self.path.with_suffix(".md").write_text(tables(self.content))


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Time of one call on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(functions: dict[str, Callable[[], Any]], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Median, best and worst seconds of each function, called in turn, or the error of one that fails."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    failed: dict[str, dict[str, Any]] = {}
    for turn in range(sizes.repeats + 2):
        for name in [name for name in functions if name not in failed]:
            try:
                spent = seconds(functions[name], sizes.device)
            except Exception as error:  # out of memory is a result here
                failed[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            if turn >= 2:  # the first two warm up: compilation, allocator
                times[name].append(spent)
    done = {name: t for name, t in times.items() if name not in failed}
    stats = {n: {"seconds": statistics.median(t), "from": min(t), "to": max(t)} for n, t in done.items()}
    return {**stats, **failed}


def peak_memory(function: Callable[[], Any], device: torch.device) -> float | None:
    """GiB allocated at most during a call, above what was before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


# Part 1: exactness


LAYERS = {
    "32/8 heads of 128": (32, 8, 128, None, None),
    "14/2 heads of 64": (14, 2, 64, None, None),
    "32/8 heads of 128, window 128": (32, 8, 128, 128, None),
    "8/4 heads of 256, softcap 50": (8, 4, 256, None, 50.0),
}


def attention_cell(layer: str, dtype: torch.dtype, sizes: Sizes) -> dict[str, Any]:
    """Errors against float64, and seconds forward + backward, by the kernel and by segments."""
    heads, key_heads, size, window, softcap = LAYERS[layer]
    tree = pack(make_pairs(*sizes.data["ultrafeedback"], 1000)[:16], OBJECTIVE).tree
    num_tokens = sum(segment.tokens for segment in tree)
    torch.manual_seed(1)
    shapes = [(heads, num_tokens), (key_heads, num_tokens), (key_heads, num_tokens), (num_tokens, heads)]
    inputs = [torch.randn(1, *shape, size, device=sizes.device).to(dtype) for shape in shapes]
    segments, options = Segments(tree), Options(window=window, softcap=softcap)
    case = Case(sizes.device, dtype, heads, key_heads, size, size, window is not None, softcap is not None)

    def by_segments(*heads: torch.Tensor) -> torch.Tensor:
        return attend_segments(*heads, segments, options)

    def by_kernel(*heads: torch.Tensor) -> torch.Tensor:
        return attend_by_kernel(KERNEL, *heads, segments, options)

    exact = output_and_gradients(by_segments, [x.double() for x in inputs])
    result: dict[str, Any] = {"tokens": num_tokens}
    calls = {SEGMENTS: functools.partial(output_and_gradients, by_segments, inputs)}
    if (refusal := KERNEL.refusal(case)) is None:
        calls["kernel"] = functools.partial(output_and_gradients, by_kernel, inputs)
    else:
        result["kernel"] = {"refuses": refusal}
    timings = interleaved(calls, sizes)
    for name, call in calls.items():
        result[name] = timings[name]
        if "error" not in timings[name]:
            errors = [relative_error(mine, truth) for mine, truth in zip(call(), exact, strict=True)]
            result[name]["errors"] = [float(f"{error:.2e}") for error in errors]
            # As far from the truth as the plain way in the same precision, give or take rounding.
            result[name]["exact"] = all(
                e <= 2 * s for e, s in zip(errors, result[SEGMENTS]["errors"], strict=True)
            )
    return result


def head_cell(dtype: torch.dtype, shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """Errors of the fused head and of full logits in `dtype`, against full logits in float64."""
    batch = pack(make_pairs(*sizes.data["hh"], shape.vocab)[:8], OBJECTIVE).to(sizes.device)
    torch.manual_seed(1)
    hidden = torch.randn(batch.num_tokens, shape.hidden, device=sizes.device).to(dtype)
    weight = (torch.randn(shape.vocab, shape.hidden, device=sizes.device) * 0.03).to(dtype)
    counts = Denominators(batch.nll_weight, batch.num_preferences)

    def run(kind: torch.dtype, fused: bool) -> tuple[torch.Tensor, ...]:
        h, w = (x.to(kind).requires_grad_() for x in (hidden, weight))
        if fused:
            loss, pairs = score_batch(h, Head(w, chunk_tokens=512, max_chunk_tokens=512), batch, counts)
            means = torch.stack([pairs.chosen_logprob_P, pairs.rejected_logprob_P])
        else:
            logits = (h[batch.source_T] @ w.T).to(torch.promote_types(kind, torch.float32))
            logprob_T = logits.log_softmax(1).gather(1, batch.target_T[:, None])[:, 0]
            side_T = 2 * batch.pair_T + (batch.role_T == 2)
            scored = (batch.role_T > 0).to(logprob_T.dtype)
            total = logprob_T.new_zeros(2 * batch.num_pairs)
            means = total.index_add(0, side_T, logprob_T * scored) / total.index_add(0, side_T, scored)
            means = means.view(-1, 2).T
            odds = means - torch.log(-torch.expm1(means))
            loss = -(logprob_T * batch.nll_weight_T).sum() / counts.nll
            loss = loss - OBJECTIVE.preference_weight * F.logsigmoid(odds[0] - odds[1]).mean()
        return means.detach(), *torch.autograd.grad(loss, (h, w))

    exact = run(torch.float64, fused=False)
    result = {}
    for name, fused in (("fused", True), ("full logits", False)):
        errors = [relative_error(a, b) for a, b in zip(run(dtype, fused), exact, strict=True)]
        result[name] = {"errors": [float(f"{error:.2e}") for error in errors]}
    pairs_of_errors = zip(result["fused"]["errors"], result["full logits"]["errors"], strict=True)
    result["fused"]["exact"] = all(ours <= 2 * plain + 1e-6 for ours, plain in pairs_of_errors)
    return result


def model_cell(shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """Loss and first layer's gradients of the model cut to 2 layers; the truth is its padded float32 run."""
    pairs = make_pairs(*sizes.data["hh"], shape.vocab)[:4]
    model = replace(shape, layers=2).build(sizes.device)
    batch, padded = pack(pairs, OBJECTIVE).to(sizes.device), to_padded(pairs, sizes.device)
    weights = [p for n, p in model.named_parameters() if "layers.0" in n]
    prepare_model(model, layout="shared")

    def run(loss: Callable[[], torch.Tensor], half: bool) -> list[torch.Tensor]:
        with torch.autocast(sizes.device.type, torch.bfloat16, enabled=half):
            value = loss()
            return [value.detach(), *torch.autograd.grad(value, weights)]

    def ours() -> torch.Tensor:
        return model(batch=batch).loss

    def plain() -> torch.Tensor:
        return padded_loss(model, padded)

    truth = run(plain, half=False)
    runs = {
        "float32": run(ours, half=False),
        "bfloat16": run(ours, half=True),
        "bfloat16, padded": run(plain, half=True),
    }
    worst = {name: max(map(relative_error, values, truth)) for name, values in runs.items()}
    limits = {"float32": 1e-4, "bfloat16": 2 * worst["bfloat16, padded"]}
    exact = all(worst[name] <= limit for name, limit in limits.items())
    return {"worst_errors": {name: float(f"{e:.2e}") for name, e in worst.items()}, "exact": exact}


# Part 2: steps of ours and of the peers (gpu_steps.py)


def adapted(shape: Shape, sizes: Sizes, lora: bool, checkpointing: bool) -> tuple[torch.nn.Module, str]:
    """A prepared model, and what attends in it."""
    model: torch.nn.Module = shape.build(sizes.device, torch.bfloat16 if lora else torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.autocast(sizes.device.type, torch.bfloat16):
        preparation = prepare_model(model, layout="shared")
    if checkpointing:
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), preparation.attention


def step_cell(shape: Shape, data: str, kind: str, sizes: Sizes) -> dict[str, Any]:
    """Time and memory of one step, ours and the peers'."""
    lora, checkpointing = "LoRA" in kind, "checkpointing" in kind
    pairs = make_pairs(*sizes.data[data], shape.vocab)
    model, attention = adapted(shape, sizes, lora, checkpointing)
    ours = our_step(model, pairs, sizes, sizes.tokens_per_micro_batch)
    steps = {"ours": ours, **peer_steps(model, pairs, sizes)}
    timings = interleaved(steps, sizes)
    flops = useful_flops(pairs, shape, frozen=lora)
    tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    for name, timing in timings.items():
        if "error" not in timing:
            timing["gib"] = peak_memory(steps[name], sizes.device)
            timing["tokens_per_second"] = round(tokens / timing["seconds"])
            timing["flops_per_second"] = flops / timing["seconds"]
    return {
        "attention": attention,
        "pairs": len(pairs),
        "tokens": tokens,
        "useful_flops": flops,
        "steps": timings,
    }


# Part 3: tuning


def compile_cell(shape: Shape, data: str, sizes: Sizes) -> dict[str, Any]:
    """Our step with decoder layers compiled and not."""
    pairs = make_pairs(*sizes.data[data], shape.vocab)
    model, _ = adapted(shape, sizes, lora=False, checkpointing=False)
    step = our_step(model, pairs, sizes, sizes.tokens_per_micro_batch)
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    compiled = {layer: layer._compiled_call_impl for layer in model.model.layers}

    def switched(on: bool) -> Callable[[], None]:
        def run() -> None:
            for layer, call in compiled.items():
                layer._compiled_call_impl = call if on else None
            step()

        return run

    return {"steps": interleaved({"eager": switched(False), "compiled layers": switched(True)}, sizes)}


def budgets_cell(shape: Shape, data: str, sizes: Sizes) -> dict[str, Any]:
    """Our step under several token budgets of a micro-batch."""
    pairs = make_pairs(*sizes.data[data], shape.vocab)
    model, _ = adapted(shape, sizes, lora=False, checkpointing=False)
    budgets = [sizes.tokens_per_micro_batch * k // 4 for k in (1, 2, 4, 8)]
    return {
        "steps": interleaved(
            {f"{b} tokens per micro-batch": our_step(model, pairs, sizes, b) for b in budgets}, sizes
        )
    }


def chunks_cell(shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """The head alone, forward and backward, by chunk size; bf16 products of a float32 weight."""
    batch = pack(make_pairs(*sizes.data["ultrafeedback"], shape.vocab)[:8], OBJECTIVE).to(sizes.device)
    hidden = torch.randn(batch.num_tokens, shape.hidden, device=sizes.device).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.hidden, device=sizes.device) * 0.03).requires_grad_()
    counts = Denominators(batch.nll_weight, batch.num_preferences)

    def run(mib: int, compiled: bool) -> None:
        token_logprobs.broken = logprob_slopes.broken = not compiled
        tokens = max(1, mib * 2**20 // (4 * shape.vocab))
        head = Head(weight, chunk_tokens=tokens, max_chunk_tokens=tokens)
        with torch.autocast(sizes.device.type, torch.bfloat16):
            loss, _ = score_batch(hidden, head, batch, counts)
        torch.autograd.grad(loss, (hidden, weight))

    calls = {f"{mib} MiB": functools.partial(run, mib, True) for mib in (128, 256, 1024, 4096)}
    calls |= {f"{mib} MiB, eager": functools.partial(run, mib, False) for mib in (256, 1024)}
    steps = interleaved(calls, sizes)
    token_logprobs.broken = logprob_slopes.broken = False
    flops = 6 * shape.hidden * shape.vocab * len(batch.target_T)
    return {"scored": len(batch.target_T), "useful_flops": flops, "steps": steps}


def adamw_cell(shape: Shape, sizes: Sizes) -> dict[str, Any]:
    """AdamW's step, fused and per tensor list."""
    model = shape.build(sizes.device)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    fused, lists = (torch.optim.AdamW(model.parameters(), **{k: True}) for k in ("fused", "foreach"))
    return {"steps": interleaved({"fused": fused.step, "foreach": lists.step}, sizes)}


def profile_cell(shape: Shape, name: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Where the time of our step goes; the table is a file of its own."""
    from torch.profiler import ProfilerActivity, profile

    model, attention = adapted(shape, sizes, lora=False, checkpointing=False)
    step = our_step(model, make_pairs(*sizes.data["hh"], shape.vocab), sizes, sizes.tokens_per_micro_batch)
    step()
    cuda = sizes.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        step()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    path = folder / f"profile_{name}.txt"
    path.write_text(recorded.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90))
    return {"attention": attention, "file": path.name}


# Tables


def tables(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    about, gemm = content.get("about", {}), content.get("about", {}).get("gemm_flops_per_second")
    peak = next((p for n, p in PEAKS.items() if n in about.get("device", "")), None)
    lines = ["# One GPU", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    for name, cell in content["cells"].items():
        lines += [f"## {name}", ""]
        if "steps" not in cell:
            lines += [f"- {key}: {json.dumps(value)}" for key, value in cell.items()] + [""]
            continue
        ours = cell["steps"].get("ours", {}).get("seconds")
        lines += [", ".join(f"{k} {v}" for k, v in cell.items() if k != "steps"), ""]
        lines += [
            "| | ms (from-to) | tokens/s | peak GiB | MFU | of GEMM rate | times ours |",
            "|" + "---|" * 7,
        ]
        for step, t in cell["steps"].items():
            if "error" in t:
                lines.append(f"| {step} | {t['error']} |" + " |" * 5)
                continue
            flops = t.get("flops_per_second") or cell.get("useful_flops", 0) / t["seconds"]
            spread = f"{1e3 * t['seconds']:.2f} ({1e3 * t['from']:.2f}-{1e3 * t['to']:.2f})"
            shares = [f"{flops / limit:.1%}" if limit and flops else "" for limit in (peak, gemm)]
            ratio = f"{t['seconds'] / ours:.2f}" if ours else ""
            columns = [step, spread, t.get("tokens_per_second", ""), t.get("gib") or "", *shares, ratio]
            lines.append("| " + " | ".join(map(str, columns)) + " |")
        lines.append("")
    return "\n".join(lines)


def describe(sizes: Sizes) -> dict[str, Any]:
    """Machine, versions, date, and the rate of a large bf16 product on random data."""
    a, b = (torch.randn(sizes.gemm, sizes.gemm, device=sizes.device).bfloat16() for _ in range(2))
    rate = 2 * sizes.gemm**3 / interleaved({"gemm": lambda: a @ b}, sizes)["gemm"]["seconds"]
    cuda = sizes.device.type == "cuda"
    names = ("torch", "triton", "transformers", "peft", "trl", "liger_kernel", "flash_attn")
    versions = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU (smoke test)",
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "cuda": torch.version.cuda,
        "gemm_flops_per_second": rate,
        "peak": "data sheet: " + ", ".join(f"{n} {p / 1e12:.0f} TFLOP/s" for n, p in PEAKS.items()),
    }


def exactness(report: Report, models: dict[str, Shape], size: Sizes) -> None:
    """Everything against references."""
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for layer in LAYERS:
            report.cell(f"attention, {layer}, {kind}", lambda a=layer, d=dtype: attention_cell(a, d, size))
        for name, shape in models.items():
            report.cell(f"head, {name}, {kind}", lambda s=shape, d=dtype: head_cell(d, s, size))
    for name, shape in models.items():
        report.cell(f"model, {name} cut to 2 layers", lambda s=shape: model_cell(s, size))


def steps(report: Report, models: dict[str, Shape], size: Sizes) -> None:
    """Ours next to the peers."""
    for name, shape in models.items():
        for kind in ("full", "full, checkpointing", "LoRA"):
            for data in size.data:
                report.cell(
                    f"step, {name}, {data}, {kind}", lambda s=shape, d=data, k=kind: step_cell(s, d, k, size)
                )


def tuning(report: Report, models: dict[str, Shape], size: Sizes) -> None:
    """What pays."""
    for name, shape in models.items():
        report.cell(f"profile, {name}", lambda s=shape, n=name: profile_cell(s, n, size, report.path.parent))
        report.cell(f"compiled layers, {name}", lambda s=shape: compile_cell(s, "ultrafeedback", size))
        report.cell(f"tokens per micro-batch, {name}", lambda s=shape: budgets_cell(s, "hh", size))
        report.cell(f"chunks of logits, {name}", lambda s=shape: chunks_cell(s, size))
        report.cell(f"AdamW, {name}", lambda s=shape: adamw_cell(s, size))


PARTS = {"exactness": exactness, "steps": steps, "tuning": tuning}


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default="0.5B,1.5B,7B")
    parser.add_argument("--only", default="", help="regular expression: only these cells")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no cell after this time")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    arguments = parser.parse_args()
    size = sizes(arguments.smoke)
    report = Report(arguments.out, arguments.only, time.monotonic() + 60 * arguments.minutes)
    report.content["about"] = describe(size)
    for part in arguments.parts.split(","):
        PARTS[part](report, {name: size.shapes[name] for name in arguments.models.split(",")}, size)
    report.save()


if __name__ == "__main__":
    main()
