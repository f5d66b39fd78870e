"""What a model is asked: lines of text, rows with a question in some column, or the prompts of pairs.

Rows are read by the same reader as training data, so whatever trains can be asked. A prompt that comes twice
is asked once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo.data import turn_markers
from orpo.data.columns import Columns, NamedRow
from orpo.data.messages import BadRow
from orpo.data.preferences import row_tools, template_arguments
from orpo.data.questions import question
from orpo.data.rows import RawRow, read_rows
from orpo.data.source import read_texts
from orpo.data.text_rows import as_conversations
from orpo.data.verdicts import looks_at
from orpo.errors import ConfigError, DataError
from orpo.pairs import Message, PreferencePair
from orpo.settings.config import OrpoSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One thing to answer.

    Attributes:
        asked: Messages, the last of which is to be answered; or a text to continue as it is.
        source: `prompts.jsonl:118`.
        tools: Schemas of the tools the conversation may call.
        chat_template_kwargs: Arguments of the chat template for this conversation.
    """

    asked: list[Message] | str
    source: str
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def instruction(self) -> str:
        """The text that is answered: the last turn's."""
        return self.asked if isinstance(self.asked, str) else str(self.asked[-1]["content"])

    def key(self) -> str:
        """Equal for prompts that ask the same."""
        return json.dumps([self.asked, self.tools, self.chat_template_kwargs], sort_keys=True)


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts in the order of the data, each once.

    Attributes:
        prompts: At least one.
        notices: Lines to print.
    """

    prompts: Sequence[Prompt]
    notices: tuple[str, ...] = ()


def read_prompts(
    data: Any,
    settings: OrpoSettings,
    tokenizer: Any = None,
    *,
    split: str | None = None,
    system: str | None = None,
    limit: int | None = None,
) -> PromptSet:
    """Read prompts.

    Args:
        data: Texts; a file of lines (.txt); or anything `orpo` reads rows from. A row of a pair gives its
            prompt, any other row what stands in `prompt`, `instruction` (with `input`), `question` or
            `messages` (without an answer at their end).
        settings: How rows are read (`columns`, `dataset_config`, `text_rows`, ...).
        tokenizer: Of the model; None: of one that has a chat template, as at an endpoint.
        split: As for `read_rows`.
        system: A system turn for conversations that have none.
        limit: The first so many, at least 1.

    Raises:
        DataError: The data cannot be read, or holds no prompt.
        ConfigError: A system turn for a model without a chat template.
    """
    has_template = tokenizer is None or bool(settings.chat_template or tokenizer.chat_template)
    chats = has_template and settings.text_rows != "plain"
    if system and not chats:
        raise ConfigError("--system needs a chat template to write it; name one with --chat_template")
    found, notices = _read(data, settings, tokenizer, split)
    prompts = [_as_asked(prompt, chats, system) for prompt in found]
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.key(), prompt)
    once = list(first.values())
    if not once:
        raise DataError(f"{data if isinstance(data, str | Path) else 'the data'}: there is no prompt in it")
    if len(once) < len(prompts):
        notices.append(f"prompts that repeat an earlier one, and are asked once: {len(prompts) - len(once)}")
    if limit is not None and limit < len(once):
        notices.append(f"the first {limit} of {len(once)} prompts are asked (--limit)")
        once = once[:limit]
    return PromptSet(once, tuple(notices))


def prompt_of(pair: PreferencePair) -> Prompt:
    """What the chosen answer of a pair answers: the prompt and, where the sides part early, its own turns."""
    asked = pair.prompt if isinstance(pair.prompt, str) else [*pair.prompt, *pair.chosen[:-1]]
    arguments = pair.chat_template_kwargs
    return Prompt(asked=asked, source=pair.source, tools=pair.tools, chat_template_kwargs=arguments)


def _read(
    data: Any, settings: OrpoSettings, tokenizer: Any, split: str | None
) -> tuple[list[Prompt], list[str]]:
    if isinstance(data, str | Path) and Path(data).suffix.lower() == ".txt":
        return list(_lines(Path(data).expanduser())), []
    if isinstance(data, list | tuple) and data and all(isinstance(text, str) for text in data):
        return [Prompt(asked=_said(text), source=f"prompt:{n}") for n, text in enumerate(data)], []
    if not isinstance(data, str | Path | Sequence | Mapping):
        data = list(data)  # what can be read only once is looked at twice
    if _holds_pairs(data, settings, split):
        lenient = replace(settings, sft_rows="use", max_dropped=1.0)
        read = read_texts(data, lenient, tokenizer, split=split, name="prompts")
        pairs = read.pairs if tokenizer else _decided(read.pairs, settings)
        return [prompt_of(pair) for pair in pairs], [*read.notices, *read.counts.lines()]
    return _questions(data, settings, split)


def _decided(pairs: list[PreferencePair], settings: OrpoSettings) -> list[PreferencePair]:
    """Pairs that nothing was decided about, for a model at an endpoint: texts are what a user says."""
    return pairs if settings.text_rows == "plain" else as_conversations(pairs)


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield Prompt(asked=_said(line.strip()), source=f"{path.name}:{number}")


def _said(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _named(raw: RawRow, columns: Columns) -> NamedRow:
    if isinstance(raw.data, DataError):
        raise raw.data
    return columns.name(raw.data)


def _holds_pairs(data: Any, settings: OrpoSettings, split: str | None) -> bool:
    """Whether the first row that can be read has a chosen answer, or a format is named."""
    if settings.data_format is not None:
        return True
    columns = Columns(settings.columns)
    for raw in read_rows(data, split=split, config=settings.dataset_config):
        try:
            return _named(raw, columns).get("chosen") is not None
        except DataError:
            continue
    return False


def _questions(data: Any, settings: OrpoSettings, split: str | None) -> tuple[list[Prompt], list[str]]:
    columns = Columns(settings.columns)
    prompts, num_answered = [], 0
    skipped: list[str] = []
    reason = ""
    for raw in read_rows(data, split=split, config=settings.dataset_config):
        try:
            row = _named(raw, columns)
            turns = question(row)
            if turns and turns[-1]["role"] == "assistant":
                turns, num_answered = turns[:-1], num_answered + 1
            if not turns or not str(turns[-1]["content"]).strip():
                raise BadRow("prompt", "is empty", "leave the row out")
            tools, arguments = row_tools(row), template_arguments(row)
        except DataError as bad:
            if settings.on_bad_row == "stop":
                raise DataError(f"{raw.source}: {bad} or set on_bad_row: skip") from None
            skipped.append(raw.source)
            reason = reason or str(bad)
            continue
        prompts.append(Prompt(asked=turns, source=raw.source, tools=tools, chat_template_kwargs=arguments))
    columns.check_names(looks_at)
    notices = []
    if skipped and not prompts:
        raise DataError(f"{skipped[0]}: {reason} (none of {len(skipped)} rows has a prompt that can be read)")
    if skipped:
        notices.append(
            f"skipped {len(skipped)}: rows without a prompt that can be read (first: {skipped[0]})"
        )
    if num_answered:
        notices.append(
            f"conversations whose last turn is an answer, which the model is not shown: {num_answered}"
        )
    if columns.unused:
        notices.append(f"columns not used: {', '.join(columns.unused)}")
    return prompts, notices


def _as_asked(prompt: Prompt, chats: bool, system: str | None) -> Prompt:
    """The prompt as the model takes it: turns for one with a chat template, text for one without."""
    asked = prompt.asked
    if isinstance(asked, str):
        if system:
            raise ConfigError(
                f"--system: {prompt.source} is a text to continue; set --text_rows chat to ask it as a "
                "question"
            )
        return prompt
    if not chats:
        if len(asked) > 1:
            raise DataError(
                f"{prompt.source}: a conversation of {len(asked)} turns, and no chat template to write it "
                "with; name one with --chat_template"
            )
        return replace(prompt, asked=prompt.instruction)
    if any(turn_markers.is_rendered(str(turn["content"])) for turn in asked):
        raise DataError(
            f"{prompt.source}: the prompt holds the tokens of a chat template already; give it as the user "
            "said it, or set --text_rows plain"
        )
    if system and asked[0]["role"] != "system":
        asked = [{"role": "system", "content": system}, *asked]
    return replace(prompt, asked=asked)
