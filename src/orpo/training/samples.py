"""Answers to held-out prompts, so that a run can be read and not only plotted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orpo.console import say
from orpo.engine.lengths import positions_in_window
from orpo.engine.scorer import base_model
from orpo.engine.stop_tokens import stop_token_ids
from orpo.evaluation.decoding import Decoding, check_decoding, decode
from orpo.evaluation.generation import pad_id
from orpo.run.directory import RunDirectory, write_json

DEFAULT_LENGTH = 128
FEW, SHORT = 3, 64
"""Answers, and tokens of each, that `orpo train` asks for before and after training where nothing is set."""


class SampleWriter(TrainerCallback):
    """Writes samples.json: for each prompt its answers by step. Greedy, so no random number is drawn.

    Args:
        trainer: Gives model, tokenizer and evaluation pairs.
        number: How many prompts are answered.
        longest: Tokens of an answer; None: `max_completion_length`, else `DEFAULT_LENGTH`.
        at_ends: Whether only the model before training and the one that training ends with answer, not the
            one at each evaluation.

    Raises:
        ModelError: The model's generation_config cannot be used.
    """

    def __init__(
        self, trainer: Any, number: int, *, longest: int | None = None, at_ends: bool = False
    ) -> None:
        self.trainer = trainer
        self.number = number
        self.longest = trainer.args.max_completion_length or longest or DEFAULT_LENGTH
        self.at_ends = at_ends
        for line in check_decoding(trainer.model):
            say(line)
        self._answered = -1  # the step of the last answers; each named evaluation set calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take back what an earlier attempt has written after the checkpoint this one starts from."""
        self._answered = -1
        run = RunDirectory(Path(args.output_dir))
        if state.is_world_process_zero and run.samples.exists():
            samples = run.read_samples() if state.global_step > 0 else []
            for sample in samples:
                for key in ("answers", "tokens"):
                    named = sample.get(key, {})
                    sample[key] = {k: v for k, v in named.items() if _step(k) <= state.global_step}
            write_json(run.samples, samples)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer with the model as it is evaluated."""
        if not self.at_ends or state.global_step == 0:
            self._write(args, state, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer with the model that training ends with, the best checkpoint where that is loaded."""
        if self.at_ends and self.trainer.stopped_by is None and self.trainer.model_step > 0:
            self._write(args, state, self.trainer.model_step)

    def _write(self, args: Any, state: Any, step: int) -> None:
        """Generate on every rank, since a sharded model needs all of them; the first one writes."""
        if self._answered == step:
            return
        pairs = self.trainer.eval_dataset
        pairs = next(iter(pairs.values())) if isinstance(pairs, dict) else pairs
        shown = [pairs[index] for index in range(min(self.number, len(pairs)))]
        prompts = [[*pair.prompt, *pair.chosen[: pair.chosen_context]] for pair in shown]
        answers = self._generate(prompts)
        self.trainer.cut_off()
        self._answered = step
        if not state.is_world_process_zero:
            return
        run = RunDirectory(Path(args.output_dir))
        known = {sample["prompt"]: sample for sample in run.read_samples()}
        samples = []
        for pair, prompt, answer in zip(shown, prompts, answers, strict=True):
            text, name = self._text(prompt), f"step {step}"
            before = known.get(text) or {
                "answers": {"chosen": self._text(pair.chosen[pair.chosen_context :])}
            }
            samples.append(
                {
                    "source": pair.source,
                    "prompt": text,
                    "answers": before["answers"] | {name: self._text(answer)},
                    "tokens": before.get("tokens", {}) | {name: len(answer)},
                    "longest": self.longest,
                }
            )
        write_json(run.samples, samples)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.trainer.processing_class.decode(tokens, skip_special_tokens=True)
        return text

    def _generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """Answers up to and with the token that ends them, none of the padding after it."""
        tokenizer, model = self.trainer.processing_class, self.trainer.model
        most = positions_in_window(base_model(model).config.get_text_config())
        longest = self.longest if most is None else min(self.longest, most - max(map(len, prompts)))
        decoding = Decoding(
            max_tokens=max(1, longest),
            ends=stop_token_ids(model),
            pad=pad_id(tokenizer),
        )
        model.eval()
        with self.trainer.stopwatch.paused(), self.trainer.accelerator.autocast():
            return decode(model, prompts, decoding, stop=lambda: self.trainer.is_cut_off)


def _step(name: str) -> int:
    """The step in the name of an answer; 0 for the chosen one."""
    return int(name.removeprefix("step ")) if name.startswith("step ") else 0
