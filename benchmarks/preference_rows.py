"""Rows of text with the lengths of UltraFeedback, for what happens between a data set and the first step.

Sentences are drawn from the demo's transcripts until a text has its length, so that words are as frequent as
in writing and no two prompts are alike.
"""

import gzip
import json
import re
from importlib.resources import files
from typing import Any

import numpy as np
from workloads import SYNTHETIC

CHARACTERS_PER_TOKEN = 4.0


def make_rows(number: int) -> list[dict[str, Any]]:
    """`number` rows with columns of UltraFeedback-binarized, a function of the number alone."""
    rng = np.random.default_rng(0)
    sentences = _sentences()
    order = iter(())

    def text(mean: float, sigma: float) -> str:
        nonlocal order
        length = CHARACTERS_PER_TOKEN * np.clip(
            mean * np.exp(sigma * rng.standard_normal() - sigma**2 / 2), 4, 1500
        )
        parts, total = [], 0
        while total < length:
            index = next(order, None)
            if index is None:
                order = iter(rng.permutation(len(sentences)).tolist())
                continue
            parts.append(sentences[index])
            total += len(parts[-1]) + 1
        return " ".join(parts)[: max(8, int(length))].strip()

    rows = []
    for index in range(number):
        prompt, chosen, rejected = (
            text(mean, sigma) for mean, sigma in zip(SYNTHETIC["uf"], (0.6, 0.5, 0.5), strict=True)
        )
        asked = {"role": "user", "content": prompt}
        sides = [[asked, {"role": "assistant", "content": answer}] for answer in (chosen, rejected)]
        rows.append(
            {
                "prompt": prompt, "prompt_id": f"{index:032x}", "chosen": sides[0], "rejected": sides[1],
                "score_chosen": 8.0, "score_rejected": 5.0,
            }
        )  # fmt: skip
    return rows


def _sentences() -> list[str]:
    folder = files("orpo") / "demo" / "data" / "harmless"
    found: dict[str, None] = {}
    for split in ("train", "validation", "test"):
        for line in gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).decode().splitlines():
            row = json.loads(line)
            turns = re.split(r"\n\n(?:Human|Assistant):", row["chosen"] + row["rejected"])
            said = (one for turn in turns for one in re.split(r"(?<=[.?!])\s+", turn.strip()))
            found.update(dict.fromkeys(said))
    return [sentence for sentence in found if sentence]
