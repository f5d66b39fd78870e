"""The part of the page with answers to held-out prompts, and how long they became."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from orpo.run.directory import Samples

SHOWN = 8
"""Prompts on the page; the run directory has all of them."""


def samples_section(samples: Samples) -> str:
    """Prompts with the answers of each model; of answers during training the first and the last."""
    if not samples:
        return ""
    cards = "".join(_card(sample) for sample in samples[:SHOWN])
    more = f" The first {SHOWN} of {len(samples):,}." if len(samples) > SHOWN else ""
    return f"""
<section id="samples"><h2>Sample answers</h2>
<p class="caption">Written by the models of this page.{more} {escape(_lengths(samples))}</p>
{cards}
</section>
"""


def _card(sample: Mapping[str, Any]) -> str:
    columns = "".join(
        f"<div><h4>{escape(str(name))}{_cut(sample, name)}</h4>"
        f"<p>{escape(str(text).strip()) or '<em>(empty)</em>'}</p></div>"
        for name, text in _few(sample["answers"]).items()
    )
    prompt = escape(sample["prompt"])
    return f'<article><p class="prompt">{prompt}</p><div class="answers">{columns}</div></article>'


def _cut(sample: Mapping[str, Any], name: str) -> str:
    """A mark on an answer that was stopped by its length."""
    longest, tokens = sample.get("longest"), sample.get("tokens", {}).get(name)
    return f" (cut at {longest} tokens)" if longest and tokens == longest else ""


def _lengths(samples: Samples) -> str:
    """Mean length of the answers before and after training."""
    counted = [sample.get("tokens", {}) for sample in samples]
    first, last = ([list(_few(tokens).values())[end] for tokens in counted if tokens] for end in (0, -1))
    if len(first) < 1 or any(len(_few(tokens)) < 2 for tokens in counted):
        return ""
    before, after = (sum(lengths) / len(lengths) for lengths in (first, last))
    number = len(first)
    return (
        f"Mean length {before:.0f} tokens before and {after:.0f} after"
        f" ({number} answer{'' if number == 1 else 's'})."
    )


def _few(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Of the answers during training, `step 0`, `step 20`, ..., the first and the last; all others."""
    steps = [name for name in answers if str(name).startswith("step ")]
    return {name: text for name, text in answers.items() if name not in steps[1:-1]}
