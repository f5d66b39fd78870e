"""A comparison on the terminal: how its trainings go, and its tables, which fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from orpo.comparing.arms import Arm
from orpo.comparing.choosing import DECIDES, Chosen
from orpo.comparing.methods import MODELS_HELD, RATE, Choice
from orpo.comparing.pool import Watcher
from orpo.comparing.result import COSTS, Comparison
from orpo.comparing.sentences import rules, sentences
from orpo.engine.metrics import metric_named, write_change, write_figure
from orpo.run.log import Figures, Record

SHOWN = ("accuracy", "log_odds_ratio", "chosen_logprob", "rejected_logprob")
_HEADS = {"chosen_logprob": "chosen", "rejected_logprob": "rejected"}


class Screen(Watcher):
    """Shows how trainings go: a bar each on a terminal, a line for each that ends elsewhere."""

    def __init__(self, console: Console, bars: Progress | None) -> None:
        self.console = console
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.total = self.ended = 0

    def begin(self, to_make: int, there: int) -> None:
        """So many trainings come next."""
        self.total, self.ended = to_make, 0
        said = f"; {there} are finished already" if there else ""
        if to_make:
            number = "1 training" if to_make == 1 else f"{to_make} trainings"
            self.console.print(f"{number} to make{said}")

    def record(self, arm: Arm, record: Record) -> None:
        """Move the bar of a training."""
        if self.bars is None or record.kind != "train":
            return
        name = arm.folder.name
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None, numbers="")
        loss = write_figure("loss", record.metrics.get("loss")).value
        self.bars.update(self.tasks[name], completed=record.step, numbers=f"step {record.step}  loss {loss}")

    def end(self, arm: Arm) -> None:
        """A line for what has ended."""
        self.ended += 1
        if self.bars is not None and arm.folder.name in self.tasks:
            self.bars.remove_task(self.tasks.pop(arm.folder.name))
        self.console.print(f"  {self.ended:3} of {self.total}  {arm.folder.name}", soft_wrap=True)


@contextmanager
def watching(console: Console) -> Iterator[Screen]:
    """What is to be informed of trainings while the block runs."""
    if not console.is_terminal:
        yield Screen(console, None)
        return
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(), console=console, transient=True,
    )  # fmt: skip
    with bars:
        yield Screen(console, bars)


def show(console: Console, result: Comparison) -> None:
    """The tables, what they say, and where things are."""
    counts = f"{result.counts['test']:,} test pairs of {result.num_prompts:,} prompts"
    console.print()
    console.rule(f"[bold]{counts}[/]", align="left")
    console.print(Padding(quality_table(result), (1, 0)))
    console.print(f"± one standard error. {rules(result)[2]}", style="dim")
    if len(result.sizes) > 1:
        console.print(Padding(size_table(result), (1, 0)))
    if result.answers:
        console.print(Padding(answers_table(result), (1, 0)))
    console.rule("[bold]what one training took[/]", align="left")
    console.print(Padding(cost_table(result), (1, 0)))
    console.rule("[bold]settings, chosen on validation pairs[/]", align="left")
    console.print(Padding(choice_table(result), (1, 0)))
    console.rule("[bold]what it comes to[/]", align="left")
    for line in sentences(result):
        console.print(f"• {line}")
    console.print()


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    return table


def quality_table(result: Comparison) -> Table:
    """A method a row, the base first."""
    table = _table("", *(_HEADS.get(name, metric_named(name).title) for name in SHOWN))
    rows = {"base": result.base} | {entry.method: entry.quality for entry in result.whole}
    for method, quality in rows.items():
        figures: Figures = {name: one.figure for name, one in quality.means.items()}
        table.add_row(method, *(str(write_figure(name, figures.get(name))) for name in SHOWN))
    return table


def size_table(result: Comparison) -> Table:
    """The accuracy of each method by the pairs it was trained on."""
    methods = [entry.method for entry in result.whole]
    table = _table("accuracy by pairs", *methods)
    for size in result.sizes:
        found = {entry.method: entry.quality.means["accuracy"].figure for entry in result.at(size)}
        table.add_row(f"{size:,}", *(str(write_figure("accuracy", found.get(one))) for one in methods))
    return table


def answers_table(result: Comparison) -> Table:
    """How answers to test prompts end and repeat."""
    names = ("ended", "repetition")
    number = next(iter(result.answers.values())).number
    table = _table(f"answers to {number} test prompts", *(metric_named(name).title for name in names))
    for method, answers in result.answers.items():
        table.add_row(method, *(str(write_figure(name, answers.figures.get(name))) for name in names))
    return table


def cost_table(result: Comparison) -> Table:
    """A method a row; means over its seeds."""
    table = _table("", "CPU s", "wall s", "in steps", "peak GiB", "tokens", "forward", "models")
    for entry in result.whole:
        cost = {name: entry.cost(value) for name, value in COSTS.items()}
        times = (f"{cost[name]:.0f}" for name in ("cpu_seconds", "seconds", "step_seconds"))
        read = (f"{cost[name]:,.0f}" for name in ("tokens", "answers"))
        table.add_row(entry.method, *times, f"{cost['peak_gib']:.2f}", *read, str(MODELS_HELD))
    return table


def choice_table(result: Comparison) -> Table:
    """What each method was trained with, and how sure that choice is."""
    table = _table("", "chosen", "odds-ratio loss", "tried", "not told apart")
    for method, chosen in result.chosen.items():
        figure = chosen.trials[chosen.number].means[DECIDES].figure
        written = str(write_figure(DECIDES, figure))
        numbers = (str(len(chosen.trials)), str(chosen.indistinct))
        table.add_row(method, write_choice(chosen.choice), written, *numbers)
    return table


def write_choice(choice: Choice) -> str:
    """`lr 0.001, beta 2`."""
    return ", ".join(f"{'lr' if name == RATE else name} {value:g}" for name, value in choice.items())


def trials_table(chosen: Chosen) -> Table:
    """Every setting that was tried, the recipe's own first, and how it differs from the best one."""
    table = _table("", "odds-ratio loss", "to the best", "accuracy", "chosen")
    for number, trial in enumerate(chosen.trials):
        name = write_choice(trial.choice) + (" *" if number == chosen.number else "")
        if trial.failure:
            table.add_row(name, "failed", "", "", "")
            continue
        means = {metric: one.figure for metric, one in trial.means.items()}
        difference = trial.to_chosen.get(DECIDES)
        table.add_row(
            name,
            str(write_figure(DECIDES, means[DECIDES])),
            str(write_change(DECIDES, difference and difference.figure)),
            str(write_figure("accuracy", means["accuracy"])),
            write_figure("chosen_logprob", means["chosen_logprob"]).value + ("" if trial.keeps else " !"),
        )
    return table
