"""The fuzz campaign of `torture.py fuzz`: random rows, damaged files, recipes, plans and numbers.

A case is made from its target and its number alone, so that any can be repeated by itself. Cases run in
blocks, each block in a fork, so that a damaged file that ends the process ends one block, and names it.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from torture import _wait
from torture_inputs import _SHAPES, _VALUES, _flipped, _whole_files

BLOCK_LIMIT = 300.0
"""Seconds that a block may take."""

Outcome = str
"""`ran` or `refused`; whatever else a case raises is an escape."""


def fuzz(results: Path, number: int, seed: int, minutes: float, only: str) -> int:
    """Run blocks until there are `number` cases, escapes are printed; 1 where there was one."""
    end = time.monotonic() + 60 * minutes
    totals: dict[str, Counter[str]] = {name: Counter() for name in TARGETS}
    done = set()
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            block = json.loads(line)
            done.add((block["target"], block["first"], block["seed"]))
            totals[block["target"]].update(block["outcomes"])
    targets = [(name, *entry) for name, entry in TARGETS.items() if only in name]
    first = dict.fromkeys(TARGETS, 0)
    weights = [share for _, share, _, _ in targets]
    draw = random.Random(seed)
    while sum(total.total() for total in totals.values()) < number and time.monotonic() < end:
        name, _, block, make = draw.choices(targets, weights)[0]
        start, first[name] = first[name], first[name] + block
        if (name, start, seed) in done:
            continue
        outcomes, escapes = _run_block(make, name, start, block, seed)
        totals[name].update(outcomes)
        record = {"target": name, "first": start, "seed": seed, "outcomes": outcomes, "escapes": escapes}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for escape in escapes[:3]:
            print(f"{name} {escape}", flush=True)
    print(_table(totals))
    return int(any(total[end] for total in totals.values() for end in total if end not in ("ran", "refused")))


def _table(totals: dict[str, Counter[str]]) -> str:
    rows = ["| target | cases | refused | ran | escapes |", "|---|---|---|---|---|"]
    for name, total in [*totals.items(), ("all", sum(totals.values(), Counter()))]:
        others = total.total() - total["refused"] - total["ran"]
        rows.append(f"| {name} | {total.total():,} | {total['refused']:,} | {total['ran']:,} | {others:,} |")
    return "\n".join(rows)


def _run_block(
    make: Callable[[random.Random], Outcome], name: str, start: int, block: int, seed: int
) -> tuple[dict[str, int], list[str]]:
    """A block in a fork; what it was at when it died is an escape too."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    log = folder / "log"
    child = os.fork()
    if child == 0:
        _be_the_block(make, name, range(start, start + block), seed, log)
    status = _wait(child, BLOCK_LIMIT)
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    outcomes = Counter(line["outcome"] for line in lines)
    escapes = [f"{line['case']}: {line['why']}" for line in lines if "why" in line]
    if status != 0:
        outcomes["died"] += 1
        escapes.append(f"{start + len(lines)}: the process ended with {status}")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return dict(outcomes), escapes


def _be_the_block(
    make: Callable[[random.Random], Outcome], name: str, numbers: range, seed: int, log: Path
) -> None:
    """Never returns."""
    from orpo.errors import OrpoError

    status = 1
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        with log.open("a", buffering=1) as file:
            for number in numbers:
                line: dict[str, Any] = {"case": number}
                try:
                    line["outcome"] = make(random.Random(f"{name} {seed} {number}"))
                except OrpoError as error:
                    line["outcome"] = "refused"
                    if "\n" in str(error).strip() and name != "recipes":
                        line |= {"outcome": "several lines", "why": str(error)[:300]}
                except BaseException:
                    line |= {"outcome": "escape", "why": traceback.format_exc()[-700:]}
                file.write(json.dumps(line) + "\n")
        status = 0
    finally:
        os._exit(status)


# ------------------------------------------------------------------------------------------- rows


_COLUMNS = sorted(
    {column for row in _SHAPES.values() for column in row}
    | {
        "label",
        "score_chosen",
        "scores",
        "completions",
        "labels",
        "source",
        "question",
        "context",
        "images",
        "margin",
    }
)
_WORDS = (
    "",
    " ",
    "a",
    "Yes, I do.",
    "\n\nHuman: a\n\nAssistant: b",
    "<|im_start|>",
    "<|endoftext|>",
    "é👍",
    "\x00",
    "\ud83d",
    "[{'role': 'user', 'content': 'x'}]",
    '{"a": 1}',
    "{{ x }}",
    "</think>",
    "a" * 3000,
)
_ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "", None, 5)


def _value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return draw.choice([None, True, 0, -1, 3.5, float("nan"), float("inf"), 10**30])
    if kind <= 3:
        return draw.choice(_WORDS)
    if kind == 4:
        return draw.choice(list(_VALUES.values()))
    if kind <= 6:
        turn = {"role": draw.choice(_ROLES), "content": _value(draw, depth + 2)}
        return [dict(turn) for _ in range(draw.randrange(3))]
    if kind == 7:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {
        draw.choice([*_COLUMNS, "a", "", None]): _value(draw, depth + 1) for _ in range(draw.randrange(3))
    }


def _row(draw: random.Random) -> dict[Any, Any]:
    row: dict[Any, Any] = dict(draw.choice(list(_SHAPES.values())))
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        row[draw.choice([*row, *_COLUMNS, None, 5])] = _value(draw)
    return row


def rows(draw: random.Random) -> Outcome:
    """Rows in memory -> tokens; nothing empty, nothing too long, and the counts add up."""
    from orpo.data.dataset import tokenize_pairs
    from orpo.data.formats import FORMATS
    from orpo.data.preferences import read_preferences

    data = [_row(draw) for _ in range(draw.randrange(1, 5))]
    named = draw.choice([None, None, None, *(one.name for one in FORMATS)])
    read = read_preferences(
        data,
        max_dropped=1.0,
        data_format=named,
        on_bad_row=draw.choice(["stop", "skip"]),
        sft_rows=draw.choice(["drop", "use"]),
    )
    longest = draw.choice([None, 8, 64, 512])
    template = draw.choice(
        [None, "chatml", "{{ messages }}", "{% for m in messages %}{{ m.content }}{% endfor %}"]
    )
    pairs = tokenize_pairs(read, _tokenizer(), max_length=longest, chat_template=template)
    assert pairs.counts.total == pairs.counts.kept + pairs.counts.num_dropped, "the counts do not add up"
    for pair in pairs:
        assert pair.prompt, "empty prompt"
        assert len(pair.chosen) > pair.chosen_context, "empty chosen answer"
        assert longest is None or len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= longest, (
            "long"
        )
    return "ran"


_loaded: dict[str, Any] = {}


def _tokenizer() -> Any:
    if "tokenizer" not in _loaded:
        from transformers import AutoTokenizer

        _loaded["tokenizer"] = AutoTokenizer.from_pretrained(str(files("orpo") / "demo" / "model"))
    return _loaded["tokenizer"]


# ------------------------------------------------------------------------------------------- files


def damaged_files(draw: random.Random) -> Outcome:
    """Good files with bits, bytes and stretches changed."""
    from orpo.data.preferences import read_preferences

    if "files" not in _loaded:
        with tempfile.TemporaryDirectory() as folder:
            _loaded["files"] = _whole_files(Path(folder))
    kind = draw.choice(list(_loaded["files"]))
    data = bytes(_loaded["files"][kind])
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice([1, 4, 50, 5000]))
        how = draw.randrange(5)
        if how == 0:
            data = _flipped(data, draw.randrange(10**9), draw.choice([1, 10, 100])) if data else data
        elif how == 1:
            data = data[:start] + data[stop:]
        elif how == 2:
            data = data[:start] + data[start:stop] * 2 + data[stop:]
        elif how == 3:
            data = data[:start] + draw.randbytes(stop - start) + data[stop:]
        else:
            data = data[:start]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"d.{kind}"
        file.write_bytes(data)
        read_preferences(str(file), max_dropped=1.0, on_bad_row=draw.choice(["stop", "skip"]))
    return "ran"


# ------------------------------------------------------------------------------------------- recipes

_SCALARS = (
    "1",
    "-1",
    "0.5",
    "1e22",
    ".inf",
    "nan",
    "null",
    "true",
    "no",
    "foo",
    "[1, 2]",
    "{a: b}",
    "'x'",
    "&a 1",
    "*a",
    "!!float O",
    "!!python/none x",
    '"\\ud83d"',
    "\x1b",
    "2026-11-27",
    "1:30",
    "0x1F",
    "~",
    "-",
    "|",
)


def recipes(draw: random.Random) -> Outcome:
    """Recipe files and command words."""
    from orpo.settings.config import check_recipe
    from orpo.settings.recipe import load_recipe

    names = _names()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r.yaml"
        lines = [f"{draw.choice(names)}: {draw.choice(_SCALARS)}" for _ in range(draw.randrange(6))]
        text = "\n".join(lines)
        if draw.random() < 0.2 and text:
            at = draw.randrange(len(text))
            text = (
                text[:at] + draw.choice(["\t", "\x00", ":", "\n ", "{", "]", "é", "\ufeff", "#"]) + text[at:]
            )
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        words = []
        for _ in range(draw.randrange(3)):
            words.append(draw.choice(["--", "-", ""]) + draw.choice(names))
            words += draw.choice([[], [draw.choice(_SCALARS)]])
        check_recipe(load_recipe(str(file), overrides=words).settings)
    return "ran"


def _names() -> list[str]:
    if "names" not in _loaded:
        from orpo.settings.renamed import understood_names
        from orpo.settings.schema import known_settings

        _loaded["names"] = sorted({*known_settings(), *understood_names(), "nope", "learning_rat", ""})
    return list(_loaded["names"])


# ----------------------------------------------------------------------------------- plans and numbers


def plans(draw: random.Random) -> Outcome:
    """Every pair once, as many micro-batches on each rank, the budget kept but by single pairs."""
    import numpy as np

    from orpo.engine.planning import pair_tokens, plan_step

    number, ranks = draw.randrange(1, 40), draw.randrange(1, 5)
    lengths = np.array([[draw.randrange(1, 60) for _ in range(3)] for _ in range(number)])
    layout, budget = draw.choice(["shared", "packed", "padded"]), draw.randrange(2, 600)
    shares = plan_step(lengths, num_ranks=ranks, tokens_per_micro_batch=budget, layout=layout)
    seen = [index for share in shares for batch in share for index in batch.pairs if not batch.empty]
    assert sorted(seen) == list(range(number)), "not every pair exactly once"
    assert len({len(share) for share in shares}) == 1, "ranks differ in micro-batches"
    tokens = pair_tokens(lengths, layout)
    for share in shares:
        for batch in share:
            whole = [int(tokens[index]) for index in batch.pairs]
            total = max(whole) * len(whole) if layout == "padded" else sum(whole)
            assert total <= budget or len(batch.pairs) == 1, "over the budget"
    return "ran"


def numbers(draw: random.Random) -> Outcome:
    """Objective and slopes are finite, whatever the mean log-probabilities are."""
    import torch

    from orpo.engine import objective
    from orpo.settings.config import Objective

    dtype = draw.choice([torch.float32, torch.float64])
    pair = [-(10 ** draw.uniform(-45, 6)) if draw.random() < 0.95 else 0.0 for _ in range(2)]
    chosen, rejected = torch.tensor(pair, dtype=dtype).split(1)
    minimised = Objective(
        compares=draw.choice(list(objective.VALUES)),
        scale=draw.choice([0.01, 0.5, 1.0, 100.0]),
        margin=draw.choice([0.0, 1.0]),
        label_smoothing=draw.choice([0.0, 0.2]),
    )
    tokens, reference = torch.tensor([draw.choice([1.0, 1000.0])], dtype=dtype), torch.tensor([-1.0])
    sides = [objective.Side(mean, tokens, reference) for mean in (chosen, rejected)]
    values = [
        *(objective.reward(side, minimised) for side in sides),
        objective.preference_loss(*sides, minimised),
        *objective.preference_slopes(*sides, minimised),
    ]
    assert all(bool(torch.isfinite(value).all()) for value in values), (pair, values)
    return "ran"


# name: share of the cases' blocks, cases a block, the case
TARGETS: dict[str, tuple[float, int, Callable[[random.Random], Outcome]]] = {
    "rows": (4, 1000, rows),
    "files": (2, 250, damaged_files),
    "recipes": (4, 1000, recipes),
    "plans": (2, 2000, plans),
    "numbers": (4, 2000, numbers),
}
