"""Measure ours against TRL 1.16 on this machine and write RESULTS.md; `--full` measures the grid.

Every run is a process of its own (measure.py), one at a time, ours and TRL's taking turns. Raw numbers go to
results.json, those of DPO and SFT to objectives.json, those of pairs that share tokens to sharing.json, after
each run: a second call resumes where the first stopped, `--fresh` starts again. Without `--full` the cells of
the project's bar are measured, then measured again while the time budget lasts.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heads import VARIANTS
from report import RAW, RAW_OBJECTIVES, RAW_SHARING, write_report

from orpo.engine.precision import bfloat16_gain

FOLDER = Path(__file__).resolve().parent
KEEP_HEAP = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip
"""glibc keeps and reuses its heap: without it TRL's step spends a third of its time on page faults."""

Spec = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A workload on which both sides are measured.

    Attributes:
        shape, data: Keys of workloads.py.
        per_step: Pairs of an optimizer step, TRL's batch size.
        pairs: Pairs of the epoch that `train()` runs; 0: single steps only.
        steps: Whose single steps are timed: `both`, `ours` (for the share of the FLOP limit) or nobody's.
        memory: Also measure peaks, under the allocator's defaults.
        agreement: Also compare loss and gradients.
    """

    shape: str
    data: str
    per_step: int
    pairs: int = 0
    dtype: str = "fp32"
    checkpointing: bool = False
    steps: str = "both"
    memory: bool = True
    agreement: bool = True

    def runs(self) -> Iterator[tuple[Spec, bool]]:
        """What to measure, in order, and whether with the heap kept (time) or as it comes (memory)."""
        cell: Spec = {"shape": self.shape, "data": self.data, "per_step": self.per_step, "dtype": self.dtype}
        if self.pairs:
            whole = {"task": "train", **cell, "checkpointing": self.checkpointing, "pairs": self.pairs}
            yield {**whole, "side": "trl", "order": "random"}, True
            yield {**whole, "side": "ours"}, True
            yield {**whole, "side": "trl", "order": "grouped"}, True
        single = {"task": "step", **cell, "checkpointing": self.checkpointing}
        if self.steps == "both":
            yield {**single, "side": "trl", "repeats": 2}, True
        if self.steps:
            yield {**single, "side": "ours", "repeats": 5}, True
        if self.memory:
            yield {**single, "side": "trl", "repeats": 1}, False
            yield {**single, "side": "ours", "repeats": 1}, False
        if self.agreement and not self.checkpointing:
            yield {"task": "agreement", **cell}, True


BAR = [
    Cell("h256", "hh", 8, pairs=64, steps=""),
    Cell("opt", "hh", 4, pairs=16, steps="ours", memory=False),
    Cell("opt_gelu", "hh", 4, steps="", memory=False),  # as OPT, without a kink
    Cell("h256", "uf", 4, pairs=16, steps="", memory=False, agreement=False),
    Cell("h256", "long", 4, pairs=16, steps="", memory=False, agreement=False),
    Cell("h512", "hh", 8, steps="ours", memory=False, agreement=False),
    Cell("h256", "hh", 8, checkpointing=True, steps=""),
    *([Cell("h256", "hh", 8, pairs=64, dtype="bf16")] if bfloat16_gain() > 1 else []),
]
PAIRS = {"hh": 8, "uf": 4, "long": 4}
SMALLER = {"opt": {"hh": 4, "uf": 2, "long": 2}, "v152k": {"hh": 2, "uf": 1, "long": 1}}
GRID = [
    *BAR,
    *(
        Cell(shape, data, SMALLER.get(shape, PAIRS)[data], 0, dtype, checkpointing)
        for dtype in ("fp32", "bf16")
        for shape in ("h256", "h512", "opt", "v152k")
        for data in ("hh", "uf", "long")
        for checkpointing in (False, True)
    ),
    Cell("h512", "hh", 8, pairs=32),
    Cell("v152k", "hh", 2, pairs=16),
    Cell("h256", "hh", 8, pairs=64, checkpointing=True),
]
HEADS: list[Spec] = [
    {"task": "head", "variant": v, "shape": "h256", "data": "hh", "pairs": 8} for v in VARIANTS
]
MAIN_HEADS = [s for s in HEADS if s["variant"] in ("ours", "full", "torch", "liger")]
DATA: list[Spec] = [
    {"task": "data", "side": side, "rows": 4000, "processes": processes}
    for processes in (1, 2)
    for side in ("trl", "ours")
]
BUDGETS: list[Spec] = [
    {
        "task": "micro_batches",
        "shape": shape,
        "data": "hh",
        "per_step": 32,
        "budgets": [512, 1024, 2048, 4096, 8192],
    }
    for shape in ("h256", "h512")
]
_WHOLE: Spec = {"task": "train", "shape": "h256", "data": "hh", "per_step": 8, "dtype": "fp32"}
_SIDES: list[Spec] = [
    {"side": "trl", "objective": "dpo", "order": "random"},
    {"side": "ours", "objective": "dpo"},
    {"side": "trl", "objective": "sft", "order": "random"},
    {"side": "ours", "objective": "sft"},
    {"side": "trl", "objective": "sft", "order": "packed"},
]


SHARED: list[tuple[Spec, bool]] = [
    ({**_WHOLE, "data": data, "per_step": per_step, "pairs": pairs, **side}, True)
    for data, per_step, pairs in (("ranked", 6, 24), ("all ranked", 6, 24), ("system", 8, 16), ("hh", 8, 64))
    for side in ({"side": "trl", "order": "random"}, {"side": "ours", "apart": True}, {"side": "ours"})
    if not (data == "hh" and side["side"] == "trl")
]
"""Data whose pairs share something, with and without sharing it, and plain pairs, which must not pay."""


def objectives(pairs: int) -> list[tuple[Spec, bool]]:
    """Whole `train()` loops of DPO and SFT: time with the heap kept, and the peak as the allocator has it."""
    return [({**_WHOLE, "pairs": pairs, **side}, keep) for keep in (True, False) for side in _SIDES]


@dataclass
class Store:
    """Raw results on disk: for each run's key the list of its repetitions."""

    path: Path
    runs: dict[str, list[Spec]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.runs = json.loads(self.path.read_text())["runs"]

    def add_missing(self, runs: Iterable[tuple[Spec, bool]], arguments: argparse.Namespace) -> None:
        """Measure each run as often as asked, those that time something again while the budget lasts."""
        command = "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        named = {key_of(*run): run for run in runs}
        start = time.monotonic()
        for number in range(arguments.passes):
            for key, (spec, keep_heap) in named.items():
                spent = (time.monotonic() - start) / 60
                timed = keep_heap and spec["task"] in ("train", "step", "data")
                if arguments.only not in key or self.count(key) > number or (number and not timed):
                    continue
                if number and not arguments.full and spent > arguments.minutes:
                    return
                result = measure(spec, keep_heap)
                self.add(key, result, command)
                _say(spec, result, spent)
                write_report(FOLDER / "RESULTS.md")

    def count(self, key: str) -> int:
        """How often a run was measured; failures do not count, so the next call tries them again."""
        return sum("error" not in result for result in self.runs.get(key, []))

    def add(self, key: str, result: Spec, command: str) -> None:
        """Append a result and write the file."""
        self.runs[key] = [r for r in self.runs.get(key, []) if "error" not in r] + [result]
        content = {"machine": machine(), "command": command, "runs": self.runs}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def key_of(spec: Spec, keep_heap: bool) -> str:
    """Name of a run in results.json."""
    return json.dumps(spec, sort_keys=True) + ("" if keep_heap else " default allocator")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = int(next(iter(Path("/proc/meminfo").read_text().splitlines())).split()[1]) / 2**20
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu, "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "load": os.getloadavg()[0], "python": platform.python_version(), "threads": 1,
        "system": f"{platform.system()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "versions": {name: version(name) for name in packages},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }  # fmt: skip


def measure(spec: Spec, keep_heap: bool) -> Spec:
    """Run one measurement; a failure is a result too, and says why."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | (KEEP_HEAP if keep_heap else {})
    process = subprocess.run(
        [sys.executable, str(FOLDER / "measure.py"), json.dumps(spec)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in process.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT ")) | {"load": round(os.getloadavg()[0], 1)}
    last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
    return {"error": last[0][:300]}


def main() -> None:
    """Measure what is missing and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole grid, then growth.py's plots")
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument(
        "--minutes", type=float, default=16, help="time within which the bar's cells are repeated"
    )
    parser.add_argument("--passes", type=int, default=3, help="times each cell is measured at most")
    parser.add_argument("--only", default="", help="runs whose key contains this text, for instance opt")
    parser.add_argument(
        "--again", default="", help="forget runs whose key contains this text, and measure them"
    )
    parser.add_argument("--report", action="store_true", help="write RESULTS.md from the results there are")
    parser.add_argument("--objectives", action="store_true", help="DPO and SFT alone")
    parser.add_argument("--sharing", action="store_true", help="pairs that share tokens alone")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of the epoch of DPO and SFT")
    arguments = parser.parse_args()
    stores = {name: FOLDER / name for name in (RAW, RAW_OBJECTIVES, RAW_SHARING)}
    if arguments.objectives or arguments.sharing:
        stores = {name: stores[name] for name in (RAW_OBJECTIVES if arguments.objectives else RAW_SHARING,)}
    for path in stores.values():
        if arguments.fresh:
            path.unlink(missing_ok=True)
    if not arguments.report:
        for name, path in stores.items():
            store = Store(path)
            if arguments.again:
                store.runs = {key: runs for key, runs in store.runs.items() if arguments.again not in key}
            runs = {RAW_OBJECTIVES: objectives(arguments.pairs), RAW_SHARING: SHARED}
            store.add_missing(runs.get(name) or _bar(arguments), arguments)
        if arguments.full and not arguments.only:
            subprocess.run([sys.executable, str(FOLDER / "growth.py")], check=True)
    write_report(FOLDER / "RESULTS.md")


def _bar(arguments: argparse.Namespace) -> list[tuple[Spec, bool]]:
    """ORPO's cells."""
    cells = GRID if arguments.full else BAR
    others = HEADS + BUDGETS if arguments.full else MAIN_HEADS
    runs = [(spec, True) for spec in DATA] + [run for cell in cells for run in cell.runs()]
    return runs + [(spec, True) for spec in others]


def _say(spec: Spec, result: Spec, minutes: float) -> None:
    what = " ".join(str(v) for k, v in spec.items() if v is not False and k not in ("repeats", "budgets"))
    names = ("cpu", "wall", "peak_mib", "loss_difference", "gradient_error")
    shown = {name: float(f"{result[name]:.4g}") for name in names if isinstance(result.get(name), float)}
    print(f"{minutes:5.1f} min  {what:60s} {result.get('error') or shown}", flush=True)


if __name__ == "__main__":
    main()
