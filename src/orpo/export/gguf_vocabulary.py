"""A tokenizer as llama.cpp wants it: tokens with their kinds, merges, the name of the split, the special ids.

Only byte-level BPE is written here. What llama.cpp would do in another way is refused by name; what cannot be
seen from the tokenizer's file shows when the ids of the run's texts are compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from orpo.data.chat_template import ChatTemplate
from orpo.data.templates import adds_bos
from orpo.engine.gguf_model import SPLITS
from orpo.errors import ModelError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, as GGUF numbers them."""

CONVERTER = "convert it with convert_hf_to_gguf.py of llama.cpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a GGUF file says about its tokenizer.

    Attributes:
        pre: llama.cpp's name of the way to split text.
        tokens: By id, as the vocabulary spells them.
        kinds: By id: `NORMAL`, `CONTROL`, `USER_DEFINED`, `UNUSED`.
        merges: In order, the two parts joined by a blank.
        special: By GGUF's name (`bos`, `eos`, `eot`, `eom`, `padding`), the id.
        adds_bos: Whether a prompt begins with BOS.
        chat_template: As trained; None where the run trained on plain text.
        normalises: Whether text is brought to NFC first, which llama.cpp does not do.
    """

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    adds_bos: bool
    chat_template: str | None
    normalises: bool


def vocabulary_of(tokenizer: Any, template: ChatTemplate | None, stops: list[int]) -> Vocabulary:
    """Read a tokenizer.

    Args:
        tokenizer: Of the run.
        template: Of the run.
        stops: Ids that end an answer, the one that ends a turn in training first.

    Raises:
        ModelError: It is not one that llama.cpp can be told to follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"a GGUF file cannot be written: the tokenizer has no tokenizer.json; {CONVERTER}")
    state = json.loads(backend.to_str())
    _refuse_foreign(state)
    by_id = {int(number): token for token, number in tokenizer.get_vocab().items()}
    added = {int(token["id"]): token for token in state["added_tokens"]}
    size = max(by_id) + 1
    kinds = [UNUSED if number not in by_id else NORMAL for number in range(size)]
    for number, token in added.items():
        kinds[number] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    return Vocabulary(
        pre=_split_name(state),
        tokens=[by_id.get(number, f"[PAD{number}]") for number in range(size)],
        kinds=kinds,
        merges=merges,
        special=_special_ids(tokenizer, stops),
        adds_bos=_begins_with_bos(tokenizer, template),
        chat_template=template.text if template is not None else None,
        normalises=state["normalizer"] is not None,
    )


def _refuse_foreign(state: dict[str, Any]) -> None:
    """Refuse what llama.cpp's byte-level BPE does not do."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "SentencePiece BPE" if model["type"] == "BPE" else model["type"]
        raise ModelError(
            f"a GGUF file is written for byte-level BPE tokenizers; this one is {kind}: {CONVERTER}"
        )
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ModelError(
            f"the tokenizer changes text before it splits it ({normalizer['type']}): {CONVERTER}"
        )
    for token in state["added_tokens"]:
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd:
            raise ModelError(f"llama.cpp cannot follow the token {token['content']} ({', '.join(odd)}): "
                             "it would keep the blanks around it, or find it inside words")  # fmt: skip


def _split_name(state: dict[str, Any]) -> str:
    """llama.cpp's name of the way a tokenizer splits text."""
    split = state["pre_tokenizer"]
    steps = split["pretokenizers"] if split and split["type"] == "Sequence" else [split]
    for name, known in SPLITS.items():
        if [_essence(step) for step in steps] == [_essence(step) for step in known]:
            return name
    kinds = " + ".join(str(step and step["type"]) for step in steps)
    raise ModelError(f"llama.cpp's name for this tokenizer's split ({kinds}) is not known here: {CONVERTER}")


def _essence(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A step without what changes no id."""
    return None if step is None else {key: value for key, value in step.items() if key != "trim_offsets"}


def _special_ids(tokenizer: Any, stops: list[int]) -> dict[str, int]:
    """The ids with a role; three may end an answer, of which `eot` ends the turn that was trained."""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
    found = {"bos": tokenizer.bos_token_id, "eos": eos, "padding": tokenizer.pad_token_id, "eot": stops[0]}
    others = [token for token in stops if token not in (eos, stops[0])]
    if others and eos == stops[0]:
        found["eos"] = others.pop(0)
    if others:
        found["eom"] = others.pop(0)
    return {name: int(token) for name, token in found.items() if token is not None}


def _begins_with_bos(tokenizer: Any, template: ChatTemplate | None) -> bool:
    """Whether a prompt of training begins with BOS, whatever the tokenizer does to plain text."""
    if template is None:
        return adds_bos(tokenizer)
    bos = tokenizer.bos_token
    opening = template.render(tokenizer, [{"role": "user", "content": "a"}], None, ask=True)
    return bool(bos) and opening.startswith(bos)
