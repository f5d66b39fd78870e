"""A row is read in the way that its columns prove, or the run stops in one line that says what to set."""

import ast
import csv
import io
import json

import pytest
from turns import bot, system, user

from orpo.data.columns import Columns
from orpo.data.detect import detect
from orpo.data.preferences import read_preferences
from orpo.errors import DataError

GOOD_BAD = ([bot("GOOD")], [bot("BAD")])
ASKED = [user("Q?")]
YES = [user("Q?"), bot("yes it is")]
NO = [user("Q?"), bot("no it is not")]
GIVEN = ("chosen", "rejected")


def read(*rows, **options):
    return read_preferences(list(rows), **{"max_dropped": 1.0, **options})


def pairs_of(*rows, **options):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in read(*rows, **options).pairs]


def only(row, **options):
    (pair,) = pairs_of(row, **options)
    return pair


def stops(*rows, match, **options):
    with pytest.raises(DataError, match=match) as error:
        read(*rows, **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- ranked lists


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q?", "answers": [
            {"text": "BAD", "pm_score": 1, "selected": False},
            {"text": "GOOD", "pm_score": 9, "selected": True},
        ]},
        {"prompt": "Q?", "responses": ["BAD", "GOOD"], "rewards": [0.1, 0.9]},
        {"prompt": "Q?", "responses": ["BAD", "GOOD"], "ranks": [2, 1]},
        {"prompt": "Q?", "responses": ["BAD", "GOOD"], "scores": ["1.5", "4"]},
        {"prompt": "Q?", "answers": [{"text": "BAD", "votes": 1}, {"text": "GOOD", "votes": 90}]},
        {"prompt": "Q?", "answers": [{"answer": "BAD", "rank": 2.0}, {"answer": "GOOD", "rank": 1.0}]},
        {"prompt": "Q?", "completions": [
            {"response": "BAD", "annotations": {"helpfulness": {"Rating": "1"}}},
            {"response": "GOOD", "annotations": {"helpfulness": {"Rating": "5"}}},
        ]},
        {"prompt": "Q?", "completions": [
            {"response": "BAD", "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "1"}}},
            {"response": "GOOD", "annotations": {"helpfulness": {"Rating": "3"}, "honesty": {"Rating": "5"}}},
        ]},
        {"prompt": "Q?", "completions": [
            {"response": "BAD", "overall_score": 2, "fine-grained_score": 5},
            {"response": "GOOD", "overall_score": 8, "fine-grained_score": 4},
        ]},
        {"prompt": "Q?", "responses": ["BAD", "GOOD"], "my_rm_scores": [0.1, 0.9]},
        {"prompt": "Q?", "answers": [
            {"text": "BAD", "is_accepted": False}, {"text": "GOOD", "is_accepted": True},
        ]},
        {"prompt": "Q?", "responses": ["BAD", "GOOD"], "chosen_index": 1},
        {"prompt": "Q?", "responses": [[bot("BAD")], [bot("GOOD")]], "rewards": [0, 1]},
        {"prompt": "Q?", "responses": [{**bot("BAD"), "score": 1}, {**bot("GOOD"), "score": 2}]},
        {"instruction": "Q?", "output": ["BAD", "GOOD"], "scores": [1, 2]},
        {"instruction": "Q?", "responses": [{"response": "BAD"}, {"response": "GOOD"}], "annotations": [
            {"model": "m", "rating": "2"}, {"model": "n", "rating": "4"},
        ]},
        {"instruction": "Q?", "generations": ["BAD", "GOOD"], "ratings": [1, 2]},
    ],
)  # fmt: skip
def test_a_list_of_answers_is_ranked_by_the_numbers_whose_name_says_what_they_are(row):
    assert only(row) == (ASKED, *GOOD_BAD)
    assert "ranked by" in read(row).format.reason


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"responses": ["one", "two", "three"]},
            r"nothing known says which is best; set columns: \{scores: \.\.\.\} where .* data_format: ra",
        ),
        (
            {"responses": ["one", "two"], "karma": [1, 2]},
            r"responses holds .* set columns: \{scores: karma\} where",
        ),
        (
            {"responses": ["one", "two"], "ranking": [1, 0]},
            r"\{scores: ranking\} .* \{ranks: ranking\} where 1 is best",
        ),
        (
            {"output": ["one", "two"], "karma": [1, 2]},
            r"output holds .* set columns: \{scores: karma\} where",
        ),
        (
            {"completions": [{"text": "one", "karma": 1}, {"text": "two", "karma": 3}]},
            r"set columns: \{scores: completions\.karma\}",
        ),
        (
            {"completions": ["We begin.", "We add."], "labels": [True, True]},
            r"completions with a label for each looks like the steps of one solution",
        ),
        (
            {"completions": ["Step 1: we begin.", "Step 2: we add."], "labels": [True, False]},
            "the steps of one solution",
        ),
        (
            {"completions": ["Step 1: we begin.", "Step 2: we add."], "rewards": [0.5, 1]},
            "the steps of one solution",
        ),
        (
            {"responses": ["a", "b"], "human_score": [1, 2], "judge_score": [2, 1]},
            r"numbers that disagree \(human_score, judge_score\)",
        ),
        ({"responses": ["a", "b"], "scores": [1, None]}, "'scores' does not give one number for each answer"),
        (
            {"responses": ["a", "b"], "scores": [1, float("nan")]},
            "'scores' does not give one number for each",
        ),
        (
            {"responses": ["a", "b"], "chosen_index": 2},
            "'chosen_index' is 2; expected the index of an answer",
        ),
    ],
)
def test_a_list_of_answers_of_unknown_order_stops_the_run(row, match):
    stops({"prompt": "Q?", **row}, match=match)


@pytest.mark.parametrize(
    "name",
    [
        "toxicity_score", "error_score", "down_votes", "harm_rating", "rank_score", "negative_reward",
        "novelty_score", "hallucinationScore", "mean_toxicity_score", "score_down_vote",
        "model_refusal_score", "ai_detector_model_score", "human_edit_score", "refusal_reward", "flag_votes",
    ],
)  # fmt: skip
def test_numbers_of_which_more_may_be_worse_rank_nothing(name):
    match = rf"set columns: \{{scores: (answers\.)?{name}\}} where more is better, \{{ranks"
    stops({"prompt": "Q?", "responses": ["a", "b"], name: [0.1, 0.9]}, match=match)
    answers = [{"text": "a", name: 1}, {"text": "b", name: 2}]
    stops({"prompt": "Q?", "answers": answers}, match=match)
    rated = [
        {"response": text, "annotations": {"helpfulness": {"Rating": good}, name: {"Rating": more}}}
        for text, good, more in (("GOOD", 4, 1), ("BAD", 4, 5))
    ]
    stops({"prompt": "Q?", "completions": rated}, match="nothing known says which is best")


@pytest.mark.parametrize(
    "name",
    [
        "gpt4_score",
        "num_upvotes",
        "harmlessness_score",
        "reward_rank",
        "my_reward",
        "llama3_8b_RMScore",
        "instruction_following_ratings",
        "ArmoRM-Score",
    ],
)
def test_numbers_by_a_judge_or_of_what_is_good_rank(name):
    values = [2, 1] if name.endswith("rank") else [1, 2]
    assert only({"prompt": "Q?", "responses": ["BAD", "GOOD"], name: values}) == (ASKED, *GOOD_BAD)


def test_chosen_and_rejected_may_name_the_answers():
    texts = {"prompt": "Q?", "response_a": "BAD", "response_b": "GOOD"}
    listed = {"prompt": "Q?", "responses": ["BAD", "GOOD"]}
    for row in (
        {**texts, "chosen": "b", "rejected": "a"},
        {**texts, "chosen": "response_b", "rejected": "response_a"},
        {**listed, "chosen": 1},
        {**listed, "chosen": 1, "rejected": 0},
        {**listed, "chosen": "1", "rejected": "0"},
    ):
        assert only(row) == (ASKED, *GOOD_BAD)
    own = {"prompt": "Q?", "chosen": "1", "rejected": "0", "responses": ["0", "1"]}
    assert only(own) == ("Q?", "1", "0")  # answers themselves
    assert only({**texts, "chosen": "good", "rejected": "a"}) == ("Q?", "good", "a")
    assert only({**own, "responses": ["x", "y"], "chosen": "7"}) == ("Q?", "7", "0")
    stops({**listed, "chosen": 2}, match="'chosen' is 2; expected the index of an answer, from 0 to 1")


def test_numbers_next_to_an_output_list_are_not_passed_over():
    row = {"instruction": "Q?", "output": ["BAD", "GOOD"], "karma": [1, 9]}
    stops(row, match=r"output holds several answers .* set columns: \{scores: karma\}")
    assert only(row, columns={"scores": "karma"}) == (ASKED, *GOOD_BAD)


def test_unknown_numbers_can_be_mapped_to_scores():
    row = {"prompt": "Q?", "responses": ["BAD", "GOOD"], "karma": [1, 9]}
    assert only(row, columns={"scores": "karma"}) == (ASKED, *GOOD_BAD)
    row = {"prompt": "Q?", "completions": [{"text": "BAD", "karma": 1}, {"text": "GOOD", "karma": 9}]}
    assert only(row, columns={"scores": "completions.karma"}) == (ASKED, *GOOD_BAD)
    row = {"prompt": "Q?", "responses": ["BAD", "GOOD"], "ranking": [2, 1]}
    assert only(row, columns={"ranks": "ranking"}) == (ASKED, *GOOD_BAD)
    row = {"prompt": "Q?", "completions": ["BAD", "GOOD"], "labels": [False, True]}
    assert only(row, columns={"scores": "labels"}) == (ASKED, *GOOD_BAD)


def test_best_first_is_read_where_data_format_asks_for_it_and_scores_still_count():
    found = read({"prompt": "Q?", "responses": ["GOOD", "BAD"]}, data_format="ranked")
    assert "the first is the best where nothing says so" in found.format.reason
    assert (found.pairs[0].chosen, found.pairs[0].rejected) == GOOD_BAD
    row = {"prompt": "Q?", "responses": ["BAD", "GOOD"], "rewards": [1, 2]}
    assert only(row, data_format="ranked") == (ASKED, *GOOD_BAD)


def test_a_row_without_scores_among_scored_ones_is_malformed_and_not_best_first():
    scored = {"prompt": "Q?", "responses": ["BAD", "GOOD"], "rewards": [1, 2]}
    stops(
        scored, scored, {"prompt": "Q?", "responses": ["a", "b"]}, match="^row:2: 'scores' does not give one"
    )


def test_answers_next_to_chosen_and_rejected_are_not_ranked():
    row = {"prompt": "Q?", "chosen": "GOOD", "rejected": "BAD", "responses": ["x", "y"], "scores": [1, 2]}
    found = read(row)
    assert found.format.name == "standard" and found.unused_columns == {"data": ["responses", "scores"]}


# -------------------------------------------------------------------------------- two answers and a label

WHOLE = {"a": [user("Q?"), bot("GOOD")], "b": [user("Q?"), bot("BAD")]}
PARTS = [{"type": "text", "text": "GOOD", "image": None, "mimeType": None}]
# Each with the first answer the better one.
JUDGED = {
    "PKU-SafeRLHF": {
        "prompt": "Q?", "response_0": "GOOD", "response_1": "BAD", "is_response_0_safe": False,
        "is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1,
    },
    "HelpSteer2": {"prompt": "Q?", "response_1": "GOOD", "response_2": "BAD", "preference_strength": -2},
    "HelpSteer3": {
        "domain": "code", "context": ASKED, "response1": "GOOD", "response2": "BAD", "overall_preference": -3,
        "individual_preference": [{"score": 1}],
    },
    "SHP": {
        "history": "Q?", "human_ref_A": "GOOD", "human_ref_B": "BAD", "labels": 1, "score_A": 20,
        "score_B": 3, "upvote_ratio": 0.9,
    },
    "chatbot_arena_conversations": {
        "model_a": "x", "model_b": "y", "winner": "model_a", "conversation_a": WHOLE["a"],
        "conversation_b": WHOLE["b"], "turn": 1, "anony": True, "language": "English",
    },
    "arena-human-preference-140k": {
        "winner": "model_a", "conversation_a": [user([{**PARTS[0], "text": "Q?"}]), bot(PARTS)],
        "conversation_b": [user([{**PARTS[0], "text": "Q?"}]), bot([{**PARTS[0], "text": "BAD"}])],
    },
    "lmsys-arena-human-preference-55k": {
        "prompt": '["Q?"]', "response_a": '["GOOD"]', "response_b": '["BAD"]', "winner_model_a": 1,
        "winner_model_b": 0, "winner_tie": 0,
    },
    "webgpt_comparisons": {
        "question": {"dataset": "eli5", "id": "1", "full_text": "Q?"}, "answer_0": "GOOD", "answer_1": "BAD",
        "score_0": 0.5, "score_1": -0.5, "quotes_0": {"title": [], "extract": []},
    },
    "alpaca_farm": {"instruction": "Q?", "input": "", "output_1": "GOOD", "output_2": "BAD", "preference": 1},
    "alpaca_eval": {"instruction": "Q?", "output_1": "GOOD", "output_2": "BAD", "preference": 1.2},
    "Unified-Feedback": {
        "conv_A": WHOLE["a"], "conv_B": WHOLE["b"], "conv_A_rating": 4.0, "conv_B_rating": 2.0,
        "num_turns": 1,
    },
    "LLMBar": {"input": "Q?", "output_1": "GOOD", "output_2": "BAD", "label": 1},
    "Preference-Collection": {
        "instruction": "Q?", "orig_response_A": "GOOD", "orig_response_B": "BAD", "orig_preference": "A",
    },
    "the model that won": {
        "prompt": "Q?", "answer_a": "GOOD", "answer_b": "BAD", "model_a": "gpt", "model_b": "vicuna",
        "winner": "gpt",
    },
    "the column that won": {"prompt": "Q?", "answer_a": "GOOD", "answer_b": "BAD", "preferred": "answer_a"},
    "ranks": {"prompt": "Q?", "answer_a": "GOOD", "answer_b": "BAD", "rank_a": 1, "rank_b": 2},
}  # fmt: skip


@pytest.mark.parametrize("row", JUDGED.values(), ids=JUDGED)
def test_two_answers_and_a_label_are_read_by_what_the_label_means(row):
    found = read(row)
    (pair,) = found.pairs
    assert (found.format.name, pair.prompt, pair.chosen, pair.rejected) == ("pairwise", ASKED, *GOOD_BAD)


@pytest.mark.parametrize(
    "name", ["PKU-SafeRLHF", "HelpSteer2", "SHP", "webgpt_comparisons", "alpaca_eval", "LLMBar"]
)
def test_labels_may_be_written_as_text_as_in_csv(name):
    row = {
        key: str(value) if isinstance(value, int | float) else value for key, value in JUDGED[name].items()
    }
    assert only(row) == (ASKED, *GOOD_BAD)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("PKU-SafeRLHF", {"better_response_id": 1}),
        ("HelpSteer2", {"preference_strength": 1}),
        ("HelpSteer3", {"overall_preference": 1}),
        ("SHP", {"labels": 0}),
        ("chatbot_arena_conversations", {"winner": "model_b"}),
        ("arena-human-preference-140k", {"winner": "model_b"}),
        ("lmsys-arena-human-preference-55k", {"winner_model_a": 0, "winner_model_b": 1}),
        ("webgpt_comparisons", {"score_0": -1.0, "score_1": 1.0}),
        ("alpaca_farm", {"preference": 2}),
        ("alpaca_eval", {"preference": 1.7}),
        ("Unified-Feedback", {"conv_A_rating": 1.0}),
        ("LLMBar", {"label": 2}),
        ("Preference-Collection", {"orig_preference": "B"}),
        ("the model that won", {"winner": "vicuna"}),
        ("the column that won", {"preferred": "answer_b"}),
        ("ranks", {"rank_a": 3}),
    ],
)
def test_the_other_label_turns_the_sides_round(name, change):
    first, second = pairs_of(JUDGED[name], {**JUDGED[name], **change})
    assert (first, second) == ((ASKED, *GOOD_BAD), (ASKED, *reversed(GOOD_BAD)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("HelpSteer2", {"preference_strength": 0}),
        ("HelpSteer3", {"overall_preference": 0}),
        ("chatbot_arena_conversations", {"winner": "tie"}),
        ("chatbot_arena_conversations", {"winner": "tie (bothbad)"}),
        ("arena-human-preference-140k", {"winner": "both_bad"}),
        ("lmsys-arena-human-preference-55k", {"winner_model_a": 0, "winner_tie": 1}),
        ("webgpt_comparisons", {"score_0": 0.0, "score_1": 0.0}),
        ("alpaca_eval", {"preference": 1.5}),
        ("Unified-Feedback", {"conv_B_rating": 4.0}),
    ],
)
def test_a_tie_is_dropped_and_counted(name, change):
    found = read(JUDGED[name], {**JUDGED[name], **change})
    assert len(found) == 1 and found.counts.dropped == {"a tie: neither answer is better": 1}


@pytest.mark.parametrize("write", [json.dumps, str, lambda value: value])
def test_lists_of_questions_and_answers_are_exchanges_also_where_one_is_missing(write):
    """One null in a list of answers, and all lists of the row trained as JSON."""

    def row(prompt, a, b):
        return {"prompt": write(prompt), "response_a": write(a), "response_b": write(b), "winner_model_a": 1,
                "winner_model_b": 0}  # fmt: skip

    good = row(["Q?", "R?"], ["x", "GOOD"], ["x", "BAD"])
    asked = [*ASKED, bot("x"), user("R?")]
    nulls = [
        row(["Q?", "R?"], ["a", "b"], ["c", None]), row(["Q?", None], ["a", "b"], ["c", "d"]),
        row(["Q?"], [None], ["c"]),
    ]  # fmt: skip
    found = read(good, *nulls)
    assert (found.pairs[0].prompt, found.pairs[0].chosen, found.pairs[0].rejected) == (asked, *GOOD_BAD)
    assert found.counts.dropped == {"a question or an answer in the lists of a row is missing (null)": 3}
    for b in (["c"], "c"):
        stops(
            good, row(["Q?", "R?"], ["a", "b"], b), match="^row:1: 'prompt' lists 2 questions, and not each"
        )


def test_a_question_that_is_a_list_may_have_answers_that_are_none():
    row = {"prompt": '["b", "a"]', "response_a": "GOOD", "response_b": "BAD", "winner": "a"}
    assert only(row) == ([user('["b", "a"]')], *GOOD_BAD)


@pytest.mark.parametrize("name", ["HelpSteer2", "HelpSteer3"])
def test_a_scale_that_does_not_go_below_1_is_not_read_by_signs(name):
    """On one from 1 to 7 every number said that the second answer is better."""
    label = next(label for label in ("preference_strength", "overall_preference") if label in JUDGED[name])
    one, seven = ({**JUDGED[name], label: number} for number in (1, 7))
    stops(one, seven, match=f"{label} is above 0 in each of the first 2 rows, .* winner .* data_format: pair")
    assert [pair[1:] for pair in pairs_of(one, seven, data_format="pairwise")] == [
        (GOOD_BAD[1], GOOD_BAD[0])
    ] * 2
    few = {**JUDGED[name], label: 3}
    assert len(read(one, few)) == 2, "a slice of a scale from -3 to 3"
    stops(*[one, few] * 6, match=f"{label} is above 0 in each of the first 12 rows")
    assert len(read(one, {**one, label: 0})) == len(read(one, {**one, label: -1})) - 1 == 1
    assert only({**one, "winner": "1"}) == (ASKED, *GOOD_BAD)  # a label before it decides


@pytest.mark.parametrize("options", [{}, {"data_format": "pairwise"}])
def test_a_strength_beside_a_winner_disagrees_only_where_it_has_signs(options):
    """A strength without signs says how much better the winner is."""
    first = {
        "prompt": "Q?",
        "response_a": "GOOD",
        "response_b": "BAD",
        "winner": "a",
        "preference_strength": 3,
    }
    second = {**first, "winner": "b", "preference_strength": 1}

    def lines(*rows):
        return [line for line in read(*rows, **options).notices if "although" in line]

    assert lines(first, second, {**first, "preference_strength": 0}) == []
    (line,) = lines(first, second, {**first, "preference_strength": -2})
    assert "1 of 3 rows" in line and "preference_strength says that the other answer" in line


def test_a_label_of_unknown_meaning_stops_the_run():
    row = {"prompt": "Q?", "response_a": "x", "response_b": "y"}
    stops(
        {**row, "label": 1},
        match="'label' is 1, which names neither response_a nor response_b; write response_a",
    )
    stops({**row, "winner": True}, match="'winner' is True")
    stops({**row, "mood": 1}, match=r"nothing known says which is better; set columns: \{winner: \.\.\.\}")
    stops(row, match="two answers")
    farm = {"prompt": "Q?", "output_1": "x", "output_2": "y"}
    stops({**farm, "preference": 0}, match="'preference' is 0")
    stops({**farm, "label": True}, match="'label' is True")
    assert only({**row, "mine": "b"}, columns={"winner": "mine"}) == (ASKED, [bot("y")], [bot("x")])


def test_the_reason_names_the_answers_and_what_decides():
    reason = read(JUDGED["PKU-SafeRLHF"]).format.reason
    assert reason.endswith("response_0 and response_1, the better one by better_response_id")
    assert read(JUDGED["webgpt_comparisons"]).format.reason.endswith("by score_0 and score_1")
    assert read(JUDGED["PKU-SafeRLHF"]).unused_columns["data"] == [
        "is_response_0_safe", "is_response_1_safe", "safer_response_id",
    ]  # fmt: skip


def test_conversations_of_several_turns_are_cut_at_the_exchange_that_was_judged():
    row = {
        "conversation_a": [*WHOLE["a"], user("R?"), bot("later")], "winner": "model_a", "turn": 1,
        "conversation_b": [*WHOLE["b"], user("R?"), bot("later")],
    }  # fmt: skip
    assert only(row) == (ASKED, *GOOD_BAD)
    prompt, chosen, _ = only({**row, "turn": 2})
    assert prompt == ASKED and chosen == [bot("GOOD"), user("R?"), bot("later")]
    row = {"prompt": '["Q?", "R?"]', "response_a": '["one", "GOOD"]', "response_b": '["one", "BAD"]'}
    row |= {"winner_model_a": 1, "winner_model_b": 0}
    assert only(row) == ([user("Q?"), bot("one"), user("R?")], *GOOD_BAD)
    prompt = "Q?\n<extra_id_1>Assistant\none\n<extra_id_1>User\nR?"
    row = {"prompt": prompt, "response_1": "GOOD", "response_2": "BAD", "preference_strength": -1}
    assert only(row) == ([user("Q?"), bot("one"), user("R?")], *GOOD_BAD)


def test_summarize_from_feedback_is_read_by_its_choice():
    row = {
        "info": {"id": "t3", "post": "I fell.", "title": "Ouch", "subreddit": "tifu", "article": None},
        "summaries": [{"text": "BAD", "policy": "sup"}, {"text": "GOOD", "policy": "ref"}], "choice": 1,
        "worker": "x", "split": "train", "extra": {"confidence": 5},
    }  # fmt: skip
    asked = "SUBREDDIT: r/tifu\n\nTITLE: Ouch\n\nPOST: I fell.\n\nTL;DR:"
    assert only(row) == ([user(asked)], *GOOD_BAD)
    article = {**row, "info": {"article": "News.", "post": None}, "choice": 0}
    assert only(article) == ([user("Article:\nNews.\n\nTL;DR:")], *reversed(GOOD_BAD))


def test_the_format_of_preference_fine_tuning_at_openai_is_read():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {
        "input": {"messages": [system("S"), user("Q?")], "tools": tools, "parallel_tool_calls": True},
        "preferred_output": [bot("GOOD")], "non_preferred_output": [bot("BAD")],
    }  # fmt: skip
    found = read(row)
    (pair,) = found.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ([system("S"), user("Q?")], *GOOD_BAD)
    assert pair.tools == tools and found.unused_columns["data"] == ["input.parallel_tool_calls"]
    assert found.format.name == "messages"
    as_text = {**row, "input": json.dumps(row["input"])}
    assert only(as_text) == ([system("S"), user("Q?")], *GOOD_BAD)


# ------------------------------------------------------------------------- conversations stored as text


def python_text(value):
    return repr(value)


def numpy_text(value):
    """As pandas writes a parquet file's lists to CSV."""
    return "[" + "\n ".join(map(repr, value)) + "]"


@pytest.mark.parametrize("write", [json.dumps, python_text, numpy_text, lambda v: json.dumps(json.dumps(v))])
def test_conversations_stored_as_text_are_parsed(write):
    row = {"prompt": "Q?", "chosen": write(YES), "rejected": write(NO)}
    assert only(row) == (ASKED, YES[1:], NO[1:])
    assert only({"chosen": row["chosen"], "rejected": row["rejected"]}) == (ASKED, YES[1:], NO[1:])
    prompted = {"prompt": write(ASKED), "chosen": write(YES[1:]), "rejected": write(NO[1:])}
    assert only(prompted) == (ASKED, YES[1:], NO[1:])
    shared = {"conversations": write([{"from": "human", "value": "Q?"}]), "chosen": "GOOD", "rejected": "BAD"}
    assert only(shared) == (ASKED, *GOOD_BAD)
    spoken = [{"speaker": "human", "text": "Q?"}, {"speaker": "gpt", "text": "yes"}]
    other = [spoken[0], {"speaker": "gpt", "text": "no"}]
    columns = {"role": "speaker", "content": "text"}
    assert only({"chosen": write(spoken), "rejected": write(other)}, columns=columns) == (
        ASKED, [bot("yes")], [bot("no")],
    )  # fmt: skip


@pytest.mark.parametrize("write", [json.dumps, python_text, numpy_text])
def test_conversations_in_the_cells_of_a_csv_file_are_parsed(tmp_path, write):
    tricky = [user("Q} {'it': \"1\"}?\n"), bot('it\'s\n"so" } {')]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerows([["chosen", "rejected"], [write(tricky), write([tricky[0], bot("no")])]])
    path = tmp_path / "d.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    (pair,) = read_preferences(path).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ([tricky[0]], [tricky[1]], [bot("no")])


def test_rows_of_pandas_are_read():
    pandas = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    frame = pandas.DataFrame([{"prompt": "Q?", "chosen": numpy.array(YES), "rejected": numpy.array(NO)}])
    (pair,) = read_preferences(frame.to_dict("records")).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, YES[1:], NO[1:])


@pytest.mark.parametrize("write", [json.dumps, python_text, lambda value: value])
def test_messages_and_tools_in_one_cell_are_taken_apart(write):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}]
    row = {
        "chosen": write({"messages": YES, "tools": tools}),
        "rejected": write({"messages": NO, "tools": tools}),
    }
    (pair,) = read(row).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, YES[1:], NO[1:])
    assert pair.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    stops(
        {**row, "rejected": write({"messages": NO, "tools": [*tools, *tools]})},
        match="'rejected' brings other tools",
    )


def test_a_stored_conversation_that_cannot_be_parsed_stops_the_run():
    cut = json.dumps(YES)[:-9]
    stops(
        {"prompt": "Q?", "chosen": cut, "rejected": cut},
        match="^row:0: 'chosen' begins like a conversation stored",
    )
    good = {"prompt": "Q?", "chosen": json.dumps(YES), "rejected": json.dumps(NO)}
    found = read(good, good, {**good, "rejected": cut}, on_bad_row="skip")
    assert len(found) == 2 and found.counts.num_dropped == 1


def test_an_answer_that_is_json_stays_text():
    row = {"prompt": "Write JSON", "chosen": '{"name": "x", "tags": ["a"]}', "rejected": '["a", "b"]'}
    assert only(row) == tuple(row.values())
    row = {"prompt": "P", "chosen": '[{"id": 1}]', "rejected": "{'id': 1}"}
    assert only(row) == tuple(row.values())


@pytest.mark.parametrize(
    ("chosen", "rejected", "counted"),
    [
        ("a", '["b", "c"]', 1), ("a", "['b', 'c']", 1), ('["a"]', '["b", "c"]', 0), ("a", '["b"]', 0),
        ("a", "[b, c]", 0), ("a", ["b", "c"], 0),
    ],
)  # fmt: skip
def test_a_rejected_answer_that_writes_a_list_is_read_as_one_and_counted(chosen, rejected, counted):
    row = {"prompt": "Q?", "chosen": chosen, "rejected": rejected}
    found = read({"prompt": "Q?", "chosen": "a", "rejected": "b"}, row)
    line = "data: 1 of 2 rows train although their rejected answer is a text that writes a list, and is read"
    assert sum(line in notice for notice in found.notices) == counted
    assert len(found.pairs) == 3 - isinstance(rejected, str)


def test_rejected_answers_that_mostly_write_lists_stop_the_run():
    rows = [{"prompt": "Q?", "chosen": "a", "rejected": text} for text in ('["b", "c"]', "['d', 'e']", "f")]
    stops(*rows, match="^row:0: the rejected answers of 2 of 3 rows are texts that write a list, .* standard")
    assert len(read(*rows, data_format="standard")) == 3
    assert len(read(*({**row, "orpo_origin": "f.jsonl:1"} for row in rows))) == 3  # prepared is as it is


def test_lists_stored_as_text_are_parsed_where_a_column_holds_lists():
    row = {"prompt": "Q?", "responses": '["BAD", "GOOD"]', "scores": "[1, 2]"}
    assert only(row) == (ASKED, *GOOD_BAD)
    row = {"prompt": "Q?", "answers": str([{"text": "BAD", "votes": 1}, {"text": "GOOD", "votes": 2}])}
    assert only(row) == (ASKED, *GOOD_BAD)
    assert ast.literal_eval(row["answers"])[0]["text"] == "BAD"


# ---------------------------------------------------------------------------------- rows rendered already

CHATML = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3 = "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|>" + LLAMA3_HEADER
HEADERS = {
    "chatml": CHATML,
    "llama3": "<|begin_of_text|>" + LLAMA3,
    "llama4": "<|header_start|>user<|header_end|>\n\nQ?<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "zephyr": "<|user|>\nQ?</s>\n<|assistant|>\n",
    "gemma": "<bos><start_of_turn>user\nQ?<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] Q? [/INST]",
    "deepseek": "<\uff5cUser\uff5c>Q?<\uff5cAssistant\uff5c>",
    "command-r": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q?<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "gpt-oss": "<|start|>user<|message|>Q?<|end|><|start|>assistant<|channel|>final<|message|>",
    "granite": "<|start_of_role|>user<|end_of_role|>Q?<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "phi4": "<|im_start|>user<|im_sep|>Q?<|im_end|><|im_start|>assistant<|im_sep|>",
    "openchat": "GPT4 Correct User: Q?<|end_of_turn|>GPT4 Correct Assistant:",
    "alpaca": "Below is a task.\n\n### Instruction:\nQ?\n\n### Response:\n",
    "vicuna": "A chat. USER: Q? ASSISTANT:",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_sides_that_hold_the_rendered_question_are_cut_at_its_last_header(header, column):
    row = {column: "Q?", "chosen": header + "yes<end>", "rejected": header + "no<end>"}
    found = read({**row, "source": "x"})
    (pair,) = found.pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == (header, "yes<end>", "no<end>")
    assert found.format.name == "rendered" and "rendered already" in found.format.reason


def test_a_rendered_prompt_and_sides_that_repeat_bos_and_header():
    bos, header = "<|begin_of_text|>", LLAMA3_HEADER
    row = {
        "prompt": bos + LLAMA3,
        "chosen": bos + header + "yes<|eot_id|>",
        "rejected": bos + header + "no<|eot_id|>",
    }
    assert only(row) == (bos + LLAMA3, "yes<|eot_id|>", "no<|eot_id|>")
    asked = LLAMA3.removesuffix(header)
    row = {"prompt": asked, "chosen": header + "yes<|eot_id|>", "rejected": header + "no<|eot_id|>"}
    assert only(row) == (LLAMA3, "yes<|eot_id|>", "no<|eot_id|>")


def test_a_rendered_prompt_of_several_turns_and_sides_that_bring_the_header():
    asked = CHATML + "a<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n"
    header = "<|im_start|>assistant\n"
    row = {"prompt": asked, "chosen": header + "yes", "rejected": header + "no"}
    assert only(row) == (asked + header, "yes", "no")


def test_rendered_sides_without_a_prompt_that_part_before_their_last_turn_stop_the_run():
    later = "<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\n"
    row = {"chosen": CHATML + "a" + later + "yes", "rejected": CHATML + "b" + later + "no"}
    stops(row, match="'chosen' is rendered already, and parts before its last turn")


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_word_that_heads_answers_is_a_part_of_an_answer_behind_another_header(header):
    """Answers that begin alike up to 'Answer:' were trained behind it alone."""
    yes, no = (f"As 2 + 2 = 4.\nAnswer: {letter}" for letter in "BC")
    sides = {"chosen": header + yes, "rejected": header + no}
    assert only({"prompt": "Q?", **sides}) == only(sides) == (header, yes, no)
    assert only({"prompt": "Q?", "chosen": header + yes}, sft_rows="use") == (header, yes, None)


def test_a_token_that_a_text_speaks_of_makes_it_no_rendered_one():
    head = "Q: what is [/INST]?\nAnswer:"
    row = {"chosen": head + " a token", "rejected": head + " a tag"}
    assert only(row) == (head, " a token", " a tag")
    row = {"prompt": "Which tokens?", "chosen": "Write [INST] first. Answer: yes", "rejected": "None."}
    assert only(row) == tuple(row.values())


def test_rendered_sides_without_a_prompt_that_part_in_their_question_stop_the_run():
    row = {"chosen": CHATML.replace("Q?", "Q a?") + "yes", "rejected": CHATML.replace("Q?", "Q b?") + "no"}
    stops(row, match="'chosen' is rendered already, and parts before its last turn")


def test_a_rendered_prompt_with_bare_answers_stays_as_it_is():
    row = {"prompt": CHATML, "chosen": "yes<|im_end|>", "rejected": "no<|im_end|>"}
    assert read(row).format.name == "standard" and only(row) == tuple(row.values())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "chosen": "<s>yes</s>", "rejected": "<s>no</s>"},
        {
            "prompt": "Q?",
            "chosen": "<|im_start|>assistant\nyes<|im_end|>",
            "rejected": "<|im_start|>assistant\nno",
        },
        {"prompt": "Other?", "chosen": CHATML + "yes", "rejected": CHATML + "no"},
        {"prompt": "Q?", "chosen": "User says: Q?\nyes", "rejected": "User says: Q?\nno"},
        {"prompt": ASKED, "chosen": [bot(CHATML + "yes")], "rejected": [bot(CHATML + "no")]},
        {"prompt": ASKED, "chosen": CHATML + "yes", "rejected": CHATML + "no"},
        {"instruction": "Q?", "output": [CHATML + "yes", CHATML + "no"]},
        {"prompt": "Q?", "responses": [CHATML + "yes", CHATML + "no"], "scores": [1, 2]},
        {"prompt": "Q?", "response_a": CHATML + "yes", "response_b": CHATML + "no", "winner": "a"},
        {
            "prompt": "Q?",
            "chosen": CHATML + "a<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\nyes",
            "rejected": CHATML + "b<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\nno",
        },
    ],
)
def test_rendered_rows_that_cannot_be_cut_stop_the_run(row):
    stops(row, match="is rendered already.* or set on_bad_row: skip$")


def test_a_rendered_row_among_plain_ones_is_malformed():
    good = {"prompt": "Q?", "chosen": "yes", "rejected": "no"}
    stops(
        good,
        good,
        {**good, "chosen": CHATML + "yes", "rejected": CHATML + "no"},
        match="^row:2: 'chosen' is rendered",
    )


def test_keys_that_are_no_text_are_said_with_their_row():
    """Rows in memory can have them; a file cannot. (Found by fuzzing.)"""
    good = {"prompt": "Q?", "chosen": "a", "rejected": "b"}
    schema = {"type": "function", "function": {"name": "f", 5: "x"}}
    for name, value in (("chat_template_kwargs", {None: 1}), ("tools", [schema])):
        stops(
            good, {**good, name: value}, match=f"^row:1: '{name}' has a key that is an? \\w+; expected text"
        )


def test_half_a_character_is_said_with_its_row():
    good = {"prompt": "Q?", "chosen": "caf\u00e9 \U0001f600", "rejected": "no"}
    for name in good:
        stops(good, {**good, name: "x \ud83d y"}, match=f"^row:1: '{name}' holds half of a character")
    for name, value in (("tools", [{"name": "\ud83d"}]), ("source", "\ud83d")):
        stops(good, {**good, name: value}, match=f"^row:1: '{name}' holds half of a character")
    found = read(good, {**good, "chosen": "x \ud83d y"}, on_bad_row="skip")
    assert len(found) == 1 and found.counts.num_dropped == 1


def test_an_answer_that_echoes_its_question_is_not_rendered():
    row = {"prompt": "2 + 2?", "chosen": "2 + 2? That is 4.", "rejected": "No idea. 2 + 2? Hm."}
    assert only(row) == tuple(row.values())


# --------------------------------------------------------------------------------------------- unpaired rows


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q?", "completion": "BAD answer", "label": False},
        {"prompt": "Q?", "completion": "BAD answer", "label": "False"},
        {"prompt": "Q?", "completion": "BAD answer", "label": 0},
        {"messages": [user("Q?"), bot("BAD answer")], "label": False},
        {"prompt": ASKED, "completion": [bot("BAD answer")], "label": False},
        {"instruction": "Q?", "input": "", "output": "BAD answer", "kto_tag": False},
        {"input": "Q?", "output": "BAD answer", "reward": -1.5},
        {"prompt": "Q?", "completion": "BAD answer", "score": 0.2},
        {"prompt": "Q?", "completion": "BAD answer", "verdict": False},
    ],
)
def test_a_bad_answer_without_a_counterpart_never_trains_and_is_not_pointed_to_sft_rows(row):
    columns = {"label": "verdict"} if "verdict" in row else None
    for sft_rows, words in (
        ("drop", "is no pair: put the good and the bad one"),
        ("use", "without a counterpart"),
    ):
        with pytest.raises(DataError, match=f"no row can .*{words}") as error:
            read(row, sft_rows=sft_rows, columns=columns)
        assert "sft_rows" not in str(error.value)


def test_good_answers_with_a_label_train_where_sft_rows_are_used():
    rows = [{"prompt": "Q?", "completion": f"a{i}", "label": i % 2 == 0} for i in range(6)]
    found = read(*rows, sft_rows="use")
    assert [pair.chosen for pair in found.pairs] == ["a0", "a2", "a4"]
    assert found.counts.dropped == {"an answer without a counterpart that label says is bad": 3}
    both = {"prompt": "Q?", "completion": "a", "label": True, "score": 0.1}
    assert len(read(both, sft_rows="use")) == 1
    found = read(both, {**both, "correct": False}, sft_rows="use")
    assert found.counts.dropped == {"an answer without a counterpart that correct says is bad": 1}
    topic = {"prompt": "Q?", "completion": "a", "label": "geography"}
    assert len(read(topic, sft_rows="use")) == 1


def test_scores_that_do_not_say_chosen_is_better_are_counted_and_printed():
    row = {"prompt": "Q?", "chosen": "a", "rejected": "b", "score_chosen": 8.0, "score_rejected": 5.0}
    found = read(row, {**row, "score_chosen": 1.0}, {**row, "score_chosen": "5.0"}, {**row, "status": "tie"})
    said = "data: 2 of 4 rows train although score_chosen is not above score_rejected (first: row:1)"
    assert said in found.notices
    assert "data: 1 of 4 rows train although status is tie (first: row:3)" in found.notices
    assert found.unused_columns["data"] == ["score_chosen", "score_rejected", "status"]
    assert len(read({"prompt": "Q?", "chosen": "a", "rejected": "b", "status": "ok"}).notices) == 2


def test_one_answer_a_row_in_columns_we_do_not_know_says_that_it_is_unpaired():
    stops({"prompt": "Q?", "response": "a", "label": True}, match=r"one answer and how good it is \(label\)")


# -------------------------------------------------------------------- prompts next to whole conversations


@pytest.mark.parametrize(
    "prompt",
    [
        [system("Be kind"), user("Q?")],
        [system("Be kind"), user("Q? ")],
        [system("Be  kind\n"), user(" Q?")],
    ],
)
@pytest.mark.parametrize("own", [[], [system("Be kind")]])
def test_a_prompt_that_whole_conversations_repeat_is_not_asked_twice(prompt, own):
    row = {"prompt": prompt, "chosen": [*own, *YES], "rejected": [*own, *NO]}
    assert only(row) == (prompt, YES[1:], NO[1:])
    assert only({**row, "rejected": NO[1:]}) == (prompt, YES[1:], NO[1:])


def test_blanks_at_the_ends_of_a_shared_turn_do_not_part_the_sides():
    row = {"chosen": YES, "rejected": [user(" Q?\n"), NO[1]]}
    assert only(row) == (ASKED, YES[1:], NO[1:])


def test_a_prompt_that_is_the_last_question_of_whole_conversations():
    earlier = [system("S"), user("Hi"), bot("Hello")]
    row = {"prompt": ASKED, "chosen": [*earlier, *YES], "rejected": [*earlier, *NO]}
    assert only(row) == ([*earlier, user("Q?")], YES[1:], NO[1:])


def test_a_prompt_that_whole_conversations_do_not_repeat_stops_the_run():
    row = {"prompt": [user("Other?")], "chosen": YES, "rejected": NO}
    stops(row, match="'chosen' begins with another question than the prompt")
    row = {"prompt": [system("S"), *ASKED], "chosen": [system("T"), *YES], "rejected": [system("T"), *NO]}
    stops(row, match="'chosen' begins with another system text than the prompt")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "Answer in French.\nQ?", "chosen": YES, "rejected": NO}, "chosen"),
        ({"prompt": "Q?", "chosen": YES, "rejected": [user("Other?"), NO[1]]}, "rejected"),
        ({"prompt": "Q?", "chosen": YES, "rejected": [[user("Other?"), NO[1]], NO]}, "rejected"),
        (
            {
                "prompt": "\n\nHuman: Answer in French. Q?\n\nAssistant:",
                "chosen": "\n\nHuman: Q?\n\nAssistant: oui",
                "rejected": "\n\nHuman: Q?\n\nAssistant: no",
            },
            "chosen",
        ),
        (
            {
                "prompt": "In French. Q?",
                "chosen": "\n\nHuman: Q?\n\nAssistant: oui",
                "rejected": "\n\nHuman: Q?\n\nAssistant: no",
            },
            "chosen",
        ),
    ],
)
def test_a_text_that_whole_conversations_do_not_ask_stops_the_run(row, field):
    stops(row, match=f"'{field}' begins with another question than the prompt; fix the row or set ")


def test_a_prompt_that_is_not_read_can_be_left_out_by_name():
    row = {"prompt": "no. 17", "chosen": YES, "rejected": NO}
    read_set = read(row, data_format="conversational_implicit")
    assert read_set.pairs[0].prompt == ASKED
    assert any("columns not used: prompt" in line for line in read_set.notices)


@pytest.mark.parametrize("prompt", ["Q?", " Q?\n", "Hi", "S Hi", "\n\nHuman: Q?\n\nAssistant:", ""])
def test_a_text_that_whole_conversations_ask_somewhere_is_their_prompt(prompt):
    earlier = [system("S"), user("Hi"), bot("Hello")]
    row = {"prompt": prompt, "chosen": [*earlier, *YES], "rejected": [*earlier, *NO]}
    assert only(row) == ([*earlier, user("Q?")], YES[1:], NO[1:])


def test_a_prompt_that_a_transcript_repeats():
    sides = {side: f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q?\n\nAssistant: {side}" for side in GIVEN}
    for prompt in ("\n\nHuman: Q?\n\nAssistant:", "Human: Hi", "Q?", "\n\nHuman: Hi\n\nAssistant: Hello"):
        asked = [user("Hi"), bot("Hello"), user("Q?")]
        assert only({"prompt": prompt, **sides}) == (asked, [bot("chosen")], [bot("rejected")])


# ---------------------------------------------------------------------------------------- a system column

PLAIN = {"prompt": "Q?", "chosen": "GOOD", "rejected": "BAD"}


@pytest.mark.parametrize("missing", [{"system": None}, {}, {"system": ""}])
@pytest.mark.parametrize("first", [True, False])
def test_one_system_text_is_trained_whatever_the_other_rows_lack(missing, first):
    rows = [{**PLAIN, **missing}] * 5
    rows.insert(0 if first else 5, {**PLAIN, "system": "S"})
    found = read(*rows)
    expected = [ASKED] * 5
    expected.insert(0 if first else 5, [system("S"), *ASKED])
    assert [pair.prompt for pair in found.pairs] == expected
    assert not any("not used" in line for line in found.notices)


@pytest.mark.parametrize("more", [{"system": "S"}, {"history": [["Hi", "Hello"]]}])
def test_what_stands_before_a_prompt_is_not_left_out_behind_the_rows_that_tell_the_format(more):
    rows = [{**PLAIN, "prompt": f"Q{n}?"} for n in range(300)]
    rows[280] |= more
    name = next(iter(more))
    stops(*rows, match=f"row:280: '{name}' would be left out: .*; set data_format: instruction or set on_bad")
    found = read(*rows, data_format="instruction").pairs
    assert len(found[280].prompt) > len(found[0].prompt) == 1
    found = read(*rows, data_format="standard")
    assert found.pairs[280].prompt == "Q280?"
    assert any(f"columns not used: {name}" in line for line in found.notices)


def test_a_system_column_is_put_before_transcripts_and_whole_conversations():
    row = {side: f"\n\nHuman: Q?\n\nAssistant: {side}" for side in GIVEN}
    assert only({**row, "system": "S"})[0] == [system("S"), *ASKED]
    row = {"conversation_a": YES, "conversation_b": NO, "winner": "a"}
    assert only({**row, "system": "S"})[0] == [system("S"), *ASKED]


def test_a_system_column_that_is_not_the_system_turn_stops_the_run():
    for row in (
        {"prompt": [system("Be kind"), *ASKED], "chosen": YES[1:], "rejected": NO[1:]},
        {"prompt": "Q?", "chosen": [system("Be kind"), *YES], "rejected": [system("Be kind"), *NO]},
        {"messages": [system("Be kind"), *ASKED], "chosen": YES[1], "rejected": NO[1]},
    ):
        stops(
            {**row, "system": "In French."}, match="'system' is another text than the system turn; keep one"
        )
        assert only({**row, "system": " Be  kind "})[0] == [system("Be kind"), *ASKED]


# ------------------------------------------------------------------------------------ what is never silent


@pytest.mark.parametrize("name", ["prompt", *GIVEN])
def test_a_transcript_among_plain_texts_stops_the_run(name):
    text = "\n\nHuman: Q?\n\nAssistant: yes"
    rows = [PLAIN, PLAIN, {**PLAIN, name: text}]
    stops(
        *rows, match=f"row:2: '{name}' is a transcript .*; write it as they are, or set data_format: standard"
    )
    assert getattr(read(*rows, data_format="standard").pairs[2], name) == text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"answers": [{"text": "a", "score": 2, "rank": 2}, {"text": "b", "score": 1, "rank": 1}]},
            "rank says that another answer is the best than score does, which decides",
        ),
        (
            {"answers": ["a", "b"], "scores": [2, 1], "ranks": [2, 1]},
            "ranks says that another answer is the best than scores does, which decides",
        ),
        ({"answers": [{"text": "a", "score": 2, "rank": 1}, {"text": "b", "score": 1, "rank": 2}]}, None),
        ({"answers": [{"text": "a", "score": 2, "best": 0}, {"text": "b", "score": 1, "best": 0}]}, None),
        ({"answers": ["a", "b"], "scores": [2, 1], "ranks": [2, None]}, None),
    ],
)
def test_numbers_that_disagree_on_the_best_answer_are_counted(row, said):
    found = read({"prompt": "Q?", **row})
    assert found.pairs[0].chosen == [bot("a")]
    lines = [line for line in found.notices if "train although" in line]
    assert lines == ([f"data: 1 of 1 rows train although {said} (first: row:0)"] if said else [])


def test_numbers_that_the_recipe_names_are_not_questioned():
    row = {"prompt": "Q?", "answers": ["a", "b"], "mine": [2, 1], "ranks": [2, 1]}
    assert not any("train although" in line for line in read(row, columns={"scores": "mine"}).notices)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": False}])
def test_turns_that_are_marked_as_not_to_be_trained_are_counted(mark):
    row = {
        "prompt": [user("Hi"), {**bot("Hello"), **mark}, user("Q?")],
        "chosen": [YES[1]],
        "rejected": [NO[1]],
    }
    key, value = next(iter(mark.items()))
    line = f"although a turn says {key}: {str(value).lower()}, which is not read (first: row:0)"
    other = {**row, "prompt": [user("Hi"), {**bot("Hello"), "weight": 1}, user("Q?")]}
    assert f"data: 1 of 2 rows train {line}" in read(row, other).notices


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": ASKED, "chosen": [bot("a")], "rejected": [bot("b"), bot("c")]}, "rejected"),
        ({"prompt": "Q?", "chosen": bot("a"), "rejected": [bot("b"), bot("c")]}, "rejected"),
        ({"prompt": ASKED, "chosen": [bot("a"), bot("b")], "rejected": [bot("c")]}, "chosen"),
        ({"prompt": ASKED, "chosen": [bot("a"), bot("b")]}, "chosen"),
        ({"messages": ASKED, "chosen": bot("a"), "rejected": [bot("b"), bot("c")]}, "rejected"),
        ({"chosen": [*ASKED, bot("a")], "rejected": [*ASKED, bot("b"), bot("c")]}, "rejected"),
    ],
)
def test_two_answers_in_a_row_stop_the_run(row, field):
    """The odds were on the second of them alone."""
    match = rf"^row:0: '{field}' has two turns of the assistant in a row, .* or set on_bad_row: skip$"
    stops(row, match=match, sft_rows="use")


def test_turns_of_the_assistant_in_a_row_that_are_one_answer_or_shared_are_read():
    several = {"prompt": ASKED, "chosen": [bot("a")], "rejected": [[bot("b")], [bot("c")]]}
    assert [rejected for *_, rejected in pairs_of(several)] == [[bot("b")], [bot("c")]]
    call = {"role": "function_call", "content": '{"name": "f", "arguments": {}}'}
    tool = {"role": "observation", "content": "1"}
    row = {"prompt": ASKED, "chosen": [bot("I look."), call, tool, bot("1")], "rejected": [bot("2")]}
    assert len(only(row)[1]) == 4
    row = {"chosen": [*ASKED, bot("a"), bot("b")], "rejected": [*ASKED, bot("a"), bot("c")]}
    assert only(row) == ([*ASKED, bot("a")], [bot("b")], [bot("c")])


def test_a_side_without_an_answer_is_told_by_its_roles():
    row = {"prompt": ASKED, "chosen": YES, "rejected": [user("no it is not")]}
    stops(row, match="'rejected' has no turn of the assistant, and so no answer")


def test_weights_that_leave_nothing_are_the_reason(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n")
    with pytest.raises(
        DataError, match=r"^the weights leave no pair to train on \(.*p\.jsonl: 0\); raise one"
    ):
        read_preferences({str(file): 0})
    assert len(read_preferences({str(file): 1}).pairs) == 1


def test_blanks_around_the_names_of_columns_are_seen(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text("prompt, chosen, rejected\nQ?, a, b\n")
    match = (
        r"columns ' chosen', ' rejected', prompt; blanks .* set columns: \{chosen: ' chosen', rejected: ' rej"
    )
    with pytest.raises(DataError, match=match):
        read_preferences(str(file))
    with pytest.raises(DataError, match=r"the data has prompt, ' chosen', ' rejected'$"):
        read_preferences(str(file), columns={"chosen": "chosen"})
    found = read_preferences(str(file), columns={"chosen": " chosen", "rejected": " rejected"})
    assert found.pairs[0].chosen == " a"


def test_rejected_answers_may_follow_the_context_of_a_whole_chosen_conversation():
    for row in ({"prompt": "Q?", "chosen": YES}, {"chosen": YES}, {"prompt": ASKED, "chosen": YES}):
        for rejected in ("no it is not", NO[1], NO[1:]):
            assert only({**row, "rejected": rejected}) == (ASKED, YES[1:], NO[1:])
        assert len(pairs_of({**row, "rejected": ["a", "b"]})) == 2


def test_sides_may_continue_a_prompt_that_ends_with_an_answer():
    row = {"prompt": [user("Hi"), bot("Hello")], "chosen": YES, "rejected": NO}
    assert only(row) == ([user("Hi"), bot("Hello"), user("Q?")], YES[1:], NO[1:])


# --------------------------------------------------------------------------- nulls, columns, arguments


def ways_in(rows, tmp_path):
    """The same rows as a list, as a data set, as its parquet file and as JSON lines."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "filled.jsonl").write_text("\n".join(json.dumps(data[i]) for i in range(len(data))))
    return [rows, data, *(tmp_path / name for name in ("rows.parquet", "rows.jsonl", "filled.jsonl"))]


def call(name, **arguments):
    return {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
    ]}  # fmt: skip


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_keys_that_a_data_set_fills_with_none_leave_tools_and_arguments_on_every_way_in(tmp_path):
    rows = [
        {"prompt": ASKED, "chosen": [call("f", city="Rome")], "rejected": [bot("no")],
         "tools": [tool("f", city={"type": "string"})], "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": ASKED, "chosen": [call("g", day=3)], "rejected": [call("g", day=4)],
         "tools": [tool("g", day={"type": "integer"})], "chat_template_kwargs": {"effort": "high"}},
    ]  # fmt: skip
    for data in ways_in(rows, tmp_path):
        found = read_preferences(data).pairs
        assert [pair.tools for pair in found] == [row["tools"] for row in rows]
        assert [pair.chosen for pair in found] == [row["chosen"] for row in rows]
        assert [pair.chat_template_kwargs for pair in found] == [row["chat_template_kwargs"] for row in rows]


def test_template_arguments_are_carried_with_the_pair():
    row = {"prompt": ASKED, "chosen": "a", "rejected": "b"}
    (pair,) = read({**row, "chat_template_kwargs": '{"enable_thinking": false}'}).pairs
    assert pair.chat_template_kwargs == {"enable_thinking": False}
    assert read(row).pairs[0].chat_template_kwargs is None
    assert read({**row, "chat_template_kwargs": {}}).pairs[0].chat_template_kwargs is None
    stops({**row, "chat_template_kwargs": [1]}, match="'chat_template_kwargs' is a list; expected an object")


def test_columns_that_nothing_was_read_from_are_named_as_the_data_names_them():
    row = {
        "prompt": "Q?", "prompt_id": "1f", "chosen": YES, "rejected": NO, "messages": YES,
        "score_chosen": 8.0, "score_rejected": 2.0, "source": "x", "empty": None,
    }  # fmt: skip
    found = read(row, {**row, "late": 1})
    assert found.unused_columns == {
        "data": ["prompt_id", "messages", "score_chosen", "score_rejected", "late"]
    }
    assert (
        found.notices[1] == "data: columns not used: prompt_id, messages, score_chosen, score_rejected, late"
    )
    assert len(read({"prompt": "Q?", "chosen": "a", "rejected": "b"}).notices) == 1


def test_prompt_wins_over_question_and_instruction_which_are_named_as_not_used():
    row = {
        "prompt": "Answer in French.\nHello?",
        "question": "Hello?",
        "chosen": "Bonjour",
        "rejected": "Hello",
    }
    found = read(row)
    assert found.pairs[0].prompt == row["prompt"] and found.unused_columns["data"] == ["question"]
    for name in ("question", "instruction"):
        ranked = {"prompt": row["prompt"], name: "Hello?", "responses": ["a", "b"], "scores": [1, 2]}
        found = read(ranked)
        assert found.pairs[0].prompt == [user(row["prompt"])] and found.unused_columns["data"] == [name]
    context = {
        "context": "Paris is in France.",
        "question": "Where?",
        "chosen": "In France",
        "rejected": "In Spain",
    }
    assert read(context).unused_columns["data"] == ["context"]


@pytest.mark.parametrize("name", ["image", "images", "video", "audio", "image_url", "image_path"])
def test_a_question_about_a_picture_stops_the_run(name):
    row = {
        name: {"path": "a.jpg"},
        "question": "What is in the image?",
        "chosen": "a cat",
        "rejected": "a dog",
    }
    stops(row, match=f"'{name}' belongs to the question, and only text is trained; leave the column out")
    assert len(read({**row, name: None})) == len(read({**row, name: []})) == 1


@pytest.mark.parametrize("place", ["<image>\nWhat is it?", "What is it?\n<image>", "<|image_1|>What is it?"])
def test_the_place_of_a_picture_is_counted(place):
    plain = {"prompt": "What is the tag <video>", "chosen": "a cat", "rejected": "a dog"}
    found = read({**plain, "prompt": place}, plain, plain)
    (line,) = [line for line in found.notices if "place of a picture" in line]
    assert "1 of 3 rows" in line
    turns = {"chosen": [bot("a cat")], "rejected": [bot("a dog")]}
    assert "place of a picture" in "".join(
        read({**turns, "prompt": [user(place), bot("Hm"), user("?")]}).notices
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user(" ")], "chosen": [bot("a")], "rejected": [bot("b")]},
        {"prompt": [user("Hi"), bot("Hello"), user("")], "chosen": "a", "rejected": "b"},
        {"instruction": "", "chosen": "a", "rejected": "b"},
        {"prompt": " ", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_question_that_asks_nothing_is_dropped_and_counted(row):
    found = read(row, {"prompt": "Hi", "chosen": "a", "rejected": "b"}, max_dropped=1.0)
    assert len(found) == 1 and sum(found.counts.dropped.values()) == 1
    assert next(iter(found.counts.dropped)).startswith("no prompt: ")


def test_transcripts_whose_turns_are_lines():
    row = {"prompt": "Human: Q?\nAssistant:", "chosen": " GOOD", "rejected": " BAD"}
    assert only(row) == (ASKED, *GOOD_BAD)
    row = {"chosen": "Human: Q?\nAssistant: GOOD", "rejected": "Human: Q?\nAssistant: BAD"}
    assert only(row) == (ASKED, *GOOD_BAD)
    row = {
        "prompt": "Q?",
        "chosen": "\n\nHuman: Q?\n\nAssistant: GOOD",
        "rejected": "\n\nHuman: Q?\n\nAssistant: BAD",
    }
    assert only(row) == (ASKED, *GOOD_BAD)
    quoted = "\n\nHuman: Q?\n\nAssistant: He wrote\nHuman: hm\nand left"
    prompt, chosen, _ = only({"chosen": quoted, "rejected": "\n\nHuman: Q?\n\nAssistant: BAD"})
    assert prompt == ASKED and chosen == [bot("He wrote\nHuman: hm\nand left")]
    row = {"instruction": "Q?", "chosen": row["chosen"], "rejected": row["rejected"]}
    assert only(row) == (ASKED, *GOOD_BAD)
    row = {"prompt": "Human: Q? Assistant:", "chosen": " yes", "rejected": " no"}
    assert only(row) == tuple(row.values())


# ---------------------------------------------------------------------------------- mapping and messages


def test_nested_columns_can_be_mapped():
    row = {"in": {"talk": ASKED, "lang": "en"}, "out": {"good": "GOOD", "bad": ["BAD"]}}
    columns = {"messages": "in.talk", "chosen": "out.good", "rejected": "out.bad.0"}
    found = read(row, columns=columns)
    assert (found.pairs[0].prompt, found.pairs[0].chosen, found.pairs[0].rejected) == (ASKED, *GOOD_BAD)
    assert found.unused_columns["data"] == ["in.lang"]
    assert only({key: json.dumps(value) for key, value in row.items()}, columns=columns) == (ASKED, *GOOD_BAD)


def test_columns_can_be_swapped():
    row = {"prompt": "P", "chosen": "bad", "rejected": "good"}
    assert only(row, columns={"chosen": "rejected", "rejected": "chosen"}) == ("P", "good", "bad")


def test_a_mapping_to_a_column_that_is_not_there_stops_the_run():
    row = {"prompt": "P", "chosen": "a", "rejected": "b"}
    for theirs in ("better", "prompt.better", "inner.better"):
        stops(
            row,
            columns={"chosen": theirs},
            match=f"there is no column '{theirs}'; the data has prompt, chosen, rej",
        )
    talk = {"chosen": YES, "rejected": NO}
    stops(talk, columns={"role": "speaker"}, match="columns: role: no message has a key 'speaker'")


def test_one_of_several_data_sets_may_have_our_names_already(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "P", "better": "a", "rejected": "b"}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "P", "chosen": "a", "rejected": "b"}')
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert len(read_preferences(both, columns={"chosen": "better"})) == 2


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"id": 1, "trajectory": ASKED, "chosen": "a", "rejected": "b"},
            r"columns chosen, id, rejected, trajectory; nothing .*; set columns: \{messages: trajectory\}$",
        ),
        ({"task": "Q", "chosen": "a", "rejected": "b"}, r"set columns: \{prompt: task\}$"),
        (
            {"x": "Q", "y": "R", "chosen": "a", "rejected": "b"},
            r"set columns: \{prompt: \.\.\.\} \(one of x, y\)$",
        ),
        (
            {"prompt": "Q", "better": "a", "rejected": "b"},
            r"there is no chosen answer; set columns: \{chosen: \.\.\.\}$",
        ),
        (
            {"good": "a", "bad": "b"},
            r"map them with columns \(prompt: \.\.\., chosen: \.\.\., rejected: \.\.\.\)",
        ),
        (
            {"row_idx": 0, "row": {"prompt": "Q", "chosen": "a", "rejected": "b"}},
            r"set columns: \{prompt: row\.prompt, chosen: row\.chosen, rejected: row\.rejected\}",
        ),
        ({"prompt": ["Q"], "chosen": "a", "rejected": "b"}, "; prompt is a list; expected text or messages$"),
        ({"question": {"x": 1}, "chosen": "a", "rejected": "b"}, "; question is a dict; expected text or"),
        (
            {"prompt": "Q", "chosen": ["a"], "rejected": ["b"]},
            "; chosen is a list; expected text or messages$",
        ),
        (
            {"question": "Q", "ratings": [1, 2]},
            "cannot tell the format from the columns question, ratings; map them",
        ),
    ],
)
def test_what_is_said_of_rows_in_no_known_format_can_be_followed(row, hint):
    stops(row, match=hint)


def test_the_hints_about_mappings_work():
    row = {"row_idx": 0, "row": {"prompt": "Q", "chosen": "a", "rejected": "b"}}
    columns = {name: f"row.{name}" for name in ("prompt", "chosen", "rejected")}
    assert only(row, columns=columns) == ("Q", "a", "b")
    row = {"trajectory": ASKED, "chosen": "GOOD", "rejected": "BAD"}
    assert only(row, columns={"messages": "trajectory"}) == (ASKED, *GOOD_BAD)


def test_stack_exchange_paired_and_accepted_answers_have_names_of_their_own():
    row = {"qid": 1, "question": "Q?", "response_j": "GOOD", "response_k": "BAD"}
    assert only(row) == (ASKED, *GOOD_BAD)
    assert only({"instruction": "Q?", "input": "", "accepted": "GOOD", "rejected": "BAD"}) == (
        ASKED,
        *GOOD_BAD,
    )


def test_earlier_turns_in_history_are_part_of_the_prompt():
    for history in ([["Hi", "Hello"]], [user("Hi"), bot("Hello")]):
        row = {"prompt": "Q?", "history": history, "chosen": "GOOD", "rejected": "BAD"}
        assert only(row) == ([user("Hi"), bot("Hello"), user("Q?")], *GOOD_BAD)
    assert only({**row, "history": []}) == ("Q?", "GOOD", "BAD")
    stops({**row, "history": [5]}, match="'history' is not a list of")


def test_rows_of_one_set_may_fill_different_columns():
    asked = {"messages": ASKED}
    tools = [tool("f", a={"type": "string"})]
    row = {"preferred_output": GOOD_BAD[0], "non_preferred_output": GOOD_BAD[1]}
    found = read({"input": asked, **row}, {"input": {**asked, "tools": tools}, **row})
    assert [pair.tools for pair in found.pairs] == [None, tools]
    rows = [
        {"prompt": "P", "chosen": "a", "completion": None, "rejected": "b"},
        {"prompt": "P", "chosen": None, "completion": "c", "rejected": "b"},
    ]
    assert [chosen for _, chosen, _ in pairs_of(*rows)] == ["a", "c"]


def test_tools_may_be_written_as_text_one_by_one():
    row = {"prompt": ASKED, "chosen": "a", "rejected": "b", "tools": [json.dumps(tool("f"))]}
    assert read(row).pairs[0].tools == [tool("f")]
    stops({**row, "tools": ["{"]}, match="'tools' is text, but not JSON")


def test_reading_a_row_notes_only_the_columns_that_were_read():
    columns = Columns({"prompt": "asked"})
    row = columns.name({"asked": "Q", "chosen": "a", "rejected": "b", "note": "n"})
    detect([row])
    columns.forget()
    assert columns.unused == ["asked", "chosen", "rejected", "note"]
    assert row["prompt"] == row.get("prompt") == "Q" and columns.unused == ["chosen", "rejected", "note"]


@pytest.mark.parametrize("name", ["messages", "prompt"])
@pytest.mark.parametrize("as_text", [True, False])
def test_a_conversation_that_holds_the_chosen_answer_already_is_not_answered_twice(name, as_text):
    row = {name: [user("Q?"), bot("GOOD ")], "chosen": bot("GOOD"), "rejected": bot("BAD")}
    if as_text:
        row |= {"chosen": "GOOD", "rejected": "BAD"}
    assert only(row) == (ASKED, *GOOD_BAD)
    prompt, _, _ = only({**row, name: [user("Q?"), bot("another")]})
    assert prompt == [user("Q?"), bot("another")]


def test_a_response_next_to_a_rejected_one_is_the_chosen_one():
    """ms-swift writes query, response, rejected_response."""
    assert only({"query": "Q?", "response": "GOOD", "rejected_response": "BAD"}) == ("Q?", "GOOD", "BAD")
    row = {"prompt": "Q?", "chosen": "GOOD", "rejected": "BAD", "response": "other"}
    assert only(row) == ("Q?", "GOOD", "BAD")
    assert read(row).unused_columns["data"] == ["response"]
    stops({"prompt": "Q?", "response": "x", "reward": 1}, match="one answer and how good it is")
    whole = {"chosen_messages": [*ASKED, bot("GOOD")], "rejected_messages": [*ASKED, bot("BAD")]}
    assert only(whole) == (ASKED, *GOOD_BAD)


def test_calls_as_openai_wrote_them_first_are_tool_calls():
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    for content in (None, ""):
        row = {"prompt": ASKED, "chosen": [{**called, "content": content}], "rejected": [bot("BAD")]}
        _, (answer,), _ = only(row)
        assert answer["content"] == "" and "function_call" not in answer
        assert answer["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        ]


def test_a_column_without_a_name_is_shown_as_one():
    found = read({"prompt": "Q?", "chosen": "GOOD", "rejected": "BAD", "": 7})
    assert any(line.endswith("columns not used: ''") for line in found.notices)


TWICE = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]'


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": TWICE, "rejected": "d"},
        {"prompt": "q", "chosen": TWICE.replace('"', "'"), "rejected": "d"},
        {"prompt": "q", "chosen": TWICE.replace('"', "'").replace("}, {", "} {"), "rejected": "d"},
        {"prompt": "q", "chosen": json.dumps(TWICE), "rejected": "d"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b",
         "tools": '[{"name": "f", "name": "g"}]'},
        {"prompt": [{"role": "user", "content": "q"}], "rejected": "b",
         "chosen": [{"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "name": "g"}]'}]},
    ],
)  # fmt: skip
def test_a_key_that_text_in_a_cell_has_twice_stops_the_run(row):
    with pytest.raises(DataError, match=r"row:0: .*has the key '(content|name)' twice in one object"):
        read_preferences([row])


@pytest.mark.parametrize(
    ("mark", "counted"),
    [
        ({"train_on_turn": False}, True), ({"loss_weight": 0}, True), ({"trainable": False}, True),
        ({"weight": "0"}, True), ({"train": "false"}, True), ({"weight": 0.5}, True), ({"mask": True}, True),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, True),
        ({"weight": 1}, False), ({"train": True}, False), ({"train": "true"}, False), ({"mask": 0}, False),
        ({"loss": True, "trainable": "yes"}, False), ({"loss_mask": 0}, True), ({"ignore": "no"}, False),
    ],
)  # fmt: skip
def test_every_way_to_weigh_a_turn_is_counted(mark, counted):
    answer = [{"role": "assistant", "content": "a", **mark}]
    asked = [{"role": "user", "content": "q"}]
    answers = [{**answer[0], "score": 2}, {"role": "assistant", "content": "b", "score": 1}]
    records = [{"text": "a", "score": 2, **mark}, {"text": "b", "score": 1}]
    for row in (
        {"prompt": asked, "chosen": answer, "rejected": "b"},
        {"prompt": [{**asked[0], **mark}], "chosen": "a", "rejected": "b"},
        {"prompt": asked, "answers": answers},
        {"prompt": asked, "answers": records},
    ):
        lines = [line for line in read_preferences([row]).notices if "although a turn says" in line]
        assert len(lines) == counted, row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": -2},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score": {"chosen": 1, "rejected": 9}},
        {"prompt": "q", "chosen": "a", "rejected": "b", "preference": "rejected"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_helpfulness": 1, "rejected_helpfulness": 3},
        {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rank": 2, "rejected_rank": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "scores": [1, 9]},
        *(
            {"prompt": "q", "chosen": "a", "rejected": "b", chosen: 1, rejected: 3}
            for chosen, rejected in [
                ("chosen_rewards", "rejected_rewards"), ("chosenScore", "rejectedScore"), ("rewards/chosen",
                "rewards/rejected"), ("reward_model_score_chosen", "reward_model_score_rejected"),
                ("chosen_avg_rating", "rejected_avg_rating"), ("chosen_response_score", "score_rejected"),
                ("rejectedRank", "chosenRank"), ("rank-rejected", "rank-chosen"),
            ]
        ),
        {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a", "score_a": 1, "score_b": 9},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "score": 1}],
         "rejected": [{"role": "assistant", "content": "b", "score": 2}]},
    ],
)  # fmt: skip
def test_what_says_that_the_rejected_answer_is_better_is_counted(row):
    (line,) = [line for line in read_preferences([row]).notices if "although" in line]
    assert "1 of 1 rows train although" in line and "rejected" in line


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"winner": "a", "preference": "b"},
            "preference says that the other answer is better than winner does",
        ),
        ({"winner": "a", "preference": "response_a"}, None),
        ({"winner": "a", "label": "a topic"}, None),
        (
            {"winner": "a", "score_a": 1, "score_b": 1},
            "their numbers say that neither answer is the better one",
        ),
    ],
)
def test_labels_that_disagree_on_the_better_answer_are_counted(row, said):
    found = read_preferences([{"prompt": "q", "response_a": "a", "response_b": "b", **row}])
    assert found.pairs[0].chosen == [bot("a")]
    lines = [line for line in found.notices if "although" in line]
    assert len(lines) == (said is not None) and all(str(said) in line for line in lines)


@pytest.mark.parametrize(
    "more",
    [
        {"margin": 2}, {"preference": "chosen"}, {"score": {"chosen": 2, "rejected": 1}}, {"scores": [9, 1]},
        {"chosen_rank": 1, "rejected_rank": 2}, {"chosenScore": 2, "rejectedScore": 1}, {"": 7},
        {"chosen_toxicity_score": 1, "rejected_toxicity_score": 2},
        {"chosen_honesty_rating": 1, "rejected_honesty_rating": 2},
        {"chosen_score": 1, "rejected_rating": 2}, {"chosen_length": 1, "rejected_length": 2},
    ],
)  # fmt: skip
def test_what_agrees_is_not_counted(more):
    row = {"prompt": "q", "chosen": "a", "rejected": "b", **more}
    assert not [line for line in read_preferences([row]).notices if "although" in line]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image", "text": ""}]},
        {"role": "user", "content": "q", "images": ["a.png"]},
        {"role": "user", "content": "q", "image_url": {"url": "a.png"}},
        {"role": "user", "content": [{"type": "text", "text": "q", "image_url": {"url": "a.png"}}]},
    ],
)
def test_media_in_turns_stop_the_run(turn):
    row = {"prompt": [turn], "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"row:0: 'prompt' has a turn with .*image.*; only text is trained"):
        read_preferences([row])


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_of_ranked_answers_is_a_part_of_them(key):
    answers = [{"text": "good", key: "because", "score": 2}, {"text": "bad", "score": 1}]
    (pair,) = read_preferences([{"prompt": "q", "answers": answers}]).pairs
    assert pair.chosen == [{"role": "assistant", "content": "good", key: "because"}]
    assert pair.rejected == [{"role": "assistant", "content": "bad"}]


def test_ranked_answers_under_several_keys_stop_the_run():
    answers = [{"response": None, "text": "a comment", "score": 2}, {"response": "b", "score": 1}]
    with pytest.raises(DataError, match="has one answer in 'text' and another in 'response'"):
        read_preferences([{"prompt": "q", "answers": answers}])


def test_a_system_text_of_blanks_is_none():
    row = {"system": "  ", "prompt": "q", "chosen": "a", "rejected": "b"}
    (pair,) = read_preferences([row], data_format="instruction").pairs
    assert pair.prompt == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("sign", "said"), [(b"PAR1", "is Parquet"), (b"BZh91", "bzip2"), (b"7z\xbc\xaf\x27\x1c", "7z archive")]
)
def test_packed_files_with_the_name_of_a_text_are_told_by_their_first_bytes(tmp_path, sign, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(sign + bytes(20))
    with pytest.raises(DataError, match=said):
        read_preferences(path)


def test_a_blank_history_in_csv_is_none(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('instruction,history,chosen,rejected\nQ?,,yes,no\nR?,"[[""a"", ""b""]]",yes,no\n')
    short, long = read_preferences(path).pairs
    assert short.prompt == [user("Q?")] and long.prompt == [user("a"), bot("b"), user("R?")]


def test_data_without_rows_or_a_known_format_is_named(tmp_path):
    good, empty, odd = (tmp_path / f"{name}.jsonl" for name in ("good", "empty", "odd"))
    good.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    empty.write_text("")
    odd.write_text('{"foo": 1}\n')
    with pytest.raises(DataError, match=r"empty\.jsonl: the data set is empty"):
        read_preferences([str(good), str(empty)])
    with pytest.raises(DataError, match=r"odd\.jsonl: cannot tell the format from the columns foo"):
        read_preferences([str(good), str(odd)])
    with pytest.raises(DataError, match="the data: the data set is empty"):
        read_preferences([])


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "user", "from": "gpt", "content": "q"}, "two roles, role 'user' and from 'gpt'"),
        ({"role": "user", "content": "q", "value": "r"}, "one text in 'content' and another in 'value'"),
    ],
)
def test_a_turn_that_says_two_things_stops_the_run(turn, said):
    with pytest.raises(DataError, match=f"'prompt' has a turn .*{said}"):
        read_preferences([{"prompt": [turn], "chosen": "a", "rejected": "b"}])


def test_a_turn_that_says_one_thing_twice_is_read():
    turn = {"role": "user", "from": "human", "content": "q", "value": "q"}
    (pair,) = read_preferences([{"prompt": [turn], "chosen": "a", "rejected": "b"}]).pairs
    assert pair.prompt == [user("q")]


@pytest.mark.parametrize(
    "answer", [{"text": "a", "score": 2}, {"role": "assistant", "content": "a", "score": 2}]
)
def test_media_in_ranked_answers_stop_the_run(answer):
    answers = [{**answer, "images": ["a.png"]}, {**answer, "score": 1}]
    with pytest.raises(DataError, match="has a turn with images; only text is trained"):
        read_preferences([{"prompt": "q", "answers": answers}])


def test_keys_of_ranked_answers_that_are_not_used_are_named():
    answers = [
        {"text": "a", "score": 2, "critique": "good", "model": None},
        {"text": "b", "score": 1, "rank": 2},
    ]
    lines = read_preferences([{"prompt": "q", "answers": answers}]).notices
    assert "data: keys of answers not used: critique" in lines
    mapped = [{"text": "a", "mine": 2}, {"text": "b", "mine": 1}]
    found = read_preferences([{"prompt": "q", "answers": mapped}], columns={"scores": "answers.mine"})
    assert not [line for line in found.notices if "keys of answers" in line]


# ------------------------------------------------------------------------------------------- columns


def test_a_column_is_mapped_to_a_name_that_something_reads(tmp_path):
    row = {"prompt": "Capital?", "chosen": "The capital is Paris.", "rejected": "The capital is Rome."}
    for mapping, said in (
        ({"prompts": "prompt"}, r"columns: prompts: nothing here reads .*; did you mean prompt\?"),
        ({"sytem": None}, r"columns: sytem: nothing here reads .*; did you mean system\?"),
    ):
        with pytest.raises(DataError, match=said):
            read_preferences([row] * 3, columns=mapping)
    for ours in ("ranks", "winner"):  # a right name, of which these rows have no use
        assert list(read_preferences([row | {"x": 1}] * 3, columns={ours: "x"}).unused_columns.values()) == [
            ["x"]
        ]
    for ours in ("images", "status", "overall_preference", "score_a"):  # looked at, or not there
        read_preferences([row] * 3, columns={ours: None})
    for ours in ("prompt", "chosen", "rejected", "system", "tools", "chosen_score", "source"):
        read_preferences([row | {"x": None, ours: row.get(ours)}] * 3, columns={ours: ours})


def test_a_column_that_is_mapped_to_null_is_not_read_and_said_to_be_unused():
    row = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", "system": "Be kind."}
    read = read_preferences([row], columns={"system": None})
    assert read.pairs[0].prompt == read_preferences([{**row, "system": None}]).pairs[0].prompt
    assert list(read.unused_columns.values()) == [["system"]]
    other = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go.", "system_prompt": "Be kind."}
    assert read_preferences([other], columns={"system": None}).pairs[0].prompt == read.pairs[0].prompt


def test_an_answer_that_writes_a_chat_message_is_a_text_where_others_of_its_column_are_none():
    plain = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
    message = json.dumps({"role": "assistant", "content": "Hello"})
    call = {**plain, "prompt": "Write a message of the API.", "chosen": message}
    broken = {**call, "chosen": message[:-2]}
    found = read(plain, call, plain, broken, plain)
    assert [pair.chosen for pair in found.pairs][1::2] == [message, message[:-2]]
    (line,) = [line for line in found.notices if "writes a chat message" in line]
    assert "1 of 5 rows" in line
    only_calls = read(call, broken, data_format="standard")
    assert [pair.chosen for pair in only_calls.pairs] == [message, message[:-2]]
    sides = ("chosen", "rejected")
    talks = {name: json.dumps([{"role": "assistant", "content": plain[name]}]) for name in sides}
    stored = {"prompt": json.dumps([user("Hi")]), **talks}
    assert read(stored, stored).pairs[0].chosen == [bot("Hello.")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt;chosen;rejected": "a;b;c"}, r"columns seem to be separated by ';'; write commas"),
        ({"prompt\tchosen\trejected": "a\tb\tc"}, r"columns seem to be separated by '\\t'"),
        (
            {"instruction": "Q", "output": "good", "rejected": "bad"},
            r"'chosen' is missing; set columns: \{chosen: output\} if that is the good answer",
        ),
        ({"prompt": "Q", "chosen": "a", "reject": "b"}, r"no rejected answer .*in the column 'reject'\?"),
        (
            {"prompt": [user("Q"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}],
             "chosen": [bot("a")], "rejected": [bot("b")]},
            r"'prompt' holds the arguments of f that should be JSON",
        ),
    ],
)  # fmt: skip
def test_what_to_do_is_said(row, said):
    with pytest.raises(DataError, match=said):
        read_preferences([row] * 2)


def test_a_prompt_that_is_one_message_and_a_call_without_arguments_are_read():
    sides = {"chosen": [bot("a")], "rejected": [bot("b")]}
    assert only({"prompt": user("Q"), **sides})[0] == [user("Q")]
    for arguments in ("", None, {}):
        call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
        (prompt, _, _) = only({"prompt": [user("Q"), call, {"role": "tool", "content": "1"}], **sides})
        assert prompt[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_stored_conversations_are_known_however_long_their_turns_are_and_so_are_stored_lists():
    def row(question):
        sides = {
            name: json.dumps(
                [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
            )
            for name, answer in (("chosen", "yes"), ("rejected", "no"))
        }
        return {"prompt": question, **sides}

    rows = [*(row(f"{'word ' * 1000}{n}") for n in range(6)), row("short")]
    assert [pair.chosen for pair in read(*rows).pairs] == [[bot("yes")]] * 7
    told = {"instruction": "q", "chosen": "y", "rejected": "n"}
    before = json.dumps([user("a"), bot("b")])
    pairs = read(*[{**told, "history": "[]"}] * 6, {**told, "history": before}).pairs
    assert pairs[-1].prompt == [user("a"), bot("b"), user("q")]


@pytest.mark.parametrize(
    "text",
    [
        "A chat.\nUSER: Rewrite this:\n### Response: foo\nbar baz ASSISTANT: ",
        "User: What is ### Answer: for?\nAssistant: ",
        "USER: What does [INST] hi [/INST] mean? ASSISTANT: ",
        "### Instruction:\nExplain <|user|> and <|assistant|> tokens.\n\n### Response:\n",
        "Below is an instruction.\n\n### Instruction:\nWrite.\nUSER: hello\nASSISTANT: hi\n\n### Response:\n",
    ],
)
def test_a_header_of_another_way_to_write_turns_is_a_part_of_the_question(text):
    sides = only({"chosen": f"{text}Yes it is", "rejected": f"{text}No it is not"})[1:]
    assert [side.strip() for side in sides] == ["Yes it is", "No it is not"]
    asked = {"prompt": "Explain <|user|> and <|assistant|> tokens."}
    alpaca = f"### Instruction:\n{asked['prompt']}\n\n### Response:\n"
    rendered = {**asked, "chosen": f"{alpaca}They are", "rejected": f"{alpaca}No"}
    assert only(rendered)[1:] == ("They are", "No")


def test_lists_as_pandas_writes_them_are_no_answers_in_json():
    python = {"prompt": "Q", "chosen": "['a']", "rejected": "['b', 'c']"}
    stops(python, python, match=r"the rejected answers of 2 of 2 rows are texts that write a list")
    in_json = {"prompt": "Q", "chosen": '["a"]', "rejected": '["b", "c"]'}
    assert [pair.rejected for pair in read(in_json).pairs] == ['["b", "c"]']
