"""What a template shows when asked is what trains; what it does not write is counted; where a turn ends."""

import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import tokenizers
import transformers
from tiny_tokenizer import SHAPES, tiny_tokenizer
from turns import bot, system, user

from orpo.data.counts import RowCounts
from orpo.data.dataset import tokenize_pairs
from orpo.data.templates import prepare_template
from orpo.data.tokenize import PairTokenizer
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair

CHATML = SHAPES["chatml"][2]
TOOL = {"type": "function", "function": {"name": "add_numbers", "description": "", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add_numbers", "arguments": {"a": 1}}}
HEADER = "<|im_start|>assistant\n"
LOSES = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1]"


def with_template(text, shape="chatml", tokens=()):
    tokenizer = tiny_tokenizer(shape)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = text
    return tokenizer


def pair_of(prompt, chosen="A", rejected="B", **known):
    sides = [[one if isinstance(one, dict) else bot(one)] for one in (chosen, rejected)]
    return PreferencePair(prompt, *sides, source="p.jsonl:1", **known)


def encoded(tokenizer, pair, **options):
    encoder = PairTokenizer(tokenizer, max_length=None, **options)
    (tokens,) = encoder.encode([pair])
    return tokens, encoder


def texts(tokenizer, tokens):
    return [tokenizer.decode(part) for part in (tokens.prompt, tokens.chosen, tokens.rejected)]


def shown(tokenizer, turns, template, **more):
    """The prompt of inference, by transformers alone."""
    return tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, return_dict=False, **more
    )


def asked_with(written, answer="m.content"):
    """ChatML that writes something behind the header when asked."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + " + answer + " + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + written + "' }}{% endif %}"
    )


# --------------------------------------------------------------------------------- what inference shows


@pytest.mark.parametrize("written", ["<think></think>", "<think>\\n\\n</think>\\n\\n", "Let me think.\\n"])
def test_what_is_complete_when_asked_is_part_of_the_prompt(written):
    tokenizer = with_template(asked_with(written))
    tokens, encoder = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R")]))
    prompt, chosen, _ = texts(tokenizer, tokens)
    assert prompt.endswith(HEADER + written.replace("\\n", "\n")) and chosen == "A<|im_end|>"
    assert tokens.prompt == shown(tokenizer, [user("Q"), bot("O"), user("R")], tokenizer.chat_template)
    assert not any(note.startswith("inference") for note in encoder.counts.changed)


def test_the_tag_of_a_header_is_no_block_that_an_answer_must_close():
    template = SHAPES["gemma"][2].replace(
        "'<start_of_turn>model\\n'", "'<start_of_turn>model\\n<think></think>'"
    )
    tokenizer = with_template(template, "gemma")
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")]))
    prompt, chosen, _ = texts(tokenizer, tokens)
    assert prompt.endswith("<start_of_turn>model\n<think></think>") and chosen == "A<end_of_turn>"
    assert not encoder.counts.changed


def closed_between(header="<|im_start|>assistant\\n", between="<|endoftext|>"):
    """ChatML whose turns are closed only where another turn follows, as when they are answered."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
        "{% if not loop.last %}{{ '" + between + "' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + header + "' }}{% endif %}"
    )


@pytest.mark.parametrize("block", ["", "<think></think>"])
@pytest.mark.parametrize("between", ["<|endoftext|>", "<|endoftext|>\\n", "\\n---\\n"])
@pytest.mark.parametrize("earlier", [[], [user("Q"), bot("O")]])
def test_the_header_of_an_answer_is_in_no_answer_where_only_an_answered_question_is_closed(
    earlier, between, block
):
    tokenizer = with_template(closed_between("<|im_start|>assistant\\n" + block, between))
    tokens, encoder = encoded(tokenizer, pair_of([*earlier, user("R")]))
    assert texts(tokenizer, tokens)[1:] == ["A<|im_end|>", "B<|im_end|>"]
    assert tokens.prompt == shown(tokenizer, [*earlier, user("R")], tokenizer.chat_template)
    assert not encoder.counts.changed


def test_a_header_that_only_its_answer_repeats_is_refused():
    between = "<|im_start|><|endoftext|>"
    tokens, encoder = encoded(with_template(closed_between(between=between)), pair_of([user("R")]))
    assert tokens is None
    assert [*encoder.counts.dropped] == [
        "no boundary: the chat template writes the prompt differently once it is answered; "
        "give another chat_template"
    ]


def test_an_empty_block_written_otherwise_before_an_answer_is_not_written_twice():
    answer = "('<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' else '') + m.content"
    tokenizer = with_template(asked_with("<think></think>\\n", answer))
    prompt, chosen, _ = texts(tokenizer, encoded(tokenizer, pair_of([user("Q")]))[0])
    assert prompt.endswith(HEADER + "<think></think>\n") and chosen == "A<|im_end|>"


def test_a_tag_in_front_of_an_answer_follows_the_empty_block_of_the_prompt():
    """As Cohere's, whose answers stand between tags of their own."""
    answer = "('<start_of_turn>' if m.role == 'assistant' else '') + m.content"
    tokenizer = with_template(asked_with("<think></think>", answer))
    prompt, chosen, _ = texts(tokenizer, encoded(tokenizer, pair_of([user("Q")]))[0])
    assert prompt.endswith(HEADER + "<think></think>") and chosen == "<start_of_turn>A<|im_end|>"


def test_an_answer_with_a_block_of_its_own_does_not_follow_an_empty_one():
    template = asked_with("<think></think>").replace(
        "assistant\\n<think></think>'", "assistant\\n' + ('' if enable_thinking else '<think></think>')"
    )
    tokenizer = with_template(template)
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], "<think>why</think>A", "<think>no</think>B"))
    prompt, chosen, _ = texts(tokenizer, tokens)
    assert prompt.endswith(HEADER) and chosen == "<think>why</think>A<|im_end|>"
    ((note, _),) = encoder.counts.changed.items()
    assert note.startswith(
        "inference starts behind '<think></think>', but an answer opens a block of its own"
    )
    assert "set chat_template_kwargs: {enable_thinking: true}" in note
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    again, encoder = encoded(tokenizer, pair_of([user("Q")], "<think>why</think>A", "B"), **options)
    assert again.prompt == tokens.prompt and not encoder.counts.changed


@pytest.mark.parametrize("thought", ["<think>\nwhy</think>\nA", "<think>why</think>\nA", "why</think>\nA"])
def test_an_answer_that_closes_the_block_trains_behind_its_opening(thought):
    tokenizer = with_template(asked_with("<think>\\n"))
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], thought, "<think>\nno</think>\nB"))
    assert texts(tokenizer, tokens) == [
        f"<|im_start|>user\nQ<|im_end|>\n{HEADER}<think>\n",
        "why</think>\nA<|im_end|>",
        "no</think>\nB<|im_end|>",
    ]
    assert not encoder.counts.changed


def test_one_answer_that_leaves_the_block_open_cuts_the_prompt_of_both_and_says_the_way_out():
    template = asked_with("<think>\\n").replace(
        "{% if add_g", "{% if thinking is not defined or thinking %}{% endif %}{% if add_g"
    )
    template = template.replace(
        "assistant\\n<think>\\n'", "assistant\\n' + ('<think>\\n' if t else '')"
    ).replace(
        "{% if thinking is not defined or thinking %}{% endif %}",
        "{% set t = thinking is not defined or thinking %}",
    )
    tokenizer = with_template(template)
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], "<think>\nwhy</think>A", "B"))
    assert texts(tokenizer, tokens)[1:] == ["<think>\nwhy</think>A<|im_end|>", "B<|im_end|>"]
    assert list(encoder.counts.changed) == [
        "inference starts behind '<think>', which an answer does not close: the prompt ends before it; "
        "close it in the answers, set chat_template_kwargs: {thinking: false}, or give another chat_template"
    ]


def test_reasoning_that_the_template_cuts_is_written_behind_the_block_it_opens_when_asked():
    """As R1-Distill."""
    tokenizer = with_template(asked_with("<think>\\n", "m.content.split('</think>')[-1]"))
    tokens, encoder = encoded(
        tokenizer, pair_of([user("Q")], "<think>\nwhy\n</think>\n\nA", "<think>no</think>B \n")
    )
    assert texts(tokenizer, tokens)[1:] == ["why\n</think>\n\nA<|im_end|>", "no</think>B \n<|im_end|>"]
    assert tokens.prompt == shown(tokenizer, [user("Q")], tokenizer.chat_template)
    assert not encoder.counts.lost
    assert list(encoder.counts.changed) == [
        "the chat template cuts <think> out of an answer: written behind the prompt's <think>"
    ]


def test_what_only_one_answer_writes_otherwise_than_inference_ends_the_prompt_of_both():
    """As Qwen3.5 without thinking: an empty block when asked, the answer's own block once it has one."""
    answer = (
        "(('<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n') if m.role == 'assistant' "
        "else '') + m.content"
    )
    tokenizer = with_template(asked_with("<think>\\n\\n</think>\\n\\n", answer))
    thinks = {**bot("A"), "reasoning_content": "why"}
    for sides in ((thinks, "B"), ("B", thinks)):
        tokens, encoder = encoded(tokenizer, pair_of([user("Q")], *sides))
        assert tokenizer.decode(tokens.prompt).endswith(HEADER)
        assert sorted(texts(tokenizer, tokens)[1:]) == [
            "<think>\n\n</think>\n\nB<|im_end|>",
            "<think>\nwhy\n</think>\n\nA<|im_end|>",
        ]
        assert sum(note.startswith("inference starts behind") for note in encoder.counts.changed) == 1


def test_reasoning_that_is_cut_is_lost_where_the_other_answer_has_none():
    tokenizer = with_template(asked_with("<think>\\n", "m.content.split('</think>')[-1]"))
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], "<think>why</think>A", "B"))
    assert texts(tokenizer, tokens)[1:] == ["A<|im_end|>", "B<|im_end|>"]
    assert len(encoder.counts.lost) == 1
    assert all(note.startswith("inference starts behind '<think>'") for note in encoder.counts.changed)


def test_a_prompt_that_ends_with_an_answer_is_counted():
    _, encoder = encoded(tiny_tokenizer("chatml"), pair_of([user("Q"), bot("O")]))
    (note,) = encoder.counts.changed
    assert note == "the prompt ends with an assistant turn: the answer is a turn of its own behind it"


# --------------------------------------------------------------------------------- arguments


THINKS = asked_with("' + ('' if enable_thinking else '<think></think>') + '")


def test_the_arguments_of_a_run_are_written_into_the_template_that_is_saved():
    tokenizer = with_template(THINKS)
    template = prepare_template(tokenizer, chat_template_kwargs={"enable_thinking": True})
    tokens, _ = encoded(tokenizer, pair_of([user("Q")]), chat_template_kwargs={"enable_thinking": True})
    assert tokenizer.decode(tokens.prompt).endswith(HEADER)
    assert tokens.prompt == shown(tokenizer, [user("Q")], template.saved)
    other = shown(tokenizer, [user("Q")], template.saved, enable_thinking=False)
    assert tokenizer.decode(other).endswith("<think></think>")


@pytest.mark.parametrize("value", ['l\'été "\\n"\n', 3, 0.5, ["a", None], {"a": {"b": True}}, False])
def test_arguments_of_any_kind_are_saved_as_they_are(value):
    tokenizer = with_template("{{ extra | tojson }}" + CHATML)
    template = prepare_template(tokenizer, chat_template_kwargs={"extra": value})
    text = tokenizer.apply_chat_template([user("Q")], chat_template=template.saved, tokenize=False)
    assert text.startswith(json.dumps(value, ensure_ascii=False))


def test_documents_are_an_argument_too():
    tokenizer = with_template("{{ documents | tojson }}" + CHATML)
    template = prepare_template(tokenizer, chat_template_kwargs={"documents": [{"title": "T"}]})
    text = tokenizer.apply_chat_template([user("Q")], chat_template=template.saved, tokenize=False)
    assert text.startswith('[{"title": "T"}]')


def test_the_arguments_of_a_row_win_over_those_of_the_run():
    tokenizer = with_template(THINKS)
    row = pair_of([user("Q")], chat_template_kwargs={"enable_thinking": False})
    tokens, encoder = encoded(tokenizer, row, chat_template_kwargs={"enable_thinking": True})
    assert tokenizer.decode(tokens.prompt).endswith("<think></think>") and not encoder.counts.changed
    tokens, encoder = encoded(tokenizer, replace(row, chat_template_kwargs={"effort": 1}))
    assert list(encoder.counts.changed) == ["chat_template_kwargs: the chat template does not read 'effort'"]
    tokens, encoder = encoded(tokenizer, replace(row, chat_template_kwargs={"tokenize": True}))
    (reason,) = encoder.counts.dropped
    assert (
        tokens is None and reason == "chat_template_kwargs: 'tokenize' is not a variable of a chat template"
    )


@pytest.mark.parametrize("name", ["enable_thinkng", "tokenize", "messages", "a b"])
def test_an_argument_that_would_do_nothing_or_something_else_stops_the_run(name):
    with pytest.raises(ConfigError, match="chat_template_kwargs: .*" + name):
        prepare_template(with_template(THINKS), chat_template_kwargs={name: True})


# --------------------------------------------------------------------------------- end of turn

KIMI = (
    "{% for m in messages %}<|o|>message role={{ m.role }}<|s|>{{ m.content }}<|c|>message<|s|><|eom|>"
    "{% endfor %}{% if add_generation_prompt %}<|o|>message role=assistant<|s|>{% endif %}"
)
R7B = (
    "{% for m in messages %}<|s|>{{ '<|bot|>' if m.role == 'assistant' else '<|usr|>' }}{{ m.content }}<|e|>"
    "{% endfor %}<|s|><|bot|>"
)
SEVERAL = ["<|o|>", "<|c|>", "<|s|>", "<|eom|>", "<|e|>", "<|bot|>", "<|usr|>"]


@pytest.mark.parametrize("eos", ["<|eom|>", "<|endoftext|>"])
def test_several_end_tokens_with_text_between_train_whole(eos):
    tokenizer = with_template(KIMI, tokens=SEVERAL)
    tokenizer.eos_token = eos
    tokens, encoder = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R")], "Yes sir", "No"))
    assert texts(tokenizer, tokens)[1:] == ["Yes sir<|c|>message<|s|><|eom|>", "No<|c|>message<|s|><|eom|>"]
    assert encoder.renderer.template.end_token == "<|eom|>"
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O<|c|>message<|s|><|eom|>"


@pytest.mark.parametrize("eos", ["<|e|>", "<|endoftext|>"])
def test_the_header_of_the_next_turn_is_not_the_end_of_an_answer(eos):
    tokenizer = with_template(R7B, tokens=SEVERAL)
    tokenizer.eos_token = eos
    tokens, encoder = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R")], "Yes sir", "No"))
    assert texts(tokenizer, tokens)[1:] == ["Yes sir<|e|>", "No<|e|>"]
    assert encoder.renderer.template.end_token == "<|e|>"
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O<|e|>"


def test_a_tool_call_that_ends_with_a_token_of_its_own_is_cut_before_the_next_header_too():
    content = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|c|>{% endif %}"
    template = R7B.replace("{{ m.content }}<|e|>", content + "{% if not m.tool_calls %}<|e|>{% endif %}")
    tokenizer = with_template(template, tokens=SEVERAL)
    tokens, _ = encoded(tokenizer, pair_of([user("Q")], {**bot(""), "tool_calls": [CALL]}, tools=[TOOL]))
    assert texts(tokenizer, tokens)[1:] == ["add_numbers<|c|>", "B<|e|>"]


def test_the_header_of_the_next_turn_is_cut_where_a_template_takes_one_exchange_only():
    once = "{% if messages | length > 2 %}{{ raise_exception('one exchange only') }}{% endif %}"
    tokenizer = with_template(once + R7B, tokens=SEVERAL)
    tokens, _ = encoded(tokenizer, pair_of([user("Q")], "Yes sir", "No"))
    assert texts(tokenizer, tokens)[1:] == ["Yes sir<|e|>", "No<|e|>"]


@pytest.mark.parametrize(
    ("between", "eos", "end"),
    [
        ("", "<|im_end|>", "<|end|><|im_end|>"),
        ("", "<|endoftext|>", "<|end|>"),
        ("\\n", "<|im_end|>", "<|end|>"),
    ],
)
def test_an_end_of_conversation_directly_behind_the_turn_trains_where_generation_stops_there(
    between, eos, end
):
    template = CHATML.replace("<|im_end|>\\n", "<|end|>").replace(
        "{% if add", "{% if not add_generation_prompt %}{{ '" + between + "<|im_end|>' }}{% endif %}{% if add"
    )
    tokenizer = with_template(template)
    tokenizer.eos_token = eos
    tokens, _ = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R")]))
    assert texts(tokenizer, tokens)[1:] == ["A" + end, "B" + end]
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O<|end|>"


def test_a_turn_ends_at_the_first_token_that_generation_stops_at():
    template = CHATML.replace("<|im_end|>", "<|end|>\\n<|im_end|>")
    tokenizer = with_template(template)
    assert prepare_template(tokenizer).end == "<|end|>\n<|im_end|>"
    stops = [tokenizer.convert_tokens_to_ids("<|end|>")]
    tokens, encoder = encoded(
        tokenizer, pair_of([user("Q"), bot("O"), user("R")], "A<|end|>"), stop_tokens=stops
    )
    assert encoder.renderer.template.end == "<|end|>" == encoder.renderer.template.earlier_end
    assert texts(tokenizer, tokens)[1:] == ["A<|end|>", "B<|end|>"]


def test_a_token_that_generation_stops_at_stands_in_no_answer():
    tokenizer = tiny_tokenizer("chatml")
    stops = [tokenizer.convert_tokens_to_ids("<|end|>")]
    row = pair_of([user("Q")], "A <|end|> B")
    assert encoded(tokenizer, row)[0] is not None
    tokens, encoder = encoded(tokenizer, row, stop_tokens=stops)
    assert tokens is None and "<|end|> occurs inside an answer" in next(iter(encoder.counts.dropped))


def test_a_default_system_turn_does_not_hide_the_end_of_earlier_answers():
    """As Qwen2.5, which writes a system turn by itself."""
    tokenizer = with_template("<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML)
    assert prepare_template(tokenizer).earlier_end == "<|im_end|>"


def test_all_tokens_that_close_a_turn_train_where_a_system_turn_closes_with_one_of_them():
    """As Cohere2: the answer is closed, then the turn; the system turn it writes by itself has one end."""
    tokenizer = with_template(
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        + CHATML.replace("+ '<|im_end|>", "+ ('<|end|>' if m.role == 'assistant' else '') + '<|im_end|>")
    )
    template = prepare_template(tokenizer)
    assert template.end == template.earlier_end == "<|end|><|im_end|>"


# --------------------------------------------------------------------------------- earlier answers


def test_an_earlier_answer_covers_what_it_covers_as_the_last_one():
    """As GLM and gpt-oss: a block or a channel in front of every answer, another token behind the last."""
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{% if m.role == 'assistant' %}{{ '<|end|>final\\n<think></think>' }}{% endif %}"
        "{{ '\\n' + m.content }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    tokens, _ = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R"), bot("P"), user("S")]))
    assert tokenizer.decode(tokens.chosen) == "<|end|>final\n<think></think>\nA<|im_end|>"
    spans = [tokenizer.decode(tokens.prompt[slice(*span)]) for span in tokens.assistant_spans]
    assert spans == [f"<|end|>final\n<think></think>\n{said}<|eot_id|>" for said in "OP"]
    own = {**bot("P"), "name": "x"}  # a key that a template may read: found turn by turn
    again, _ = encoded(tokenizer, pair_of([user("Q"), own, user("R"), bot("P"), user("S")]))
    spans = [tokenizer.decode(again.prompt[slice(*span)]) for span in again.assistant_spans]
    assert spans == ["<|end|>final\n<think></think>\nP<|eot_id|>"] * 2


def test_an_earlier_answer_behind_another_kind_of_turn_covers_as_much():
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
        "{{ '<|end|>' if m.role == 'tool' else '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    turns = [user("Q"), bot("O"), {"role": "tool", "content": "3"}, bot("P"), user("R")]
    tokens, _ = encoded(tokenizer, pair_of(turns))
    spans = [tokenizer.decode(tokens.prompt[slice(*span)]) for span in tokens.assistant_spans]
    assert spans == ["<think></think>O<|im_end|>", "<think></think>P<|im_end|>"]


def test_an_earlier_answer_without_a_header_does_not_begin_at_the_header_of_another():
    """As DeepSeek behind the result of a tool."""
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|end|>' + m.content }}{% else %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% endif %}{{ '<think></think>' if loop.last and m.role == 'assistant' }}"
        "{{ m.content + (m.tool_calls[0].function.name if m.tool_calls else '') }}"
        "{{ '<|im_end|>' if loop.last and m.role == 'assistant' else '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}"
        "{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    call = {**bot(""), "tool_calls": [CALL]}
    tokens, _ = encoded(
        tokenizer,
        pair_of([user("Q"), call, {"role": "tool", "content": "3"}, bot("O"), user("R")], tools=[TOOL]),
    )
    spans = [tokenizer.decode(tokens.prompt[slice(*span)]) for span in tokens.assistant_spans]
    assert spans == ["add_numbers<|eot_id|>", "O<|eot_id|>"]


# --------------------------------------------------------------------------------- tools

TOOL_USE = "{% if tools %}{{ tools | tojson }}{% else %}{{ tools[0].x.y }}{% endif %}" + CHATML.replace(
    "m['content'] +", "m['content'] + (m.tool_calls | tojson if m.tool_calls else '') +"
)


def test_rows_with_tools_take_the_template_that_transformers_takes_and_all_are_saved():
    tokenizer = tiny_tokenizer("zephyr")
    own = {"default": SHAPES["zephyr"][2].replace("bos", "b"), "tool_use": TOOL_USE, "rag": "{{ documents }}"}
    tokenizer.chat_template = own
    plain, tooled = pair_of([user("Q")]), pair_of([user("Q")], tools=[TOOL])
    encoder = PairTokenizer(tokenizer, max_length=None)
    one, two = encoder.encode([plain, tooled])
    template = encoder.renderer.template
    assert tokenizer.decode(one.chosen) == "A</s>" and "add_numbers" in tokenizer.decode(two.prompt)
    assert not encoder.counts.changed
    assert set(template.saved) == set(own) and template.saved["rag"] == own["rag"]
    assert "rows with tools are written with the tokenizer's template 'tool_use'" in template.notices
    tokenizer.chat_template = template.saved
    assert one.prompt == shown(tokenizer, [user("Q")], None)
    assert two.prompt == shown(tokenizer, [user("Q")], None, tools=[TOOL])
    assert prepare_template(tokenizer, "tool_use").for_tools(None).reads("tool_calls")


def test_rows_with_arguments_of_their_own_take_the_template_of_their_tools():
    tokenizer = with_template({"default": THINKS, "tool_use": TOOL_USE + "{{ enable_thinking }}"})
    own = {"chat_template_kwargs": {"enable_thinking": False}}
    encoder = PairTokenizer(tokenizer, max_length=None)
    plain, tooled = encoder.encode([pair_of([user("Q")], **own), pair_of([user("Q")], **own, tools=[TOOL])])
    assert tokenizer.decode(plain.prompt).endswith("<think></think>")
    assert "add_numbers" in tokenizer.decode(tooled.prompt)


def test_no_tools_are_no_reason_for_the_tool_template():
    default = "{% if tools is not none %}TOOLS{% endif %}" + CHATML
    tokenizer = with_template({"default": default, "tool_use": TOOL_USE})
    tokens, _ = encoded(tokenizer, pair_of([user("Q")], tools=[]))
    assert tokenizer.decode(tokens.prompt).startswith("<|im_start|>user")


def test_a_tokenizer_without_a_default_template_uses_its_first_and_says_so():
    template = prepare_template(with_template({"rag": CHATML}))
    assert template.saved == {"default": CHATML, "rag": CHATML}
    assert template.notices == ("the tokenizer names no template 'default': using 'rag'",)


def test_a_template_that_only_works_with_tools_is_probed_with_tools():
    tokenizer = tiny_tokenizer("chatml")
    encoder = PairTokenizer(tokenizer, max_length=None, chat_template=TOOL_USE)
    tooled, plain = encoder.encode([pair_of([user("Q")], tools=[TOOL]), pair_of([user("Q")])])
    assert tokenizer.decode(tooled.chosen) == "A<|im_end|>" and plain is None
    (reason,) = encoder.counts.dropped
    assert reason.startswith("the chat template refuses the row")


@pytest.mark.parametrize("blank", ["", " ", " \n"])
def test_a_tool_call_that_the_template_does_not_write_never_trains_as_an_empty_answer(blank):
    tokenizer = with_template(CHATML.replace("+ '<|im_end|>", f"+ {blank!r} + '<|im_end|>"))
    call = {**bot(""), "tool_calls": [CALL]}
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], call, "B", tools=[TOOL]))
    assert tokens is None and list(encoder.counts.dropped) == [
        "an answer is a tool call, and the chat template does not write tool calls; "
        "give a chat_template that does"
    ]
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], " ", "B"))
    assert tokens is None and list(encoder.counts.dropped) == ["an answer is empty once rendered"]
    for content in ("I add", "I call add_numbers"):
        row = pair_of([user("Q")], {**call, "content": content}, "B", tools=[TOOL])
        tokens, encoder = encoded(tokenizer, row)
        assert tokens is not None and "does not write tool calls" in next(iter(encoder.counts.lost))


def test_an_earlier_tool_call_that_is_not_written_is_no_answer_to_train():
    call = {**bot(""), "tool_calls": [CALL]}
    row = pair_of([user("Q"), call, {"role": "tool", "content": "3"}, bot("O"), user("R")], tools=[TOOL])
    tokenizer = tiny_tokenizer("chatml")
    tokens, encoder = encoded(tokenizer, row)
    assert [tokenizer.decode(tokens.prompt[slice(*span)]) for span in tokens.assistant_spans] == [
        "O<|im_end|>"
    ]
    assert "the chat template does not write the tool calls of earlier turns" in encoder.counts.changed


def test_our_chatml_introduces_tools_on_one_line():
    tokens, _ = encoded(
        tiny_tokenizer("chatml"), pair_of([system("S"), user("Q")], tools=[TOOL]), chat_template="chatml"
    )
    text = tiny_tokenizer("chatml").decode(tokens.prompt)
    lines = text.split("<|im_end|>")[0].split("\n")
    assert lines[:3] == ["<|im_start|>system", "S", ""] and lines[4] == json.dumps(TOOL)
    assert lines[3].endswith("as JSON between <tool_call> and </tool_call>.")


# --------------------------------------------------------------------------------- system turns

NEMO = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (s + '\\n\\n' if loop.last and s is defined else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("blank", ["", " "])
def test_a_system_turn_written_into_the_last_question_trains_as_inference_shows_it(blank):
    """As Mistral-Nemo, which writes it there only while the question has no answer."""
    template = NEMO.replace("{{ m.content + eos", "{{ '" + blank + "' + m.content + eos")
    tokenizer = with_template(template, "mistral")
    turns = [system("S"), user("Q"), bot("O"), user("R")]
    tokens, encoder = encoded(tokenizer, pair_of(turns))
    assert tokens.prompt == shown(tokenizer, turns, template)
    assert tokenizer.decode(tokens.prompt).endswith("[INST]S\n\nR[/INST]") and not encoder.counts.changed
    assert tokenizer.decode(tokens.chosen) == blank + "A</s>"
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == blank + "O</s>"


@pytest.mark.parametrize("front", ["", "\n", "  {% set x = 1 %}", "text"])
@pytest.mark.parametrize("turns", [[system("S "), user("Q"), bot("O"), user("R")], [system("S"), bot("O")]])
def test_the_saved_template_opens_the_first_question_with_the_system_text(front, turns):
    silent = front + CHATML.replace("messages %}", "messages if m.role != 'system' %}")
    tokenizer = with_template(silent)
    tokens, encoder = encoded(tokenizer, pair_of(turns))
    template = encoder.renderer.template
    assert template.folds_system and tokens.prompt == shown(tokenizer, turns, template.saved)
    text = turns[0]["content"]
    folded = [user(f"{text}\n\nQ"), *turns[2:]] if turns[1]["role"] == "user" else [user(text), *turns[1:]]
    assert tokens.prompt == shown(tokenizer, folded, silent)  # the obvious twin
    assert shown(tokenizer, [user("Q")], template.saved) == shown(tokenizer, [user("Q")], silent)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_system_text_adds_nothing_to_the_question(empty):
    tokenizer = tiny_tokenizer("gemma")
    tokens, encoder = encoded(tokenizer, pair_of([system(empty), user("Q")]))
    assert tokens.prompt == encoded(tokenizer, pair_of([user("Q")]))[0].prompt
    (note,) = encoder.counts.changed
    assert note == "the chat template has no system turn: an empty one is left out"


# --------------------------------------------------------------------------------- dates

MONDAY = datetime(2026, 3, 2, 7, 5, 9)


def test_a_date_is_that_of_the_run_and_said_in_one_line():
    formats = ["%d %b %Y", "%-d %B %y, %H:%M:%S", "%Y-%m-%d", "%A %j %%", "%I %p"]
    written = "".join("{{ strftime_now('" + one + "') }}|" for one in formats[:-2] + formats[-1:])
    tokenizer = with_template("{% if strftime_now is defined %}" + written + "{% endif %}" + CHATML)
    template = prepare_template(tokenizer, date=MONDAY)
    text = template.render(tokenizer, [user("Q")], None, ask=True)
    assert text.startswith("|".join(MONDAY.strftime(one) for one in formats[:-2] + formats[-1:]) + "|")
    assert template.notices == (
        "the chat template writes today's date: 02 March 2026 in every row of this run",
    )
    assert template.saved == tokenizer.chat_template  # inference goes on with its own days
    tokens = [encoded(tokenizer, pair_of([user("Q")]), date=date)[0] for date in (MONDAY, MONDAY)]
    later, encoder = encoded(tokenizer, pair_of([user("Q")]), date=MONDAY + timedelta(days=1))
    assert tokens[0] == tokens[1] != later and not encoder.counts.dropped
    assert not prepare_template(with_template(CHATML), date=MONDAY).notices


def test_cached_tokens_are_those_of_their_date_arguments_and_template(tmp_path):
    tokenizer = with_template("{{ strftime_now('%d') }}{{ extra }}" + CHATML)
    pairs = [pair_of([user("Q")])]
    known = {"max_length": None, "cache_dir": tmp_path / "cache"}
    tokenize_pairs(pairs, tokenizer, **known, date=MONDAY)
    tokenize_pairs(pairs, tokenizer, **known, date=MONDAY)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    tokenize_pairs(pairs, tokenizer, **known, date=MONDAY + timedelta(days=1))
    tokenize_pairs(pairs, tokenizer, **known, date=MONDAY, chat_template_kwargs={"extra": "x"})
    tokenize_pairs([replace(pairs[0], chat_template_kwargs={"extra": "y"})], tokenizer, **known, date=MONDAY)
    file = tmp_path / "mine.jinja"
    for text in (CHATML, CHATML + " "):
        file.write_text(text)
        tokenize_pairs(pairs, tokenizer, **known, chat_template=str(file))
        tokenize_pairs(
            pairs, tokenizer, **known, chat_template=str(file)
        )  # no date is written: always the same
    assert len(list((tmp_path / "cache").iterdir())) == 6


# --------------------------------------------------------------------------------- what is lost


def test_reasoning_that_is_not_written_is_counted_and_stops_the_run():
    thinks = {**bot("A"), "reasoning_content": "because of this"}
    tokens, encoder = encoded(
        tiny_tokenizer("chatml"), pair_of([user("Q")], thinks, {**thinks, "content": "B"})
    )
    reason = "the chat template does not write the reasoning of an answer (its key 'reasoning_content')"
    assert tokens is not None and encoder.counts.lost == {reason: 1}
    pairs = [pair_of([user("Q")], thinks)] + [pair_of([user("Q")], f"A{i}") for i in range(9)]
    kept = tokenize_pairs(pairs, tiny_tokenizer("chatml"), max_length=None)
    kept.counts.check(0.1)
    assert len(kept) == 10 and kept.counts.lines()[1] == f"incomplete 1: {reason} (first: p.jsonl:1)"
    with pytest.raises(DataError, match=r"1 of 10 rows \(10%\) cannot be used whole, .*: incomplete 1"):
        kept.counts.check(0.05)


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        (["because", "of this"], 1),
        ([{"type": "text", "text": "because of this"}], 1),
        ([{"type": "text", "text": "A", "signature": "xyz"}], 0),
        ({"thinking": "A", "signature": "xyz"}, 0),
        ([], 0),
    ],
)
def test_reasoning_in_steps_is_what_its_steps_say(said, lost):
    answers = ({**bot(text), "reasoning_content": said} for text in ("A", "A B"))
    _, encoder = encoded(tiny_tokenizer("chatml"), pair_of([user("Q")], *answers))
    assert sum(encoder.counts.lost.values()) == lost


def test_reasoning_that_the_template_cuts_out_of_an_answer_is_counted():
    tokenizer = with_template(asked_with("", "m.content.split('</think>')[-1]"))
    tokens, encoder = encoded(tokenizer, pair_of([user("Q")], "<think>why so</think>\n\nA", "B"))
    assert tokenizer.decode(tokens.chosen).strip() == "A<|im_end|>"
    assert list(encoder.counts.lost) == [
        "the chat template cuts the reasoning (everything up to </think>) out of an answer"
    ]
    empty = pair_of([user("Q")], "<think>\n\n</think>\n\nA", "B")
    assert not encoded(tokenizer, empty)[1].counts.lost


def test_words_of_an_answer_that_are_not_written_are_counted_and_blanks_are_not():
    tokenizer = with_template(asked_with("", "m.content.replace(' two', '') | trim"))
    assert list(encoded(tokenizer, pair_of([user("Q")], "one two three"))[1].counts.lost) == [
        "the chat template leaves out words of an answer"
    ]
    assert not encoded(tokenizer, pair_of([user("Q")], " one \n"))[1].counts.lost
    earlier = pair_of([user("Q"), bot("one two three"), user("R")])
    assert not encoded(tokenizer, earlier)[1].counts.lost  # thinking of earlier turns is left out by design


def test_counts_of_lost_parts_are_kept_and_joined():
    counts = RowCounts(total=4)
    counts.lose("r", "a:1")
    again = RowCounts.from_dict(counts.to_dict())
    again.add(counts)
    assert again.lost == {"r": 2} and again.total == 8 and again.kept == 8
    again.check(0.25)
    with pytest.raises(DataError, match=r"2 of 8 rows \(25%\) cannot be used whole"):
        again.check(0.2)


# --------------------------------------------------------------------------------- other tokenizers


def sentencepiece_tokenizer(template):
    """As Llama 2's: blanks are letters, and a text gets one in front."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<s>", "</s>", "<0x0A>"], show_progress=False
    )
    backend.train_from_iterator(["USER: what is it? ASSISTANT: it is good. it is bad."] * 9, trainer)
    backend.pre_tokenizer = None
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def test_a_header_that_ends_in_a_blank_trains_under_a_vocabulary_that_writes_blanks():
    template = (
        "{% for m in messages %}{{ ('USER: ' if m.role == 'user' else 'ASSISTANT: ') + m.content }}"
        "{{ '\\n' if m.role == 'user' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    tokenizer = sentencepiece_tokenizer(template)
    tokens, encoder = encoded(tokenizer, pair_of([user("what is it?")], "it is good.", "it is bad."))
    assert tokens.prompt == tokenizer(
        "USER: what is it?\nASSISTANT: ", add_special_tokens=False
    )["input_ids"]  # fmt: skip
    whole = tokenizer.decode(tokens.prompt + tokens.chosen)
    assert whole == "USER: what is it?\nASSISTANT: it is good.</s>"
    assert list(encoder.counts.changed) == [
        "a token crossed the boundary: the answer is tokenized apart from its prompt"
    ]


def test_a_template_for_contents_in_parts_is_given_parts():
    """As those of vision models."""
    tokenizer = with_template(
        CHATML.replace("m['content']", "(m['content'] | selectattr('type', 'equalto', 'text') | first).text")
    )
    tokens, encoder = encoded(tokenizer, pair_of([user("Q"), bot("O"), user("R")]))
    assert texts(tokenizer, tokens)[1:] == ["A<|im_end|>", "B<|im_end|>"]
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O<|im_end|>" and not encoder.counts.changed


def test_a_list_of_parts_written_out_as_text_is_no_answer():
    with pytest.raises(ConfigError, match="does not write the assistant's answer once"):
        prepare_template(with_template(asked_with("", "m.content[:9] | string")))


LAST_ALONE = (
    "{% set last = messages|rejectattr('role', 'equalto', 'assistant')|list|last %}"
    "{% for message in messages %}{% if message.role == 'assistant' or message == last %}"
    "<|im_start|>{{ message.role }}\n"
    "{{ message.content|tojson if message.role == 'tool' else message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_turn_that_the_template_passes_over_is_counted():
    def notes(*turns):
        tokenizer = tiny_tokenizer("chatml")
        tokenizer.chat_template = LAST_ALONE
        tokens, encoder = encoded(tokenizer, pair_of(list(turns), "yes", "no"))
        assert tokens is not None
        return [note for note in encoder.counts.changed if "does not write" in note]

    assert notes(user("Context"), user("Is it?")) == [
        "the chat template does not write a user turn of the prompt"
    ]
    assert (
        notes(user("i"), user("Is it?")) == notes(user("Same"), user("Same")) == notes(user("a"), user("b"))
    )
    assert notes(user("Is it?")) == []
    assert notes({"role": "tool", "content": 'a "quote"\nb'}) == []  # written as JSON


def test_a_turn_within_an_answer_that_the_template_passes_over_is_counted():
    template = CHATML.replace("in messages %}", "in messages if m['content'] != 'then this' %}")
    pair = PreferencePair(
        [user("Q?")],
        [bot("a"), user("then this"), bot("b")],
        [bot("c"), user("or this"), bot("d")],
        source="p",
    )
    _, encoder = encoded(with_template(template), pair)
    assert "the chat template does not write a user turn of the prompt" in encoder.counts.changed


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        ({"context": "Paris is in France"}, True), ({"annotations": ["u"]}, True), ({"name": "Alice"}, True),
        ({"reasoning_content": "so"}, True), ({"context": ""}, False), ({"id": None}, False),
        ({"weight": 1, "score": 3}, False),
    ],
)  # fmt: skip
def test_keys_of_turns_that_the_template_does_not_write_are_counted(more, counted):
    def notes(template, turn):
        _, encoder = encoded(with_template(template), pair_of([user("Hi"), turn, user("Q?")]))
        return [note for note in encoder.counts.changed if "does not write" in note]

    (key,) = list(more)[:1]
    said = [f"the chat template does not write {key!r} of a turn"] if counted else []
    assert notes(CHATML, {**bot("Yes"), **more}) == said
    writes = CHATML.replace("m['content']", f"m['content'] + (m.{key} | default('', true) | string)")
    assert writes != CHATML and notes(writes, {**bot("Yes"), **more}) == []


def test_names_of_tools_beside_their_results_are_not_counted():
    turns = [user("Q?"), bot(""), {"role": "tool", "content": "3", "name": "f", "tool_call_id": "1"}]
    _, encoder = encoded(with_template(CHATML), pair_of(turns))
    assert not [note for note in encoder.counts.changed if "of a turn" in note]
