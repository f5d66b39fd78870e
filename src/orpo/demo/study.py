"""The demo: from one base, ORPO in one stage and SFT for contrast, then both on pairs that neither saw.

Both trainings are ordinary runs of `ORPOTrainer`, over the same pairs in the same order, with equally many
optimizer steps. They differ in `beta` alone; at 0 a rejected answer is never run. The curves are of the
validation split, by which the settings were chosen too (benchmarks/demo_claims.py --choose); the table is of
the test split.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback
from transformers.utils import logging

from orpo.comparing.asking import Answers, compared
from orpo.data.dataset import tokenize_pairs
from orpo.data.preferences import read_preferences
from orpo.demo import screen
from orpo.demo.experiment import FORMATS, Experiment, SplitName, sft_folder
from orpo.engine.loading import load_tokenizer
from orpo.engine.model import prepare_model
from orpo.evaluation.answer_summary import answer_figures
from orpo.evaluation.answers import Reply
from orpo.evaluation.generation import ChatModel, Sampling, load_trained
from orpo.evaluation.local_model import LocalModel
from orpo.evaluation.per_pair import PairResults
from orpo.evaluation.preferences import evaluate_pairs
from orpo.evaluation.prompts import Prompt, prompt_of
from orpo.evaluation.verdict import compare
from orpo.pairs import PreferencePair
from orpo.report.page import write_report
from orpo.run.directory import RunDirectory, write_json, write_json_lines
from orpo.run.log import Figures, figures_to_json
from orpo.settings.config import Objective, OrpoSettings
from orpo.training.arguments import ORPOConfig
from orpo.training.progress import Progress
from orpo.training.trainer import ORPOTrainer

TOKENS_PER_MICRO_BATCH = 4096
"""Enough for the pairs of a step, and little memory when evaluating."""


class Observer(Protocol):
    """Is kept informed while a model is trained."""

    def step(self, done: int, total: int) -> None:
        """An optimizer step has been made."""

    def evaluation(self, done: int, total: int, figures: Figures) -> None:
        """The validation split has been scored, after `done` steps."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a training took: its optimizer steps, their tokens, and their seconds, evaluations left out."""

    num_steps: int
    num_tokens: int
    seconds: float


def train(experiment: Experiment, beta: float, folder: Path, observer: Observer | None = None) -> Training:
    """Train from the base and leave a run directory.

    Args:
        experiment: What on, and how.
        beta: Weight of the odds-ratio term; 0 is SFT.
        folder: The run directory; what the trainer prints goes into a file in it.
        observer: Is informed of steps and evaluations.

    Raises:
        KeyboardInterrupt: A signal has stopped the training; its checkpoint is in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = RunDirectory(folder).trainer_output
    with output.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trainer = _CountingTrainer(args=_arguments(experiment, beta, folder))
        trainer.remove_callback(Progress)
        trainer.add_callback(_Clock(trainer, observer))
        trainer.train()
        if trainer.stopped_by is not None:
            raise KeyboardInterrupt
        trainer.save_model()
    return Training(trainer.state.global_step, trainer.num_tokens, trainer.seconds)


def _arguments(experiment: Experiment, beta: float, folder: Path) -> ORPOConfig:
    return ORPOConfig(
        output_dir=str(folder),
        model_name_or_path=str(experiment.base),
        dataset_name=str(experiment.split("train")),
        eval_dataset_name=str(experiment.split("validation")),
        data_format=FORMATS[experiment.data],
        max_length=experiment.max_length,
        beta=beta,
        nll_on="response",
        learning_rate=experiment.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        num_train_epochs=experiment.num_epochs,
        max_steps=experiment.max_steps,
        per_device_train_batch_size=experiment.pairs_per_step,
        tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
        seed=experiment.seed,
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=1 / experiment.num_evaluations,
        save_strategy="no",
        logging_steps=4,
        report_to="none",
        disable_tqdm=True,
    )


class _CountingTrainer(ORPOTrainer):
    """Counts the tokens that training reads, and has its time taken."""

    num_tokens = 0
    seconds = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.num_tokens += inputs["step"].num_tokens
        return super().training_step(model, inputs, num_items_in_batch)


class _Clock(TrainerCallback):
    """Takes the time of optimizer steps, and informs the observer."""

    def __init__(self, trainer: _CountingTrainer, observer: Observer | None) -> None:
        self.trainer = trainer
        self.observer = observer
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.seconds += time.perf_counter() - self.began
        if self.observer:
            self.observer.step(state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        record = self.trainer.recorder.newest
        if self.observer and record is not None:
            self.observer.evaluation(state.global_step, state.max_steps, record.metrics)


@dataclass(frozen=True, slots=True)
class Examined:
    """What held-out pairs say of a model.

    Attributes:
        figures: By metric; errors are over prompts.
        results: The same pair by pair.
        replies: What it answers to the prompts that are asked, those that are shown first.
    """

    figures: Figures
    results: PairResults
    replies: Sequence[Reply]

    @property
    def all_figures(self) -> Figures:
        """Those of the pairs, then how often answers end and repeat themselves."""
        return dict(self.figures) | (dict(answer_figures(self.replies)) if self.replies else {})

    def answers_against(self, other: Examined) -> Answers:
        """How its answers differ from another model's."""
        return compared(self.replies, other.replies)

    def shown(self, number: int) -> str:
        """An answer on one line."""
        return " ".join(self.replies[number].text.split())


class HeldOut:
    """A held-out split, for any number of models that are on the disk.

    Attributes:
        split: Its name.
        pairs: Its pairs.
        prompts: Those that are asked; the first `num_shown` are shown.
        num_shown: How many that are.
    """

    def __init__(self, experiment: Experiment, split: SplitName = "test") -> None:
        """Read and tokenize the pairs, with the tokenizer of the base."""
        self.experiment = experiment
        self.split = split
        self.objective = Objective(preference_weight=experiment.beta, nll_on="response")
        read = read_preferences(str(experiment.split(split)), data_format=FORMATS[experiment.data])
        self.pairs = read.pairs[: experiment.num_test]
        tokenizer = load_tokenizer(str(experiment.base))
        self.tokenized = tokenize_pairs(self.pairs, tokenizer, max_length=experiment.max_length)
        shown = shown_prompts(self.pairs)
        self.num_shown = len(shown)
        asked = {prompt.key(): prompt for prompt in [*shown, *map(prompt_of, self.pairs)]}
        self.prompts = list(itertools.islice(asked.values(), experiment.num_asked))

    def __len__(self) -> int:
        return len(self.tokenized)

    def examine(self, folder: Path, *, answering: bool = True) -> Examined:
        """Load a model, score the pairs, and let it answer the prompts."""
        model = load_trained(str(folder), OrpoSettings(dtype="float32"))
        batches = prepare_model(model).batches(self.objective, TOKENS_PER_MICRO_BATCH)
        found = evaluate_pairs(model, self.tokenized, batches)
        chat = ChatModel(folder.name, model, load_tokenizer(str(folder)), self.tokenized.chat_template)
        return Examined(found.figures, found.results, self._answers(LocalModel(chat)) if answering else ())

    def _answers(self, model: LocalModel) -> list[Reply]:
        """The likeliest answer to each prompt."""
        asked = [(prompt, model.prepare(prompt)) for prompt in self.prompts]
        greedy = Sampling(temperature=0, max_tokens=self.experiment.answer_tokens)
        found = dict(model.answers(asked, greedy, [None] * len(asked)))
        return [reply for _, reply in sorted(found.items()) if isinstance(reply, Reply)]


def shown_prompts(pairs: Sequence[PreferencePair], num_shown: int = 3, longest: int = 70) -> list[Prompt]:
    """Prompts of one short line from all over a split: picked by position, not by the answers to them."""
    short: dict[str, Prompt] = {}
    for prompt in map(prompt_of, pairs):
        text = prompt.instruction
        if len(prompt.asked) == 1 and len(text) <= longest and "\n" not in text:
            short.setdefault(prompt.key(), prompt)
    every = max(len(short) // num_shown, 1)
    return list(itertools.islice(short.values(), 0, None, every))[:num_shown]


def write_results(
    folder: Path,
    experiment: Experiment,
    held_out: HeldOut,
    verdicts: Mapping[str, Examined],
    trainings: Mapping[str, Training],
) -> None:
    """Write the samples (for the page), the test pairs (to score with) and the figures of the table."""
    run = RunDirectory(folder)
    samples = [
        {"prompt": prompt.instruction, "answers": {name: v.shown(i) for name, v in verdicts.items()}}
        for i, prompt in enumerate(held_out.prompts[: held_out.num_shown])
    ]
    write_json(run.samples, samples)
    rows = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in held_out.pairs)
    write_json_lines(run.test_pairs, rows)
    result = {
        "data": experiment.data,
        "seed": experiment.seed,
        "num_test_pairs": len(held_out),
        "test": {name: figures_to_json(verdict.figures) for name, verdict in verdicts.items()},
        "num_answers": len(held_out.prompts),
        "answers": {name: figures_to_json(answer_figures(v.replies)) for name, v in verdicts.items()},
        "training": {
            name: {"steps": t.num_steps, "tokens": t.num_tokens, "seconds": round(t.seconds, 1)}
            for name, t in trainings.items()
        },
    }
    write_json(run.demo_result, result)


def run_demo(console: Console, experiment: Experiment, folder: Path) -> None:
    """Train SFT and ORPO from the base, examine all three on the test pairs, show and write the results.

    Args:
        console: Where it is shown.
        experiment: What on, and how.
        folder: The run directory of ORPO; that of SFT is inside it.
    """
    logging.disable_progress_bar()
    folders = {"SFT": sft_folder(folder), "ORPO": folder}
    betas = {"SFT": 0.0, "ORPO": experiment.beta}
    with screen.watching(console, list(folders)) as observers:
        trainings = {name: train(experiment, betas[name], folders[name], observers[name]) for name in folders}
    with console.status("scoring test pairs and asking for answers"):
        held_out = HeldOut(experiment)
        models = {"base": experiment.base} | folders
        verdicts = {name: held_out.examine(model) for name, model in models.items()}
        answers = verdicts["ORPO"].answers_against(verdicts["SFT"])
        write_results(folder, experiment, held_out, verdicts, trainings)
        write_report(
            folder,
            contrast={"SFT": folders["SFT"]},
            test={name: verdict.all_figures for name, verdict in verdicts.items()},
            test_change=compare(verdicts["base"].results, verdicts["ORPO"].results, held_out.objective),
            note=screen.note(experiment, len(held_out), answers),
        )
    screen.results(console, verdicts, trainings, answers)
    shown = [prompt.instruction for prompt in held_out.prompts[: held_out.num_shown]]
    screen.samples(console, shown, verdicts)
