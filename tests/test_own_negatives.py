"""Rejected answers that a model makes itself: which are chosen, which are left out, and what is written."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from answer_server import answer_server
from hypothesis import given
from hypothesis import strategies as st

import orpo
from orpo import cli
from orpo.curation.likeness import likeness, says_the_same
from orpo.curation.own_negatives import OwnNegatives, make_pairs
from orpo.data.preferences import read_preferences
from orpo.errors import ConfigError, DataError
from orpo.evaluation.endpoint import Endpoint
from orpo.evaluation.generation import Sampling

DEMO = str(Path(orpo.__file__).parent / "demo" / "model")
DRAWN = Sampling(temperature=1.0, top_p=1.0, max_tokens=24, seed=0)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(*answers: str) -> str:
    """A prompt that makes the server of the tests give these answers, one after the other."""
    return f"say {json.dumps(answers)}"


def with_server(tmp_path, rows, *, samples=4, out="out", **own):
    data = write(tmp_path / "rows.jsonl", rows)
    with answer_server() as url:
        one_by_one = Endpoint(url=url, concurrency=1)
        return make_pairs(
            None, data, tmp_path / out, own=OwnNegatives(samples=samples, **own), endpoint=one_by_one
        )


def rejected(made) -> list[str]:
    return [row["rejected"][-1]["content"] for row in made.rows]


def test_rows_without_a_rejected_answer_get_one_of_the_models_own(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus 2?"},
                {"role": "assistant", "content": f"It is {n + 2}, of course."},
            ]
        }
        for n in range(6)
    ]
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And who are you?"},
        {"role": "assistant", "content": "I am a good answer."},
    ]
    rows.append({"messages": talk, "source": "talks"})
    data = write(tmp_path / "rows.jsonl", rows)
    own = OwnNegatives(samples=3, keep_unfinished=True)
    made = make_pairs(DEMO, data, tmp_path / "out", own=own, sampling=DRAWN)
    answers = lines(tmp_path / "out" / "answers.jsonl")
    assert len(answers) == 21

    read = read_preferences(str(tmp_path / "out"))
    assert read.unused_columns == {str(tmp_path / "out"): []}
    assert len(read) == made.num_own == 7
    for pair, row, line in zip(read.pairs, rows, made.rows, strict=True):
        assert [*pair.prompt, *pair.chosen] == row["messages"]
        about = line["provenance"]
        answer = next(
            one for one in answers if (one["source"], one["sample"]) == (about["row"], about["sample"])
        )
        assert pair.rejected == [{"role": "assistant", "content": answer["output"]}]
        assert about["rejected_by"] == "own" and about["temperature"] == 1.0 and about["model"] == DEMO
    assert read.pairs[-1].group == "talks"

    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    again = make_pairs(DEMO, data, tmp_path / "out", own=own, sampling=DRAWN)
    assert again.asked.num_known == 21
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_answers_that_are_no_negatives_are_left_out_and_counted(tmp_path):
    good = "The capital of France is Paris."
    rows = [
        {"prompt": said(" the capital of  France is PARIS", "Lyon.", "Lyon", ""), "chosen": good},
        {"prompt": said("<|im_start|>user\nMore?", good, good, good), "chosen": good},
        {"prompt": "cut off", "chosen": good, "rejected": "Given."},
        {"prompt": said("It is -3.", "It is 3."), "chosen": "It is 3."},
    ]
    made = with_server(tmp_path, rows)
    assert rejected(made) == ["Lyon.", "Given.", "It is -3."]
    assert [row["provenance"]["rejected_by"] for row in made.rows] == ["own", "given", "own"]
    assert made.num_own == 2
    counted = "\n".join(made.counted)
    for expected in (
        "answers left out 6: the same as the good answer, or nearly (first: rows.jsonl:1)",
        "answers left out 2: the same as another sample (first: rows.jsonl:1)",
        "answers left out 1: empty (first: rows.jsonl:1)",
        "answers left out 1: runs on past its turn: it holds the tokens of a chat template (first: ",
        "answers left out 4: cut at --max_tokens (--keep_unfinished uses them) (first: rows.jsonl:3)",
        "rows 1: no answer of the model's own is left, and none is given (first: rows.jsonl:2)",
        "rows 1: no answer of the model's own is left; the given one is kept (first: rows.jsonl:3)",
    ):
        assert expected in counted
    kept = with_server(tmp_path, rows, out="kept", keep_unfinished=True)
    assert "You said: cut off" in rejected(kept)
    with pytest.raises(DataError, match="no pair is left"):
        with_server(tmp_path, rows[1:2], out="none")


def test_the_rule_says_which_answer_is_taken(tmp_path):
    good = "A cat sat on the mat."
    said_all = said("Dogs run.", "A cat sat on the red mat.", "A cat slept.")
    rows = [{"prompt": said_all, "chosen": good}]
    assert rejected(with_server(tmp_path, rows, samples=3, choose="most_similar")) == [
        "A cat sat on the red mat."
    ]
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    least = with_server(tmp_path, rows, samples=3, choose="least_similar")
    assert rejected(least) == ["Dogs run."]
    assert least.asked.num_known == 3  # nothing is asked again for another rule
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    many = [{"prompt": f"{said_all}{' ' * n}", "chosen": good} for n in range(12)]
    drawn = with_server(tmp_path, many, samples=3, out="many")
    assert len(set(rejected(drawn))) > 1
    assert rejected(drawn) == rejected(with_server(tmp_path, many, samples=3, out="many"))


def test_pairs_of_one_prompt_get_different_answers(tmp_path):
    rows = [{"prompt": said("One.", "Two.", "Three."), "chosen": "Good.", "rejected": ["a", "b", "c", "d"]}]
    made = with_server(tmp_path, rows, samples=3)
    assert sorted(rejected(made)) == ["One.", "Three.", "Two.", "d"]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_own_answers_is_exact_and_the_others_stay_as_given(tmp_path, share):
    rows = [{"prompt": f"number {n}", "chosen": "Good.", "rejected": f"Bad {n}."} for n in range(8)]
    rows.append({"prompt": "number 8", "chosen": "Good."})
    made = with_server(tmp_path, rows, samples=1, share_own=share)
    assert made.num_own == 8 * share + 1
    for number, (row, text) in enumerate(zip(made.rows, rejected(made), strict=True)):
        is_own = row["provenance"]["rejected_by"] == "own"
        assert text == (f"You said: number {number}" if is_own else f"Bad {number}.")
    asked = {answer["instruction"] for answer in lines(tmp_path / "out" / "answers.jsonl")}
    assert len(asked) == made.num_own  # nobody asks for what is not used


def test_texts_to_continue_stay_texts(tmp_path):
    rows = [{"prompt": "The sky is", "chosen": " blue."}, {"prompt": "The sea is", "chosen": " wide."}]
    data = write(tmp_path / "rows.jsonl", rows)
    made = make_pairs(
        DEMO, data, tmp_path / "out", own=OwnNegatives(keep_unfinished=True), sampling=DRAWN, limit=1
    )
    (row,) = made.rows
    assert (row["prompt"], row["chosen"]) == ("The sky is", " blue.")
    assert row["rejected"] in {one["output"] for one in lines(tmp_path / "out" / "answers.jsonl")}


LETTERS = st.text("abcAB .12-é", max_size=60)


@given(LETTERS, LETTERS)
def test_likeness_is_symmetric_one_for_equal_texts_and_never_beyond(one, other):
    assert likeness(one, other) == likeness(other, one)
    assert 0 <= likeness(one, other) <= 1
    assert likeness(one, one) == 1
    assert says_the_same(one, f" {one.upper()} ")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Paris.", "paris", True),
        ("It is 12.", "It is 14.", False),
        ("x = -3", "x = 3", False),
        ("“Yes!”", "Yes", True),
        ("No.", "Yes.", False),
        (
            "The quick brown fox jumps over the lazy dog " * 5,
            "The quick brown fox jumps over the lazy dog " * 4
            + "The quick brown fox jumps over the lazy dogs",
            True,
        ),
        (
            "It costs 15 euros. " + "Nobody knows why. " * 9,
            "It costs 16 euros. " + "Nobody knows why. " * 9,
            False,
        ),
    ],
)
def test_what_says_the_same(one, other, expected):
    assert says_the_same(one, other) is expected


def test_the_command_writes_what_training_reads_and_refuses_what_is_not_its_own(tmp_path):
    data = write(
        tmp_path / "rows.jsonl", [{"prompt": said("No.", n), "chosen": "Yes, I will."} for n in "ab"]
    )
    out, words = tmp_path / "out", ["data", "pairs", data, "--samples", "1", "--out"]

    def run(folder, *more):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return cli.main([*words, str(folder), *more]), printed.getvalue()

    with answer_server() as url:
        status, printed = run(out, "--endpoint", url)
    assert status == 0
    for expected in (
        "prompt      say",
        "rejected    No.",
        "rejected 1.0 on average; the rejected answer is longer in 0%",
        "nearly always the shorter one",
        "pairs       2, 2 with a rejected answer of the model's own",
        f"written     {out / 'train.jsonl'}",
    ):
        assert expected in printed
    status, printed = run(tmp_path, "--model", DEMO)
    assert (status, printed) == (
        2,
        f"orpo: error: --out {tmp_path}: something else is there already; name another folder\n",
    )
    for name, value in (("share_own", 1.5), ("choose", "best")):
        with pytest.raises(ConfigError, match=name):
            OwnNegatives(**{name: value})
