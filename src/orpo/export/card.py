"""The card of an exported model: that of the run, how the copy was checked, how to serve it, its limits."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from orpo.engine.metrics import metric_named, write_figure
from orpo.export.check import Comparison
from orpo.export.merged import Merged
from orpo.export.serving import CLIENT
from orpo.run.card import write_model_card
from orpo.run.directory import RunDirectory, read_run


def write_export_card(
    run: str,
    merged: Merged,
    folder: Path,
    name: str,
    *,
    checks: Mapping[str, Comparison | None],
    commands: Mapping[str, str],
) -> None:
    """Write README.md into an export.

    Args:
        run: What was exported.
        merged: The same, merged.
        folder: Gets the card.
        name: Of the export.
        checks: By what was written, how it agrees with the run; None where nobody checked.
        commands: By server, what to type next to the folder.
    """
    results, step = _results(run)
    more = [_checked(merged, checks), _served(commands), _limits(merged, bool(results))]
    write_model_card(folder, merged.recipe, results, step, name=name, more="\n".join(more))


def _results(run: str) -> tuple[list[tuple[str, str]], int]:
    """What held-out pairs say at the end of a run, and after how many steps."""
    if not RunDirectory(Path(run)).is_run():
        return [], 0
    read, step = read_run(Path(run)), 0
    rows: list[tuple[str, str]] = []
    for name in read.evaluation_sets():
        record = read.final_evaluation(name)
        if record is not None:
            step = record.step
            of_set = f", {name}" if name else ""
            rows += [
                (f"{metric_named(metric).title}{of_set}", str(write_figure(metric, figure)))
                for metric, figure in record.metrics.items()
            ]
    return rows, step


def _checked(merged: Merged, checks: Mapping[str, Comparison | None]) -> str:
    made = "The adapter was merged into its base in float32. " if merged.was_adapter else ""
    rows = "\n".join(
        f"| {what} | not checked | | |"
        if found is None
        else f"| {what} | {found.texts:,} | {found.tokens:,} | {found.mean:.2g} (at most {found.most:.2g}) |"
        for what, found in checks.items()
    )
    return f"""## Checked against the training run

{made}Another process loaded each file and compared it with the run, in float32: the same token ids, the same
prompts from the chat template, an end to the answer at each stop token, and these log-probs:

| | texts | tokens | difference in nat |
|---|---|---|---|
{rows}
"""


def _served(commands: Mapping[str, str]) -> str:
    lines = "\n".join(f"{command}  # {server}" for server, command in commands.items())
    return f"""## How to serve it

```bash
{lines}
```
{CLIENT}
"""


def _limits(merged: Merged, has_results: bool) -> str:
    pairs = (
        "the figures above are of held-out pairs alone" if has_results else "no held-out pairs were scored"
    )
    longest = merged.recipe.get("max_length")
    length = f" No conversation of more than {longest} tokens was trained on." if longest else ""
    text = (
        "A model keeps what its base knows, and what it gets wrong. Preference training moves how it "
        f"answers; {pairs}. Nothing was measured about facts, safety, bias, or languages other than those "
        f"of the pairs.{length}"
    )
    return f"## Limits\n\n{textwrap.fill(text, 110)}\n"
