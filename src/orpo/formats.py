"""The shapes in which preference data is published, and how a row of each becomes its sides.

A format is recognised once per data set from the columns and their types; a row that then does not fit is malformed
(`BadRow`), it is never read as something else. Sides are either plain text (no chat template will be used) or
messages in the `role`/`content` form every chat template understands.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orpo.errors import DataError
from orpo.rows import Row

Message = dict[str, Any]
Turns = list[Message]


class BadRow(DataError):
    """A row that cannot be read as its format: which field, and what is wrong with it."""

    def __init__(self, field: str, problem: str, remedy: str = "mend the row"):
        super().__init__(f"'{field}' {problem}; {remedy}")
        self.reason = f"'{field}' {problem}"


class Sides(NamedTuple):
    """What a row says: the shared beginning and the two ways to go on; `rejected` None is an SFT-only row."""

    prompt: Turns | str
    chosen: Turns | str
    rejected: Turns | str | None


class Format(NamedTuple):
    """How the rows of one data set are read."""

    name: str
    reason: str
    """One line: what in the data spoke for it."""


# Names other projects use for our columns; `columns` in the recipe maps any further ones.
ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("query",),
    "chosen": ("completion", "chosen_response", "response_chosen"),
    "rejected": ("rejected_response", "rejected_messages", "rejected_responses", "response_rejected"),
    "instruction": ("question",),
    "system": ("system_prompt",),
    "answers": ("completions", "responses"),
    "scores": ("ratings",),
}

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
    "function_call": "function_call",
}  # fmt: skip
_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SAMPLE = 256


# ------------------------------------------------------------------------------------------------- values


def kind(value: object) -> str:
    """What a cell holds: null, text, message, messages, texts, conversations, records or other."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "message" if "role" in value or "from" in value else "other"
    if isinstance(value, Sequence) and value:
        kinds = {kind(item) for item in value}
        if all(isinstance(item, Mapping) for item in value):
            return "messages" if kinds == {"message"} else "records"
        if kinds == {"text"}:
            return "texts"
        if kinds == {"messages"}:
            return "conversations"
    return "other"


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise BadRow(field, "is missing" if value is None else f"is a {type(value).__name__}, not text")
    return value


def _without_nulls(value: Any) -> Any:
    """Arrow tables give every struct all keys of the column; the ones a row did not set come back as None."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _message(value: object, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(field, f"holds a {type(value).__name__} where a message was expected")
    message = _without_nulls(value)
    role = message.pop("role", None) or message.pop("from", None)
    message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    known = _ROLES.get(str(role).lower())
    if known is None:
        raise BadRow(field, f"has a turn of unknown role {role!r}", "use system, user, assistant or tool")
    if known == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(_json(content, field), field)}
    if message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(_json(message["tool_calls"], field), field)
    else:
        message.pop("tool_calls", None)
    content = "" if content is None and "tool_calls" in message else _content(content, field)
    return {"role": known, "content": content, **message}


def _content(content: object, field: str) -> str:
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        problem = "no content" if content is None else f"content that is not text ({type(content).__name__})"
        raise BadRow(field, f"has a turn with {problem}")
    return content


def _json(value: object, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise BadRow(field, "holds text that should be JSON") from None


def _tool_calls(calls: Any, field: str) -> list[dict[str, Any]]:
    """Tool calls in the form chat templates expect: arguments as an object, not as a JSON string."""
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(field, "has a tool call without a name")
        arguments = _json(function.get("arguments", {}), field)
        outer = dict(call) if "function" in call else {"type": "function"}
        result.append({**outer, "function": {**function, "arguments": arguments}})
    return result


def _turns(value: object, field: str) -> Turns:
    """A text is one assistant answer; a message is itself; a list is its messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [_message(value, field)]
    if isinstance(value, list | tuple):
        return [_message(item, field) for item in value]
    raise BadRow(field, "is missing" if value is None else f"is a {type(value).__name__}, not messages")


def _alternatives(value: object, field: str) -> list[Any]:
    """The answers of a `rejected` cell, which may hold several."""
    if kind(value) in ("texts", "conversations"):
        return list(value)  # type: ignore[call-overload,no-any-return]
    return [value]


def _with_system(row: Row, turns: Turns) -> Turns:
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRow("system", f"is a {type(system).__name__}, not text")
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _part(chosen: Turns, rejected: Turns) -> Sides:
    """Two whole conversations, cut where they part; each keeps at least its last turn."""
    shared = 0
    longest = min(len(chosen), len(rejected)) - 1
    while shared < longest and chosen[shared] == rejected[shared]:
        shared += 1
    return Sides(chosen[:shared], chosen[shared:], rejected[shared:])


def _pair_up(history: Turns, row: Row) -> list[Sides]:
    """History plus `chosen` and one or several `rejected`, whose turns follow it (or repeat it first)."""

    def follow(answer: object, field: str) -> Turns:
        turns = _turns(answer, field)
        if turns and turns[0]["role"] == "system" and history and history[0]["role"] == "system":
            return turns if len(turns) > 1 else history
        return turns if history and turns[: len(history)] == history else history + turns

    chosen = follow(row.get("chosen"), "chosen")
    rejected = row.get("rejected")
    if rejected is None:
        return [Sides(chosen[:-1], chosen[-1:], None)]
    return [_part(chosen, follow(answer, "rejected")) for answer in _alternatives(rejected, "rejected")]


# ------------------------------------------------------------------------------------------------- formats


def _read_standard(row: Row) -> list[Sides]:
    prompt, chosen = _text(row, "prompt"), _text(row, "chosen")
    if row.get("rejected") is None:
        return [Sides(prompt, chosen, None)]
    answers = _alternatives(row["rejected"], "rejected")
    return [Sides(prompt, chosen, _text({"rejected": answer}, "rejected")) for answer in answers]


def _read_standard_repeated(row: Row) -> list[Sides]:
    result = []
    for prompt, chosen, rejected in _read_standard(row):
        assert isinstance(prompt, str)
        for field, side in (("chosen", chosen), ("rejected", rejected)):
            if side is not None and not side.startswith(prompt):  # type: ignore[union-attr]
                raise BadRow(field, "does not begin with the prompt, as the other rows do")
        cut = None if rejected is None else rejected[len(prompt) :]
        result.append(Sides(prompt, chosen[len(prompt) :], cut))
    return result


def _read_standard_implicit(row: Row) -> list[Sides]:
    chosen = _text(row, "chosen")
    if row.get("rejected") is None:
        raise BadRow(
            "rejected", "is missing, so that nothing tells prompt and answer apart", "add a prompt column"
        )
    result = []
    for answer in _alternatives(row["rejected"], "rejected"):
        rejected = _text({"rejected": answer}, "rejected")
        cut = common_words(chosen, rejected)
        result.append(Sides(chosen[:cut], chosen[cut:], rejected[cut:]))
    return result


# Where a rendered prompt ends: the headers after which models answer.
_HEADER = re.compile(
    r"<\|im_start\|>assistant\n|<\|assistant\|>\n?|<start_of_turn>model\n|\[/INST\]"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n|### (?:Response|Assistant|Answer):\n?"
    r"|\b(?:ASSISTANT|Assistant|Answer):"
)
_UNBREAKABLE = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


def common_words(one: str, other: str) -> int:
    """Length of the common beginning of two texts that have no prompt of their own, cut where no word is split.

    Where the beginning holds the header of an answer (`<|assistant|>`, `[/INST]`, `Answer:`), it ends with the last
    one; else at the last border between words. Blanks go with what follows, line ends with what precedes.
    """
    limit = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    headers = [match.end() for match in _HEADER.finditer(one, 0, limit)]
    if headers:
        return headers[-1]
    inside = {
        position
        for text in (one, other)
        for match in _UNBREAKABLE.finditer(text, max(0, limit - 64))
        for position in range(match.start() + 1, match.end())
    }

    def border(text: str, position: int) -> bool:
        if position in inside or text[position - 1] == " ":
            return False
        after = text[position : position + 1]
        return (
            not (text[position - 1].isalnum() and (after.isalnum() or after in ("_", "'", "’")))
            and after != "\n"
        )

    while limit > 0 and not (border(one, limit) and border(other, limit)):
        limit -= 1
    return limit


def _read_conversational(row: Row) -> list[Sides]:
    prompt = row.get("prompt")
    if prompt is None:
        raise BadRow("prompt", "is missing")
    if isinstance(prompt, str):
        first = row.get("chosen")
        whole = kind(first) == "messages" and _turns(first, "chosen")[0]["role"] != "assistant"
        prompt_turns = [] if whole else [{"role": "user", "content": prompt}]
    else:
        prompt_turns = _turns(prompt, "prompt")
    return [_add_system(row, sides) for sides in _pair_up(prompt_turns, row)]


def _add_system(row: Row, sides: Sides) -> Sides:
    prompt = sides.prompt
    assert not isinstance(prompt, str)
    return sides._replace(prompt=_with_system(row, prompt))


def _read_conversational_implicit(row: Row) -> list[Sides]:
    return [_add_system(row, sides) for sides in _pair_up([], row)]


def _transcript(text: str, field: str) -> Turns:
    pieces = _HH_TURN.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise BadRow(field, "is no transcript: it does not begin with 'Human:'", "set data_format: standard")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _read_hh(row: Row) -> list[Sides]:
    def whole(field: str, answer: str) -> Turns:
        if row.get("prompt") is None or answer.startswith(_text(row, "prompt")):
            return _transcript(answer, field)
        before = _transcript(_text(row, "prompt"), "prompt")
        if before[-1] == {"role": "assistant", "content": ""}:
            before.pop()
        return [*before, {"role": "assistant", "content": answer.strip()}]

    chosen = whole("chosen", _text(row, "chosen"))
    if row.get("rejected") is None:
        return [Sides(chosen[:-1], chosen[-1:], None)]
    answers = _alternatives(row["rejected"], "rejected")
    return [_part(chosen, whole("rejected", _text({"rejected": answer}, "rejected"))) for answer in answers]


def _instruction(row: Row) -> Turns:
    text = _text(row, "instruction" if row.get("instruction") is not None else "prompt")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRow("input", f"is a {type(extra).__name__}, not text")
    earlier: Turns = []
    for exchange in row.get("history") or []:
        if kind(exchange) != "texts" or len(exchange) != 2:
            raise BadRow("history", "is not a list of [question, answer]")
        earlier += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    asked = f"{text}\n\n{extra}" if extra else text
    return _with_system(row, [*earlier, {"role": "user", "content": asked}])


def _read_instruction(row: Row) -> list[Sides]:
    output = row.get("output")
    if row.get("chosen") is None and kind(output) == "texts":
        best, *others = output  # type: ignore[misc]
        row = {**row, "chosen": best, "rejected": others or None}
    elif row.get("chosen") is None and row.get("rejected") is None and isinstance(output, str):
        row = {**row, "chosen": output}
    if kind(row.get("chosen")) == "text" and row.get("rejected") is not None:
        for answer in _alternatives(row["rejected"], "rejected"):
            _text({"rejected": answer}, "rejected")
    return _pair_up(_instruction(row), row)


def _read_messages(row: Row) -> list[Sides]:
    turns = _turns(row.get("messages", row.get("conversations")), "messages")
    history = _with_system(row, turns)
    if row.get("chosen") is not None:
        return _pair_up(history, row)
    if not history:
        raise BadRow("messages", "is empty")
    # Without a chosen column the conversation holds the chosen answer as its last turn.
    return _pair_up(history[:-1], {**row, "chosen": [history[-1]]})


def _answer_text(answer: object) -> object:
    if isinstance(answer, Mapping) and kind(answer) != "message":
        for field in ("response", "content", "text", "completion", "output"):
            if isinstance(answer.get(field), str):
                return answer[field]
        raise BadRow("answers", "has an entry without a response")
    return answer


def _answer_score(answer: object) -> float | None:
    if isinstance(answer, Mapping):
        for field in ("score", "overall_score", "rating", "reward"):
            if isinstance(answer.get(field), int | float):
                return float(answer[field])
        if isinstance(answer.get("rank"), int | float):
            return -float(answer["rank"])
    return None


def _read_ranked(row: Row) -> list[Sides]:
    """The best answer against each that is strictly worse; a list without scores is ranked best first."""
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise BadRow("answers", "is missing or empty")
    scores: list[Any] = (
        row["scores"] if row.get("scores") is not None else [_answer_score(one) for one in answers]
    )
    if all(score is None for score in scores):
        scores = [-float(place) for place in range(len(answers))]
    if len(scores) != len(answers) or not all(isinstance(score, int | float) for score in scores):
        raise BadRow("scores", "does not give one number for each answer")
    texts = [_answer_text(answer) for answer in answers]
    best = max(range(len(scores)), key=lambda place: scores[place])
    worse = sorted((i for i in range(len(scores)) if scores[i] < scores[best]), key=lambda i: -scores[i])
    if isinstance(row.get("prompt"), list):
        history = _with_system(row, _turns(row["prompt"], "prompt"))
    else:
        history = _instruction(row)
    if not worse:
        return _pair_up(history, {"chosen": texts[best], "rejected": texts[best]})
    return [
        sides for i in worse for sides in _pair_up(history, {"chosen": texts[best], "rejected": texts[i]})
    ]


READERS: dict[str, Callable[[Row], list[Sides]]] = {
    "standard": _read_standard,
    "standard_repeated": _read_standard_repeated,
    "standard_implicit": _read_standard_implicit,
    "conversational": _read_conversational,
    "conversational_implicit": _read_conversational_implicit,
    "hh": _read_hh,
    "instruction": _read_instruction,
    "sharegpt": _read_messages,
    "messages": _read_messages,
    "ranked": _read_ranked,
}

_REASONS = {
    "standard": "prompt, chosen and rejected are texts: used as they are, without a chat template",
    "standard_repeated": "prompt, chosen and rejected are texts and both sides begin with the prompt: no chat template",
    "standard_implicit": "chosen and rejected are texts without a prompt column: their common beginning is the prompt",
    "conversational": "a prompt column, chosen and rejected are messages",
    "conversational_implicit": "chosen and rejected are whole conversations: the turns they share are the prompt",
    "hh": "texts are transcripts with 'Human:' and 'Assistant:'",
    "instruction": "an instruction (or a prompt with a system column) and answers as texts: made user and assistant turns",
    "sharegpt": "a conversation of from/value turns; chosen and rejected answer it",
    "messages": "a list of messages; chosen and rejected answer it (without chosen, its last turn is the chosen one)",
    "ranked": "several answers to a prompt, scored or best first: the best against each worse one",
}


# ------------------------------------------------------------------------------------------------- detection


def rename(row: Row, columns: Mapping[str, str] | None) -> Row:
    """The row under our column names.

    Args:
        row: As read.
        columns: Our name -> the data's name. `role` and `content` rename the keys of messages.
    """
    row = dict(row)
    for ours, theirs in (columns or {}).items():
        if ours not in ("role", "content") and theirs in row:
            row[ours] = row.pop(theirs)
    for ours, others in ALIASES.items():
        if ours not in row:
            found = next((name for name in others if name in row), None)
            if found is not None:
                row[ours] = row.pop(found)
    keys = {theirs: ours for ours, theirs in (columns or {}).items() if ours in ("role", "content")}
    if keys:
        row = {name: _rename_keys(value, keys) for name, value in row.items()}
    return row


def _rename_keys(value: Any, keys: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {keys.get(name, name): item for name, item in value.items()}
    if isinstance(value, list):
        return [_rename_keys(item, keys) for item in value]
    return value


def recognise(row: Row) -> str | None:
    """The format one row speaks for, or None."""
    chosen, rejected, prompt = (kind(row.get(name)) for name in ("chosen", "rejected", "prompt"))
    if row.get("messages") is not None or row.get("conversations") is not None:
        lists = chosen == "messages" and rejected in ("messages", "conversations", "null")
        if not lists or _turns_start(row["chosen"]) == "assistant" and prompt == "null":
            return _recognise_history(row)
    if chosen in ("messages", "message") or rejected in ("messages", "message", "conversations"):
        return "conversational_implicit" if prompt == "null" else "conversational"
    if kind(row.get("answers")) in ("texts", "records", "messages"):
        return "ranked"
    return _recognise_texts(row, chosen, prompt)


def _turns_start(value: Any) -> str | None:
    first = value[0]
    return _ROLES.get(str(first.get("role") or first.get("from")).lower())


def _recognise_history(row: Row) -> str | None:
    turns = row.get("messages", row.get("conversations"))
    if kind(turns) != "messages":
        return None
    return "sharegpt" if "from" in turns[0] else "messages"  # type: ignore[index]


def _recognise_texts(row: Row, chosen: str, prompt: str) -> str | None:
    if kind(row.get("instruction")) == "text":
        return "instruction" if chosen == "text" or kind(row.get("output")) in ("text", "texts") else None
    if chosen != "text":
        return None
    if prompt == "messages":
        return "conversational"
    first = row["prompt"] if prompt == "text" else row["chosen"]
    if _HH_TURN.match(first) and "Assistant:" in first:
        return "hh"
    if prompt == "null":
        return "standard_implicit"
    if prompt != "text":
        return None
    if row.get("system") is not None:
        return "instruction"
    sides = [side for side in (row["chosen"], row.get("rejected")) if isinstance(side, str)]
    repeated = len(row["prompt"]) > 0 and all(side.startswith(row["prompt"]) for side in sides)
    return "standard_repeated" if repeated and len(sides) == 2 else "standard"


def detect(rows: Iterable[Row]) -> Format:
    """The format most of the first rows speak for.

    Args:
        rows: Renamed rows; at most 256 are looked at.

    Raises:
        DataError: No row is of a known format.
    """
    votes: Counter[str] = Counter()
    columns: list[str] = []
    seen = 0
    for row in rows:
        seen += 1
        columns = columns or sorted(row)
        name = recognise(row)
        if name is not None:
            votes[name] += 1
        if seen == _SAMPLE:
            break
    if not votes:
        if not seen:
            raise DataError("the data set is empty")
        raise DataError(
            f"cannot tell the format from the columns {', '.join(columns)}; map them with columns (for instance "
            f"chosen: {columns[0] if columns else 'better'}) or set data_format to one of {', '.join(READERS)}"
        )
    # A few answers that happen to repeat their prompt must not change how the others are read.
    if votes["standard_repeated"] and votes["standard"]:
        votes["standard"] += votes.pop("standard_repeated")
    name, count = votes.most_common(1)[0]
    told = _REASONS[name] + ("" if count == seen else f" ({count} of the first {seen} rows)")
    return Format(name, told)
