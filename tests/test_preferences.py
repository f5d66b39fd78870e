"""Every accepted format gives the pairs a person would write down by hand; every other row gives a reason."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turns import bot, system, user

from orpo.data.counts import RowCounts
from orpo.data.formats import FORMATS, common_words
from orpo.data.preferences import read_preferences, resample, split_holdout, stream_preferences
from orpo.data.rows import SAMPLE
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair

DATA = Path(__file__).parent / "data"


def read(*rows, **options):
    return read_preferences(list(rows), **{"max_dropped": 1.0, **options})


def one(row, expected_format, **options):
    """The parts of the only pair of the only row."""
    found = read(row, **options)
    assert found.format.name == expected_format
    (pair,) = found.pairs
    return pair.prompt, pair.chosen, pair.rejected


def several(row, expected_format, **options):
    found = read(row, **options)
    assert found.format.name == expected_format
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in found.pairs]


HELLO = [user("Hi"), bot("Hello"), user("Name?")]
YES_NO = ([bot("Yes")], [bot("No")])

# --------------------------------------------------------------------------------- formats


def test_standard_with_prompt_is_plain_text():
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert one(row, "standard") == ("The sky is", " blue.", " green.")


def test_standard_with_the_prompt_repeated_in_both_sides():
    rows = [{"prompt": f"Q{i}:", "chosen": f"Q{i}: a", "rejected": f"Q{i}: b"} for i in range(3)]
    assert one(rows[0], "standard_repeated") == ("Q0:", " a", " b")
    plain = {"prompt": "Z", "chosen": "other", "rejected": "words"}
    said = (
        r"row:3: the sides of 3 of the first 4 rows begin with their prompt, and those of 1 do not, this one"
    )
    with pytest.raises(DataError, match=said + " first; .* data_format: standard .* on_bad_row: skip"):
        read(*rows, plain)
    with pytest.raises(DataError, match=r"row:0: the sides of 1 of the first 2 rows begin"):
        read(plain, rows[0])  # as many as not
    with pytest.raises(DataError, match=r"row:1: 'chosen' does not begin with the prompt, as those of most"):
        read(rows[0], plain, data_format="standard_repeated")
    several = {"prompt": "Q:", "chosen": "Q: a", "rejected": ["Q: b", "Q: c"]}
    assert [pair.rejected for pair in read(several).pairs] == [" b", " c"]
    mixed = read(rows[0], plain, plain | {"prompt": "Y"})  # some answers repeat a short prompt
    assert mixed.format.name == "standard" and mixed.pairs[0].chosen == "Q0: a"
    (line,) = [line for line in mixed.notices if "although" in line]
    assert line.endswith(
        "1 of 3 rows train although both sides begin with their prompt, which is then read twice"
        " (first: row:0)"
    )


def test_repeated_prompts_behind_the_first_rows_stop_the_run():
    plain = [{"prompt": f"Z{i}", "chosen": "other", "rejected": "words"} for i in range(SAMPLE)]
    rows = [{"prompt": f"Q{i}:", "chosen": f"Q{i}: a", "rejected": f"Q{i}: b"} for i in range(SAMPLE + 1)]
    with pytest.raises(DataError, match=f"row:{SAMPLE}: {SAMPLE + 1} of {2 * SAMPLE + 1} rows begin both"):
        read(*plain, *rows)
    assert len(read(*plain, *rows, data_format="standard")) == 2 * SAMPLE + 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "red."}, "one side begins with"),
        (
            {
                "prompt": "The sky is",
                "chosen": "The sky is blue.",
                "rejected": "The sky is red.",
                "system": "S",
            },
            "both sides begin with",
        ),
        (
            {"prompt": [{"role": "user", "content": "Why? "}], "chosen": "Why? So.", "rejected": "Why? Not."},
            "both sides begin with",
        ),
        ({"prompt": "Hi", "chosen": "Hint", "rejected": "Hide"}, None),
    ],
)
def test_answers_that_repeat_their_prompt_are_counted_in_every_format(row, said):
    lines = [
        line
        for line in read(row, {"prompt": "Z", "chosen": "a", "rejected": "b"}).notices
        if "although" in line
    ]
    assert len(lines) == (said is not None) and all(str(said) in line for line in lines)


def test_implicit_prompt_of_texts_ends_between_words():
    row = {"chosen": "The sky is blue now.", "rejected": "The sky is black."}
    assert one(row, "standard_implicit") == ("The sky is", " blue now.", " black.")


def test_implicit_prompt_ends_with_the_last_header_inside_the_common_beginning():
    """peers 5: answers that begin alike are scored whole, and no special token is cut."""
    head = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    row = {"chosen": head + "The answer to that is yes", "rejected": head + "The answer to that is no"}
    assert one(row, "standard_implicit") == (head, "The answer to that is yes", "The answer to that is no")
    row = {"chosen": "Q: x\nAnswer: I say yes", "rejected": "Q: x\nAnswer: I say no"}
    assert one(row, "standard_implicit")[0] == "Q: x\nAnswer:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("a b<|im_start|>x", "a b<|im_end|>y", "a b"),  # peers 5: not inside a special token
        ("Say it: yes", "Say it: yesterday", "Say it:"),
        ("It isn't so", "It isn't", "It"),
        ("Reply:\nyes", "Reply:\nno", "Reply:\n"),
        ("問い。はい", "問い。いいえ", "問い。"),
        ("x_a", "x_b", ""),
        ("same", "same and more", ""),
        ("It is so", "It is so and so", "It is"),
    ],
)
def test_common_words_cuts_no_word_and_no_special_token(chosen, rejected, prompt):
    assert chosen[: common_words(chosen, rejected)] == prompt


@given(
    st.text("ab _<|>\n.", max_size=30), st.text("ab _<|>\n.", max_size=8), st.text("ab _<|>\n.", max_size=8)
)
def test_common_words_is_a_common_beginning_that_splits_no_word(start, one, other):
    cut = common_words(start + one, start + other)
    for text in (start + one, start + other):
        assert text[:cut] == (start + one)[:cut]
        assert not (text[cut - 1 : cut].isalnum() and text[cut : cut + 1].isalnum()) or cut == 0


def test_conversational_with_explicit_prompt():
    row = {"prompt": HELLO, "chosen": YES_NO[0], "rejected": YES_NO[1]}
    assert one(row, "conversational") == (HELLO, *YES_NO)


def test_conversational_with_implicit_prompt():
    row = {"chosen": [*HELLO, bot("Yes")], "rejected": [*HELLO, bot("No")]}
    assert one(row, "conversational_implicit") == (HELLO, *YES_NO)


def test_conversations_that_part_before_the_last_turn():
    row = {
        "chosen": [user("Q"), bot("A"), user("R"), bot("B")],
        "rejected": [user("Q"), bot("C"), user("S"), bot("D")],
    }
    prompt, chosen, rejected = one(row, "conversational_implicit")
    assert prompt == [user("Q")]
    assert chosen == [bot("A"), user("R"), bot("B")] and rejected == [bot("C"), user("S"), bot("D")]
    row = {"chosen": [user("Q"), bot("A")], "rejected": [user("Q"), bot("A"), user("R"), bot("B")]}
    assert one(row, "conversational_implicit") == ([user("Q")], [bot("A")], [bot("A"), user("R"), bot("B")])


def test_ultrafeedback_has_a_string_prompt_beside_whole_conversations():
    row = {
        "prompt": "Q", "prompt_id": "1f", "messages": [user("Q"), bot("Yes")],
        "chosen": [user("Q"), bot("Yes")], "rejected": [user("Q"), bot("No")], "score_chosen": 8.0,
    }  # fmt: skip
    assert one(row, "conversational") == ([user("Q")], *YES_NO)
    row = {"prompt": "Q", "chosen": YES_NO[0], "rejected": YES_NO[1], "system": "Be brief."}
    assert one(row, "conversational") == ([system("Be brief."), user("Q")], *YES_NO)


def test_hh_transcripts():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name?\n\nAssistant:"
    row = {"chosen": start + " Yes", "rejected": start + " No"}
    assert one(row, "hh") == (HELLO, *YES_NO)
    assert one({"prompt": start, "chosen": " Yes", "rejected": " No"}, "hh") == (HELLO, *YES_NO)


def test_hh_excerpt_reads_whole():
    found = read_preferences(DATA / "hh_excerpt.jsonl")
    assert (found.format.name, len(found)) == ("hh", 20)
    raw = [json.loads(line) for line in (DATA / "hh_excerpt.jsonl").read_text(encoding="utf-8").splitlines()]
    for pair, row in zip(found.pairs, raw, strict=True):
        for side, text in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
            names = {"user": "Human", "assistant": "Assistant"}
            told = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in [*pair.prompt, *side])
            assert told.split() == text.split()


def test_instruction_columns():
    row = {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4", "system": "Be exact."}
    assert one(row, "instruction") == ([system("Be exact."), user("Add\n\n1 2")], [bot("3")], [bot("4")])
    assert one({**row, "input": "", "system": None}, "instruction")[0] == [user("Add")]
    intel = {"system": "", "question": "Add", "chosen": "3", "rejected": "4"}
    assert one(intel, "instruction") == ([user("Add")], [bot("3")], [bot("4")])
    icr = {"system": "", "input": "Add", "chosen": "3", "rejected": "4"}
    assert one(icr, "instruction") == ([user("Add")], [bot("3")], [bot("4")])
    row = {"system": "S", "prompt": "Add", "chosen": "3", "rejected": "4"}
    assert one(row, "instruction") == ([system("S"), user("Add")], [bot("3")], [bot("4")])


def test_alpaca_ranking_with_history_and_with_output_list():
    row = {"instruction": "Name?", "history": [["Hi", "Hello"]], "output": ["Yes", "No"]}
    assert one(row, "instruction") == (HELLO, *YES_NO)
    found = several({"instruction": "Q", "output": ["Yes", "No", "Never"]}, "instruction")
    assert [rejected for _, _, rejected in found] == [[bot("No")], [bot("Never")]]


def test_politeness_excerpt_reads_whole():
    found = read_preferences(DATA / "politeness_excerpt.json")
    raw = json.loads((DATA / "politeness_excerpt.json").read_text(encoding="utf-8"))
    assert (found.format.name, len(found)) == ("instruction", 20)
    assert [pair.chosen[-1]["content"] for pair in found.pairs] == [row["chosen"] for row in raw]


def test_sharegpt_ranking():
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "Name?"},
        ],
        "chosen": {"from": "gpt", "value": "Yes"},
        "rejected": {"from": "gpt", "value": "No"},
        "system": "S",
    }
    assert one(row, "sharegpt") == ([system("S"), *HELLO], *YES_NO)


def test_axolotl_chat_template_with_field_maps():
    row = {"messages": HELLO, "chosen": bot("Yes"), "rejected": bot("No")}
    assert one(row, "messages") == (HELLO, *YES_NO)

    def say(role, text):
        return {"speaker": role, "text": text}

    mapped = {
        "talk": [say("human", "Hi"), say("gpt", "Hello"), say("human", "Name?")],
        "better": say("gpt", "Yes"), "worse": say("gpt", "No"),
    }  # fmt: skip
    columns = {
        "messages": "talk",
        "chosen": "better",
        "rejected": "worse",
        "role": "speaker",
        "content": "text",
    }
    assert one(mapped, "messages", columns=columns) == (HELLO, *YES_NO)


LINE = '{"prompt": "Q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "p.jsonl",
            f"{LINE},\n{LINE},\n",
            r"p\.jsonl:1: is not JSON \(.*\) .*; write one JSON object a line",
        ),
        (
            "p.jsonl",
            f"[{LINE}]\n",
            r"p\.jsonl:1: is a list; expected an object .*; write .* or name .* \.json",
        ),
        (
            "p.jsonl",
            '{\n  "prompt": "Q"\n}\n',
            r"p\.jsonl:1: is not JSON .*\(none of the first 3 rows can be read\); write",
        ),
        ("p.jsonl", '"a"\n7\n', r"p\.jsonl:1: is a str; expected an object"),
        (
            "p.jsonl",
            '{"prompt":"aaa',
            r"p\.jsonl:1: is not JSON \(.*\); write one",
        ),
        (
            "p.json",
            '{"data": [\n1]}\n{"data": [\n1]}',
            r"p\.json:1: is not JSON .*; write one JSON array of the",
        ),
        ("p.csv", 'prompt,chosen,rejected\nQ,"a"x,b\nQ,"a"x,b\n', r"p\.csv:2: is not CSV .*a cell twice"),
        (
            "p.csv",
            "prompt,chosen,rejected\nQ,caf\xe9,b\n",
            r"p\.csv:2: holds bytes that are not UTF-8 \(0xe9\)",
        ),
    ],
)
def test_where_no_row_can_be_read_the_first_says_why(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content.encode("cp1252"))
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(DataError, match=f"^{said}"):
            read_preferences(str(tmp_path / name), on_bad_row=on_bad_row)


def test_multi_turn_with_a_prompt_column_keeps_every_user_turn():
    """peers 25: the prompt column must not overwrite earlier user turns."""
    row = {"prompt": "Name?", "chosen": [*HELLO, bot("Yes")], "rejected": [*HELLO, bot("No")]}
    assert one(row, "conversational") == (HELLO, *YES_NO)
    row = {
        "prompt": "Name?",
        "chosen": [system("S"), *HELLO, bot("Yes")],
        "rejected": [system("S"), *HELLO, bot("No")],
    }
    assert one(row, "conversational") == ([system("S"), *HELLO], *YES_NO)


def test_messages_with_rejected():
    row = {"messages": [*HELLO, bot("Yes")], "rejected": "No"}
    assert one(row, "messages") == (HELLO, *YES_NO)
    row = {"messages": [*HELLO, bot("Yes")], "rejected_response": "No"}
    assert one(row, "messages") == (HELLO, *YES_NO)
    row = {"messages": [*HELLO, bot("Yes")], "rejected_messages": [*HELLO, bot("No")]}
    assert one(row, "messages") == (HELLO, *YES_NO)


def test_several_rejected_become_several_pairs():
    row = {"prompt": "P", "chosen": "a", "rejected": ["b", "c"]}
    assert several(row, "standard") == [("P", "a", "b"), ("P", "a", "c")]
    row = {"prompt": HELLO, "chosen": YES_NO[0], "rejected": [[bot("b")], [bot("c")]]}
    assert several(row, "conversational") == [(HELLO, YES_NO[0], [bot("b")]), (HELLO, YES_NO[0], [bot("c")])]


def test_ranked_and_scored_lists_give_the_best_against_each_worse():
    expected = [([user("Q")], [bot("best")], [bot("good")]), ([user("Q")], [bot("best")], [bot("bad")])]
    row = {"prompt": "Q", "responses": ["bad", "best", "good"], "scores": [1, 9.5, 5]}
    assert several(row, "ranked") == expected
    raw = {
        "instruction": "Q",
        "completions": [
            {"response": "bad", "overall_score": 1.0},
            {"response": "best", "overall_score": 9},
            {"response": "good", "overall_score": 3},
        ],
    }
    assert several(raw, "ranked") == expected
    nectar = {
        "prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name?\n\nAssistant: ",
        "answers": [{"answer": "No", "rank": 2.0}, {"answer": "Yes", "rank": 1.0}],
    }
    assert several(nectar, "ranked") == [(HELLO, *YES_NO)]
    equal = read({"prompt": "Q", "responses": ["a", "b"], "scores": [1, 1]}, row)
    assert equal.counts.dropped == {"chosen and rejected are identical": 1} and len(equal) == 2


def test_tools_and_tool_calls():
    """peers 4: tool schemas reach the pair."""
    schema = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    told = {"role": "tool", "name": "add", "content": "3"}
    row = {
        "chosen": [user("Q"), asked, told, bot("3")],
        "rejected": [user("Q"), asked, told, bot("4")],
        "tools": schema,
    }
    (pair,) = read(row).pairs
    assert pair.tools == schema
    assert pair.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]}  # fmt: skip
    assert pair.prompt[2] == {"role": "tool", "content": "3", "name": "add"}
    (pair,) = read({**row, "tools": json.dumps(schema)}).pairs
    assert pair.tools == schema
    sharegpt = {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        "rejected": {"from": "gpt", "value": "No"},
    }
    (pair,) = read(sharegpt).pairs
    assert pair.chosen[0]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_keys_that_arrow_fills_with_null_are_left_out():
    filled = {"role": "user", "content": "Q", "name": None, "tool_calls": None}
    row = {
        "chosen": [filled, {**bot("Yes"), "name": None}],
        "rejected": [filled, {**bot("No"), "name": None}],
    }
    assert one(row, "conversational_implicit") == ([user("Q")], *YES_NO)


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "Na"}, {"type": "text", "text": "me?"}]
    row = {"prompt": [user(parts)], "chosen": YES_NO[0], "rejected": YES_NO[1]}
    assert one(row, "conversational")[0] == [user("Name?")]


def test_every_format_name_can_be_forced_and_says_so():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    found = read(row, data_format="instruction")
    assert (found.format.name, found.format.reason) == ("instruction", "as data_format says")
    assert found.pairs[0].prompt == [user("Q")]
    with pytest.raises(ConfigError, match="data_format: 'alpaca' is unknown"):
        read(row, data_format="alpaca")
    assert len({one.name for one in FORMATS}) == len(FORMATS) == 13


# --------------------------------------------------------------------------------- what becomes of rows

GOOD = {"prompt": "P", "chosen": "a", "rejected": "b"}


def test_a_malformed_row_stops_with_file_line_field_and_remedy(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, {"prompt": "P", "chosen": 3, "rejected": "b"}])))
    with pytest.raises(
        DataError,
        match=r"^pairs\.jsonl:2: 'chosen' is an int; expected text; fix the row or set on_bad_row: skip$",
    ):
        read_preferences(path)
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(DataError, match=r"^pairs\.jsonl:2: .*not JSON.* or set on_bad_row: skip$"):
        read_preferences(path)


@pytest.mark.parametrize(
    ("good", "bad", "field"),
    [
        (GOOD, {"chosen": "a", "rejected": "b"}, "prompt"),
        (GOOD, {"prompt": "P", "rejected": "b"}, "chosen"),
        (GOOD, {"prompt": "P", "chosen": "a", "rejected": 1.5}, "rejected"),
        (GOOD, {**GOOD, "tools": "not json"}, "tools"),
        (GOOD, {**GOOD, "tools": {"a": 1}}, "tools"),
        (
            {"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("b")]},
            {"chosen": "a", "rejected": 2},
            "rejected",
        ),
        (
            {"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("b")]},
            {"chosen": [{"role": "critic", "content": "a"}], "rejected": []},
            "chosen",
        ),
        (
            {"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("b")]},
            {"chosen": [{"role": "user"}], "rejected": [user("Q"), bot("b")]},
            "chosen",
        ),
        (
            {"messages": HELLO, "chosen": bot("a"), "rejected": bot("b")},
            {"chosen": bot("a"), "rejected": bot("b")},
            "messages",
        ),
        (
            {"instruction": "Q", "chosen": "a", "rejected": "b"},
            {"instruction": 1, "chosen": "a", "rejected": "b"},
            "instruction",
        ),
        (
            {"prompt": "Q", "responses": ["a", "b"], "scores": [2, 1]},
            {"prompt": "Q", "responses": ["a", "b"], "scores": [1]},
            "scores",
        ),
    ],
)
def test_a_malformed_row_is_skipped_and_counted_on_request(good, bad, field):
    with pytest.raises(DataError, match=f"^row:3: '{field}' "):
        read(good, good, good, bad)
    found = read(good, good, good, bad, on_bad_row="skip")
    assert len(found) == 3 and found.counts.total == 4
    ((reason, count),) = found.counts.skipped.items()
    assert reason.startswith(f"'{field}'") and count == 1 and found.counts.examples[reason] == "row:3"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "rejected": "a"}, "chosen and rejected are identical"),
        ({**GOOD, "rejected": " a\n"}, "chosen and rejected are identical"),
        ({**GOOD, "chosen": " \n"}, "empty chosen answer"),
        (
            {**GOOD, "rejected": ""},
            "empty rejected answer",
        ),  # an empty text is an empty answer, not an SFT row
        ({**GOOD, "prompt": ""}, "no prompt: the sides share no beginning"),
        ({**GOOD, "rejected": None}, "no rejected answer (sft_rows: drop)"),
    ],
)
def test_a_well_formed_row_that_cannot_train_is_dropped_and_counted(row, reason):
    found = read(GOOD, row)
    assert found.counts.dropped == {reason: 1} and found.counts.examples == {reason: "row:1"}
    assert (len(found), found.counts.total, found.counts.kept) == (1, 2, 1)


def test_a_conversation_that_does_not_end_with_the_assistant_is_dropped():
    row = {"chosen": [user("Q"), bot("a"), user("R")], "rejected": [user("Q"), bot("b")]}
    good = {"chosen": [user("Q"), bot("a")], "rejected": [user("Q"), bot("b")]}
    assert read(good, row).counts.dropped == {"the last turn of chosen is not the assistant's": 1}


def test_more_than_max_dropped_stops_with_the_table():
    rows = [GOOD] * 8 + [{**GOOD, "rejected": ""}] * 2
    with pytest.raises(
        DataError,
        match=r"the data: 2 of 10 rows \(20%\) cannot be used, .* dropped 2: empty rejected answer",
    ):
        read_preferences(rows)
    assert len(read_preferences(rows, max_dropped=0.2)) == 8
    with pytest.raises(DataError, match="no row can be used"):
        read({**GOOD, "rejected": ""})
    with pytest.raises(DataError, match="empty"):
        read()


@pytest.mark.parametrize(
    ("rows", "format_"),
    [
        ([GOOD, {"prompt": "P", "chosen": "a"}, {"prompt": "P", "completion": "a"}], "standard"),
        ([{"messages": [*HELLO, bot("Yes")], "rejected": None}], "messages"),
        ([{"instruction": "Q", "output": "a"}], "instruction"),
        ([{"prompt": HELLO, "completion": [bot("Yes")]}], "conversational"),
        ([{"chosen": [*HELLO, bot("Yes")], "rejected": None}], "conversational_implicit"),
    ],
)
def test_sft_rows_are_used_on_request(rows, format_):
    found = read(*rows, sft_rows="use")
    assert found.format.name == format_ and len(found) == len(rows)
    assert found.pairs[-1].rejected is None and found.pairs[-1].prompt


def test_unknown_columns_are_named():
    with pytest.raises(DataError, match="cannot tell the format from the columns bad, good"):
        read({"good": "a", "bad": "b"})
    with pytest.raises(DataError, match="cannot tell the format from the columns ask, chosen, rejected"):
        read({"ask": "Q", "chosen": "yes", "rejected": "no"})
    assert one(
        {"p": "P", "good": "a", "bad": "b"},
        "standard",
        columns={"prompt": "p", "chosen": "good", "rejected": "bad"},
    )


def test_every_row_of_the_documentation_is_read_as_it_says():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", page, flags=re.MULTILINE)
    assert {name for name, _ in rows} == {one.name for one in FORMATS}
    for name, row in rows:
        found = read(json.loads(row))
        assert found.format.name == name and len(found) == 1, row
        assert found.pairs[0].is_text == name.startswith(("standard", "rendered", "prepared"))


def test_group_comes_from_the_source_or_dataset_column():
    found = read({**GOOD, "source": "wiki"}, {**GOOD, "dataset": "web"}, {**GOOD, "source": 3})
    assert [pair.group for pair in found.pairs] == ["wiki", "web", None]


# --------------------------------------------------------------------------------- sets


def write_pairs(path, name, number):
    rows = [{"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(number)]
    (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(path / f"{name}.jsonl")


def test_weights_say_how_often_each_pair_is_seen(tmp_path):
    one, two = write_pairs(tmp_path, "one", 10), write_pairs(tmp_path, "two", 4)
    found = read_preferences({one: 0.5, two: 2.5})
    prompts = [pair.prompt for pair in found.pairs]
    assert (
        sum(prompt.startswith("one") for prompt in prompts)
        == 5
        == len({p for p in prompts if p.startswith("one")})
    )
    assert sorted(prompts.count(f"two{i}") for i in range(4)) == [2, 2, 3, 3]
    assert f"{one}: weight 0.5: 5 of 10 pairs in an epoch" in found.notices
    assert prompts == [pair.prompt for pair in read_preferences({one: 0.5, two: 2.5}).pairs]
    assert len(read_preferences([one, two])) == 14
    with pytest.raises(ConfigError, match="not in 0 to 1000"):
        read_preferences({one: -1})


@given(st.integers(0, 20), st.floats(0, 3), st.integers(0, 3))
def test_resampling_repeats_each_pair_floor_or_ceiling_times(number, weight, seed):
    pairs = [PreferencePair(str(i), "a", "b") for i in range(number)]
    taken = resample(pairs, weight, seed)
    assert len(taken) == number * int(weight) + round((weight % 1) * number)
    assert all(taken.count(pair) in (int(weight), int(weight) + 1) for pair in pairs)


@given(st.lists(st.integers(0, 9), max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_holdout_is_by_prompt_and_loses_nothing(prompts, fraction, seed):
    pairs = [
        PreferencePair([user(str(p))], [bot("a")], [bot("b")], source=str(i)) for i, p in enumerate(prompts)
    ]
    train, held = split_holdout(pairs, fraction, seed)
    assert not {pair.prompt_key() for pair in train} & {pair.prompt_key() for pair in held}
    assert sorted([*train, *held], key=lambda pair: int(pair.source)) == pairs
    assert (train, held) == split_holdout(pairs, fraction, seed)
    distinct = len(set(prompts))
    number = len({pair.prompt_key() for pair in held})
    assert number == (
        0 if fraction == 0 or distinct < 2 else min(max(1, round(fraction * distinct)), distinct - 1)
    )


def test_streaming_gives_the_same_pairs_one_by_one():
    rows = iter([GOOD] * 300 + [{**GOOD, "rejected": ""}, {**GOOD, "chosen": "z"}])
    stream = stream_preferences(rows)
    assert next(stream).prompt == "P"
    assert sum(1 for _ in rows) > 0  # not read to the end
    assert len(list(stream_preferences([GOOD, {**GOOD, "rejected": ""}]))) == 1
    with pytest.raises(ConfigError, match="a weight needs the whole data set"):
        list(stream_preferences({"a": 0.5}))


def test_importing_the_data_path_needs_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = "import sys, orpo.data.dataset, orpo.data.findings; "
    code += "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
    )


NAMES = ["prompt", "chosen", "rejected", "messages", "conversations", "instruction", "input", "system"]
NAMES += ["history", "output", "answers", "scores", "tools", "source", "label", "labels", "rewards", "choice"]
NAMES += [
    "response_a",
    "response_b",
    "winner",
    "turn",
    "score_a",
    "score_b",
    "preference_strength",
    "context",
]
NAMES += ["info", "question", "chat_template_kwargs", "image", "completion"]
KEYS = ["role", "from", "content", "value", "tool_calls", "score", "messages", "text"]
TEXTS = [
    "Human: a\nAssistant: b",
    "<s>a",
    "<|user|>a<|assistant|>b",
    "<|assistant|>",
    "[1, 2]",
    "response_a",
    "tie",
]
TEXTS += [
    '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
    "[{'role': 'user', 'content",
]
ROLES = ["user", "assistant", "tool", "x"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("ab \n:<", max_size=5)
    | st.sampled_from(TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner)
        | st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": inner})
    ),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), ANYTHING, min_size=1), min_size=1, max_size=4),
    st.sampled_from([None, *(one.name for one in FORMATS)]),
    st.sampled_from(["drop", "use"]),
)
def test_whatever_a_row_holds_it_is_read_or_told(rows, data_format, sft_rows):
    """No row, however odd, ends in anything but pairs or a `DataError`."""
    options = {"data_format": data_format, "sft_rows": sft_rows, "max_dropped": 1.0}
    try:
        found = read_preferences(rows, on_bad_row="skip", **options)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert found.counts.kept == len(found) > 0
    for pair in found.pairs:
        sides = [side for side in (pair.chosen, pair.rejected) if side is not None]
        assert pair.prompt and all(type(side) is type(pair.prompt) and side for side in sides)
        if not pair.is_text:
            turns = [turn for side in (pair.prompt, *sides) for turn in side]
            assert all(isinstance(turn["content"], str) for turn in turns)
            assert all(side[-1]["role"] == "assistant" for side in sides)


def test_what_speaks_against_rows_of_a_stream_is_counted():
    counts = RowCounts()
    list(stream_preferences([{**GOOD, "margin": -1}, GOOD, {**GOOD, "margin": -2}], counts=counts))
    said = "doubtful 2: their numbers say that the rejected answer is the better one (first: row:0)"
    assert said in counts.lines()
    assert RowCounts.from_dict(counts.to_dict()).doubtful == counts.doubtful
