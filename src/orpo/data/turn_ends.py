"""How a chat template ends an answer: which of the tokens it writes behind one are trained.

A turn ends where generation stops. Among the tokens that stand behind an answer, those the model is known to
stop at come first; what follows the first of them, such as the header of the next turn, is never trained.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from orpo.errors import ModelError


class AddedToken(NamedTuple):
    """A special or otherwise added token, and where it stands in a text."""

    text: str
    start: int
    stop: int


class TurnEnd(NamedTuple):
    """What of the text behind an answer is trained."""

    text: str
    """Up to the end-of-turn token, this included."""
    token: str
    """That token."""


def added_ids(tokenizer: Any) -> set[int]:
    """Ids of special and other added tokens: what may end a turn."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def added_tokens(tokenizer: Any, text: str) -> list[AddedToken]:
    """The added tokens of a text, in order."""
    added, found, position = added_ids(tokenizer), [], 0
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        written = str(tokenizer.convert_ids_to_tokens(token)) if token in added else ""
        if written and (start := text.find(written, position)) >= 0:
            position = start + len(written)
            found.append(AddedToken(written, start, position))
    return found


def earlier_turn_end(tokenizer: Any, between: str, opening: str, stops: Collection[str]) -> str:
    """What closes an answer that another turn follows; "" where nothing does.

    Args:
        tokenizer: Knows the added tokens.
        between: The text between an answer and the next question.
        opening: The text in front of the first question of a conversation.
        stops: Tokens that generation is known to stop at.
    """
    tokens = added_tokens(tokenizer, between)
    opener = next(iter(_openers(tokenizer, opening)), None)
    header = next((token.start for token in tokens if token.text == opener), None)
    if header is None:
        header = len(between) - _common_end(between, opening)
    own = [token for token in tokens if token.start < header]
    return between[: _first_stop(own, stops).stop] if own else ""


def turn_end(tokenizer: Any, suffix: str, earlier: str, opening: str, stops: Collection[str]) -> TurnEnd:
    """What of the text behind the last answer is trained.

    Args:
        tokenizer: Knows the added tokens.
        suffix: All text behind the last answer.
        earlier: As `earlier_turn_end` found it. What stands behind every answer closes the turn; the rest of
            the suffix closes the conversation.
        opening: The text in front of the first question of a conversation.
        stops: Tokens that generation is known to stop at.

    Raises:
        ModelError: Neither template nor tokenizer has an end-of-turn token.
    """
    tokens = added_tokens(tokenizer, suffix)
    if earlier and suffix.startswith(earlier):
        tokens = _closing(tokens, len(earlier), stops)
    openers = _openers(tokenizer, opening)
    # Some templates write the header of the next turn behind every answer, asked or not.
    header = next((index for index, token in enumerate(tokens) if index and token.text in openers), None)
    if tokens:
        last = _first_stop(tokens[:header], stops)
        return TurnEnd(suffix[: last.stop], last.text)
    if tokenizer.eos_token is None:
        raise ModelError(
            "neither the chat template nor the tokenizer has an end-of-turn token; set tokenizer.eos_token"
        )
    return TurnEnd(suffix.rstrip() + tokenizer.eos_token, tokenizer.eos_token)


def _closing(tokens: list[AddedToken], length: int, stops: Collection[str]) -> list[AddedToken]:
    """The tokens of what closes every turn, and those directly behind where only they reach a stop."""
    own = [token for token in tokens if token.stop <= length]
    reach = list(own)
    for token in tokens[len(own) :]:
        if token.start == reach[-1].stop:
            reach.append(token)
    return own if any(token.text in stops for token in own) or reach[-1].text not in stops else reach


def _first_stop(tokens: list[AddedToken], stops: Collection[str]) -> AddedToken:
    """The first token that generation stops at; where it knows none, the last: all of them close the turn."""
    return next((token for token in tokens if token.text in stops), tokens[-1])


def _openers(tokenizer: Any, opening: str) -> list[str]:
    """The token that begins a turn, if any."""
    texts = [token.text for token in added_tokens(tokenizer, opening)]
    return [text for text in texts if text != tokenizer.bos_token][:1]


def _common_end(one: str, other: str) -> int:
    """Length of the common ending."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
