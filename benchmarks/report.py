"""Write RESULTS.md from the raw numbers of bench.py."""

import json
import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from heads import VARIANTS
from workloads import SHAPES

Spec = dict[str, Any]
BARS = {
    ("h256", "hh", "fp32"): (8.0, 5.0),
    ("opt", "hh", "fp32"): (3.5, None),
    ("h256", "uf", "fp32"): (5.0, None),
    ("h256", "long", "fp32"): (7.5, None),
    ("h256", "hh", "bf16"): (5.0, None),
}
"""Required speed-up over TRL in random order and length-grouped, for a whole `train()`."""
RAW, RAW_OBJECTIVES, RAW_SHARING = "results.json", "objectives.json", "sharing.json"
RAW_REAL = "real_run.json"
"""Raw numbers of bench.py, those of its runs of DPO and SFT, and of pairs that share tokens, and those of
real_run.py; each file may be of another machine. `results-NAME.json` are bench.py's of another processor."""
OBJECTIVE_BARS = {("dpo", "random"): 5.5, ("sft", "random"): 4.0, ("sft", "packed"): 2.0}
"""Required speed-up over TRL's DPOTrainer and SFTTrainer, for a whole `train()`."""
MEMORY_BARS = {("dpo", "random"): 15.0, ("sft", "random"): 15.0}
"""How many times less memory they must need; packing has no bar."""
NAMES = {
    "h256": "Llama h256 L6 V32000", "h512": "Llama h512 L8 V32000", "v152k": "Llama h256 L6 V151936 tied",
    "opt": "OPT-125M (V50272)", "opt_gelu": "OPT-125M with GELU",
    "hh": "HH-RLHF", "uf": "UltraFeedback-like", "long": "long prompts",
}  # fmt: skip


class Results:
    """Raw runs, looked up by what was measured."""

    def __init__(self, raw: Spec) -> None:
        self.runs: list[tuple[Spec, bool, list[Spec]]] = []
        for key, results in raw["runs"].items():
            spec, _, suffix = key.rpartition("}")
            self.runs.append((json.loads(spec + "}"), not suffix, [r for r in results if "error" not in r]))

    def find(self, kept: bool = True, **wanted: Any) -> list[Spec]:
        """All results of the runs whose specification has these values, by default with the heap kept."""
        return [
            result for spec, keep_heap, results in self.runs for result in results
            if keep_heap == kept and all(spec.get(k, False) == v for k, v in wanted.items())
        ]  # fmt: skip

    def cells(self, task: str) -> list[Spec]:
        """The distinct workloads of a task, in the order measured."""
        names = ("shape", "data", "per_step", "pairs", "dtype", "checkpointing")
        found = [
            tuple((n, spec[n]) for n in names if n in spec)
            for spec, _, _ in self.runs
            if spec["task"] == task
        ]
        return [dict(cell) for cell in dict.fromkeys(found)]


def median(results: Iterable[Spec], name: str) -> float | None:
    """Median of one number over repetitions; None where there is none."""
    values = [r[name] for r in results if r.get(name) is not None]
    return statistics.median(values) if values else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, or None where one is missing."""
    return None if a is None or not b else a / b


def show(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{value:{form}}{unit}"


def percent(value: float | None) -> str:
    """A share for a table, or a dash."""
    return "-" if value is None else f"{100 * value:.0f} %"


def label(cell: Spec) -> str:
    """What was measured, in words."""
    extras = [cell["dtype"]] if cell.get("dtype") == "bf16" else []
    extras += ["checkpointing"] if cell.get("checkpointing") else []
    return f"{NAMES[cell['shape']]}, {NAMES[cell['data']]}" + "".join(f", {e}" for e in extras)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [" | ".join(["", *line, ""]).strip() for line in (header, ["---"] * len(header), *rows)] + [""]


def write_report(path: Path) -> None:
    """Write the report of the results so far, whose raw numbers lie beside it."""
    lines = ["# Measured against TRL 1.16", ""]
    if (raw := _raw(path.with_name(RAW))) is not None:
        results = Results(raw)
        lines += [
            *_made_by(raw, RAW), *_train_table(results), *_data_table(results), *_step_table(results),
            *_memory_table(results), *_agreement_table(results), *_head_table(results),
            *_budget_table(results), *_growth_note(path.parent), *_errors(raw),
        ]  # fmt: skip
    for other in sorted(path.parent.glob("results-*.json")):
        raw = json.loads(other.read_text())
        _, _, *rows = _train_table(Results(raw))
        lines += [f"## Whole `train()` loop on {_processor(raw)}", "", *_made_by(raw, other.name), *rows[2:]]
    if (raw := _raw(path.with_name(RAW_OBJECTIVES))) is not None:
        lines += _objectives_table(raw)
    if (raw := _raw(path.with_name(RAW_SHARING))) is not None:
        lines += _sharing_table(raw)
    if (raw := _raw(path.with_name(RAW_REAL))) is not None:
        lines += _real_table(raw)
    path.write_text("\n".join(map(wrapped, lines)).rstrip() + "\n")


def _raw(path: Path) -> Spec | None:
    return json.loads(path.read_text()) if path.exists() else None


def _processor(raw: Spec) -> str:
    return " ".join(raw["machine"]["cpu"].replace("(R)", "").split())


def _made_by(raw: Spec, name: str) -> list[str]:
    machine = raw["machine"]
    return [
        f"Last run by `{raw['command']}`, {machine['date']}, commit {machine['commit'] or 'unknown'}. "
        f"Method: [README.md](README.md). Raw numbers: [{name}]({name}).", "",
        f"Machine: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, "
        f"{machine['system']}; "
        f"Python {machine['python']}, " + ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        + f". **1 thread.** {_load_note(Results(raw))}", "",
    ]  # fmt: skip


def wrapped(line: str) -> str:
    """Prose in lines of at most 120 characters; tables, headings, pictures and list items as they are."""
    if line.startswith(("|", "#", "!", "-")):
        return line
    return textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False)


def _load_note(results: Results) -> str:
    loads = [r["load"] for _, _, found in results.runs for r in found if "load" in r]
    if not loads:
        return ""
    return (
        f"Load average while measuring: {min(loads):.1f} to {max(loads):.1f}, median "
        f"{statistics.median(loads):.1f} "
        "(1 means that only the benchmark was running). A load above the number of cores inflates CPU times "
        "on both sides."
    )


def _train_table(results: Results) -> list[str]:
    rows = []
    for cell in results.cells("train"):
        ours = results.find(task="train", side="ours", **cell)
        cpu = median(ours, "cpu")
        row = [label(cell), f"{cell['pairs']} / {cell['per_step']}", show(cpu, ".1f")]
        bars = BARS.get((cell["shape"], cell["data"], cell.get("dtype", "fp32")), (None, None))
        if cell.get("checkpointing"):
            bars = (None, None)
        limits = [run["flops"] / run["gemm"] for run in ours if run.get("flops")]
        limit = statistics.median(limits) if limits else None
        for order, bar in zip(("random", "grouped"), bars, strict=True):
            trl = results.find(task="train", side="trl", order=order, **cell)
            gain = ratio(median(trl, "cpu"), cpu)
            verdict = "" if bar is None or gain is None else f" ({'≥' if gain >= bar else 'misses'} {bar})"
            row += [show(median(trl, "cpu"), ".1f"), f"**{show(gain, '.2f', 'x')}**{verdict}"]
            if order == "random":
                row += [percent(ratio(limit, cpu)), show(ratio(median(trl, "cpu"), limit), ".1f", "x")]
        walls = [
            median(results.find(task="train", side="trl", order=o, **cell), "wall")
            for o in ("random", "grouped")
        ]
        wall = median(ours, "wall")
        row.append(" / ".join(show(ratio(w, wall), ".1f", "x") for w in walls))
        row.append(str(len(ours)))
        rows.append(row)
    header = [
        "workload", "pairs / step", "ours, CPU s", "TRL random, CPU s", "ours is faster by (bar)",
        "ours, share of FLOP limit", "faster at the limit itself",
        "TRL length-grouped, CPU s", "ours is faster by (bar)", "by wall time", "runs",
    ]  # fmt: skip
    note = [
        "The FLOP limit is the time that the useful floating-point operations take at the best GEMM rate "
        "of the same run; at the limit itself nothing else would cost any time. "
        "The bar applies to CPU time. Wall time depends on what else the machine was doing. With few runs "
        "under load, so does up to a fifth of the CPU time: this is the likely reason where length-grouped "
        "TRL comes out slower than random order.",
        "",
    ]
    return ["## Whole `train()` loop, one epoch", "", *note, *table(header, rows)]


THEIRS = {
    ("dpo", "random"): "DPO, DPOTrainer with its reference model",
    ("sft", "random"): "SFT, SFTTrainer",
    ("sft", "packed"): "SFT, SFTTrainer with packing",
}


def _objectives_table(raw: Spec) -> list[str]:
    """Whole `train()` loops of DPO and SFT, time and memory."""
    results, rows = Results(raw), []
    for cell in results.cells("train"):
        for (objective, order), name in THEIRS.items():
            wanted = {"task": "train", "objective": objective, **cell}
            ours, trl = {**wanted, "side": "ours"}, {**wanted, "side": "trl", "order": order}
            if not results.find(**ours) or not results.find(**trl):
                continue
            times = [median(results.find(**side), "cpu") for side in (ours, trl)]
            faster = ratio(times[1], times[0])
            peaks = [median(results.find(False, **side), "peak_mib") for side in (ours, trl)]
            less = ratio(peaks[1], peaks[0])
            kept = [median(results.find(**side), "peak_mib") for side in (ours, trl)]
            bar = OBJECTIVE_BARS[objective, order]
            gain = show(ratio(kept[1], kept[0]), ".1f", "x")
            runs = " / ".join(str(len(results.find(**side))) for side in (ours, trl))
            rows.append([
                name, f"{cell['pairs']} / {cell['per_step']}", *(show(time, ".1f") for time in times),
                _barred(faster, ".2f", bar), *(show(peak, ",.0f") for peak in peaks),
                _barred(less, ".1f", MEMORY_BARS.get((objective, order))),
                f"{show(kept[0], ',.0f')} / {show(kept[1], ',.0f')}: {gain}",
                runs,
            ])  # fmt: skip
    header = [
        "workload", "pairs / step", "ours, CPU s", "TRL, CPU s", "ours is faster by (bar)",
        "ours, peak MiB", "TRL, peak MiB", "ours needs less by (bar)", "peaks with the heap kept",
        "runs",
    ]  # fmt: skip
    note = [
        "Llama h256 L6 V32000 on HH-RLHF, one epoch, medians. Ours includes the pass that scores DPO's "
        "reference. Peaks are of whole runs with the allocator's defaults, above that of the model and "
        "AdamW's moments; they include the gradients and TRL's reference model; the last of them are of the "
        "timed runs, which keep their heap. Packing fills sequences of 1,024 tokens, one a step.", "",
    ]  # fmt: skip
    return ["## DPO and SFT", "", *_made_by(raw, RAW_OBJECTIVES), *note, *table(header, rows), *_errors(raw)]


SHARING_BARS = {"ranked": (2.2, 8.0), "all ranked": (2.2, 8.0), "system": (1.8, None), "hh": (0.99, None)}
"""Required speed-up over the same build without sharing between pairs, and over TRL in random order."""


def _sharing_table(raw: Spec) -> list[str]:
    """Whole `train()` loops over pairs that share answers or a beginning."""
    results, rows = Results(raw), []
    for cell in results.cells("train"):
        sides = {"ours": {"side": "ours", "apart": False}, "apart": {"side": "ours", "apart": True},
                 "trl": {"side": "trl"}}  # fmt: skip
        found = {name: results.find(task="train", **side, **cell) for name, side in sides.items()}
        cpu = {name: median(runs, "cpu") for name, runs in found.items()}
        peak = {name: median(runs, "peak_mib") for name, runs in found.items()}
        bars = SHARING_BARS[cell["data"]]
        rows.append([
            SHARED_NAMES[cell["data"]], f"{cell['pairs']} / {cell['per_step']}",
            *(show(cpu[name], ".1f") for name in sides),
            _barred(ratio(cpu["apart"], cpu["ours"]), ".2f", bars[0]),
            _barred(ratio(cpu["trl"], cpu["ours"]), ".1f", bars[1]),
            " / ".join(show(peak[name], ",.0f") for name in sides),
            " / ".join(str(len(runs)) for runs in found.values()),
        ])  # fmt: skip
    header = [
        "data", "pairs / step", "ours, CPU s", "each pair for itself, CPU s", "TRL random, CPU s",
        "faster than for itself (bar)", "faster than TRL (bar)", "peak MiB, in this order", "runs",
    ]  # fmt: skip
    note = [
        "Llama h256 L6 V32000, one epoch, medians. `Each pair for itself` is the same build told to share "
        "nothing between pairs; peaks are with the heap kept; HH-RLHF as it is has next to nothing to "
        "share.", "",
    ]  # fmt: skip
    return ["## Pairs that share tokens", "", *_made_by(raw, RAW_SHARING), *note, *table(header, rows),
            *_errors(raw)]  # fmt: skip


SHARED_NAMES = {
    "ranked": "four answers, best against each", "all ranked": "four answers, each against every worse one",
    "system": "HH-RLHF, one system prompt of 500 tokens", "hh": "HH-RLHF as it is",
}  # fmt: skip


def _real_table(raw: Spec) -> list[str]:
    """A real model trained by both, one line for each pair of runs."""
    runs = {key: found[-1] for key, found in raw["runs"].items() if found and "error" not in found[-1]}
    specs = {tuple(sorted(json.loads(key).items())): result for key, result in runs.items()}
    rows = []
    for spec, ours in specs.items():
        cell = dict(spec)
        trl = specs.get(tuple(sorted((cell | {"side": "trl"}).items())))
        if cell["side"] == "trl" or trl is None:
            continue
        both = (ours, trl)
        accuracy = " / ".join(f"{100 * r['accuracy']:.1f} ± {100 * r['accuracy_se']:.1f}" for r in both)
        rows.append([
            f"{cell['data']}, {'LoRA' if cell['adapted'] == 'lora' else 'all weights'}, seed {cell['seed']}",
            f"{100 * ours['before']:.1f}", accuracy,
            " / ".join(f"{r['train_loss']:.3f}" for r in both), " / ".join(f"{r['cpu']:.0f}" for r in both),
            f"**{show(ratio(trl['cpu'], ours['cpu']), '.2f', 'x')}**",
            " / ".join(f"{r['peak_mib']:,.0f}" for r in both),
            f"**{show(ratio(trl['peak_mib'], ours['peak_mib']), '.1f', 'x')}**",
        ])  # fmt: skip
    header = [
        "pairs, what trains", "accuracy before, %", "after: ours / TRL, %", "mean training loss",
        "CPU s", "ours is faster by", "peak MiB", "ours needs less by",
    ]  # fmt: skip
    tested = next(iter(specs.values()))["test_pairs"] if specs else 0
    note = [
        f"SmolLM2-135M-Instruct, one epoch of 96 pairs of at most 256 tokens, 8 a step, the same token ids "
        f"on both sides, float32; accuracy on {tested} pairs that were not trained on. Peaks are of whole "
        "runs with the allocator's defaults, above the model and AdamW's moments.", "",
    ]  # fmt: skip
    return ["## A real model", "", *_made_by(raw, RAW_REAL), *note, *table(header, rows), *_errors(raw)]


def _barred(value: float | None, form: str, bar: float | None) -> str:
    """A ratio and whether it reaches its bar, where it has one."""
    verdict = "" if value is None or bar is None else f" ({'≥' if value >= bar else 'misses'} {bar:g})"
    return f"**{show(value, form, 'x')}**{verdict}"


DATA_CELLS = ((1, 1, "cpu", 5.0), (2, 1, "wall", 8.0), (2, 2, "wall", None))
"""Our processes, TRL's, what is compared, and how many times less of it ours must take."""


def _data_table(results: Results) -> list[str]:
    """From rows to a trainer that is ready to train."""
    rows = []
    for ours, theirs, name, bar in DATA_CELLS:
        mine = results.find(task="data", side="ours", processes=ours)
        trl = results.find(task="data", side="trl", processes=theirs)
        if mine and trl:
            faster = ratio(median(trl, name), median(mine, name))
            times = [show(median(side, which)) for which in ("cpu", "wall") for side in (mine, trl)]
            said = f"**{show(faster)}x** ({name} time{'' if bar is None else f', ≥ {bar}'})"
            rows.append([str(ours), str(theirs), *times, said, str(len(mine))])
    note = [
        "`ORPOTrainer(...)` on 4,000 rows of text with the lengths of UltraFeedback: read, rendered, "
        "tokenized, checked and ready to train, with nothing cached. CPU time counts all processes.", "",
    ]  # fmt: skip
    header = [
        "our processes", "TRL's", "ours, CPU s", "TRL, CPU s", "ours, wall s", "TRL, wall s",
        "ours is faster by (bar)", "runs",
    ]  # fmt: skip
    return ["## Rows to tokens", "", *note, *table(header, rows)] if rows else []


def _step_table(results: Results) -> list[str]:
    rows = []
    for cell in results.cells("step"):
        ours = results.find(task="step", side="ours", **cell)
        trl = results.find(task="step", side="trl", **cell)
        if not ours and not trl:
            continue
        rate = median(ours + trl, "gemm")
        cpu = median(ours, "cpu")
        update = median(ours, "optimizer_cpu")
        rows.append([
            label(cell), str(cell["per_step"]), show(cpu, ".2f"), show(median(trl, "cpu"), ".2f"),
            f"**{show(ratio(median(trl, 'cpu'), cpu), '.2f', 'x')}**",
            percent(median(ours, "share")), percent(median(trl, "share")), show(rate and rate / 1e9, ".0f"),
            percent(ratio(update, (cpu or 0) + (update or 0))),
        ])  # fmt: skip
    header = [
        "workload", "pairs", "ours, CPU s", "TRL, CPU s", "ours is faster by", "ours, share of FLOP limit",
        "TRL, share", "best GEMM, GF/s", "AdamW's share of our step",
    ]  # fmt: skip
    note = [
        "Forward and backward of one batch; medians. The FLOP limit is the time for the floating-point "
        "operations that the loss needs (each token and key once, matrix products only) at the best GEMM "
        "rate, timed right before and after each step in the same precision. "
        "Bar: 70 % for h512 and OPT in fp32.", "",
    ]  # fmt: skip
    return ["## One step", "", *note, *table(header, rows)]


def _gradients_mib(shape: str) -> float:
    """Memory of the gradients, which both sides need."""
    with torch.device("meta"):
        return sum(4 * weight.numel() for weight in SHAPES[shape].build().parameters()) / 2**20


def _memory_table(results: Results) -> list[str]:
    rows = []
    for cell in results.cells("step"):
        peaks = [
            median(results.find(False, task="step", side=s, **cell), "peak_mib") for s in ("ours", "trl")
        ]
        if peaks == [None, None]:
            continue
        bar = 20 if cell.get("checkpointing") else 10
        gain = ratio(peaks[1], peaks[0])
        barred = cell["shape"] == "h256" and cell["data"] == "hh" and cell.get("dtype") == "fp32"
        verdict = f" ({'≥' if gain >= bar else 'misses'} {bar})" if barred and gain is not None else ""
        rows.append([
            label(cell), str(cell["per_step"]), show(_gradients_mib(cell["shape"]), ",.0f"),
            show(peaks[0], ",.0f"), show(peaks[1], ",.0f"), f"**{show(gain, '.1f', 'x')}**{verdict}",
        ])  # fmt: skip
    for cell in results.cells("train"):
        peaks = [median(results.find(task="train", side=s, **cell, **o), "peak_mib")
                 for s, o in (("ours", {}), ("trl", {"order": "random"}))]  # fmt: skip
        rows.append([
            f"`train()`, heap kept: {label(cell)}", str(cell["per_step"]),
            show(_gradients_mib(cell["shape"]), ",.0f"), show(peaks[0], ",.0f"), show(peaks[1], ",.0f"),
            f"**{show(ratio(peaks[1], peaks[0]), '.1f', 'x')}**",
        ])  # fmt: skip
    header = [
        "workload",
        "pairs a step",
        "gradients, MiB",
        "ours, MiB",
        "TRL, MiB",
        "ours needs less by (bar)",
    ]
    note = [
        "Memory above that of the model and AdamW's moments, gradients included. One batch, the allocator's "
        "defaults, each in its own process. The last rows are whole epochs with the heap kept, so memory "
        "that was freed counts.", "",
    ]  # fmt: skip
    return ["## Peak memory", "", *note, *table(header, rows)]


def _agreement_table(results: Results) -> list[str]:
    rows = []
    for cell in results.cells("agreement"):
        for r in results.find(task="agreement", **cell)[-1:]:
            rows.append([
                label(cell), str(cell["per_step"]), f"{r['loss_ours']:.6f}", f"{r['loss_difference']:.1e}",
                f"{r['gradient_error']:.1e}", f"`{r['parameter']}`",
                *(f"{r[key]:.1e}" if key in r else "-" for key in ("ours_to_float64", "trl_to_float64")),
            ])  # fmt: skip
    header = [
        "workload", "pairs", "loss", "difference to TRL", "worst relative gradient difference", "in",
        "ours to float64", "TRL to float64",
    ]  # fmt: skip
    note = [
        "One batch, with the same weights and token ids (checked) on both sides. "
        "Bars in fp32: 1e-6 and 1e-5. The last columns are the worst gradient of each side against each "
        "response alone in float64: where a ReLU near zero rounds to its other side, the side that did so is "
        "far off there.", "",
    ]  # fmt: skip
    return ["## The same loss and gradients", "", *note, *table(header, rows)]


def _head_table(results: Results) -> list[str]:
    rows = []
    exact = median(results.find(task="head", variant="full"), "loss")
    for variant, name in VARIANTS.items():
        found = results.find(task="head", variant=variant)
        if found:
            loss = median(found, "loss")
            rows.append([
                name, show(median(found, "cpu"), ".2f"), show(median(found, "peak_mib"), ",.0f"),
                "-" if loss is None or exact is None else f"{abs(loss - exact):.1e}",
            ])  # fmt: skip
    note = [
        "From hidden states to the loss and both gradients: h256, V 32000, 8 pairs of HH-RLHF, fp32. Memory "
        "is what is used above the inputs, with the heap kept, gradients (33 MiB) included.", "",
    ]  # fmt: skip
    if not any("Liger" in row[0] for row in rows):
        note = [*note[:-1], "Liger: not installed where this was measured (`pip install liger-kernel`).", ""]
    return [
        "## The head alone",
        "",
        *note,
        *table(["head", "CPU s", "peak MiB", "loss difference to full logits"], rows),
    ]


def _budget_table(results: Results) -> list[str]:
    lines: list[str] = []
    header = ["tokens_per_micro_batch", "micro-batches", "CPU s", "above the fastest", "peak MiB"]
    for shape in ("h256", "h512"):
        for r in results.find(task="micro_batches", shape=shape)[-1:]:
            fastest = min(r["cpu"])
            rows = [
                [str(b), str(n), show(c, ".2f"), f"+{100 * (c / fastest - 1):.0f} %", show(m, ",.0f")]
                for b, n, c, m in zip(r["budgets"], r["micro_batches"], r["cpu"], r["peak_mib"], strict=True)
            ]
            lines += [f"{NAMES[shape]}, 32 pairs of HH-RLHF, {r['tokens']} tokens:", ""]
            lines += table(header, rows)
    return ["## Token budget of a micro-batch", "", *lines] if lines else []


def _growth_note(folder: Path) -> list[str]:
    if not (folder / "growth.svg").exists():
        return []
    return [
        "## How cost grows",
        "",
        "![Time and memory per pair against lengths, pairs and vocabulary](growth.svg)",
        "",
    ]


def _errors(raw: Spec) -> list[str]:
    failed = [
        f"- `{key}`: {r['error']}" for key, runs in raw["runs"].items() for r in runs[-1:] if "error" in r
    ]
    return ["## Runs that failed", "", *failed, ""] if failed else []
