"""What the demo prints: what is about to happen, how it goes, what came of it, and what to type next.

On a terminal the trainings are bars that move; anywhere else each evaluation is one line. Every sentence
about the result is made from its figures, so it also fits a run that did not turn out as expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from orpo.demo.experiment import Experiment, sft_folder
from orpo.run.directory import RunDirectory
from orpo.run.log import Figures

if TYPE_CHECKING:
    from orpo.comparing.asking import Answers
    from orpo.demo.study import Examined, Training

CHOSEN, REJECTED = "green", "dark_orange"
_ROWS = {
    "chosen_logprob": CHOSEN,
    "rejected_logprob": REJECTED,
    "log_odds_ratio": "",
    "accuracy": "",
    "nll_token_mean": "",
    "ended": "",
    "repetition": "",
}
"""Metrics of the table, and their colours."""
_PAIRS = {
    "politeness": "AI-written: a Llama 3.1 70B rewrote answers to be more polite or less polite, and nobody "
    "judged them. What can be learned from them is a tone, not which answer is right.",
    "harmless": "written and judged by people: crowd workers provoked a chatbot and chose the less harmful "
    "of two answers (Anthropic's HH-RLHF). No gain is promised: when tried, ORPO and SFT came out the same.",
}
_WARNING = (
    "Content warning: these dialogues were written to provoke harmful answers. Many are violent, sexual, "
    "racist or otherwise upsetting. Three prompts and answers will be shown at the end."
)
LIMITS = (
    "The answers show style, not knowledge: so small a model takes on a tone, and gets facts and sums wrong."
)


def opening(console: Console, experiment: Experiment) -> None:
    """Say what is about to happen."""
    console.rule("[bold]What ORPO does: one small experiment[/]", align="left")
    if experiment.data == "harmless":
        console.print(_WARNING, style="bold red")
    sizes = {name: len(experiment.rows(name)) for name in ("train", "validation", "test")}
    size = (experiment.base / "model.safetensors").stat().st_size / 1e6
    grid = _grid()
    grid.add_row(
        "pairs",
        f"{sizes['train']} to train on, {sizes['validation']} to watch (validation), {sizes['test']} to "
        f"judge by (test); no prompt is in two of these. They are {_PAIRS[experiment.data]}",
    )
    if experiment.data == "politeness":
        grid.add_row("", _example(experiment.rows("train")))
    grid.add_row(
        "model",
        f"A language model of {size:.0f} MB that this project trained from scratch on a CPU: books, "
        "conversations, school maths, role play. It writes sentences; it knows next to nothing.",
    )
    grid.add_row(
        "plan",
        "SFT learns from the chosen answers alone; the ORPO paper found that this makes the rejected ones "
        "likelier too. ORPO learns from both, in one stage. Each starts from that model and takes equally "
        f"many steps. Everything runs on this computer, offline. {_length(experiment)}",
    )
    console.print(Padding(grid, (1, 0)))


def _length(experiment: Experiment) -> str:
    if experiment.max_steps > 0:
        return (
            f"This is the fast version: {experiment.max_steps} steps show that everything works, and no more."
        )
    return "It takes a few minutes."


def _example(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first short pair of one-line texts whose rejected answer is the one with something added."""
    row = next(
        row
        for row in rows
        if max(map(len, row.values())) < 75
        and len(row["rejected"]) > len(row["chosen"]) + 12
        and "\n" not in "".join(row.values())
    )
    grid = Table.grid(padding=(0, 1))
    for name, style in (("prompt", ""), ("chosen", CHOSEN), ("rejected", REJECTED)):
        grid.add_row(Text(name, "dim"), Text(row[name], style))
    return grid


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    return grid


class _Lines:
    """Shows a training where no bar can be drawn."""

    def __init__(self, console: Console, name: str) -> None:
        self.console = console
        self.name = name

    def step(self, done: int, total: int) -> None:
        pass

    def evaluation(self, done: int, total: int, figures: Figures) -> None:
        self.console.print(f"{self.name:4}  step {done}/{total}  {_glance(figures)}")


class _Bar:
    """Shows a training by its bar."""

    def __init__(self, bars: Progress, name: str) -> None:
        self.bars = bars
        self.task = bars.add_task(name, total=None, start=False, numbers="")

    def step(self, done: int, total: int) -> None:
        self.bars.update(self.task, completed=done, total=total)

    def evaluation(self, done: int, total: int, figures: Figures) -> None:
        if done == 0:
            self.bars.start_task(self.task)
        self.bars.update(self.task, completed=done, total=total, numbers=_glance(figures))


@contextmanager
def watching(console: Console, names: Sequence[str]) -> Iterator[dict[str, _Lines | _Bar]]:
    """What is to be informed of each training."""
    console.print("[bold]training[/]   figures: held-out validation pairs; log-prob is the mean of a token")
    if not console.is_terminal:
        yield {name: _Lines(console, name) for name in names}
        return
    bars = Progress(
        TextColumn("{task.description:4}", style="bold"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        expand=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bars:
        yield {name: _Bar(bars, name) for name in names}


def _glance(figures: Figures) -> str:
    from orpo.engine.metrics import write_figure

    names = {"chosen": "chosen_logprob", "rejected": "rejected_logprob", "accuracy": "accuracy"}
    return "  ".join(f"{word} {write_figure(name, figures[name]).value}" for word, name in names.items())


def results(
    console: Console,
    verdicts: Mapping[str, Examined],
    trainings: Mapping[str, Training],
    answers: Answers,
) -> None:
    """The table, the picture and the reading of it."""
    from orpo.comparing.sentences import answering
    from orpo.engine.metrics import metric_named, write_figure

    console.print()
    figures = {name: verdict.all_figures for name, verdict in verdicts.items()}
    num_pairs = verdicts["base"].results.num_preferences
    console.rule(f"[bold]{num_pairs} test pairs that no training has seen[/]", align="left")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for name in verdicts:
        table.add_column(name, justify="right", style="bold" if name == "ORPO" else "")
    for name, style in _ROWS.items():
        cells = (write_figure(name, found[name]) for found in figures.values())
        table.add_row(Text(metric_named(name).title, style), *map(str, cells))
    took = {name: trainings.get(name) for name in verdicts}
    table.add_row("tokens read", *(f"{t.num_tokens:,}" if t else "" for t in took.values()))
    table.add_row("seconds of training", *(f"{t.seconds:.0f}" if t else "" for t in took.values()))
    console.print(Padding(table, (1, 0, 0, 0)))
    console.print(
        "± one standard error over test prompts; differences within two of them may be chance. How answers "
        f"end and repeat was seen on {answers.number} test prompts.",
        style="dim",
    )
    console.print(Padding(picture(figures, console.width), (1, 0)))
    grid = Table.grid(padding=(0, 1))
    for line in [*reading(figures, trainings), answering("ORPO", "SFT", answers)]:
        grid.add_row("•", line)
    console.print(grid)


def picture(figures: Mapping[str, Figures], width: int) -> Text:
    """Chosen and rejected log-prob of each model on one axis."""
    ends = {n: (f["rejected_logprob"].mean, f["chosen_logprob"].mean) for n, f in figures.items()}
    low, high = min(map(min, ends.values())), max(map(max, ends.values()))
    columns = min(width, 100) - 12
    columns_of = {
        name: [round((value - low) / max(high - low, 1e-9) * columns) for value in pair]
        for name, pair in ends.items()
    }
    text = Text()
    for name, (rejected, chosen) in columns_of.items():
        cells = [" "] * (columns + 1)
        cells[min(rejected, chosen) : max(rejected, chosen)] = "─" * abs(chosen - rejected)
        text.append(f"{name:6}", "bold" if name == "ORPO" else "")
        for position, cell in enumerate(cells):
            if position == chosen:
                text.append("●", CHOSEN)
            elif position == rejected:
                text.append("○", REJECTED)
            else:
                text.append(cell, "dim")
        text.append("\n")
    axis = "log-prob of a token, likelier to the right"
    text.append(f"{'':6}{low:.2f}{axis:^{columns - 9}}{high:.2f}\n", "dim")
    text.append("      ● chosen", CHOSEN)
    text.append("   ○ rejected", REJECTED)
    return text


def reading(figures: Mapping[str, Figures], trainings: Mapping[str, Training]) -> list[str]:
    """What the figures of `base`, `SFT` and `ORPO` say, in words."""
    from orpo.engine.metrics import write_figure

    def change(name: str, key: str, before: str = "base") -> float:
        return figures[name][key].mean - figures[before][key].mean

    sft, orpo = change("SFT", "rejected_logprob"), change("ORPO", "rejected_logprob")
    below = change("ORPO", "rejected_logprob", "SFT")
    share = {name: write_figure("accuracy", f["accuracy"]).value for name, f in figures.items()}
    odds = {name: write_figure("log_odds_ratio", f["log_odds_ratio"]).value for name, f in figures.items()}
    tokens = trainings["ORPO"].num_tokens / trainings["SFT"].num_tokens
    seconds = trainings["ORPO"].seconds / max(trainings["SFT"].seconds, 1e-9)
    surprise = "and yet made them likelier" if sft > 0 else "and made them less likely"
    return [
        f"SFT has seen no rejected answer, {surprise}: {sft:+.2f} in log-prob.",
        f"ORPO moved the chosen answers by {change('ORPO', 'chosen_logprob'):+.2f} and the rejected ones by "
        f"{orpo:+.2f}, which ends {abs(below):.2f} {'below' if below < 0 else 'above'} SFT.",
        f"The chosen answer is the likelier one in {share['base']} of the pairs for the base, {share['SFT']} "
        f"after SFT, {share['ORPO']} after ORPO. Log odds ratio: "
        f"{odds['base']}, {odds['SFT']}, {odds['ORPO']}.",
        f"Equal steps are not equal work: ORPO read {tokens:.1f} times the tokens of SFT and took "
        f"{seconds:.1f} times as long.",
    ]


def samples(console: Console, prompts: Sequence[str], verdicts: Mapping[str, Examined]) -> None:
    """The prompts, and the answers side by side."""
    console.print()
    console.rule("[bold]answers to test prompts[/]", align="left")
    picked = "The prompts were picked by position; each answer takes the likeliest token."
    console.print(f"{LIMITS} {picked}", style="dim")
    for number, prompt in enumerate(prompts):
        table = Table(title=Text(prompt), title_justify="left", title_style="bold", expand=True)
        for name in verdicts:
            table.add_column(name, ratio=1)
        table.add_row(*(Text(verdict.shown(number) or "(nothing)") for verdict in verdicts.values()))
        console.print(Padding(table, (1, 0, 0, 0)))


def closing(console: Console, folder: Path, seconds: float) -> None:
    """Where things are, and what to type next."""
    console.print()
    console.rule("[bold]what next[/]", align="left")
    grid = _grid()
    run, sft = RunDirectory(folder), sft_folder(folder)
    for does, command in (
        ("see the curves", f"open {run.page} in a browser"),
        ("talk to it", f"orpo chat {folder} --compare {sft}"),
        ("score it", f"orpo eval {folder} --data {run.test_pairs}"),
        ("train it again", f"orpo train {run.recipe} --output_dir runs/mine --beta 0.5"),
    ):
        grid.add_row(does, Text(command))
    console.print(Padding(grid, (1, 0)))
    where = f"Everything is in {folder}; the SFT run is in {sft}."
    console.print(f"Done in {seconds:.0f} seconds. {where}")


def note(experiment: Experiment, num_pairs: int, answers: Answers) -> str:
    """The paragraph under the title of the report page."""
    from orpo.comparing.sentences import answering

    fast = (
        f"The fast version, {experiment.max_steps} steps: too few to judge by. "
        if experiment.max_steps > 0
        else ""
    )
    return (
        f"{fast}The headline figures are of {num_pairs} test pairs, the curves of the validation pairs. "
        f"The pairs are {_PAIRS[experiment.data]} {LIMITS} {answering('ORPO', 'SFT', answers)}"
    )
