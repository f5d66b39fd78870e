"""Token ids of prompts -> token ids of answers, many at once: what chat, samples and `orpo generate` share.

Prompts of unlike lengths are padded on the left and masked. Each answer ends at the first of its end tokens,
and is drawn with random numbers of its own, so that it depends on its seed and not on what is next to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from orpo.engine.logits import DAMAGED, are_numbers
from orpo.engine.scorer import base_model, num_embeddings
from orpo.engine.stop_tokens import stop_token_ids
from orpo.errors import ModelError

_NOT_DRAWN_HERE = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields of a generation_config that say how transformers draws; `_Draws` does that."""
_NOT_KEPT = (*_NOT_DRAWN_HERE, "max_length", "min_length", "stop_strings")
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
            "output_hidden_states")  # fmt: skip
"""What else `generate` would return; nobody here reads it."""
_WAYS = ("assistant_early_exit", "constraints", "diversity_penalty", "dola_layers", "force_words_ids",
         "num_beam_groups", "penalty_alpha", "prompt_lookup_num_tokens", "use_mtp")  # fmt: skip
"""Further ways to generate, most of which are no longer in transformers itself."""
_FORCED = ("forced_bos_token_id", "forced_eos_token_id")
_ORDINARY = {
    *(*_NOT_KEPT, *_OUTPUTS, *_WAYS, "bos_token_id", "eos_token_id", "pad_token_id"),
    *("do_sample", "num_beams", "num_return_sequences", "max_new_tokens", "use_cache"),
    "transformers_version",
}
"""Fields that cannot make generation fail here: left out, set by us, or checked as the model is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How token ids are made.

    Attributes:
        max_tokens: Longest answer, at least 1.
        ends: Ids that end an answer.
        pad: Id to fill up with; it may be one of `ends`.
        temperature: At least 0; 0 takes the likeliest token.
        top_p: Share of the probability that tokens are drawn from, in (0, 1].
    """

    max_tokens: int
    ends: Sequence[int]
    pad: int
    temperature: float = 0.0
    top_p: float = 1.0


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seeds: Sequence[int | None] = (),
    streamer: Any = None,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """Answer prompts in one batch.

    What else the model's generation_config asks for (a repetition penalty, ...) holds.

    Args:
        model: In evaluation mode, on its device.
        prompts: Token ids, at least one each.
        decoding: How.
        seeds: One for each prompt, where tokens are drawn; None: a new one each time.
        streamer: Of transformers, for a single prompt.
        stop: Asked after each token whether to end all answers where they are.

    Returns:
        The new tokens of each prompt, the end token included where it was reached.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    ids = [[decoding.pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    processors = LogitsProcessorList([_Numbers()])
    if decoding.temperature > 0:
        processors.append(_Draws(decoding, seeds or [None] * len(prompts), device))
    criteria = StoppingCriteriaList() if stop is None else StoppingCriteriaList([_Cut(stop)])
    with _generation_config(model, decoding) as config:
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=criteria,
            streamer=streamer,
        )
    ends = set(decoding.ends)
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def check_decoding(model: nn.Module) -> list[str]:
    """Answer one token with the model's generation_config, so that what `generate` refuses is refused now.

    Returns:
        A line for each way to generate that the configuration asks for, and that is not taken here.

    Raises:
        ModelError: A setting of it cannot be used.
    """
    own = getattr(base_model(model), "generation_config", None)
    if own is None:
        return []
    given = {name: value for name, value in vars(own).items() if value is not None and name[0] != "_"}
    lines = [
        f"generation_config.json: {name} {given[name]} means nothing here, where answers are made token by"
        " token"
        for name in _WAYS
        if given.get(name)
    ]
    number = num_embeddings(model)
    for name in _FORCED:
        ids = given.get(name, [])
        for one in ids if isinstance(ids, list) else [ids]:
            if not (type(one) is int and 0 <= one < number):
                raise _unusable(name, one, f"expected the id of one of the model's {number:,} tokens")
    asked = [name for name in given if name not in _ORDINARY]
    if not asked or any(hasattr(weight, "ds_id") for weight in model.parameters()):
        return lines
    with _as_in_use(model):
        if (problem := _problem(model, asked)) is not None:
            alone = {name: _problem(model, [name]) for name in asked}
            name = next((name for name in asked if alone[name] is not None), asked[0])
            raise _unusable(name, given[name], alone[name] or problem)
    return lines


def _unusable(name: str, value: Any, problem: str) -> ModelError:
    return ModelError(
        f"generation_config.json: {name} {value!r} cannot be used to generate ({problem}); correct the file"
    )


def _problem(model: nn.Module, names: Sequence[str]) -> str | None:
    """What is wrong where the model answers with only these of its further settings."""
    inner = base_model(model)
    own = inner.generation_config
    inner.generation_config = copy.deepcopy(own)
    for name in vars(own).keys() - _ORDINARY - set(names):
        if not name.startswith("_"):
            setattr(inner.generation_config, name, None)
    try:
        decode(model, [[0]], Decoding(max_tokens=1, ends=stop_token_ids(model), pad=0))
    except Exception as error:  # whatever transformers makes of a value it does not expect
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        inner.generation_config = own
    return None


@contextlib.contextmanager
def _as_in_use(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((number for number, token in enumerate(tokens, start=1) if token in ends), len(tokens))
    return tokens[:end]


@contextlib.contextmanager
def _generation_config(model: nn.Module, decoding: Decoding) -> Iterator[Any]:
    """The model's generation_config with our settings, in its place for as long as this lasts.

    transformers fills what is unset from the model's own, and warns where that contradicts what is set.
    """
    inner = base_model(model)
    own = inner.generation_config
    config = copy.deepcopy(own)
    for name in (*_NOT_KEPT, *_OUTPUTS, *_WAYS):
        setattr(config, name, None)
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=decoding.max_tokens,
        eos_token_id=list(decoding.ends) or None,
        pad_token_id=decoding.pad,
    )
    inner.generation_config = config
    try:
        yield config
    finally:
        inner.generation_config = own


class _Numbers(LogitsProcessor):
    """Stops where a model says no numbers, of which the first token would be taken."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, as they are."""
        if not are_numbers(scores):
            raise ModelError(f"the model's logits are not numbers; {DAMAGED}")
        return scores


class _Cut(StoppingCriteria):
    """Ends all rows at once."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each row ends here."""
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Draws each row's next token with a random number of its own, and leaves no other token a chance.

    Shape suffixes: B = rows of the batch, V = vocabulary.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int | None], device: torch.device) -> None:
        self._temperature, self._top_p = decoding.temperature, decoding.top_p
        self._step = 0
        self._numbers = torch.stack([_uniform(seed, decoding.max_tokens) for seed in seeds]).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the next tokens -> 0 for the token that is drawn, else -inf."""
        # The largest score becomes 0 first, so that a small temperature overflows nothing.
        scaled_BV = (scores.float() - scores.float().amax(-1, keepdim=True)) / self._temperature
        sorted_BV, order_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        kept_BV = torch.where(before_BV < self._top_p, sorted_BV, 0.0)
        kept_BV[:, 0] = sorted_BV[:, 0]
        upto_BV = kept_BV.cumsum(-1)
        target_B1 = self._numbers[:, self._step, None] * upto_BV[:, -1:]
        index_B1 = (upto_BV <= target_B1).sum(-1, keepdim=True)
        last_B1 = (kept_BV > 0).sum(-1, keepdim=True) - 1
        token_B1 = order_BV.gather(-1, index_B1.minimum(last_B1))
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, token_B1, 0.0)


def _uniform(seed: int | None, number: int) -> Tensor:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.rand(number, generator=generator)
