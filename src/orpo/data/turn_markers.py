"""Texts in which a chat template was rendered already, and where the answer in them begins.

A rendered side repeats the question and brings the headers of its template; wrapping it again, or putting the
prompt in front once more, would train the question twice.
"""

from __future__ import annotations

import re

# The headers after which models answer, by family.
_ANSWER_TOKENS = (
    r"<\|im_start\|>assistant(?:\n|<\|im_sep\|>)|<\|assistant\|>\n?|<start_of_turn>model\n|<\|turn>model\n"
    r"|\[/INST\]|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|<\|header_start\|>assistant<\|header_end\|>\n\n"
    r"|<\uff5cAssistant\uff5c>|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>(?:<\|START_RESPONSE\|>)?"
    r"|<\|start\|>assistant(?:<\|channel\|>final)?<\|message\|>|<\|start_of_role\|>assistant<\|end_of_role\|>"
    r"|\[\|assistant\|\]|GPT4 Correct Assistant:|<extra_id_1>Assistant\n"
)
_ANSWER_WORDS = (
    r"### ?(?:Response|Assistant|Answer):\n?|\b(?:ASSISTANT|Assistant|Answer):|(?<=\n)(?:Bot|Chatbot|AI):"
)
_QUESTION_TOKENS = (
    r"<\|im_start\|>(?:user|system)\b|<\|(?:user|system)\|>|<start_of_turn>user\b|<\|turn>(?:user|system)\b|\[INST\]"
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

ANSWER = re.compile(f"{_ANSWER_TOKENS}|{_ANSWER_WORDS}")
"""The header of an answer."""
_QUESTION = re.compile(_QUESTION_TOKENS)
_START = re.compile(rf"\s*(?:(?P<bos>{_BOS})\s*)?(?P<header>{_ANSWER_TOKENS})?")
_RENDERED = re.compile(rf"\s*(?:{_BOS}|{_ANSWER_TOKENS}|{_QUESTION_TOKENS})")


def is_rendered(text: str) -> bool:
    """Whether a text begins with BOS or with a header of a known family, which no answer does."""
    return _RENDERED.match(text) is not None


def asks(text: str) -> bool:
    """Whether a text holds the header of a question in the special tokens of a known family."""
    return _QUESTION.search(text) is not None


def is_conversation(text: str) -> bool:
    """Whether a text holds a question in the special tokens of a known family, and an answer behind it."""
    question = _QUESTION.search(text)
    return question is not None and ANSWER.search(text, question.end()) is not None


def without_header(text: str) -> str:
    """An answer without the BOS and the header it begins with."""
    match = _START.match(text)
    return text[match.end() :] if match is not None and (match["bos"] or match["header"]) else text


def ends_with_header(text: str) -> bool:
    """Whether a rendered prompt ends where its answer begins."""
    last = None
    for match in ANSWER.finditer(text):
        last = match
    return last is not None and not text[last.end() :].strip()
