"""Preparing says what it removes, the numbers add up, and what is read back is what was kept."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from turns import bot, system, user

import orpo
from orpo.cli import main
from orpo.curation.deduplication import KINDS, remove_repeats
from orpo.curation.filters import by_length, by_margin
from orpo.curation.measuring import in_characters
from orpo.curation.parting import part_pairs
from orpo.curation.prepare import prepare_data
from orpo.curation.sampling import balance_length, limit, take_shares
from orpo.curation.similar import similar_groups
from orpo.data.formats import FORMATS
from orpo.data.preferences import read_preferences
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair

SOURCE = Path(orpo.__file__).parents[1]
WORDS = [f"{a}{b}" for a in ("lo", "mi", "ta", "ru", "sen", "pa") for b in ("na", "ko", "vel", "dis", "mu")]


def sentence(number, length=12):
    return " ".join(random.Random(number).choices(WORDS, k=length))


def row(number, **changed):
    first, second = sentence(number + 10_000), sentence(number + 20_000)
    return {"prompt": sentence(number), "chosen": first, "rejected": second} | changed


def write(path, rows):
    path.write_text("\n".join(json.dumps(one) for one in rows) + "\n")
    return path


def prepared(tmp_path, rows, **options):
    lines = []
    out = tmp_path / "out"
    result = prepare_data(write(tmp_path / "pairs.jsonl", rows), out, say=lines.append, **options)
    return result, {step.name: step for step in result.steps}, lines


def tiny_model(folder):
    tokenizer = tiny_tokenizer("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_back(folder, split="train", **options):
    return read_preferences(folder, split=split, max_dropped=1.0, **options).pairs


# ------------------------------------------------------------------------------------------------- cleaning


def test_each_planted_fault_is_counted_once_with_its_line_and_the_numbers_add_up(tmp_path):
    rows = [row(number) for number in range(40)]
    rows[1]["chosen"] += "  \n"
    rows[2]["rejected"] = "a\x00b" + rows[2]["rejected"]
    rows[3]["chosen"] = "cafÃ© and naÃ¯ve " + rows[3]["chosen"]
    rows[4]["chosen"] = "lost \ufffd " + rows[4]["chosen"]
    rows[5]["rejected"] = "half \ud83d"
    rows[6]["rejected"] = rows[6]["chosen"]
    rows[7]["chosen"] = " "
    rows[8]["chosen"] = "\x07\x08"
    rows[9]["rejected"] = rows[9]["chosen"].upper() + "!"
    rows[10] = {**rows[11], "prompt": rows[11]["prompt"] + " "}  # repeats the next one, which goes
    rows[12] = row(13, chosen=rows[13]["rejected"], rejected=rows[13]["chosen"])
    rows[14] = {name: text + " also" for name, text in rows[15].items()}
    rows[16] = row(16, chosen=3)
    result, steps, lines = prepared(tmp_path, rows, test=0)
    assert steps["read"].removed == {
        "chosen and rejected are identical": 1,
        "empty chosen answer": 1,
        "malformed: 'chosen' is an int; expected text": 1,
        "malformed: 'rejected' holds half of a character (a lone surrogate), as cut texts do": 1,
    }
    assert steps["clean"].removed == {"empty chosen answer": 1}
    assert steps["clean"].changed == {
        "trailing blanks left out": 1,
        "control characters left out": 1,
        "seems to be read in a wrong encoding": 1,
        "holds the sign of a lost character (U+FFFD)": 1,
    }
    assert steps["deduplicate"].removed == {
        KINDS["similar_sides"]: 1, KINDS["duplicates"]: 1,
        KINDS["contradictions"]: 2, KINDS["near_duplicates"]: 1,
    }  # fmt: skip
    assert result.splits == {"train": 40 - 4 - 1 - 5}
    assert f"removed 2: {KINDS['contradictions']} (pairs.jsonl:13, pairs.jsonl:14)" in "\n".join(lines)
    texts = {pair.source: pair for pair in read_back(result.folder)}
    assert texts["pairs.jsonl:2"].chosen == rows[1]["chosen"].strip()
    assert texts["pairs.jsonl:3"].rejected.startswith("ab")
    assert texts["pairs.jsonl:4"].chosen == rows[3]["chosen"] and "pairs.jsonl:12" not in texts
    for one, then in zip(result.steps, result.steps[1:], strict=False):
        assert one.after == then.before


def test_broken_encoding_is_repaired_and_lost_characters_removed_where_asked(tmp_path):
    rows = [
        row(0, chosen="cafÃ© au lait"),
        row(1, chosen="lost \ufffd one"),
        row(2, chosen="“fine” déjà vu"),
    ]
    result, steps, _ = prepared(tmp_path, rows, fix_text=True, drop_broken=True, test=0)
    assert steps["clean"].changed == {"encoding repaired": 1}
    assert steps["clean"].removed == {"holds the sign of a lost character (U+FFFD)": 1}
    assert [pair.chosen for pair in read_back(result.folder)] == ["café au lait", "“fine” déjà vu"]


def test_blanks_and_signs_that_say_something_stay(tmp_path):
    rows = [
        {"prompt": "The sky is ", "chosen": "blue", "rejected": "green"},
        {"prompt": "2 - 7 =", "chosen": " -5", "rejected": " 5"},
        {"prompt": "45/10 =", "chosen": " 4.5", "rejected": " 45"},
    ]
    result, _, _ = prepared(tmp_path, rows, test=0)
    assert [(p.prompt, p.chosen, p.rejected) for p in read_back(result.folder)] == [
        tuple(one.values()) for one in rows
    ]


def test_what_is_kept_on_request_is_counted(tmp_path):
    rows = [row(0), row(0), row(1), row(2, rejected=row(2)["chosen"] + ".")]
    _, steps, _ = prepared(tmp_path, rows, keep=("duplicates", "similar_sides"), test=0)
    assert steps["deduplicate"].changed == {
        f"{KINDS['duplicates']} (kept)": 1,
        f"{KINDS['similar_sides']} (kept)": 1,
    }
    assert steps["deduplicate"].after == 4


def test_a_system_text_tells_pairs_apart():
    one = PreferencePair(
        [system("Be kind."), user("Q?")], [bot("yes of course")], [bot("never ask me")], source="a"
    )
    other = replace(one, prompt=[system("Be rude."), user("Q?")], chosen=one.rejected, rejected=one.chosen)
    assert remove_repeats([one, other])[0] == [0, 1]
    assert remove_repeats([one, replace(one, prompt=other.prompt)])[0] == [0, 1]
    assert remove_repeats([one, replace(one, tools=[{"name": "f"}])])[0] == [0, 1]
    assert remove_repeats([one, replace(one, source="b")])[0] == [0]


# -------------------------------------------------------------------------------------------------- filters


def test_filters_remove_what_they_say(tmp_path):
    english = "The weather in the mountains is often very different from the valley below."
    german = "Das Wetter in den Bergen ist oft ganz anders als unten im Tal, wo es regnet."
    high = {"source": "a", "score_chosen": 5, "score_rejected": 1}
    low = {"score_chosen": 2}
    rows = [
        {"prompt": english[:40], "chosen": english, "rejected": english[4:50], **high},
        {"prompt": german[:40], "chosen": german, "rejected": german[4:], **high},
        row(2, source="b"),
        {"prompt": english[:45], "chosen": english + " Yes.", "rejected": english[9:], **high, **low},
        {"prompt": english[20:], "chosen": "Yes.", "rejected": "No.", **high},
        {"prompt": english[5:60], "chosen": english * 4, "rejected": english[7:], **high},
        {"prompt": english[3:70], "chosen": english[30:], "rejected": english[:60], "source": "a"},
    ]  # fmt: skip
    options = {"source": ("a",), "language": ("en",), "min_margin": 2.0, "min_length": 5, "max_length": 300}
    result, steps, _ = prepared(tmp_path, rows, test=0, **options)
    assert steps["source"].removed == {"of another source": 1}
    assert steps["language"].removed == {"in de": 1}
    assert steps["margin"].removed == {"no scores": 1, "the scores differ by less than 2": 1}
    assert steps["length"].removed == {
        "an answer is shorter than 5 characters": 1,
        "prompt and answer are longer than 300 characters": 1,
    }
    (pair,) = read_back(result.folder)
    assert pair.scores == (5.0, 1.0) and pair.group == "a"


def test_what_just_reaches_a_limit_stays():
    pairs = [PreferencePair("p" * 10, "c" * 5, "r" * 8, source="one", scores=(5.0, 3.0))]
    lengths = in_characters(pairs)

    def stays(found):
        return found[0] == [0]

    assert stays(by_margin(pairs, 2.0)) and not stays(by_margin(pairs, 2.1))
    assert stays(by_length(pairs, lengths, 5, None)) and not stays(by_length(pairs, lengths, 6, None))
    assert stays(by_length(pairs, lengths, None, 18)) and not stays(by_length(pairs, lengths, None, 17))


def test_lengths_are_counted_in_tokens_of_a_model(tmp_path):
    model = tiny_model(tmp_path / "model")
    rows = [row(number, chosen=sentence(number, 3 + number), rejected="no") for number in range(12)]
    _, in_letters, _ = prepared(tmp_path, rows, test=0, max_length=120)
    result = prepare_data(rows, tmp_path / "tokens", model=str(model), max_length=120, test=0)
    steps = {step.name: step for step in result.steps}
    assert in_letters["length"].removed and steps["tokenize"].before == 12
    assert "tokens" in next(iter(steps["length"].removed))


def test_missing_scores_and_sources_name_what_there_is(tmp_path):
    with pytest.raises(DataError, match=r"min_margin needs scores, and no row has any; .*score_chosen"):
        prepared(tmp_path, [row(0), row(1)], min_margin=1.0)
    with pytest.raises(ConfigError, match="no pair is from c; the data has a"):
        prepared(tmp_path, [row(0, source="a"), row(1, source="a")], source=("c",))
    with pytest.raises(ConfigError, match="language: xx is not known"):
        prepared(tmp_path, [row(0)], language=("xx",))


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("best-each", [("a", "b"), ("a", "c"), ("a", "d")]),
        ("best-worst", [("a", "d")]),
        ("all", [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]),
    ],
)
def test_ranked_answers_are_paired_as_asked(tmp_path, way, expected):
    answers = {"b": 5, "a": 9, "d": 1, "c": 5}
    text = {name: sentence(number) for number, name in enumerate(answers)}
    rows = [{"prompt": "Q?", "responses": list(text.values()), "scores": list(answers.values())}, row(7)]
    result, steps, _ = prepared(tmp_path, rows[:1], pairs=way, test=0)
    names = {words: name for name, words in text.items()}
    found = [
        (names[p.chosen[0]["content"]], names[p.rejected[0]["content"]]) for p in read_back(result.folder)
    ]
    assert sorted(found) == expected
    assert [p.scores for p in read_back(result.folder)] == [(answers[a], answers[b]) for a, b in found]
    if way != "best-each":
        assert steps["pairs"].before == 3 and steps["pairs"].after == len(expected)


def test_one_random_answer_is_taken_and_lists_without_scores_stay(tmp_path):
    several = row(0) | {"rejected": [sentence(n) for n in (1, 2, 3)]}
    result, _, _ = prepared(tmp_path, [several, row(9)], pairs="best-random", test=0)
    assert result.splits == {"train": 2}
    result = prepare_data([several, row(9)], tmp_path / "worst", pairs="best-worst", test=0)
    assert (
        result.splits == {"train": 4}
        and "1 rows with several answers have no scores" in result.steps[1].remark
    )


# --------------------------------------------------------------------------------------- balance and limits


def lengthy(number, longer):
    short, long = "a" * random.Random(number).randint(1, 50), "b" * (60 + number % 40)
    chosen, rejected = (long, short) if longer else (short, long)
    return PreferencePair(f"Q{number}", chosen, rejected, source=f"p:{number}", group="ab"[number % 2])


def test_balanced_lengths_say_nothing_about_the_preference_in_any_bin():
    pairs = [lengthy(number, longer=number % 4 != 0) for number in range(400)] + [
        PreferencePair("E", "x", "y")
    ]
    kept, step = balance_length(pairs, in_characters(pairs), seed=0)
    signs = [np.sign(len(pairs[i].chosen) - len(pairs[i].rejected)) for i in kept]
    assert sum(signs) == 0 and 150 < len(kept) <= 201 and kept[-1] == 400
    assert sum(step.removed.values()) == len(pairs) - len(kept)
    assert "in 75% of the pairs, now in 50%" in step.remark
    ratios = [abs(np.log1p(len(pairs[i].chosen)) - np.log1p(len(pairs[i].rejected))) for i in kept]
    by_ratio = [sign for _, sign in sorted(zip(ratios, signs, strict=True))]
    assert all(abs(sum(by_ratio[start : start + 40])) < 20 for start in range(0, len(by_ratio) - 40, 40))


def test_a_limit_keeps_the_shares_of_sources():
    pairs = [replace(lengthy(n, longer=n % 2 == 0), group="abc"[min(n % 10, 2)]) for n in range(500)]
    for seed in range(4):  # without shares, about one seed in six comes as near
        kept, step = limit(pairs, in_characters(pairs), 250, seed=seed)
        shares = [[pairs[i].group for i in kept].count(name) for name in "abc"]
        assert len(kept) == step.after == 250
        assert all(abs(a - b) <= 1 for a, b in zip(shares, (25, 25, 200), strict=True)), shares


@given(st.lists(st.sampled_from("abcde"), min_size=1), st.integers(1, 60), st.integers(0, 5))
def test_shares_are_kept_to_within_one(strata, number, seed):
    taken = take_shares(strata, number, seed)
    assert len(taken) == len(set(taken)) == min(number, len(strata)) and taken == sorted(taken)
    for name in set(strata):
        share = len(taken) * strata.count(name) / len(strata)
        assert abs(sum(strata[index] == name for index in taken) - share) < 1


# ------------------------------------------------------------------------------------------------ the split


def similarity(one, other):
    """The share of their runs of three words that two texts have in common."""
    runs = [set(zip(words, words[1:], words[2:], strict=False)) for words in (one.split(), other.split())]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def with_noise(text, draw):
    words = text.split()
    words[draw.randrange(len(words))] = "other"
    return " ".join(words)


def test_no_prompt_nor_one_that_nearly_repeats_it_is_on_both_sides(tmp_path):
    draw = random.Random(0)
    prompts = [sentence(number, 40) for number in range(100)]
    rows = [
        row(n, prompt=prompts[n % 100] if n < 150 else with_noise(prompts[n % 100], draw)) for n in range(300)
    ]
    result, _, lines = prepared(tmp_path, rows, test=0.1, validation=0.1)
    parts = {name: [pair.prompt for pair in read_back(result.folder, name)] for name in result.splits}
    assert sum(map(len, parts.values())) == 300 and all(
        25 <= len(parts[n]) <= 30 for n in ("test", "validation")
    )
    for held in ("test", "validation"):
        others = [text for name, texts in parts.items() if name != held for text in texts]
        assert not set(others) & set(parts[held])
        assert max(similarity(one, other) for one in set(parts[held]) for other in set(others)) < 0.8
    near = len({one["prompt"] for one in rows}) - 100
    assert f"{near} prompts that nearly repeat another stay on its side" in lines[-1]


def test_groups_equal_those_of_all_comparisons():
    draw = random.Random(1)
    texts = [sentence(number % 25, 100) for number in range(60)]
    texts = [text if draw.random() < 0.4 else with_noise(text, draw) for text in texts]
    slow = list(range(60))
    for one in range(60):
        for other in range(one):
            if similarity(texts[one], texts[other]) >= 0.8:
                slow = [slow[other] if number == slow[one] else number for number in slow]
    assert similar_groups(texts, len(texts)) == slow and len(set(slow)) == 25
    assert similar_groups(["-1", "1", "-1 ", "Yes", "yes"], 5) == [0, 1, 0, 3, 3]


def test_prompts_that_all_resemble_each_other_are_split_by_equality():
    pairs = [PreferencePair(sentence(1, 300) + f" {n // 2}", "a", "b") for n in range(40)]
    parts, line = part_pairs(pairs, {"test": 0.1}, seed=0)
    assert 3 <= len(parts["test"]) <= 4 and "only equal prompts stay on one side" in line
    assert not {pairs[i].prompt for i in parts["test"]} & {pairs[i].prompt for i in parts["train"]}
    with pytest.raises(DataError, match="too few prompts"):
        part_pairs(pairs[:2], {"test": 0.5}, seed=0)


# ----------------------------------------------------------------------------------------------- the folder

DOCUMENTED = re.findall(
    r"^\| `(\w+)` \| `(\{.*?\})` \|",
    (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None], "y": {}}}}]}  # fmt: skip
FURTHER = {
    "tools": [{"messages": [user("Q?"), CALL, {"role": "tool", "name": "f", "content": "3"}], "tools": [TOOL],
               "chosen": [bot("Three.")], "rejected": [bot("Four."), user("Sure?"), CALL],
               "chat_template_kwargs": {"enable_thinking": False}, "source": "a", "id": 7}],
    "scores": [row(0, score_chosen=4, score_rejected=1.5), row(1, chosen="a b", margin=2), row(2)],
    "ranked": [{"prompt": "Q", "responses": ["good", "best", "bad"], "ranks": [2, 1, 3]}],
    "diverging": [{"chosen": [user("Hi"), bot("A"), user("x"), bot("B")],
                   "rejected": [user("Hi"), bot("A"), user("y"), bot("C")]}],
    "system alone": [{"chosen": [system("S"), user("x"), bot("B")],
                      "rejected": [system("S"), user("y"), bot("C")]}],
    "no rejected answer": [{"prompt": [user("x")], "chosen": [bot("B")]},
                           {"prompt": [user("y")], "chosen": [bot("D")], "rejected": [bot("E")]}],
    "texts like another format": [{"prompt": "Say", "chosen": "Say hello", "rejected": "Say bye"}] * 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "rows", [*[[json.loads(text)] for _, text in DOCUMENTED], *FURTHER.values()],
    ids=[*[name for name, _ in DOCUMENTED], *FURTHER],
)  # fmt: skip
def test_pairs_that_are_read_back_are_those_that_were_kept(tmp_path, rows):
    forced = {"data_format": "standard"} if rows is FURTHER["texts like another format"] else {}
    expected = read_preferences(write(tmp_path / "pairs.jsonl", rows), sft_rows="use", **forced).pairs
    settings = {"sft_rows": "use", **forced}
    keep = tuple(KINDS)
    result = prepare_data(tmp_path / "pairs.jsonl", tmp_path / "out", settings=settings, test=0, keep=keep)
    found = read_preferences(result.folder, sft_rows="use")
    trimmed = [
        pair
        if not pair.is_text
        else replace(pair, chosen=pair.chosen.rstrip(), rejected=pair.rejected.rstrip())
        for pair in expected
    ]
    assert found.pairs == trimmed and len(expected) >= 1
    assert found.format.name == "prepared" and found.unused_columns == {str(result.folder): []}
    again = prepare_data(result.folder, tmp_path / "again", settings={"sft_rows": "use"}, test=0, keep=keep)
    assert read_back(again.folder, sft_rows="use") == trimmed


def test_texts_and_conversations_are_kept_apart_in_one_folder(tmp_path):
    talk = {"prompt": [user("Hi")], "chosen": [bot("Yes")], "rejected": [bot("No")]}
    one, other = write(tmp_path / "a.jsonl", [row(1)]), write(tmp_path / "b.jsonl", [talk])
    result = prepare_data([one, other], tmp_path / "out", test=0)
    assert read_back(result.folder) == read_preferences([one, other]).pairs
    assert len(FORMATS) == len(DOCUMENTED)  # the round trip above is over all of them


def test_the_same_input_gives_the_same_bytes_and_another_seed_another_split(tmp_path):
    rows = [row(number, source="ab"[number % 2]) for number in range(80)]
    data = write(tmp_path / "pairs.jsonl", rows)
    folders = [
        prepare_data(data, tmp_path / str(n), limit=60, balance="length", seed=n // 2).folder
        for n in range(3)
    ]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert set(contents[0]) == {"train.parquet", "test.parquet", "prepared.json"}
    assert contents[0] == contents[1] and contents[0]["test.parquet"] != contents[2]["test.parquet"]
    manifest = json.loads(contents[0]["prepared.json"])
    assert manifest["splits"]["test"]["sha256"] == hashlib.sha256(contents[0]["test.parquet"]).hexdigest()
    assert manifest["input"][0]["files"][0]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert manifest["options"]["limit"] == 60 and "orpo" in manifest["versions"]


STANDARD = {"data_format": "standard"}
CELLS = st.tuples(st.integers(0, 5), st.text("ab \x00é", max_size=4), st.sampled_from(["a b c", "z", ""]))


@settings(max_examples=15)
@given(st.lists(CELLS, min_size=1, max_size=15), st.integers(1, 9))
def test_the_numbers_of_all_steps_add_up(tmp_path_factory, cells, number):
    rows = [
        {"prompt": f"Q{prompt}", "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in cells
    ]
    out = tmp_path_factory.mktemp("sums") / "out"
    try:
        result = prepare_data(
            rows, out, limit=number, test=0, settings={"max_dropped": 1.0, "data_format": "standard"}
        )
    except DataError:
        assert not out.exists() and not any(
            rejected and chosen.strip("\x00 ") for _, chosen, rejected in cells
        )
        return
    left = len(rows)
    for step in result.steps:
        assert step.before == left and step.after >= 0
        left = step.before + step.added - sum(step.removed.values())
    assert left == sum(result.splits.values()) == len(read_back(result.folder))


def test_nothing_is_overwritten_and_force_replaces_prepared_data_alone(tmp_path, capsys):
    data = str(write(tmp_path / "pairs.jsonl", [row(number) for number in range(30)]))
    out = tmp_path / "out"
    assert main(["data", "prepare", data, "--out", str(out)]) == 0
    before = (out / "train.parquet").read_bytes()
    assert main(["data", "prepare", data, "--out", str(out), "--seed", "1"]) == 2
    assert "add --force" in capsys.readouterr().err and (out / "train.parquet").read_bytes() == before
    assert main(["data", "prepare", data, "--out", str(out), "--seed", "1", "--force"]) == 0
    assert (out / "train.parquet").read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for place in (tmp_path / "mine", Path(data)):
        assert main(["data", "prepare", data, "--out", str(place), "--force"]) == 2
    assert main(["data", "prepare", str(out), "--out", str(out), "--force"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "out", "pairs.jsonl"]
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "orpo: error" in line] == errors and len(errors) == 3


def test_a_kill_in_the_middle_leaves_the_place_as_it_was(tmp_path):
    data = write(tmp_path / "pairs.jsonl", [row(number) for number in range(60)])
    code = (
        "import os, signal\nimport pyarrow.parquet as pq\nfrom orpo.curation.prepare import prepare_data\n"
        "whole = pq.ParquetWriter.close\n"
        "def half(self):\n    whole(self)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pq.ParquetWriter.close = half\n"
        f"prepare_data({str(data)!r}, {str(tmp_path / 'out')!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SOURCE)}, check=False
    )
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert prepare_data(data, tmp_path / "out", test=0).splits == {"train": 60}


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.curation.reading.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs ftfy; pip install 'orpo\[data\]'"):
        prepare_data([row(0)], tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("test", 1.0),
        ("validation", -0.1),
        ("limit", 0),
        ("pairs", "best"),
        ("keep", ("all",)),
        ("balance", "score"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, option, value):
    with pytest.raises(
        ConfigError, match=rf"^{option}: .*{re.escape(str(value if option != 'keep' else 'all'))}"
    ):
        prepare_data([row(0)], tmp_path / "out", **{option: value})


# ------------------------------------------------------------------------------------------------- training


def test_a_prepared_folder_trains_and_is_evaluated_on_its_own_split(tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    folder = prepare_data([row(n) for n in range(40)], tmp_path / "data", test=0.1, validation=0.1).folder
    arguments = ["--model_name_or_path", str(model), "--dataset_name", str(folder), "--max_steps", "2",
                 "--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2"]  # fmt: skip
    assert main(["train", *arguments, "--use_cpu", "true"]) == 0
    printed = capsys.readouterr().out
    line = f"evaluating on the split validation of {folder} (dataset_test_split names another); test is left"
    assert line in printed and "held out" not in printed.split("evaluating on")[0]
    assert "format prepared" in printed and "not used" not in printed
    assert main(["eval", str(tmp_path / "run"), "--data", str(folder)]) == 0
    assert "all pairs (4)" in capsys.readouterr().out
    assert main(["data", "show", str(folder), "--model", str(model), "--row", "0"]) == 0
    assert "prepared" in capsys.readouterr().out
