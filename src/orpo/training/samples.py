"""Answers to held-out prompts at each evaluation, so that a run can be read and not only plotted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList, TrainerCallback

from orpo.run.directory import RunDirectory, read_json, write_json

DEFAULT_LENGTH = 128


class SampleWriter(TrainerCallback):
    """Writes samples.json: for each prompt its answers by step. Greedy, so no random number is drawn.

    Args:
        trainer: Gives model, tokenizer and evaluation pairs.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._answered = -1  # the step of the last answers; each named evaluation set calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take back what an earlier attempt has written after the checkpoint this one starts from."""
        self._answered = -1
        path = RunDirectory(Path(args.output_dir)).samples
        if state.is_world_process_zero and path.exists():
            samples = read_json(path, []) if state.global_step > 0 else []
            for sample in samples:
                answers = sample["answers"]
                sample["answers"] = {k: v for k, v in answers.items() if _step(k) <= state.global_step}
            write_json(path, samples)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Generate on every rank, since a sharded model needs all of them; the first one writes."""
        if self._answered == state.global_step:
            return
        pairs = self.trainer.eval_dataset
        pairs = next(iter(pairs.values())) if isinstance(pairs, dict) else pairs
        shown = [pairs[index] for index in range(min(args.num_samples, len(pairs)))]
        prompts = [[*pair.prompt, *pair.chosen[: pair.chosen_context]] for pair in shown]
        answers = self._generate(prompts, args)
        self.trainer.cut_off()
        self._answered = state.global_step
        if not state.is_world_process_zero:
            return
        path = RunDirectory(Path(args.output_dir)).samples
        before = {sample["prompt"]: sample["answers"] for sample in read_json(path, [])}
        samples = []
        for pair, prompt, answer in zip(shown, prompts, answers, strict=True):
            text = self._text(prompt)
            known = before.get(text) or {"chosen": self._text(pair.chosen[pair.chosen_context :])}
            known = known | {f"step {state.global_step}": self._text(answer)}
            samples.append({"source": pair.source, "prompt": text, "answers": known})
        write_json(path, samples)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.trainer.processing_class.decode(tokens, skip_special_tokens=True)
        return text

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], args: Any) -> list[list[int]]:
        tokenizer, model = self.trainer.processing_class, self.trainer.model
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=args.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]).to(ids)
        model.eval()
        with self.trainer.stopwatch.paused(), self.trainer.accelerator.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=args.max_completion_length or DEFAULT_LENGTH,
                do_sample=False,
                pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([self._is_cut_off]),
            )
        # By number of tokens, never by the text of the prompt, which loses its special tokens when decoded.
        return [sequence[width:].tolist() for sequence in output]

    def _is_cut_off(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.trainer.is_cut_off, dtype=torch.bool, device=ids.device)


def _step(name: str) -> int:
    """The step in the name of an answer; 0 for the chosen one."""
    return int(name.removeprefix("step ")) if name.startswith("step ") else 0
