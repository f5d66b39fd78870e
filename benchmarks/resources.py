"""What the data path and a checkpoint cost in time and memory, each against a bound; 1 where one is exceeded.

    python benchmarks/resources.py                    everything, about ten minutes on two cores
    python benchmarks/resources.py --rows 20000       with smaller data, against the same bounds
    python benchmarks/resources.py --only checkpoint

Each case runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

ROWS = 200_000
WORDS = 2_000_000
"""Of the long row, about 10 MB."""
SAVES = 30


def demo_tokenizer() -> Any:
    """Of the demo's model."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(str(files("orpo") / "demo" / "model"))


def trainer(data: str, **settings: Any) -> tuple[Any, float]:
    """A trainer of the smallest model that is ready to train, and the seconds until it was."""
    from workloads import Shape

    from orpo.training.trainer import ORPOConfig, ORPOTrainer

    tokenizer = demo_tokenizer()
    model = Shape(64, 1, len(tokenizer)).build()
    args = ORPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True, eval_strategy="no",
        dataset_name=data, dataset_num_proc=2, **{"max_length": 4096, **settings},
    )  # fmt: skip
    began = time.perf_counter()
    ready = ORPOTrainer(model=model, args=args, processing_class=tokenizer)
    return ready, time.perf_counter() - began


def inspected(folder: Path, rows: int) -> dict[str, float]:
    """Inspect all rows."""
    import orpo

    began = time.perf_counter()
    found = orpo.inspect_data(str(folder / "rows.jsonl"))
    assert found.pairs == rows, found.pairs
    return {"seconds": time.perf_counter() - began}


def first_start(folder: Path, rows: int) -> dict[str, float]:
    """60,000 of the rows (three in ten) to a trainer, with nothing cached."""
    return {"seconds": trainer(str(folder / "some.jsonl"))[1]}


def second_start(folder: Path, rows: int) -> dict[str, float]:
    """The same again, in a new process."""
    return {"seconds": trainer(str(folder / "some.jsonl"))[1]}


def damaged_cache(folder: Path, rows: int) -> dict[str, float]:
    """The same with a cache full of zeros: said in lines that name the folder, and made again."""
    whole, _ = trainer(str(folder / "some.jsonl"))
    tokens = whole.train_dataset.folder / "tokens.npy"
    before = whole.train_dataset.tokens[:1000].tolist()
    del whole
    tokens.write_bytes(bytes(tokens.stat().st_size))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        again, seconds = trainer(str(folder / "some.jsonl"))
    assert f"{tokens.parent}: the cached tokens are damaged" in said.getvalue(), said.getvalue()
    assert again.train_dataset.tokens[:1000].tolist() == before
    return {"seconds": seconds}


def full_disk(folder: Path, rows: int) -> dict[str, float]:
    """The same where nothing of more than 64 KiB can be written: the run goes on without a cache."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        ready, seconds = trainer(str(folder / "some.jsonl"), max_length=4095)
    assert "could not be cached" in said.getvalue(), said.getvalue()
    return {"seconds": seconds, "pairs": len(ready.train_dataset)}


def long_row(folder: Path, rows: int) -> dict[str, float]:
    """One row of two million words among thirty short ones, against the short ones alone."""
    _, seconds = trainer(str(folder / "long.jsonl"), max_dropped=0.5)
    return {"seconds": seconds}


def short_rows(folder: Path, rows: int) -> dict[str, float]:
    """The thirty short ones."""
    return {"seconds": trainer(str(folder / "short.jsonl"))[1]}


def checkpoint(folder: Path, rows: int) -> dict[str, float]:
    """Saves of 31 million weights on the disk."""
    return _saves(folder)


def checkpoint_in_memory(folder: Path, rows: int) -> dict[str, float]:
    """The same in memory, where no flush hides what the processor does."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        return _saves(Path(name))


def _saves(folder: Path) -> dict[str, float]:
    """Saves as plain transformers makes them (CRC32 in torch's archives), as we do (xxh3 in the manifest, no
    CRC32), and with no checksum at all, taking turns; the medians of the differences within a round.
    """
    from torch.utils.serialization import config as serialization
    from workloads import Shape

    from orpo.pairs import TokenizedPair
    from orpo.run import checkpoints
    from orpo.training import trainer as training

    args = training.ORPOConfig(
        output_dir=str(folder / "saves"), use_cpu=True, max_steps=1, eval_strategy="no", report_to="none",
        disable_tqdm=True, per_device_train_batch_size=8, save_total_limit=1, save_strategy="no",
    )  # fmt: skip
    pairs = [TokenizedPair([5, 6, 7 + number], [8, 9], [10, 11]) for number in range(8)]
    model = Shape(512, 6, 12_000).build()
    run = training.ORPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=demo_tokenizer())
    run.train()
    summed, changed = checkpoints.flush_and_describe, training.changed
    sizes = lambda paths: [{"bytes": path.stat().st_size} for path in paths]  # noqa: E731
    keep_crc = lambda target, **values: (  # noqa: E731
        contextlib.nullcontext() if target is serialization.save else changed(target, **values)
    )
    ways = {"plain": (sizes, keep_crc), "ours": (summed, changed), "none": (sizes, changed)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(SAVES):
        for name in sorted(ways, reverse=bool(number % 2)):
            checkpoints.flush_and_describe, training.changed = ways[name]
            run.state.global_step += 1
            began = time.perf_counter(), time.process_time()
            run._save_checkpoint(run.model, None)
            found[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    seconds = statistics.median(wall for wall, _ in found["ours"])
    more = {}
    for other in ("plain", "none"):
        for index, clock in enumerate(("time", "CPU")):
            usual = statistics.median(one[index] for one in found[other])
            differences = [a[index] - b[index] for a, b in zip(found["ours"], found[other], strict=True)]
            more[f"% more {clock} than {other}"] = 100 * statistics.median(differences) / usual
    return {"seconds": seconds, **more}


MORE = "% more time than plain", "% more CPU than plain"
CASES: dict[str, tuple[Callable[[Path, int], dict[str, float]], dict[str, float]]] = {
    "inspect": (inspected, {"seconds": 120, "MiB": 4096}),
    "first start": (first_start, {"MiB": 4096}),
    "second start": (second_start, {"seconds": 3, "MiB": 1024}),
    "damaged cache": (damaged_cache, {"MiB": 4096}),
    "full disk": (full_disk, {"MiB": 4096}),
    "short rows": (short_rows, {"MiB": 1024}),
    "long row": (long_row, {"MiB": 1280}),
    "checkpoint": (checkpoint, dict.fromkeys(MORE, 2.0)),
    "checkpoint in memory": (checkpoint_in_memory, dict.fromkeys(MORE, 15.0)),
}
"""Case -> what runs, and the most that it may take; times and memory for `ROWS` rows."""


DATA = "write the data"


def write_data(folder: Path, rows: int) -> None:
    """The files that the cases read."""
    from preference_rows import make_rows

    with (folder / "rows.jsonl").open("w") as everything, (folder / "some.jsonl").open("w") as some:
        for number, row in enumerate(make_rows(rows)):
            line = json.dumps(row) + "\n"
            everything.write(line)
            if number < 3 * rows // 10:
                some.write(line)
    draw = random.Random(0)
    words = " ".join(draw.choices(["alpha", "beta", "with", "some", "the"], k=WORDS))
    short = [{"prompt": f"Question {n}?", "chosen": "yes it is", "rejected": "no"} for n in range(30)]
    for name, several in (("short", short), ("long", [{**short[0], "chosen": words}, *short])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))


def main() -> int:
    """Make the data, run the cases, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case == DATA:
        write_data(args.folder, args.rows)
        return 0
    if args.case:
        found = CASES[args.case][0](args.folder, args.rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print("RESULT", json.dumps({**found, "MiB": peak}))
        return 0
    exceeded = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
        # In a process of its own too: a child's peak begins at what its parent holds.
        words = [sys.executable, __file__, "--case", DATA, "--folder", name, "--rows", str(args.rows)]
        subprocess.run(words, env=environment, check=True)
        print("| case | seconds | MiB | more | within its bounds |")
        print("|---|---|---|---|---|")
        for case, (_, bounds) in CASES.items():
            if args.only not in case:
                continue
            words = [sys.executable, __file__, "--case", case, "--folder", name, "--rows", str(args.rows)]
            process = subprocess.run(words, env=environment, capture_output=True, text=True)
            lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
            if process.returncode or not lines:
                exceeded += 1
                print(f"| {case} | failed: {process.stderr.strip().splitlines()[-1:]} |")
                continue
            found = json.loads(lines[-1].removeprefix("RESULT "))
            over = {key: most for key, most in bounds.items() if found[key] > most}
            exceeded += bool(over)
            more = ", ".join(f"{found[key]:+.1f} {key}" for key in found if key.startswith("%"))
            cells = [f"{found['seconds']:.1f}" if "seconds" in found else "", f"{found['MiB']:.0f}", more]
            print(f"| {case} | {' | '.join(cells)} | {f'NO: {over}' if over else bounds} |", flush=True)
    return int(exceeded > 0)


if __name__ == "__main__":
    sys.exit(main())
