"""The campaign of `torture.py kills`: kill -9 at random moments, and the same command again until it is done.

A finished run must equal its undisturbed twin: every weight bit for bit, every line of metrics.jsonl but
for its clocks, the same checkpoints, nothing half-written left behind. Half of the kills are spread over the
whole run; the others hit its first and its last second, where files are opened and closed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture import _be_the_command
from torture_inputs import make_world, train_words

STEPS = 11
"""Optimizer steps of a run; an epoch has ten, so that it ends within one."""
CLOCKS = ("seconds", "tokens_per_second", "peak_memory")
MOST_KILLS = 6
"""Of one run; then it is left alone."""
LIMIT = 180.0


@dataclass(frozen=True)
class Schedule:
    """One kind of run.

    Attributes:
        words: Options besides those that all runs have.
        ranks: Processes.
    """

    words: tuple[str, ...] = ()
    ranks: int = 1


SCHEDULES = {
    "full": Schedule(("--disable_dropout", "false")),
    "lora": Schedule(("--use_peft", "true", "--lora_dropout", "0.1")),
    "accumulation": Schedule(
        (
            "--gradient_accumulation_steps",
            "2",
            "--per_device_train_batch_size",
            "2",
            "--tokens_per_micro_batch",
            "200",
        )
    ),
    "best": Schedule(("--load_best_model_at_end", "true", "--num_samples", "2")),
    "two ranks": Schedule(
        (
            "--per_device_train_batch_size",
            "2",
        ),
        2,
    ),
}


class Processes:
    """The processes of one command, forks of this one."""

    def __init__(self, words: Sequence[str], folder: Path, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.outputs = [folder / f".output-{rank}" for rank in range(ranks)]
        self.children = []
        for rank, output in enumerate(self.outputs):
            child = os.fork()
            if child == 0:
                if ranks > 1:
                    os.environ |= {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    }
                _be_the_command(words, folder, output)
            self.children.append(child)

    def wait(self, seconds: float) -> list[int] | None:
        """The exit statuses; None where not all have ended by then."""
        end, statuses = time.monotonic() + seconds, dict.fromkeys(self.children, None)
        while time.monotonic() < end:
            for child in self.children:
                if statuses[child] is None:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        statuses[child] = os.waitstatus_to_exitcode(status)
            if None not in statuses.values():
                self.children = []
                return list(statuses.values())
            time.sleep(0.002)
        self.children = [child for child, status in statuses.items() if status is None]
        return None

    def kill(self, first: int = 0) -> None:
        """SIGKILL, to one of several a little earlier."""
        children = self.children[first:] + self.children[:first]
        for child in children:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.children = []

    def printed(self) -> str:
        """What they have printed."""
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


def words_of(world: Path, schedule: Schedule, out: Path) -> list[str]:
    """The command of one run."""
    words = [
        *train_words(world, out),
        "--eval_dataset_name",
        str(world / "test.jsonl"),
        "--save_steps",
        "3",
        "--eval_steps",
        "3",
        "--logging_steps",
        "2",
        "--load_best_model_at_end",
        "false",
        "--save_total_limit",
        "2",
    ]
    words[words.index("--max_steps") + 1] = str(STEPS)
    for name, value in zip(schedule.words[::2], schedule.words[1::2], strict=True):
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def result_of(folder: Path) -> dict[str, Any]:
    """What must be equal."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        for clock in CLOCKS:
            line.pop(clock, None)
            line.get("metrics", {}).pop(clock, None)
        lines.append(line)
    files = sorted(folder.rglob("*.safetensors"))
    return {
        "metrics": lines,
        "weights": {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        "left": sorted(path.name for path in folder.glob(".saving-*")),
        "card": (folder / "README.md").exists(),
    }


def kills(results: Path, number: int, seed: int, minutes: float, only: str) -> int:
    """Kill until `number` kills have been made; 1 where a run differs from its twin."""
    end = time.monotonic() + 60 * minutes
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    total = sum(run["kills"] for run in known)
    world = Path(tempfile.mkdtemp(prefix="torture-world-"))
    try:
        make_world(world)
        twins: dict[str, tuple[dict[str, Any], float]] = {}
        names = [name for name in SCHEDULES if only in name]
        while total < number and time.monotonic() < end:
            name = names[len(known) % len(names)]
            if name not in twins:
                twins[name] = _undisturbed(world, SCHEDULES[name])
            run = _disturbed(world, name, *twins[name], random.Random(f"{seed} {len(known)}"))
            known.append(run)
            total += run["kills"]
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            if run["problems"]:
                print(f"{name} {run['moments']}: {'; '.join(run['problems'])[:600]}", flush=True)
    finally:
        shutil.rmtree(world, ignore_errors=True)
    print("| schedule | runs | kills | runs that differ |\n|---|---|---|---|")
    for name in [*SCHEDULES, "all"]:
        mine = [run for run in known if name in (run["schedule"], "all")]
        counts = Counter(
            kills=sum(run["kills"] for run in mine), bad=sum(bool(run["problems"]) for run in mine)
        )
        print(f"| {name} | {len(mine)} | {counts['kills']} | {counts['bad']} |")
    return int(any(run["problems"] for run in known))


def _undisturbed(world: Path, schedule: Schedule) -> tuple[dict[str, Any], float]:
    out = Path(tempfile.mkdtemp(prefix="torture-twin-"))
    began = time.monotonic()
    processes = Processes(words_of(world, schedule, out / "run"), out, schedule.ranks)
    statuses = processes.wait(LIMIT)
    assert statuses == [0] * schedule.ranks, (statuses, processes.printed()[-2000:])
    seconds = time.monotonic() - began
    result = result_of(out / "run")
    shutil.rmtree(out)
    return result, seconds


def _disturbed(
    world: Path, name: str, twin: dict[str, Any], seconds: float, draw: random.Random
) -> dict[str, Any]:
    schedule = SCHEDULES[name]
    out = Path(tempfile.mkdtemp(prefix="torture-kill-"))
    moments: list[float] = []
    problems: list[str] = []
    statuses = None
    while not problems:
        processes = Processes(words_of(world, schedule, out / "run"), out, schedule.ranks)
        moment = _moment(seconds, draw) if len(moments) < MOST_KILLS else LIMIT
        statuses = processes.wait(moment)
        printed = processes.printed()
        if "Traceback (most recent" in printed:
            problems.append(printed[printed.index("Traceback") :][-500:])
        if statuses is not None:
            break
        processes.kill(draw.randrange(schedule.ranks))
        if moment == LIMIT:
            problems.append("it hangs")
        moments.append(round(moment, 3))
    if statuses is not None and any(statuses):
        problems.append(f"it ended with {statuses}: {processes.printed()[-300:]}")
    if not problems:
        found = result_of(out / "run")
        differing = [key for key in twin if found[key] != twin[key]]
        problems += [f"{key} differs: {_difference(twin[key], found[key])}" for key in differing]
    shutil.rmtree(out)
    return {"schedule": name, "kills": len(moments), "moments": moments, "problems": problems}


def _moment(seconds: float, draw: random.Random) -> float:
    """Seconds after the start: anywhere, or near the beginning or the end."""
    where = draw.random()
    if where < 0.5:
        return draw.uniform(0, seconds)
    if where < 0.7:
        return draw.uniform(0, min(1.0, seconds))
    return max(0.0, seconds - draw.uniform(0, 1.0))


def _difference(twin: Any, found: Any) -> str:
    if isinstance(twin, list):
        new, gone = [line for line in found if line not in twin], [line for line in twin if line not in found]
        return f"{new} instead of {gone}"[:300]
    if isinstance(twin, dict):
        return ", ".join(key for key in {**twin, **found} if twin.get(key) != found.get(key))
    return f"{found} instead of {twin}"
