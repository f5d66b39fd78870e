"""Texts in which a chat template was rendered already, and where the answer in them begins.

A rendered side repeats the question and brings the headers of its template; wrapping it again, or putting the
prompt in front once more, would train the question twice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# The headers after which models answer, by family.
_ANSWER_TOKENS = (
    r"<\|im_start\|>assistant(?:\n|<\|im_sep\|>)|<\|assistant\|>\n?|<start_of_turn>model\n|<\|turn>model\n"
    r"|\[/INST\]|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<\|header_start\|>assistant<\|header_end\|>\n\n"
    r"|<\uff5cAssistant\uff5c>|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>(?:<\|START_RESPONSE\|>)?"
    r"|<\|start\|>assistant(?:<\|channel\|>final)?<\|message\|>|<\|start_of_role\|>assistant<\|end_of_role\|>"
    r"|\[\|assistant\|\]|GPT4 Correct Assistant:|<extra_id_1>Assistant\n"
)
_ANSWER_HEADINGS = r"### ?(?:Response|Assistant|Answer):\n?"
_ANSWER_WORDS = rf"{_ANSWER_HEADINGS}|\b(?:ASSISTANT|Assistant|Answer):|(?<=\n)(?:Bot|Chatbot|AI):"
# A speaker who answers another one.
_SPEAKERS = (
    r"\bUSER:[\s\S]*?\bASSISTANT:|^(?:User|Human|USER):[\s\S]*?^(?:Assistant|ASSISTANT|Bot|Chatbot|AI):"
)
_QUESTION_TOKENS = (
    r"<\|im_start\|>(?:user|system)\b|<\|(?:user|system|prompter)\|>|<start_of_turn>user\b|<\|turn>(?:user|system)\b|\[INST\]"
    r"|<\|start_header_id\|>(?:user|system)<\|end_header_id\|>|<\|header_start\|>(?:user|system)<\|header_end\|>"
    r"|<\uff5cUser\uff5c>|<\|START_OF_TURN_TOKEN\|><\|(?:USER|SYSTEM)_TOKEN\|>"
    r"|<\|start\|>(?:user|system|developer)<\|message\|>|<\|start_of_role\|>(?:user|system)<\|end_of_role\|>"
    r"|\[\|(?:user|system)\|\]|GPT4 Correct User:|<extra_id_[01]>(?:User|System)\n"
)
_BOS = (
    r"<\|begin_of_text\|>|<\uff5cbegin\u2581of\u2581sentence\uff5c>|<\|startoftext\|>|<BOS_TOKEN>|\[gMASK\]<sop>"
    r"|<bos>|<s>"
)

ENDS = (
    "</s>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end_of_text|>", "<|endoftext|>",
    "<|end|>", "<end_of_turn>", "<turn|>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|end_of_turn|>", "<EOS_TOKEN>", "<|role_end|>", "[|endofturn|]",
)  # fmt: skip
"""What ends a turn, by family."""

_ANSWER = re.compile(f"{_ANSWER_TOKENS}|{_ANSWER_WORDS}")
_ANSWER_IN_TOKENS = re.compile(_ANSWER_TOKENS)
_HEADING = re.compile(r"### ?\w[^\n:]*:")
_HEADED_TURNS = re.compile(rf"### ?(?:Instruction|Human|User|Question|Input):[\s\S]*?{_ANSWER_HEADINGS}")
_HEADED, _SPOKEN = re.compile(_ANSWER_HEADINGS), re.compile(_SPEAKERS, re.MULTILINE)
_QUESTION = re.compile(_QUESTION_TOKENS)
_CONVERSATION = re.compile(rf"(?:{_QUESTION_TOKENS})[\s\S]*?(?:{_ANSWER_TOKENS})")
_ANSWER_TURN = re.compile(rf"(?:\A|\n|{'|'.join(map(re.escape, ENDS))})\s*(?:{_BOS})?(?:{_ANSWER_TOKENS})")
_START = re.compile(rf"\s*(?:(?P<bos>{_BOS})\s*)?(?P<header>{_ANSWER_TOKENS})?")
_RENDERED = re.compile(rf"\s*(?:{_BOS}|{_ANSWER_TOKENS}|{_QUESTION_TOKENS})")


def is_rendered(text: str) -> bool:
    """Whether a text begins with BOS or with a header of a known family, which no answer does."""
    return _RENDERED.match(text) is not None


def asks(text: str) -> bool:
    """Whether a text holds the header of a question in the special tokens of a known family."""
    return _QUESTION.search(text) is not None


def is_conversation(text: str) -> bool:
    """Whether a text is a question and an answer behind it, both in the tokens of a known family."""
    found = _CONVERSATION.search(text)
    return found is not None and found.start() < _words_begin(text)


def is_in_tokens(text: str) -> bool:
    """Whether the turns of a text, or its answer alone, begin with the special tokens of a known family."""
    found = _ANSWER_TURN.search(text)
    return is_conversation(text) or (found is not None and found.start() < _words_begin(text))


def _words_begin(text: str) -> int:
    """Where a text begins that writes its turns with headings or speakers; tokens behind are spoken of."""
    found = (family.search(text) for family in (_SPOKEN, _HEADED_TURNS))
    return min((match.start() for match in found if match is not None), default=len(text))


def answer_begins(text: str, limit: int | None = None) -> int:
    """Where the last header of an answer ends; 0 where there is none.

    A text has its headers in one way to write turns: where special tokens begin them, `Answer:` is a word of
    a question or an answer, and so it is behind `### Response:`. Of headings and speakers it is that of the
    two which it begins with.

    Args:
        text: The whole of it tells how its turns are written.
        limit: The header ends here at the latest; None is the end of the text.
    """
    end = len(text) if limit is None else limit
    return next(filter(None, (_last_end(family, text, end) for family in _families(text))), 0)


def _families(text: str) -> Sequence[re.Pattern[str]]:
    """The headers to look for, of one way to write turns after the other."""
    if is_in_tokens(text):
        return (_ANSWER_IN_TOKENS,)
    spoken, headed = _SPOKEN.search(text), _HEADING.search(text)
    if spoken is not None and (headed is None or spoken.start() < headed.start()):
        return (_SPOKEN, _HEADED, _ANSWER)
    return (_HEADED, _SPOKEN, _ANSWER)


def _last_end(pattern: re.Pattern[str], text: str, limit: int) -> int:
    return max((match.end() for match in pattern.finditer(text, 0, limit)), default=0)


def without_header(text: str) -> str:
    """An answer without the BOS and the header it begins with."""
    match = _START.match(text)
    return text[match.end() :] if match is not None and (match["bos"] or match["header"]) else text


def ends_with_header(text: str) -> bool:
    """Whether a rendered prompt ends where its answer begins, behind a header of any kind."""
    end = _last_end(_ANSWER, text, len(text))
    return end > 0 and not text[end:].strip()
