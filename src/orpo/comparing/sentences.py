"""What a comparison comes to, in plain sentences; a difference that chance may have made is called so."""

from __future__ import annotations

from collections.abc import Iterator

from orpo.comparing.asking import Answers
from orpo.comparing.choosing import ALLOWED
from orpo.comparing.methods import MODELS_HELD
from orpo.comparing.quality import JUDGED, Quality
from orpo.comparing.result import COSTS, Comparison, Entry
from orpo.comparing.splits import TEST, VALIDATION
from orpo.curation.parting import TRAIN
from orpo.engine.metrics import metric_named, write_change
from orpo.evaluation.statistics import visible
from orpo.run.log import Figure


def sentences(result: Comparison) -> list[str]:
    """Each method against the baseline in quality, cost and answers; then what to beware of."""
    baseline = next((entry for entry in result.whole if entry.method == result.baseline), None)
    lines = []
    for entry in result.whole:
        if baseline is None or entry is baseline:
            continue
        name = entry.method
        judged = [_difference(entry.quality, metric) for metric in JUDGED if metric in entry.quality.change]
        lines.append(f"{name} against {baseline.method}: {'; '.join(judged)}.")
        lines.append(_cost(entry, baseline))
        if name in result.answers:
            lines.append(answering(name, baseline.method, result.answers[name]))
    return [*lines, *_cautions(result)]


def _difference(quality: Quality, name: str) -> str:
    change, kind = quality.change[name], quality.kind(name)
    said = f"{metric_named(name).title} {write_change(name, Figure(change.mean))}"
    bounds = change.interval(quality.looks)
    if bounds is None:
        return f"{said}, of unknown error"
    low, high = (write_change(name, Figure(bound)).value for bound in bounds)
    interval = f"{said} ({low} to {high})"
    if kind != "within noise":
        return f"{interval}, {kind}"
    seen = visible(change.figure, change.df + 1, looks=quality.looks)
    shown = "" if not seen else f", where {write_change(name, Figure(seen))} would have shown"
    return f"{interval}, a difference within noise{shown}"


def _cost(entry: Entry, baseline: Entry) -> str:
    def times(name: str) -> str:
        before = baseline.cost(COSTS[name])
        return f"{entry.cost(COSTS[name]) / before:.2f} times" if before else "an unknown multiple of"

    return (
        f"{entry.method} took {times('cpu_seconds')} the CPU time of {baseline.method}, {times('tokens')} its"
        f" tokens and {times('peak_gib')} its peak memory."
    )


def answering(method: str, baseline: str, answers: Answers) -> str:
    """Whether a method repeats itself or fails to end more than the baseline does."""
    parts = []
    for name, less, more in (
        ("repetition", "repeat themselves less", "repeat themselves more"),
        ("ended", "end less often", "end more often"),
    ):
        differs = answers.differs(name)
        noise = f"{metric_named(name).title}: a difference within noise"
        said = noise if not differs else more if differs > 0 else less
        parts.append(f"{said} ({write_change(name, answers.change.get(name))})")
    number = f"{answers.number} answer{'' if answers.number == 1 else 's'}"
    return f"{method}'s {number} against {baseline}'s: {'; '.join(parts)}."


def _cautions(result: Comparison) -> Iterator[str]:
    for method, chosen in result.chosen.items():
        if chosen.at_the_edge:
            names = " and ".join(chosen.at_the_edge)
            yield f"{method}: {names} ended at the edge of what was tried; more --trials may do better."
        if not chosen.trials[chosen.number].keeps:
            yield (
                f"{method}: every setting made the chosen answers less likely than before by more than"
                f" {ALLOWED} a token; the one that did so least was taken."
            )
    if result.seeds == 1:
        yield "One seed: the intervals know how prompts vary, and not how trainings do."
    interrupted = {entry.method for entry in result.entries if any(one.sessions > 1 for one in entry.costs)}
    if interrupted:
        yield f"Interrupted on the way, so costs have work done twice: {', '.join(sorted(interrupted))}."
    for line in result.failures:
        yield f"Failed: {line}."


def rules(result: Comparison) -> list[str]:
    """How the comparison was made."""
    counts = result.counts
    looks = max(len(result.chosen) - 1, 1)
    together = f" for all {looks} comparisons together" if looks > 1 else ""
    return [
        f"All methods have the same base, pairs, batch size and number of optimizer steps; stages of a"
        f" method share the steps equally. {counts[TRAIN]:,} pairs train, {counts[VALIDATION]:,} choose,"
        f" {counts[TEST]:,} of {result.num_prompts:,} prompts judge; no prompt is in two of these.",
        f"Each method tried {result.trials} setting{'' if result.trials == 1 else 's'} on the whole training"
        f" set, seed {result.first_seed}; the lowest odds-ratio loss on validation pairs chose, among those"
        f" that keep the chosen answers as likely as before but for {ALLOWED} nats a token. Test pairs were"
        " scored after that.",
        f"Means over {result.seeds} seed{'' if result.seeds == 1 else 's'}; intervals hold with 95 %"
        f"{together}, over prompts and seeds. A seed changes the order of the pairs (and an adapter's first"
        " weights).",
        "Costs are of one training with the chosen settings; trying settings took as many trainings for"
        f" each method. Models in memory while training: {MODELS_HELD} in every method here.",
    ]
