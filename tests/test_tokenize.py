"""Where the prompt ends, how an answer ends, and what happens to pairs that are too long."""

from dataclasses import replace

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import SHAPES, tiny_tokenizer
from turns import bot, system, user

from orpo.data.counts import RowCounts
from orpo.data.named_templates import NAMED
from orpo.data.preferences import read_preferences
from orpo.data.templates import prepare_template
from orpo.data.tokenize import PairTokenizer, shorter_prompts, stream_tokenized
from orpo.errors import ConfigError, DataError, ModelError
from orpo.pairs import PreferencePair

# What prompt and answer must be, written by hand from the families' published formats.
EXPECTED = {
    "chatml": ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "think": ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\nA<|im_end|>"),
    "asks_to_think": ("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "A<|im_end|>"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "A<|eot_id|>",
    ),
    "gemma": ("<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "A<end_of_turn>"),
    "phi3": ("<s><|user|>\nQ<|end|>\n<|assistant|>\n", "A<|end|>"),
    "mistral": ("<s>[INST] Q[/INST]", " A</s>"),
    "zephyr": ("<s><|user|>\nQ</s>\n<|assistant|>\n", "A</s>"),
    "alpaca": ("<s>### Instruction:\nQ\n\n### Response:\n", "A</s>"),
}
END = {
    "chatml": "<|im_end|>",
    "think": "<|im_end|>",
    "asks_to_think": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral": "</s>",
    "zephyr": "</s>",
    "alpaca": "</s>",
}


def chat(prompt, chosen, rejected, **known):
    return PreferencePair(prompt, [bot(chosen)], rejected and [bot(rejected)], source="p.jsonl:1", **known)


def encode(tokenizer, pair, max_length=None, **options):
    encoder = PairTokenizer(tokenizer, max_length=max_length, **options)
    (tokens,) = encoder.encode([pair])
    return tokens, encoder.counts


def shown(tokenizer, turns, **more):
    """The prompt of inference, by transformers alone."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, **more)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------------- boundary and end


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("shape", EXPECTED)
def test_prompt_and_answers_are_what_the_family_publishes(shape, pad_is_eos):
    """peers 3, 15, 18: no text behind the end of turn, trained although pad equals EOS, BOS once."""
    tokenizer = tiny_tokenizer(shape, pad_is_eos=pad_is_eos)
    tokens, counts = encode(tokenizer, chat([user("Q")], "A", "A, and more"))
    prompt, chosen = EXPECTED[shape]
    assert tokens.prompt == ids(tokenizer, prompt)
    assert tokens.chosen == ids(tokenizer, chosen)
    assert tokens.rejected == ids(tokenizer, chosen.replace("A", "A, and more"))
    assert (tokens.chosen_context, tokens.rejected_context, tokens.assistant_spans) == (0, 0, ())
    assert not counts.dropped
    noted = {
        "asks_to_think": [
            "inference starts behind '<think>', which an answer does not close: the prompt ends before it; "
            "close it in the answers, or give another chat_template"
        ],
        "llama3": ["a token crossed the boundary: the answer is tokenized apart from its prompt"],
    }
    assert list(counts.changed) == noted.get(shape, [])


@st.composite
def conversations(draw):
    text = st.text("ab \n.'é<1", min_size=1, max_size=12).filter(str.strip)
    turns = [system(draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [user(draw(text)), bot(draw(text))]
    turns.append(user(draw(text)))
    return PreferencePair(turns, [bot(draw(text))], [bot(draw(text))], source="x:1")


def rendering(tokenizer, template, turns, ask=False):
    """The obvious twin: the template as the tokenizer itself applies it, the end cut by hand."""
    if template.folds_system and turns[0]["role"] == "system":
        joined = turns[0]["content"] + "\n\n" + turns[1]["content"]
        turns = [user(joined), *turns[2:]]
    return tokenizer.apply_chat_template(
        turns, chat_template=template.text, tokenize=False, add_generation_prompt=ask
    )


@pytest.mark.parametrize("shape", EXPECTED)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=conversations())
def test_any_conversation_keeps_the_invariants(shape, pair):
    tokenizer = tiny_tokenizer(shape)
    template = prepare_template(tokenizer)
    tokens, counts = encode(tokenizer, pair)
    if tokens is None:
        (reason,) = counts.dropped
        assert reason == "chosen and rejected are identical once rendered"
        trimmed = [side[0]["content"].strip() for side in (pair.chosen, pair.rejected)]
        assert trimmed[0] == trimmed[1]
        return
    end = tokenizer.convert_tokens_to_ids(END[shape])
    for side, answer in ((tokens.chosen, pair.chosen), (tokens.rejected, pair.rejected)):
        assert side[-1] == end and end not in side[:-1]
        whole = rendering(tokenizer, template, [*pair.prompt, *answer])
        if END[shape] in whole.rsplit("A", 1)[-1]:
            whole = whole[: whole.rindex(END[shape]) + len(END[shape])]
        elif shape == "alpaca":
            whole = whole.removesuffix("\n\n") + "</s>"
        assert tokenizer.decode(tokens.prompt + side) == whole
    asked = rendering(tokenizer, template, pair.prompt, ask=True)
    if shape == "asks_to_think":
        asked = asked.removesuffix("<think>\n")
    assert tokens.prompt == ids(tokenizer, asked)  # exactly what inference starts from
    bos = tokenizer.bos_token_id
    assert bos is None or (tokens.prompt[0] == bos and [*tokens.prompt, *tokens.chosen].count(bos) == 1)
    said = [turn["content"] for turn in pair.prompt if turn["role"] == "assistant"]
    spans = [tokenizer.decode((tokens.prompt + tokens.chosen)[a:b]) for a, b in tokens.assistant_spans]
    assert len(spans) == len(said)
    for span, content in zip(spans, said, strict=True):
        assert span.removesuffix(END[shape]).strip() == content.strip()
        assert span.endswith(END[shape]) or shape == "alpaca"


def test_a_token_across_the_boundary_is_cut_as_inference_cuts_it():
    """peers 26: the prompt is a true prefix; where a token would cross, the answer is tokenized apart."""
    tokenizer = tiny_tokenizer("chatml")
    tokens, counts = encode(tokenizer, chat([user("Q")], "\n\nA", "B"))
    asked = EXPECTED["chatml"][0]
    assert ids(tokenizer, asked + "\n\nA")[: len(ids(tokenizer, asked))] != ids(
        tokenizer, asked
    )  # it does cross
    assert tokens.prompt == ids(tokenizer, asked)
    assert tokens.chosen == ids(tokenizer, "\n\nA<|im_end|>")
    assert counts.changed == {
        "a token crossed the boundary: the answer is tokenized apart from its prompt": 1
    }


def test_an_end_token_inside_the_data_is_neither_doubled_nor_trained_midway():
    tokenizer = tiny_tokenizer("chatml")
    tokens, counts = encode(tokenizer, chat([user("Q")], "A<|im_end|>\n", "B<|im_end|><|im_end|>"))
    assert (
        tokenizer.decode(tokens.chosen) == "A<|im_end|>"
        and tokenizer.decode(tokens.rejected) == "B<|im_end|>"
    )
    assert counts.changed == {"<|im_end|> at the end of an answer: not repeated": 1}
    tokens, counts = encode(tokenizer, chat([user("Q")], "A <|im_end|> b", "B"))
    assert tokens is None and counts.dropped == {
        "the end-of-turn token <|im_end|> occurs inside an answer; "
        "take it out of the data, or give a chat_template that writes it at the end only": 1
    }


def test_earlier_turns_that_bring_their_end_token_have_one():
    tokenizer = tiny_tokenizer("chatml")
    turns = [user("Q<|im_end|>"), bot("old<|im_end|>\n"), user("More")]
    plain = [user("Q"), bot("old"), user("More")]
    tokens, counts = encode(tokenizer, chat(turns, "A", "B"))
    expected, _ = encode(tokenizer, chat(plain, "A", "B"))
    assert tokens == expected and tokenizer.decode(tokens.prompt).count("<|im_end|>") == 3
    assert counts.changed == {"<|im_end|> at the end of an earlier turn: not repeated": 1}


def test_an_end_token_that_the_template_does_not_write_after_earlier_turns_stays():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last and m.role == 'assistant' %}"
        "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [user("Q"), bot("old<|im_end|>"), user("More")]
    tokens, counts = encode(tokenizer, chat(turns, "A", "B"))
    assert "old<|im_end|>user: More" in tokenizer.decode(tokens.prompt) and not counts.changed


def test_answers_that_are_nothing_once_rendered_are_dropped():
    tokenizer = tiny_tokenizer("chatml")
    assert encode(tokenizer, chat([user("Q")], "<|im_end|>", "B"))[1].dropped == {
        "an answer is empty once rendered": 1
    }
    tokenizer = tiny_tokenizer("llama3")
    assert encode(tokenizer, chat([user("Q")], "A ", "A"))[1].dropped == {
        "chosen and rejected are identical once rendered": 1
    }


def test_think_block_goes_into_both_answers_alike_and_own_thinking_stays():
    tokenizer = tiny_tokenizer("think")
    prompt = [user("Q"), bot("<think>\nold\n</think>\n\nA"), user("R")]
    tokens, _ = encode(tokenizer, chat(prompt, "<think>\nwhy\n</think>\n\nB", "C"))
    assert tokenizer.decode(tokens.chosen) == "<think>\nwhy\n</think>\n\nB<|im_end|>"
    assert tokenizer.decode(tokens.rejected) == "<think>\n\n</think>\n\nC<|im_end|>"
    assert "old" not in tokenizer.decode(tokens.prompt)
    spans = [tokenizer.decode(tokens.prompt[a:b]) for a, b in tokens.assistant_spans]
    assert spans == ["A<|im_end|>"]


def test_a_prompt_that_is_written_differently_once_answered_trains_as_inference_shows_it():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    tokens, counts = encode(tokenizer, chat([user("Q"), bot("O"), user("R")], "A", "B"))
    assert tokens.prompt == shown(tokenizer, [user("Q"), bot("O"), user("R")])
    assert tokenizer.decode(tokens.chosen) == "A<|im_end|>" and not counts.changed


def test_without_a_boundary_the_row_is_dropped_and_the_run_stops():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = "{{ (messages[1:] | string) | length }}" + tokenizer.chat_template
    tokens, counts = encode(tokenizer, chat([user("Q")], "a", "b"))
    assert tokens is None
    ((reason, _),) = counts.dropped.items()
    assert reason.startswith("no boundary: the chat template writes the prompt differently")
    with pytest.raises(DataError, match="no row can be used: dropped 1: no boundary"):
        RowCounts(total=1, dropped=counts.dropped, examples=counts.examples).check(0.1)


def test_a_complete_header_written_only_when_asked_is_part_of_the_prompt():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '|' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>reply\\n' }}{% endif %}"
    )
    tokens, counts = encode(tokenizer, chat([user("Q")], "reply", "ready"))
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user|Q<|im_end|><|im_start|>reply\n"
    assert tokenizer.decode(tokens.chosen) == "reply<|im_end|>" and not counts.changed


def test_a_block_that_is_opened_when_asked_is_closed_by_what_the_template_writes():
    """As Nemotron 3: asked with an open think block, written with a closed one."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{{ ('<think></think>' if m.role == 'assistant' else '')"
        " + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    tokens, _ = encode(tokenizer, chat([user("Q")], "A", "B"))
    assert tokenizer.decode(tokens.prompt) == EXPECTED["chatml"][0] + "<think>\n"
    assert tokenizer.decode(tokens.chosen) == "</think>A<|im_end|>"


def test_a_bos_that_the_template_writes_twice_is_left_out_once():
    """peers 18: BOS once; what is counted from the start of the prompt moves with it."""
    tokenizer = tiny_tokenizer("zephyr")
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    tokens, _ = encode(tokenizer, chat([user("Q"), bot("O"), user("R")], "A", "B"))
    assert tokens.prompt.count(tokenizer.bos_token_id) == 1
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O</s>"


def test_one_side_that_goes_on_as_the_header_does_moves_the_boundary_of_neither():
    tokenizer = tiny_tokenizer("asks_to_think")
    tokens, _ = encode(tokenizer, chat([user("Q")], "<think>\nwhy</think>A", "B"))
    assert tokenizer.decode(tokens.prompt) == EXPECTED["chatml"][0]
    assert tokenizer.decode(tokens.chosen) == "<think>\nwhy</think>A<|im_end|>"
    assert tokenizer.decode(tokens.rejected) == "B<|im_end|>"


def test_end_tokens_in_a_row_are_trained_together():
    """As Command R7B: the response is closed, then the turn."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\\n", "<|end|><|im_end|>\\n<|endoftext|>"
    )
    tokens, _ = encode(tokenizer, chat([user("Q"), bot("O"), user("R")], "A", "B"))
    assert tokenizer.decode(tokens.chosen) == "A<|end|><|im_end|>"
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "O<|end|><|im_end|>"
    assert encode(tokenizer, chat([user("Q")], "<|end|>", "B"))[1].dropped == {
        "an answer is empty once rendered": 1
    }


def test_one_row_the_template_refuses_does_not_kill_the_job():
    """peers 13."""
    encoder = PairTokenizer(tiny_tokenizer("gemma"), max_length=None)
    odd = chat([user("Q"), user("R")], "A", "B")
    good = chat([user("Q")], "A", "B")
    found = encoder.encode([good, odd, good])
    assert [tokens is not None for tokens in found] == [True, False, True]
    ((reason, count),) = encoder.counts.dropped.items()
    assert (
        reason.startswith("the chat template refuses the row: Conversation roles must alternate")
        and count == 1
    )


def test_a_system_text_opens_the_first_user_turn_where_the_template_has_no_system_turn():
    tokenizer = tiny_tokenizer("gemma")
    tokens, counts = encode(tokenizer, chat([system("S"), user("Q")], "A", "B"))
    assert tokenizer.decode(tokens.prompt) == EXPECTED["gemma"][0].replace("Q", "S\n\nQ")
    assert counts.changed == {"the chat template has no system turn: its text opens the first user turn": 1}
    silent = tiny_tokenizer("chatml")  # drops system turns without a word
    silent.chat_template = silent.chat_template.replace("messages %}", "messages if m.role != 'system' %}")
    tokens, _ = encode(silent, chat([system("S"), user("Q")], "A", "B"))
    assert silent.decode(tokens.prompt) == EXPECTED["chatml"][0].replace("Q", "S\n\nQ")


def test_tools_are_written_or_their_loss_is_counted():
    """peers 4."""
    schema = {"type": "function", "function": {"name": "add_numbers", "description": "", "parameters": {}}}
    call = {"type": "function", "function": {"name": "add_numbers", "arguments": {"a": 1}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    tokenizer = tiny_tokenizer("chatml")
    pair = chat([user("Q"), asked, {"role": "tool", "content": "3"}], "A", "B", tools=[schema])
    tokens, counts = encode(tokenizer, pair)
    assert "add_numbers" not in tokenizer.decode(tokens.prompt)
    assert set(counts.changed) == {
        "the chat template does not write the tools",
        "the chat template does not write the tool calls of earlier turns",
    }
    tokens, counts = encode(tokenizer, pair, chat_template="chatml")
    text = tokenizer.decode(tokens.prompt)
    assert (
        text.count("add_numbers") == 2
        and '<tool_call>\n{"name": "add_numbers", "arguments": {"a": 1}}' in text
    )
    assert not counts.changed
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]).startswith("<tool_call>")
    answer = PreferencePair([user("Q")], [asked], [bot("B")], tools=[schema])
    tokens, _ = encode(tokenizer, answer, chat_template="chatml")
    assert tokenizer.decode(tokens.chosen).endswith("</tool_call><|im_end|>")


def test_tool_arguments_become_text_for_templates_that_join_them():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content'] +",
        "(m['tool_calls'][0].function.arguments + '!' if m['tool_calls'] else m['content']) +",
    )
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    tokens, _ = encode(tokenizer, chat([user("Q"), {**bot(""), "tool_calls": [call]}, user("R")], "A", "B"))
    assert '{"a": 1}!' in tokenizer.decode(tokens.prompt)


def test_conversations_that_part_early_share_their_beginning_only():
    tokenizer = tiny_tokenizer("chatml")
    pair = PreferencePair([user("Q")], [bot("A"), user("R"), bot("B")], [bot("C"), user("S"), bot("D")])
    tokens, _ = encode(tokenizer, pair)
    assert tokenizer.decode(tokens.prompt) == EXPECTED["chatml"][0]
    middle = "{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    chosen, rejected = tokens.chosen, tokens.rejected
    assert tokenizer.decode(chosen[: tokens.chosen_context]) == middle.format("A", "R")
    assert tokenizer.decode(chosen[tokens.chosen_context :]) == "B<|im_end|>"
    assert tokenizer.decode(rejected[: tokens.rejected_context]) == middle.format("C", "S")
    assert tokenizer.decode(rejected[tokens.rejected_context :]) == "D<|im_end|>"
    (span,) = tokens.assistant_spans
    assert tokenizer.decode((tokens.prompt + tokens.chosen)[slice(*span)]) == "A<|im_end|>"
    # They part at a user turn: the shared beginning ends with the message before, no header of an answer.
    pair = PreferencePair([user("Q"), bot("A")], [user("R"), bot("B")], [user("S"), bot("D")])
    tokens, _ = encode(tokenizer, pair)
    assert tokenizer.decode(tokens.prompt).endswith("assistant\nA<|im_end|>\n")
    # One side is a beginning of the other.
    pair = PreferencePair([user("Q")], [bot("A")], [bot("A"), user("R"), bot("B")])
    tokens, _ = encode(tokenizer, pair)
    assert (tokens.chosen_context, tokenizer.decode(tokens.chosen)) == (0, "A<|im_end|>")
    assert tokens.rejected[: len(tokens.chosen)] == tokens.chosen and tokens.rejected_context > len(
        tokens.chosen
    )


def test_parting_early_where_the_header_differs_when_asked_shares_up_to_it():
    tokenizer = tiny_tokenizer("asks_to_think")
    pair = PreferencePair([user("Q")], [bot("A"), user("R"), bot("B")], [bot("C"), user("S"), bot("D")])
    tokens, _ = encode(tokenizer, pair)
    assert tokenizer.decode(tokens.prompt) == "<|im_start|>user\nQ<|im_end|>\n"
    assert tokenizer.decode(tokens.chosen[tokens.chosen_context :]) == "B<|im_end|>"


def test_parting_early_under_a_template_that_moves_the_system_text_shares_less():
    """Mistral writes the system text into the last user turn, so no turn is shared."""
    tokenizer = tiny_tokenizer("mistral")
    prompt = [system("S"), user("P"), bot("O"), user("Q")]
    pair = PreferencePair(prompt, [bot("A"), user("R"), bot("B")], [bot("C"), user("T"), bot("D")])
    tokens, counts = encode(tokenizer, pair)
    assert tokenizer.decode(tokens.prompt) == "<s>" and not counts.dropped
    assert "[INST] S\n\nR[/INST]" in tokenizer.decode(tokens.chosen)


def test_an_sft_row_has_no_rejected_side():
    tokens, _ = encode(tiny_tokenizer("zephyr"), chat([user("Q")], "A", None))
    assert tokens.rejected == [] and tokens.chosen


# --------------------------------------------------------------------------------- plain text


def text_pair(prompt, chosen, rejected):
    return PreferencePair(prompt, chosen, rejected, source="t:1")


@pytest.mark.parametrize("shape", ["chatml", "llama3", "gemma"])
def test_plain_text_gets_bos_and_eos_once_and_no_template(shape):
    tokenizer = tiny_tokenizer(shape, pad_is_eos=True)
    tokens, _ = encode(tokenizer, text_pair("The sky is", " blue.", " green."))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert tokens.prompt == bos + ids(tokenizer, "The sky is")
    assert tokens.chosen == [*ids(tokenizer, " blue."), tokenizer.eos_token_id]
    assert tokens.rejected == [*ids(tokenizer, " green."), tokenizer.eos_token_id]
    written = tokenizer.bos_token or ""
    again, _ = encode(tokenizer, text_pair(written + "The sky is", " blue." + tokenizer.eos_token, " green."))
    assert (again.prompt, again.chosen) == (tokens.prompt, tokens.chosen)
    twice, _ = encode(tokenizer, text_pair(2 * written + "The sky is", " blue.", " green."))
    assert twice.prompt == tokens.prompt


def test_plain_text_rendered_beforehand_ends_with_its_own_end_token():
    """peers 3: no EOS behind <|im_end|> and a newline."""
    tokenizer = tiny_tokenizer("llama3")
    tokens, _ = encode(tokenizer, text_pair("<|im_start|>assistant\n", "A<|im_end|>\n", "B<|im_end|>\n"))
    assert tokenizer.decode(tokens.chosen) == "A<|im_end|>"


def test_token_id_zero_and_pad_inside_an_answer_are_kept():
    """peers 15, 17, 37: nothing is masked or cut by id."""
    tokenizer = tiny_tokenizer("mistral", pad_is_eos=True)
    zero = tokenizer.decode([0])
    tokens, _ = encode(tokenizer, text_pair("P", f" {zero}{zero}", " x"))
    assert tokens.chosen.count(0) == 2


def test_without_eos_nothing_could_end_an_answer():
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"no EOS token.*set tokenizer\.eos_token"):
        encode(tokenizer, text_pair("P", " a", " b"))


# --------------------------------------------------------------------------------- other tokenizers


def metaspace_tokenizer(scheme):
    """Shaped like Llama 2's: blanks are letters, and text gets one in front."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    backend.train_from_iterator(
        ["USER: what is it? ASSISTANT: it is good. it is bad. [INST] [/INST]\n"] * 9, trainer
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_tokenizer_that_puts_a_blank_in_front_of_text_reads_answers_in_their_place(scheme):
    tokenizer = metaspace_tokenizer(scheme)
    tokens, counts = encode(tokenizer, chat([user("what is it?")], "it is good.", "it is bad."))
    whole = ids(tokenizer, "<s>[INST] what is it? [/INST] it is good. </s>")
    assert tokens.prompt + tokens.chosen == whole
    assert not counts.changed and not counts.dropped


def test_a_tokenizer_without_offsets_works_too():
    tokenizer = transformers.ByT5Tokenizer()
    assert not tokenizer.is_fast
    pair = chat([user("Hé"), bot("Ho"), user("Q")], "Ä", "B")
    encoder = PairTokenizer(tokenizer, max_length=None)
    (tokens,) = encoder.encode([pair])
    assert "chatml" in encoder.renderer.template.notices[0]
    assert tokenizer.decode(tokens.chosen) == "Ä</s>"
    assert tokenizer.decode(tokens.prompt).endswith("<|im_start|>assistant\n")
    (span,) = tokens.assistant_spans
    assert tokenizer.decode(tokens.prompt[slice(*span)]) == "Ho</s>"


# --------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("special_tokens", [True, False])
def test_named_templates_end_with_a_trainable_token_whatever_the_vocabulary(name, special_tokens):
    tokenizer = tiny_tokenizer(None, special_tokens=special_tokens, pad_is_eos=True)
    pair = chat([system("S"), user("P"), bot("O"), user("Q")], "A", "B")
    encoder = PairTokenizer(tokenizer, max_length=None, chat_template=name)
    (tokens,) = encoder.encode([pair])
    template = encoder.renderer.template
    assert (template.end_token == "</s>") == (not special_tokens or NAMED[name].end is None)
    assert tokenizer.decode(tokens.chosen).strip() == "A" + template.end_token
    assert tokens.chosen[-1] == tokenizer.convert_tokens_to_ids(template.end_token)
    assert tokens.prompt.count(tokenizer.bos_token_id) == 1 == tokens.prompt[:1].count(tokenizer.bos_token_id)
    text = tokenizer.decode(tokens.prompt)
    assert text.index("S") < text.index("P") < text.index("O") < text.index("Q")
    missing = any("the vocabulary has no" in notice for notice in template.notices)
    assert missing == (not special_tokens)
    assert len(tokens.assistant_spans) == 1


def test_a_base_model_gets_one_named_default_and_is_told():
    template = prepare_template(tiny_tokenizer(None))
    assert template.name == "chatml"
    assert template.notices[0] == "the tokenizer has no chat template: using 'chatml'"


def test_a_saved_template_renders_the_very_prompts_of_training():
    """peers 18: BOS once in training and at inference, the template saved included."""
    for shape in ("phi3", "zephyr", "llama3", "chatml"):
        tokenizer = tiny_tokenizer(shape)
        tokens, _ = encode(tokenizer, chat([user("Q")], "A", "B"))
        tokenizer.chat_template = prepare_template(tokenizer).text
        asked = tokenizer.apply_chat_template([user("Q")], add_generation_prompt=True, return_dict=False)
        assert asked == tokens.prompt


def test_templates_by_file_text_and_wrong_name(tmp_path):
    tokenizer = tiny_tokenizer("llama3")
    path = tmp_path / "mine.jinja"
    path.write_text(SHAPES["chatml"][2])
    assert prepare_template(tokenizer, str(path)).end_token == "<|im_end|>"
    assert prepare_template(tokenizer, SHAPES["zephyr"][2]).end_token == "<|end_of_text|>"
    with pytest.raises(ConfigError, match="'chatm1' is no file and no template; did you mean 'chatml'"):
        prepare_template(tokenizer, "chatm1")
    with pytest.raises(ConfigError, match="does not write the assistant's answer"):
        prepare_template(tokenizer, "{{ 'nothing' }}")
    with pytest.raises(ConfigError, match="chat_template: "):
        prepare_template(tokenizer, "{{ messages[7].content }}{% if %}")


# --------------------------------------------------------------------------------- length


def brute_force(tokenizer, pair, limit):
    """The obvious twin of the length policy: leave out one more turn until it fits."""
    for prompt in [pair.prompt, *shorter_prompts(pair.prompt)]:
        tokens, _ = encode(tokenizer, replace(pair, prompt=prompt))
        if len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected)) <= limit:
            return tokens
    return None


@pytest.mark.parametrize("shape", ["chatml", "mistral", "gemma"])
@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.integers(1, 12), min_size=1, max_size=7).filter(lambda w: len(w) % 2 == 1),
    answers=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    has_system=st.booleans(),
    limit=st.integers(4, 120),
)
def test_the_oldest_turns_go_first_the_same_on_both_sides(shape, words, answers, has_system, limit):
    """peers 1, 14, 20, 29: no side is cut, none is empty, the last question and both ends stay."""
    tokenizer = tiny_tokenizer(shape)
    prompt = [system("be kind")] if has_system else []
    for place, number in enumerate(words):
        prompt.append((user if place % 2 == 0 else bot)(" ".join([f"w{place}"] * number)))
    pair = chat(prompt, " ".join(["yes"] * answers[0]), " ".join(["no"] * answers[1]))
    tokens, counts = encode(tokenizer, pair, max_length=limit)
    expected = brute_force(tokenizer, pair, limit)
    if expected is None:
        assert tokens is None
        ((reason, count),) = counts.dropped.items()
        shortest, _ = encode(
            tokenizer, replace(pair, prompt=[prompt[0], prompt[-1]] if has_system else prompt[-1:])
        )
        alone = max(len(shortest.chosen), len(shortest.rejected)) >= limit
        what = "an answer alone" if alone else "the last question with its answer"
        assert (reason, count) == (f"too long: {what} exceeds max_length {limit}", 1)
        return
    assert (tokens.prompt, tokens.chosen, tokens.rejected) == (
        expected.prompt,
        expected.chosen,
        expected.rejected,
    )
    text = tokenizer.decode(tokens.prompt)
    assert f"w{len(words) - 1}" in text and ("be kind" in text) == has_system
    full, _ = encode(tokenizer, pair)
    assert (tokens.chosen, tokens.rejected) == (full.chosen, full.rejected)
    cut = len(tokens.prompt) < len(full.prompt)
    assert counts.changed.get("oldest turns left out to fit max_length", 0) == cut


def test_shorter_prompts_keep_the_system_turn_and_start_with_a_user_turn():
    prompt = [
        system("S"),
        user("A"),
        bot("B"),
        user("C"),
        {"role": "tool", "content": "D"},
        bot("E"),
        user("F"),
    ]
    assert shorter_prompts(prompt) == [[prompt[0], *prompt[3:]], [prompt[0], prompt[6]]]
    assert shorter_prompts([bot("hello"), user("A")]) == [[user("A")]]
    assert shorter_prompts([user("A")]) == [] == shorter_prompts("text")


def test_plain_text_that_is_too_long_is_dropped_whole():
    tokenizer = tiny_tokenizer("chatml")
    pair = text_pair("one two three four five six seven eight nine", " a", " b")
    tokens, counts = encode(tokenizer, pair, max_length=8)
    assert tokens is None
    assert counts.dropped == {"too long: the last question with its answer exceeds max_length 8": 1}


def test_a_pair_that_fits_exactly_stays():
    tokenizer = tiny_tokenizer("chatml")
    pair = chat([user("Q")], "A", "A longer answer")
    full, _ = encode(tokenizer, pair)
    length = len(full.prompt) + max(len(full.chosen), len(full.rejected))
    assert encode(tokenizer, pair, max_length=length)[0] == full
    assert encode(tokenizer, pair, max_length=length - 1)[0] is None
    longer = replace(pair, prompt=[user("old"), bot("older"), *pair.prompt])
    assert encode(tokenizer, longer, max_length=length)[0] == full


# --------------------------------------------------------------------------------- real rows, streams


@pytest.mark.parametrize("shape", EXPECTED)
def test_real_rows_pass_every_family(shape):
    from pathlib import Path

    data = Path(__file__).parent / "data"
    pairs = read_preferences([data / "hh_excerpt.jsonl", data / "politeness_excerpt.json"]).pairs
    tokenizer = tiny_tokenizer(shape)
    encoder = PairTokenizer(tokenizer, max_length=2000)
    found = encoder.encode(pairs)
    assert None not in found and not encoder.counts.dropped
    for pair, tokens in zip(pairs, found, strict=True):
        assert tokens.source == pair.source
        for side, answer in ((tokens.chosen, pair.chosen), (tokens.rejected, pair.rejected)):
            text = tokenizer.decode(side).removesuffix(END[shape]).removeprefix("<think>\n\n</think>\n\n")
            assert text.strip() == answer[-1]["content"].strip()
        assert tokenizer.decode(tokens.prompt).count(pair.prompt[-1]["content"].strip()) >= 1


def test_streaming_gives_the_same_tokens_and_counts():
    tokenizer = tiny_tokenizer("chatml")
    pairs = [chat([user(f"Q{i}")], f"A{i}", f"B{i}" if i % 5 else f"A{i}") for i in range(1200)]
    encoder = PairTokenizer(tokenizer, max_length=64)
    expected = [tokens for tokens in encoder.encode(pairs) if tokens is not None]
    counts = RowCounts()
    assert list(stream_tokenized(iter(pairs), tokenizer, max_length=64, counts=counts)) == expected
    assert counts.dropped == encoder.counts.dropped and len(expected) == 960
    bare = list(stream_tokenized(iter(pairs), tokenizer, max_length=64, drop_rejected=True))
    assert [(t.prompt, t.chosen, t.rejected) for t in bare] == [(t.prompt, t.chosen, []) for t in expected]
