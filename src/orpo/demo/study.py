"""The demo's experiment: from one base, ORPO in one stage, and SFT beside it; judged on pairs neither saw.

Both trainings are ordinary runs of `ORPOTrainer`, over the same pairs in the same order, with equally many
optimizer steps. They differ in `beta` alone; at 0 a rejected answer is never run. The curves are of the
validation split, by which the settings were chosen too (benchmarks/demo_claims.py --choose); the verdict is
of the test split.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback

from orpo.data.dataset import TokenizedDataset, tokenize_pairs
from orpo.data.preferences import read_preferences
from orpo.demo.experiment import FORMATS, Plan, SplitName
from orpo.engine.head import PairScores
from orpo.engine.loading import load_tokenizer
from orpo.engine.metrics import preference_values
from orpo.engine.model import prepare_model
from orpo.engine.steps import RowSettings
from orpo.evaluation.generation import Sampling, Speaker, load_trained
from orpo.evaluation.preferences import score_pairs
from orpo.pairs import Message, PreferencePair
from orpo.settings.config import Objective, OrpoSettings
from orpo.training.arguments import ORPOConfig
from orpo.training.progress import Progress
from orpo.training.recorder import write_json
from orpo.training.trainer import ORPOTrainer

TOKENS_PER_ROW = 4096
"""Enough for the pairs of a step, and little memory when evaluating."""

Figures = dict[str, tuple[float, float]]
"""Name -> mean and its standard error."""


class Watch(Protocol):
    """Whoever looks on while a model is trained."""

    def step(self, done: int, total: int) -> None:
        """An optimizer step has been made."""

    def evaluation(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """The validation split has been scored, after `done` steps."""


@dataclass(frozen=True, slots=True)
class Training:
    """What a training took: its optimizer steps, their tokens, and their seconds, evaluations left out."""

    num_steps: int
    num_tokens: int
    seconds: float


def train(plan: Plan, beta: float, folder: Path, watch: Watch | None = None) -> Training:
    """Train from the base and leave a run directory.

    Args:
        plan: What on, and how.
        beta: Weight of the odds-ratio term; 0 is SFT.
        folder: The run directory; what the trainer prints goes into its `train.log`.
        watch: Is told of steps and evaluations.

    Raises:
        KeyboardInterrupt: A signal has stopped the training; its checkpoint is in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        trainer = _CountingTrainer(args=_arguments(plan, beta, folder))
        trainer.remove_callback(Progress)
        trainer.add_callback(_Clock(trainer, watch))
        trainer.train()
        if trainer.stopped_by is not None:
            raise KeyboardInterrupt
        trainer.save_model()
    return Training(trainer.state.global_step, trainer.num_tokens, trainer.seconds)


def _arguments(plan: Plan, beta: float, folder: Path) -> ORPOConfig:
    return ORPOConfig(
        output_dir=str(folder),
        model_name_or_path=str(plan.base),
        dataset_name=str(plan.split("train")),
        eval_dataset_name=str(plan.split("validation")),
        data_format=FORMATS[plan.data],
        max_length=plan.max_length,
        beta=beta,
        nll_on="response",
        learning_rate=plan.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        num_train_epochs=plan.num_epochs,
        max_steps=plan.max_steps,
        per_device_train_batch_size=plan.pairs_per_step,
        tokens_per_row=TOKENS_PER_ROW,
        seed=plan.seed,
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=1 / plan.num_evaluations,
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
    """Takes the time of optimizer steps, and tells who looks on."""

    def __init__(self, trainer: _CountingTrainer, watch: Watch | None) -> None:
        self.trainer = trainer
        self.watch = watch
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.seconds += time.perf_counter() - self.began
        if self.watch:
            self.watch.step(state.global_step, state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.watch:
            named = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            self.watch.evaluation(state.global_step, state.max_steps, named)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What held-out pairs say of a model.

    Attributes:
        figures: `chosen_logprob`, `rejected_logprob`, `log_odds_ratio`, `accuracy` and `nll`; the last is the
            mean over the tokens of the chosen answers, the others over pairs.
        answers: What it says to the prompts that are shown.
    """

    figures: Figures
    answers: list[str]


class Judge:
    """A held-out split, for any number of models; what it says of one is what is on the disk.

    Attributes:
        split: Its name.
        pairs: Its pairs.
        prompts: Those that are shown, as conversations.
    """

    def __init__(self, plan: Plan, split: SplitName = "test") -> None:
        """Read and tokenize the pairs, with the tokenizer of the base."""
        self.plan = plan
        self.split = split
        self.objective = Objective(beta=plan.beta, nll_on="response")
        read = read_preferences(str(plan.split(split)), data_format=FORMATS[plan.data])
        self.pairs = read.pairs[: plan.num_test]
        self.tokenized = tokenize_pairs(
            self.pairs, load_tokenizer(str(plan.base)), max_length=plan.max_length
        )
        self.prompts = shown_prompts(self.pairs)
        self._prompt_P = prompt_numbers(self.tokenized)

    def __len__(self) -> int:
        return len(self.tokenized)

    def look(self, folder: Path, *, answering: bool = True) -> Verdict:
        """Load a model, score the pairs, and let it answer the prompts."""
        model = load_trained(str(folder), OrpoSettings(dtype="float32"))
        layout = prepare_model(model, self.objective).layout
        scores = score_pairs(model, self.tokenized, RowSettings(self.objective, layout, TOKENS_PER_ROW))
        speaker = Speaker(folder.name, model, load_tokenizer(str(folder)), self.tokenized.chat_template)
        return Verdict(
            self._figures(scores), [self._answer(speaker, p) for p in self.prompts] if answering else []
        )

    def _answer(self, speaker: Speaker, prompt: Sequence[Message]) -> str:
        speaker.turns = list(prompt[:-1])
        greedy = Sampling(temperature=0, max_tokens=self.plan.answer_tokens)
        return " ".join(speaker.answer(str(prompt[-1]["content"]), greedy).split())

    def _figures(self, scores: PairScores) -> Figures:
        values = preference_values(scores, self.objective) | {"chosen_logprob": scores.chosen_logprob_P}
        names = ("chosen_logprob", "rejected_logprob", "log_odds_ratio", "accuracy")
        one_P = torch.ones(len(self))
        figures = {name: mean_over_prompts(values[name], one_P, self._prompt_P) for name in names}
        return figures | {"nll": mean_over_prompts(scores.nll_sum_P, scores.nll_weight_P, self._prompt_P)}


def mean_over_prompts(sum_P: Tensor, weight_P: Tensor, prompt_P: Tensor) -> tuple[float, float]:
    """A mean, `sum_P` over `weight_P`, and its standard error where prompts are what was drawn.

    Pairs of one prompt are not independent of each other: the error is that of a ratio of sums over prompts.
    """
    sum_P, weight_P = sum_P.double(), weight_P.double()
    mean = sum_P.sum() / weight_P.sum()
    num_prompts = int(prompt_P.max()) + 1
    residual = torch.zeros(num_prompts, dtype=torch.float64).index_add_(0, prompt_P, sum_P - mean * weight_P)
    spread = residual.square().sum() * num_prompts / max(num_prompts - 1, 1)
    return mean.item(), math.sqrt(spread) / weight_P.sum().item()


def prompt_numbers(pairs: TokenizedDataset) -> Tensor:
    """The same number for pairs with the same prompt, shape [P]."""
    numbers: dict[tuple[int, ...], int] = {}
    keys = [tuple(int(token) for token in pairs[index].prompt) for index in range(len(pairs))]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def shown_prompts(
    pairs: Sequence[PreferencePair], num_shown: int = 3, longest: int = 70
) -> list[list[Message]]:
    """Prompts of one short line from all over a split: picked by their place, not by the answers to them."""
    short: dict[str, list[Message]] = {}
    for pair in pairs:
        text = str(pair.prompt[-1]["content"])  # type: ignore[index]
        if len(pair.prompt) == 1 and len(text) <= longest and "\n" not in text:
            short.setdefault(pair.prompt_key(), list(pair.prompt))  # type: ignore[arg-type]
    every = max(len(short) // num_shown, 1)
    return list(itertools.islice(short.values(), 0, None, every))[:num_shown]


def write_results(
    folder: Path,
    plan: Plan,
    judge: Judge,
    verdicts: Mapping[str, Verdict],
    trainings: Mapping[str, Training],
) -> None:
    """Write samples.json (for the page), test.jsonl (to score with) and demo.json (what the screen shows)."""
    samples = [
        {"prompt": prompt[-1]["content"], "answers": {name: v.answers[i] for name, v in verdicts.items()}}
        for i, prompt in enumerate(judge.prompts)
    ]
    write_json(folder / "samples.json", samples)
    rows = ({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in judge.pairs)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")
    result = {
        "data": plan.data,
        "seed": plan.seed,
        "num_test_pairs": len(judge),
        "test": {
            name: {key: {"mean": mean, "se": error} for key, (mean, error) in verdict.figures.items()}
            for name, verdict in verdicts.items()
        },
        "training": {
            name: {"steps": t.num_steps, "tokens": t.num_tokens, "seconds": round(t.seconds, 1)}
            for name, t in trainings.items()
        },
    }
    write_json(folder / "demo.json", result)
