"""Rows of plain texts train as what `orpo chat` asks: through the template, or without one on both ways."""

import io
import json
import shutil

import pytest
import tiny_models
from tiny_tokenizer import tiny_tokenizer

from orpo.cli import main
from orpo.data.source import read_pairs, read_training
from orpo.data.text_rows import decide
from orpo.errors import DataError
from orpo.evaluation.generation import ChatModel
from orpo.pairs import PreferencePair
from orpo.settings.config import OrpoSettings
from orpo.training.arguments import ORPOConfig

QUESTIONS = [
    {"prompt": f"Convert {n} kilometers to meters.", "chosen": f"{n}000 meters.", "rejected": "Look it up."}
    for n in range(12)
]
CONTINUED = [{"prompt": f"Color {n} is", "chosen": " blue.", "rejected": " green."} for n in range(12)]
HEADED = [
    {"prompt": f"### Question: {n}?\n### Response:\n", "chosen": "a", "rejected": "b"} for n in range(12)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def first(data, tokenizer, **settings):
    read = read_pairs(data, OrpoSettings(**settings), tokenizer)
    pair = read.pairs[0]
    return tokenizer.decode([*pair.prompt, *pair.chosen]), read.lines()


@pytest.mark.parametrize(
    ("rows", "template", "expected"),
    [
        (QUESTIONS, True, "chat"),
        (QUESTIONS, False, "plain"),
        (CONTINUED, True, "plain"),
        (HEADED, True, "plain"),
        ([{**QUESTIONS[0], "prompt": "User: Q?\nBot:"}], True, "plain"),
        ([{**QUESTIONS[0], "prompt": "Is that a Bot:"}], True, "chat"),
        ([QUESTIONS[0], *CONTINUED], True, "plain"),
    ],
)
def test_the_rows_decide(rows, template, expected):
    pairs = [PreferencePair(**row) for row in rows]
    assert decide(pairs, has_template=template) == expected


def test_conversations_go_through_the_template_whatever_is_said_about_texts(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [{**row, "system": "Be brief."} for row in QUESTIONS])
    text, lines = first(data, tiny_tokenizer("chatml"), text_rows="plain")
    assert "<|im_start|>system" in text
    line = "12 of 12 pairs are conversations: they go through the chat template, also with text_rows: plain"
    assert any(line in one for one in lines)
    assert not any("also with text_rows" in one for one in first(data, tiny_tokenizer("chatml"))[1])


def test_a_named_file_of_questions_is_rendered_and_says_so(tmp_path):
    tokenizer = tiny_tokenizer("chatml")
    data = write(tmp_path / "pairs.jsonl", QUESTIONS)
    text, lines = first(data, tokenizer)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    assert text == asked + "0000 meters.<|im_end|>"
    assert any("text_rows: plain takes them as they are" in line for line in lines)
    for settings in ({"text_rows": "plain"}, {"data_format": "standard"}):
        plain, lines = first(data, tokenizer, **settings)
        assert plain.startswith("Convert 0 kilometers to meters.0000 meters.")
        assert any("text_rows: chat reads them" in line for line in lines)


def test_texts_that_went_through_a_template_do_not_go_through_one_again(tmp_path):
    asked = "<|im_start|>user\nQ {}?<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": asked.format(n), "chosen": "yes<|im_end|>", "rejected": "no<|im_end|>"} for n in range(3)
    ]
    data = write(tmp_path / "pairs.jsonl", [*rows, QUESTIONS[0]])
    text, lines = first(data, tiny_tokenizer("chatml"))
    assert text == rows[0]["prompt"] + "yes<|im_end|>"
    assert any(
        line.endswith("went through a chat template already and are taken as they are") for line in lines
    )
    assert not any("text_rows" in line for line in lines)
    (line,) = [line for line in lines if "went through no chat template" in line]
    assert "1 of 4 texts" in line and "pairs.jsonl:4" in line
    with pytest.raises(DataError, match="text_rows: chat would write them through one again; give the rows"):
        first(data, tiny_tokenizer("chatml"), text_rows="chat")


def test_an_end_of_turn_of_another_family_is_said(tmp_path):
    words = "</s> at the end of an answer ends no turn of this model: it trains as text"
    for name, number in (("chatml", 1), ("mistral", 0)):
        row = {"prompt": "Q?", "chosen": "yes </s>\n", "rejected": "no</s>"}
        for reading in ("plain", "chat"):
            data = write(tmp_path / "pairs.jsonl", [row, {**row, "chosen": "</s> yes", "rejected": "no"}])
            tokenizer = tiny_tokenizer(name, special_tokens=False)
            counts = read_pairs(
                data, OrpoSettings(text_rows=reading, max_dropped=1.0), tokenizer
            ).pairs.counts
            assert counts.changed.get(words, 0) == number


def test_rows_from_python_keep_the_reading_of_trl_and_say_so():
    text, lines = first(QUESTIONS, tiny_tokenizer("chatml"))
    assert "<|im_start|>" not in text
    assert any("text_rows: chat reads them" in line for line in lines)
    assert "<|im_start|>user" in first(QUESTIONS, tiny_tokenizer("chatml"), text_rows="chat")[0]


def test_evaluation_pairs_are_read_as_the_training_pairs_were(tmp_path):
    """A few held-out rows must not decide otherwise than the set they are held out for."""
    train, held_out = write(tmp_path / "train.jsonl", QUESTIONS), write(tmp_path / "held.jsonl", CONTINUED)
    settings = OrpoSettings(dataset_name=train, eval_dataset_name=held_out)
    data = read_training(None, None, settings, tiny_tokenizer("chatml"), evaluates=True)
    assert data.text_rows == "chat"
    assert data.eval_pairs.chat_template is not None


def moved_checkpoint(run, folder):
    """A checkpoint that somebody copied out of its run directory."""
    return shutil.copytree(f"{run}/checkpoint-1", folder / "best")


@pytest.mark.parametrize("reading", ["chat", "plain"])
def test_a_run_remembers_how_it_asked_and_chat_and_eval_ask_the_same_way(
    tmp_path, reading, monkeypatch, capsys
):
    tokenizer = tiny_tokenizer("chatml")
    tiny_models.build("Llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = write(tmp_path / "pairs.jsonl", QUESTIONS)
    run = str(tmp_path / "run")
    words = ["--model_name_or_path", str(tmp_path / "base"), "--dataset_name", data, "--output_dir", run]
    words += ["--max_steps", "1", "--eval_split", "0", "--text_rows", reading]
    assert main(["train", *words]) == 0
    chat = ChatModel.load(run)
    assert (chat.template is not None) == (reading == "chat")
    monkeypatch.setattr("sys.stdin", io.StringIO("Convert 1 kilometer.\n"))
    assert main(["chat", run, "--max_tokens", "2"]) == 0
    assert ("uses no chat template: it continues your text as it is" in capsys.readouterr().err) == (
        reading == "plain"
    )
    assert main(["eval", run, "--data", data]) == 0
    assert (ChatModel.load(str(moved_checkpoint(run, tmp_path))).template is not None) == (reading == "chat")
    said = "through the chat template" if reading == "chat" else "without a chat template"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("most", "few", "do"), [(QUESTIONS, HEADED, "continue"), (HEADED, QUESTIONS, "do not")]
)
def test_texts_that_read_the_other_way_are_counted(tmp_path, most, few, do):
    rows = [*most, *few[:3]]
    _, lines = first(write(tmp_path / "pairs.jsonl", rows), tiny_tokenizer("chatml"))
    (line,) = [line for line in lines if "read as all are" in line]
    assert "3 of 15 texts" in line and f"their answers {do}" in line and "pairs.jsonl:13" in line
    assert f"text_rows: {'plain' if most is QUESTIONS else 'chat'}" in line
    for decided in ("chat", "plain"):
        _, lines = first(str(tmp_path / "pairs.jsonl"), tiny_tokenizer("chatml"), text_rows=decided)
        assert not [line for line in lines if "read as all are" in line]


def test_tools_of_plain_texts_are_counted_as_not_read(tmp_path):
    rows = [{**row, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}} for row in CONTINUED]
    _, lines = first(write(tmp_path / "pairs.jsonl", rows), tiny_tokenizer("chatml"))
    said = [line for line in lines if "not read, since a plain text takes no chat template" in line]
    assert len(said) == 2 and all("12" in line for line in said)


def test_texts_of_an_evaluation_set_that_read_the_other_way_are_counted(tmp_path):
    train, evals = (
        write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", QUESTIONS), ("b", HEADED))
    )
    settings = OrpoSettings(dataset_name=train, eval_dataset_name=evals)
    read = read_training(None, None, settings, tiny_tokenizer("chatml"), evaluates=True)
    (line,) = [line for line in read.lines() if "read as all are" in line]
    assert line.startswith("eval: 12 of 12 texts")


def test_texts_from_python_are_not_said_to_read_the_other_way():
    _, lines = first(QUESTIONS, tiny_tokenizer("chatml"))
    assert not [line for line in lines if "read as all are" in line]


def test_texts_of_a_stream_that_read_the_other_way_are_counted(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [*QUESTIONS, *HEADED[:3]])
    settings = ORPOConfig(output_dir=str(tmp_path), dataset_name=data, streaming=True, max_steps=1)
    read = read_training(None, None, settings, tiny_tokenizer("chatml"), evaluates=False)
    stream, settings.text_rows = read.train, read.text_rows  # as the trainer notes what was found
    assert len(list(stream)) == 15
    (line,) = [line for line in stream.counts.lines() if line.startswith("doubtful")]
    assert line.startswith("doubtful 3: a text that would be read the other way") and "pairs.jsonl:13" in line
