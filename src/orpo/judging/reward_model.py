"""A reward model as a judge: a sequence classifier with one output, and the answer with more of it wins."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from orpo.data.stages import report
from orpo.data.token_ids import check_ids
from orpo.engine.scorer import num_embeddings
from orpo.errors import ModelError, raised_as
from orpo.evaluation.answers import Failure
from orpo.evaluation.generation import this_device
from orpo.evaluation.kept_values import KeptValues, content_key
from orpo.evaluation.local_model import fingerprint
from orpo.pairs import Message
from orpo.settings.config import OrpoSettings

_BATCH = 16


class RewardModel:
    """Scores answers.

    Args:
        name: Folder or hub name of a model with one output.
        settings: How it is loaded (`dtype`, `trust_remote_code`).

    Attributes:
        identity: Equal for the same weights in the same precision.

    Raises:
        ModelError: It cannot be loaded, or has several outputs.
    """

    def __init__(self, name: str, settings: OrpoSettings) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        self.name = name
        dtype = settings.dtype or ("auto" if torch.accelerator.is_available() else "float32")
        code = settings.trust_remote_code
        with raised_as(ModelError, f"the reward model {name} cannot be loaded"):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=code)
            model, missing = AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, trust_remote_code=code, output_loading_info=True
            )
        if missing["missing_keys"]:
            raise ModelError(
                f"{name}: is no reward model; its weights lack {min(missing['missing_keys'])}, which "
                "would be random"
            )
        if model.config.num_labels != 1:
            raise ModelError(f"{name}: has {model.config.num_labels} outputs; a reward model has one")
        self._model = model.to(this_device()).eval()
        self._own_pad: int | None = self._model.config.get_text_config().pad_token_id
        self.identity = fingerprint(self._model, [])
        self._kept = KeptValues(f"rewards-{self.identity}")

    def scores(self, asked: Sequence[tuple[Sequence[Message], str]]) -> list[float | Failure]:
        """Rewards of answers, each with the turns it answers; a `Failure` where there is none."""
        ids = [self._tokens(turns, answer) for turns, answer in asked]
        keys = [content_key(one) for one in ids]
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        failed = {
            key: Failure(f"{len(one[0])} tokens do not fit into the {longest} that {self.name} can read")
            for key, one in zip(keys, ids, strict=True)
            if longest is not None and len(one[0]) > longest
        }
        by_key = dict(zip(keys, ids, strict=True))
        missing = [key for key in by_key if key not in self._kept and key not in failed]
        missing.sort(key=lambda key: -len(by_key[key][0]))
        for start in range(0, len(missing), _BATCH):
            report("scoring answers", start, len(missing))
            batch = missing[start : start + _BATCH]
            self._kept.add(dict(zip(batch, self._forward([by_key[key] for key in batch]), strict=True)))
        report("scoring answers", len(missing), len(missing))
        return [failed[key] if key in failed else self._reward(float(self._kept[key])) for key in keys]

    def _reward(self, found: float) -> float | Failure:
        return found if math.isfinite(found) else Failure(f"{self.name} gives {found}, which is no reward")

    def _tokens(self, turns: Sequence[Message], answer: str) -> list[list[int]]:
        """Token ids by the chat template; without one, of question and answer as a pair, with its types."""
        if self._tokenizer.chat_template is None:
            question = "\n\n".join(str(turn["content"]) for turn in turns)
            pair = self._tokenizer(question, answer)
            return self._checked([pair[name] for name in ("input_ids", "token_type_ids") if name in pair])
        with raised_as(ModelError, f"the chat template of {self.name} refuses a conversation"):
            conversation = [*turns, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False)
        return self._checked([self._tokenizer(text, add_special_tokens=False)["input_ids"]])

    def _checked(self, ids: list[list[int]]) -> list[list[int]]:
        check_ids(ids[0], num_embeddings(self._model), self._tokenizer, f"the reward model {self.name}")
        return ids

    def _padding(self, batch: Sequence[Sequence[Sequence[int]]]) -> int:
        """The model's padding token; without one, a token that the batch does not hold.

        transformers takes the reward from the last token that is no padding. Were that the EOS at the end of
        an answer, the reward would be that of the token before it.
        """
        config = self._model.config.get_text_config()
        if self._own_pad is not None:
            return self._own_pad
        held = {token for one in batch for token in one[0]}
        config.pad_token_id = next(token for token in range(config.vocab_size) if token not in held)
        return int(config.pad_token_id)

    def _forward(self, batch: Sequence[Sequence[Sequence[int]]]) -> list[float]:
        width = max(len(one[0]) for one in batch)
        pad = self._padding(batch)

        def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            whole = [[*row, *[fill] * (width - len(row))] for row in rows]
            return torch.tensor(whole, device=self._model.device)

        inputs = {
            "input_ids": padded([one[0] for one in batch], pad),
            "attention_mask": padded([[1] * len(one[0]) for one in batch], 0),
        }
        if len(batch[0]) > 1:
            inputs["token_type_ids"] = padded([one[1] for one in batch], 0)
        with torch.inference_mode():
            logits = self._model(**inputs).logits
        found: list[float] = logits[:, 0].double().tolist()
        return found
