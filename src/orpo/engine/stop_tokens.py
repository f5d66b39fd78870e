"""Where generation stops after training: at the end of turn that was trained, for every consumer.

`generate` reads generation_config.json, servers and GGUF files the tokenizer's EOS as well, and an adapter
folder has no model to carry either; so the end of turn goes where each of them looks.
"""

import os
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from orpo.console import say
from orpo.engine.generation_config import check_generation_file, settle_generation_config, stop_ids
from orpo.engine.gguf_model import gguf_stop_token_ids
from orpo.engine.scorer import base_model
from orpo.errors import ModelError, raised_as
from orpo.run.directory import gguf_file

# Gemma and Phi keep a document's end as EOS of the tokenizer and list the end of turn in generation_config
# alone; every other family's chat models carry the end of turn in both.
KEEP_THEIR_EOS = frozenset({"<end_of_turn>", "<turn|>", "<|end|>"})


def stop_token_ids(model: Any) -> list[int]:
    """Ids that generation stops at by the model's generation_config; none where it has none."""
    generation = None if model is None else getattr(base_model(model), "generation_config", None)
    return [] if generation is None else stop_ids(generation)


def saved_stop_token_ids(name: str) -> list[int]:
    """The same for a model folder, GGUF file or hub name, without loading the model."""
    if (path := gguf_file(name)) is not None:
        return gguf_stop_token_ids(path)
    check_generation_file(name)
    with raised_as(ModelError, f"{name}: its generation_config.json cannot be used"):
        try:
            return stop_ids(GenerationConfig.from_pretrained(name))
        except OSError:
            return []


def stop_at(end_token: str, tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Let generation stop at a token, as well as where it stops already.

    Args:
        end_token: The end-of-turn token of the template that was trained.
        tokenizer: Gets it as EOS where chat models of its family have that; changed in place.
        model: Its generation_config gets the token, in front of its own; None: there is none yet.
    """
    end = tokenizer.convert_tokens_to_ids(end_token)
    assert isinstance(end, int)
    carried = end_token not in KEEP_THEIR_EOS
    known = [tokenizer.eos_token_id] if carried and tokenizer.eos_token_id is not None else []
    if carried:
        tokenizer.eos_token = end_token
    if model is None:
        return
    inner = base_model(model)
    if carried:
        inner.config.get_text_config().eos_token_id = end
    if getattr(inner, "generation_config", None) is not None:
        ids = [end, *stop_token_ids(model), *known]
        inner.generation_config.eos_token_id = list(dict.fromkeys(ids))


def save_generation_config(folder: str | os.PathLike[str], model: Any) -> None:
    """Write generation_config.json next to an adapter, whose folder would have none.

    Raises:
        ModelError: It cannot be used; of a model that is trained, that was found out before.
    """
    generation = getattr(base_model(model), "generation_config", None)
    if generation is None:
        return
    for line in settle_generation_config(model):
        say(line)
    generation.save_pretrained(folder)
