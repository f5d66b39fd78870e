"""A Modelfile for Ollama, whose templates are written in another language than chat templates.

A chat template is a program, so it is asked: what it writes around the turns of a few conversations becomes a
template of Ollama's, which is kept only if it writes the very prompts of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo.data.chat_template import ChatTemplate, common, settled, try_rendering
from orpo.pairs import Message

_U, _A, _V, _S = "ORPO user marker", "ORPO answer marker", "ORPO second marker", "ORPO system marker"


@dataclass(frozen=True, slots=True)
class Turns:
    """What stands around turns.

    Attributes:
        opening: In front of a conversation without a system turn: a system prompt that the template adds.
        around: By role, the text in front of a turn and behind it.
        asks: Behind the last turn, for an answer.
    """

    opening: str
    around: dict[str, tuple[str, str]]
    asks: str

    def render(self, turns: Sequence[Message]) -> str | None:
        """A conversation as Ollama will write it, BOS left out; None where a role has no text."""
        if any(turn["role"] not in self.around for turn in turns):
            return None
        parts = [self.opening] if all(turn["role"] != "system" for turn in turns) else []
        for turn in turns:
            before, behind = self.around[turn["role"]]
            parts.append(before + str(turn["content"]) + behind)
        return "".join(parts) + self.asks


def turns_of(tokenizer: Any, template: ChatTemplate, conversations: Sequence[list[Message]]) -> Turns | None:
    """Find out what a template writes around turns; None where it does not write turn by turn.

    Args:
        tokenizer: Of the run.
        template: Of the run.
        conversations: What is found must write each of them as the template does.
    """
    user: Message = {"role": "user", "content": _U}
    answer: Message = {"role": "assistant", "content": _A}
    again: Message = {"role": "user", "content": _V}
    system: Message = {"role": "system", "content": _S}
    texts = [
        _without_bos(tokenizer, try_rendering(tokenizer, template, turns, ask=ask))
        for turns, ask in (
            ([user], False),
            ([user], True),
            ([user, answer, again], False),
            ([system, user], False),
        )
    ]
    one, asked, three, with_system = texts
    if one is None or asked is None or three is None:
        return None
    front, _, ending = one.partition(_U)
    between, _, second = three.partition(_U)[2].partition(_A)
    behind_answer = second.partition(_V)[0]
    # Some templates close the conversation behind its last turn, or write half of a tag in both.
    behind_user = between[: settled(ending, between)]
    asks = asked.partition(_U)[2]
    if not asks.startswith(behind_user):
        return None
    before_user = _common_end(front, behind_answer)
    around = {
        "user": (before_user, behind_user),
        "assistant": (between[len(behind_user) :], behind_answer[: len(behind_answer) - len(before_user)]),
    }
    if with_system is not None and with_system.count(_S) == 1:
        start, _, rest = with_system.partition(_S)
        behind = rest.partition(_U)[0]
        if behind.endswith(before_user):
            around["system"] = (start, behind[: len(behind) - len(before_user)])
    found = Turns(front[: len(front) - len(before_user)], around, asks[len(behind_user) :])
    for turns in conversations:
        plain = [{**turn, "content": str(turn["content"]).strip()} for turn in turns]
        wanted = _without_bos(tokenizer, try_rendering(tokenizer, template, plain))
        if found.render(plain) != wanted:
            return None
    return found


def modelfile(gguf_name: str, turns: Turns | None, stops: Sequence[str]) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: Of the file next to it.
        turns: As found; None: without a template.
        stops: Texts that end an answer.
    """
    lines = [f"FROM ./{gguf_name}"]
    if turns is not None:
        lines.append(f'TEMPLATE """{_go_template(turns)}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _go_template(turns: Turns) -> str:
    """The same in the language of Go's text/template."""
    branches = " else ".join(
        f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(behind)}{{{{'
        for role, (before, behind) in turns.around.items()
    )
    opening = f"{{{{ if not .System }}}}{_literal(turns.opening)}{{{{ end }}}}" if turns.opening else ""
    return f"{opening}{{{{ range .Messages }}}}{{{{ {branches} end }}}}{{{{ end }}}}{_literal(turns.asks)}"


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _without_bos(tokenizer: Any, text: str | None) -> str | None:
    """Ollama puts BOS in front of a prompt by itself, where the GGUF file says so."""
    return text if text is None or not tokenizer.bos_token else text.removeprefix(tokenizer.bos_token)


def _common_end(one: str, other: str) -> str:
    length = common(one[::-1], other[::-1])
    return one[len(one) - length :]
