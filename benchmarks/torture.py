"""Attempts to break `orpo`: bad inputs, fuzzed inputs, random kills. Seeded, resumable, bounded.

    python benchmarks/torture.py inputs                     several hundred bad inputs, one by one
    python benchmarks/torture.py fuzz --cases 1000000       random rows, files, recipes and numbers
    python benchmarks/torture.py kills --kills 200          kill -9 at random moments, against whole runs

Each case runs in a process of its own (a fork of this one, which has imported everything), with a limit of
time. What counts as a failure: a traceback, a hang, a death by signal, an exit status other than 0 and 2, a
refusal that is not one line, and an input that is accepted though it must not be. Results go to a file, one
line a case; cases that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

REFUSED, RAN = "refused", "ran"
LIMIT = 60.0
"""Seconds that a case may take."""


@dataclass(frozen=True)
class Case:
    """One attempt.

    Attributes:
        name: Of its own; results are kept under it.
        build: Gets an empty folder, in which the case then runs; returns the command's words.
        expect: How it must end: `refused`, `ran`, or either (None).
        says: Words that must be printed.
    """

    name: str
    build: Callable[[Path], Sequence[str]]
    expect: str | None = None
    says: str = ""


@dataclass(frozen=True)
class Verdict:
    """How a case ended.

    Attributes:
        name: Of the case.
        ended: `refused`, `ran`, `traceback`, `hang`, `signal N`, `exit N`, `not one line`, `accepted`,
            `does not say`.
        failed: Whether that is a failure.
        seconds: By the clock.
        line: The last line of the output.
    """

    name: str
    ended: str
    failed: bool
    seconds: float
    line: str


def run_command(words: Sequence[str], folder: Path, limit: float = LIMIT) -> tuple[int | None, str]:
    """Run `orpo WORDS` in a fork; its exit status (negative: the signal; None: it hung) and its output."""
    output = folder / ".output"
    child = os.fork()
    if child == 0:
        _be_the_command(words, folder, output)
    status = _wait(child, limit)
    return status, output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""


def _be_the_command(words: Sequence[str], folder: Path, output: Path) -> None:
    """Never returns."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", errors="replace"), os.fdopen(2, "w", errors="replace")
        from orpo.cli import main

        try:
            status = main(list(words))
        except SystemExit as stop:  # argparse
            status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(case: Case, status: int | None, output: str) -> tuple[str, bool]:
    """How a case ended, and whether that is a failure."""
    errors = [line for line in output.splitlines() if line.startswith("orpo: error") or ": error: " in line]
    if status is None:
        return "hang", True
    if "Traceback (most recent call last)" in output or status == 1:
        return "traceback", True
    if status < 0:
        return f"signal {-status}", True
    if status not in (0, 2):
        return f"exit {status}", True
    if status == 2 and len(errors) != 1:
        return "not one line", True
    ended = REFUSED if status == 2 else RAN
    if case.expect is not None and ended != case.expect:
        return ("accepted" if ended == RAN else ended), True
    if case.says and case.says not in output:
        return "does not say", True
    return ended, False


def run_cases(cases: Sequence[Case], results: Path, only: str = "") -> list[Verdict]:
    """Run those that have no result yet; all results, in the order of the cases."""
    known = {verdict.name: verdict for verdict in read_results(results)}
    names = Counter(case.name for case in cases)
    assert max(names.values()) == 1, names.most_common(3)
    found = []
    for number, case in enumerate(cases):
        if only and only not in case.name:
            continue
        if case.name not in known:
            known[case.name] = run_case(case)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(known[case.name])) + "\n")
            if known[case.name].failed:
                print(f"{number:5}  {known[case.name].ended:14} {case.name}: {known[case.name].line[:150]}")
        found.append(known[case.name])
    return found


def run_case(case: Case) -> Verdict:
    """Run one case in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        words = case.build(folder)
        began = time.monotonic()
        status, output = run_command(words, folder)
        ended, failed = judge(case, status, output)
        lines = output.strip().splitlines() or [""]
        return Verdict(case.name, ended, failed, round(time.monotonic() - began, 2), lines[-1][:400])
    finally:
        for path in folder.rglob("*"):
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)


def read_results(results: Path) -> Iterator[Verdict]:
    """Those of earlier calls."""
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            yield Verdict(**json.loads(line))


def table(verdicts: Sequence[Verdict]) -> str:
    """Groups and how their cases ended, as Markdown."""
    ends = sorted({verdict.ended for verdict in verdicts}, key=lambda end: (end not in (REFUSED, RAN), end))
    rows = [f"| group | cases | {' | '.join(ends)} |", "|---|" + "---|" * (len(ends) + 1)]
    groups = sorted({verdict.name.split(":")[0] for verdict in verdicts})
    for group in [*groups, "all"]:
        mine = [v for v in verdicts if group == "all" or v.name.split(":")[0] == group]
        counts = Counter(v.ended for v in mine)
        rows.append(f"| {group} | {len(mine)} | {' | '.join(str(counts[end]) for end in ends)} |")
    return "\n".join(rows)


def preload() -> None:
    """Import what the commands import, so that a fork has it."""
    import torch

    torch.set_num_threads(1)
    import datasets
    import peft
    import transformers

    import orpo.demo.study
    import orpo.training.job

    datasets.disable_progress_bars()
    assert all((peft, transformers, orpo))


def main() -> int:
    """The command; the exit status is 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("campaign", choices=("inputs", "fuzz", "kills"))
    parser.add_argument("--results", type=Path, default=Path("runs/torture"), help="folder of the results")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000, help="of fuzz")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this long")
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    preload()
    if args.campaign == "inputs":
        from torture_inputs import cases

        world = Path(tempfile.mkdtemp(prefix="torture-world-"))
        try:
            verdicts = run_cases(list(cases(world)), args.results / "inputs.jsonl", args.only)
        finally:
            shutil.rmtree(world, ignore_errors=True)
        print(table(verdicts))
        return int(any(verdict.failed for verdict in verdicts))
    if args.campaign == "fuzz":
        from torture_fuzz import fuzz

        return fuzz(args.results / "fuzz.jsonl", args.cases, args.seed, args.minutes, args.only)
    from torture_kills import kills

    return kills(args.results / "kills.jsonl", args.kills, args.seed, args.minutes, args.only)


if __name__ == "__main__":
    sys.exit(main())
