"""Rows of plain texts: a conversation to be rendered, or text to be continued as it is.

`{"prompt": "Convert 45 km to m.", "chosen": "45,000 m.", ...}` is a question and its answer, and training it
without the model's chat template would teach what no chat ever asks. `{"prompt": "The sky is", "chosen":
" blue.", ...}` is text and its continuation. The rows decide, one line says so, and a run remembers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orpo.data.turn_markers import asks, ends_with_header
from orpo.pairs import Message, PreferencePair
from orpo.settings.config import TextRows


def decide(pairs: Sequence[PreferencePair], *, has_template: bool) -> TextRows | None:
    """How the texts among some pairs are to be read; None where there are none.

    Args:
        pairs: As read.
        has_template: Whether the model to train has a chat template, or is given one.
    """
    texts = [pair for pair in pairs if pair.is_text]
    if not texts:
        return None
    continuing = sum(_continues(pair) for pair in texts)
    return "chat" if has_template and continuing * 2 < len(texts) else "plain"


def reads_otherwise(pair: PreferencePair, decided: TextRows | None) -> bool:
    """Whether a plain text by itself would be read the other way than was decided."""
    return pair.is_text and _continues(pair) == (decided == "chat")


def _continues(pair: PreferencePair) -> bool:
    """Whether the answer continues the text of the prompt: after a header, or in the middle of a line."""
    prompt, chosen = str(pair.prompt), str(pair.chosen)
    return ends_with_header(prompt) or chosen[:1].isspace() or prompt[-1:].isspace()


def read_otherwise(pairs: Sequence[PreferencePair], decided: TextRows) -> str | None:
    """A line about texts that would be read the other way by themselves; None where there are none."""
    texts = [pair for pair in pairs if pair.is_text]
    others = [pair for pair in texts if reads_otherwise(pair, decided)]
    if not others:
        return None
    do, otherwise = ("continue", "plain") if decided == "chat" else ("do not continue", "chat")
    return (
        f"{len(others)} of {len(texts)} texts: read as all are, although their answers {do} the text of the"
        f" prompt (first: {others[0].source}); text_rows: {otherwise} reads all texts the other way"
    )


def not_rendered(pairs: Sequence[PreferencePair]) -> str | None:
    """A line about texts among rendered ones that went through no template; None where there are none."""
    texts = [pair for pair in pairs if pair.is_text]
    others = [pair for pair in texts if not asks(str(pair.prompt))]
    if not others:
        return None
    return (
        f"{len(others)} of {len(texts)} texts went through no chat template, unlike the others, and are"
        f" taken as they are, too (first: {others[0].source}); give all rows as they were before the template"
    )


def are_rendered(pairs: Sequence[PreferencePair]) -> bool:
    """Whether most of the texts among some pairs went through a chat template already."""
    texts = [str(pair.prompt) for pair in pairs if pair.is_text]
    return sum(map(asks, texts)) * 2 > len(texts)


def as_conversations(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs with each prompt of plain text as a user turn and its answers as the assistant's."""
    return [_conversation(pair) if pair.is_text else pair for pair in pairs]


def _conversation(pair: PreferencePair) -> PreferencePair:
    rejected = None if pair.rejected is None else [_turn("assistant", pair.rejected)]
    return replace(
        pair, prompt=[_turn("user", pair.prompt)], chosen=[_turn("assistant", pair.chosen)], rejected=rejected
    )


def _turn(role: str, text: object) -> Message:
    return {"role": role, "content": str(text)}


LINES: dict[TextRows, str] = {
    "chat": "texts are read as a user turn and an answer, through the chat template"
    " (text_rows: plain takes them as they are)",
    "plain": "texts are taken as they are, without a chat template"
    " (text_rows: chat reads them as a user turn and an answer)",
}
"""What to print of each reading."""
RENDERED = "texts went through a chat template already and are taken as they are"
RENDERED_AGAIN = (
    "the texts went through a chat template already, and text_rows: chat would write them through one again; "
    "give the rows as they were before, or set text_rows: plain"
)
THROUGH_TEMPLATE = "they go through the chat template, also with text_rows: plain"
