# ruff: noqa: RUF001 - the tokens are written as their models write them
"""The chat templates that the installed `trl` ships, each tried with six kinds of rows.

`python tests/real_templates.py` prints the table of docs/templates.md. The oracle knows nothing of our code:
transformers' `apply_chat_template` with the template as it would be saved shows the prompt of inference, and
the answer is looked for in the decoded tokens.
"""

import functools
import json
import re
from importlib.resources import files

import jinja2
import transformers
from tiny_tokenizer import tiny_tokenizer
from turns import bot, system, user

from orpo.data.counts import RowCounts
from orpo.data.tokenize import PairTokenizer
from orpo.errors import OrpoError
from orpo.pairs import PreferencePair

FOLDER = files("trl") / "chat_templates"
TEMPLATES = sorted(
    path.name.removesuffix(".jinja") for path in FOLDER.iterdir() if path.name.endswith(".jinja")
)

# Families: beginning of the name, BOS, EOS, further tokens that their generation_config stops at.
FAMILIES = (
    ("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", []),
    ("deepseek", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", []),
    ("diffusion_gemma", "<bos>", "<eos>", ["<turn|>", "<|tool_response>"]),
    ("gemma4", "<bos>", "<eos>", ["<turn|>", "<|tool_response>"]),
    ("gemma", "<bos>", "<eos>", ["<end_of_turn>"]),
    ("glm", None, "<|endoftext|>", ["<|user|>", "<|observation|>"]),
    ("gptoss", None, "<|return|>", ["<|call|>"]),
    ("idefics3", "<|begin_of_text|>", "<|end_of_text|>", ["<end_of_utterance>"]),
    ("smolvlm", None, "<end_of_utterance>", []),
    ("lfm2", "<|startoftext|>", "<|im_end|>", []),
    ("llama3", "<|begin_of_text|>", "<|eot_id|>", ["<|end_of_text|>", "<|eom_id|>"]),
    ("llava", None, "</s>", []),
    ("muse", "<|begin_of_text|>", "<|eot|>", []),
    ("phi3", None, "<|endoftext|>", ["<|end|>"]),
    ("", None, "<|im_end|>", []),
)
_SPECIAL = re.compile(r"<\|[\w/]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|</?think>|<\|\w+>|<\w+\|>")

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


def call(city):
    function = {"name": "get_weather", "arguments": {"city": city}}
    return {**bot(""), "tool_calls": [{"type": "function", "id": "call00001", "function": function}]}


def reasoned(why, said):
    return {**bot(said), "reasoning_content": why}


RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "RAIN"}
MULTI = [user("QONE"), bot("OLD"), user("QTWO")]
CASES = {
    "single": PreferencePair([user("QONE")], [bot("FINE yes")], [bot("POOR no")]),
    "multi-turn": PreferencePair(MULTI, [bot("FINE yes")], [bot("POOR no")]),
    "system": PreferencePair([system("SYS"), *MULTI], [bot("FINE yes")], [bot("POOR no")]),
    "tools": PreferencePair(
        [user("QONE"), call("Oslo"), RESULT], [bot("FINE yes")], [bot("POOR no")], tools=[TOOL]
    ),
    "tool call": PreferencePair([user("QONE")], [call("Oslo")], [call("Rome")], tools=[TOOL]),
    "reasoning": PreferencePair(
        [user("QONE")], [reasoned("WHYGOOD", "FINE yes")], [reasoned("WHYBAD", "POOR no")]
    ),
    "reasoning in text": PreferencePair(
        [user("QONE")],
        [bot("<think>\nWHYGOOD\n</think>\n\nFINE yes")],
        [bot("<think>\nWHYBAD\n</think>\n\nPOOR no")],
    ),
}


@functools.cache
def real_tokenizer(name):
    """A tokenizer with the template and its special tokens, and the ids its generation_config would list."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    _, bos, eos, stops = next(family for family in FAMILIES if name.startswith(family[0]))
    own = tiny_tokenizer(None)
    tokens = dict.fromkeys([*_SPECIAL.findall(text), *stops, *filter(None, (bos, eos))])
    own.add_tokens(sorted(tokens), special_tokens=True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own.backend_tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>"
    )
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = text
    return tokenizer, tokenizer.convert_tokens_to_ids(stops)


@functools.cache
def encoder_of(name):
    tokenizer, stops = real_tokenizer(name)
    return PairTokenizer(tokenizer, max_length=None, stop_tokens=stops)


@functools.cache
def outcome(name, case):
    """What became of a row, and every sentence about it: `held`, `elsewhere`, `incomplete`, `refused`, or
    `wrong: ...` where the tokens are not what was promised."""
    tokenizer, stops = real_tokenizer(name)
    encoder, pair = encoder_of(name), CASES[case]
    encoder.counts = counts = RowCounts()
    try:
        (tokens,) = encoder.encode([pair])
    except OrpoError as error:
        return "no template", [str(error)]
    said = [*counts.dropped, *counts.lost, *counts.changed]
    if tokens is None:
        return "refused", said
    faults = [*_ends(tokenizer, stops, tokens), *_words(tokenizer, tokens, pair)]
    shown = _shown(tokenizer, pair, encoder.renderer.template.saved)
    if tokens.prompt != shown and not any(line.startswith("inference starts behind") for line in said):
        faults.append("the prompt is not what inference shows")
    if counts.lost:
        return "incomplete", said
    if any("does not write the tool" in line for line in said):
        return "not written", said
    if faults:
        return "wrong: " + "; ".join(faults), said
    return ("held" if tokens.prompt == shown else "elsewhere"), said


def _shown(tokenizer, pair, template):
    """The prompt of inference, in tokens. Some templates want the arguments of a call as text, those of
    vision models contents in parts."""
    prompts = [json.loads(json.dumps(pair.prompt)) for _ in range(3)]
    for one in [one for turn in prompts[1] for one in turn.get("tool_calls", ())]:
        one["function"]["arguments"] = json.dumps(one["function"]["arguments"])
    for turn in prompts[2]:
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    for prompt in prompts:
        try:
            text = tokenizer.apply_chat_template(
                prompt, tools=pair.tools, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except (TypeError, jinja2.exceptions.UndefinedError):
            continue
        if "QONE" in text:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
    raise AssertionError("the template refuses the prompt")


def _ends(tokenizer, stops, tokens):
    ends = {tokenizer.eos_token_id, *stops}
    for side in (tokens.chosen, tokens.rejected):
        if side[-1] not in ends or ends & set(side[:-1]):
            yield f"one end token expected: {tokenizer.decode(side)!r}"
    bos = tokenizer.bos_token_id
    if bos is not None and (tokens.prompt[0] != bos or [*tokens.prompt, *tokens.chosen].count(bos) != 1):
        yield "BOS is not there once"


def _words(tokenizer, tokens, pair):
    for side, (answer,) in ((tokens.chosen, pair.chosen), (tokens.rejected, pair.rejected)):
        text = tokenizer.decode(side)
        words = [*answer["content"].split(), *answer.get("reasoning_content", "").split()]
        words = [word for word in words if "think" not in word]
        words += [one["function"]["arguments"]["city"] for one in answer.get("tool_calls", ())]
        if any(text.count(word) != 1 for word in words):
            yield f"{words} expected once: {text!r}"
        if "QONE" in text or "QTWO" in text:
            yield f"a question in the answer: {text!r}"


def table():
    """The table of docs/templates.md, and how many templates hold in each column."""
    lines = ["| template | " + " | ".join(CASES) + " |", "|---" * (len(CASES) + 1) + "|"]
    held = dict.fromkeys(CASES, 0)
    for name in TEMPLATES:
        cells = [outcome(name, case)[0] for case in CASES]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        for case, cell in zip(CASES, cells, strict=True):
            held[case] += cell == "held"
    return [*lines, f"| held, of {len(TEMPLATES)} | " + " | ".join(map(str, held.values())) + " |"]


if __name__ == "__main__":
    print("\n".join(table()))
