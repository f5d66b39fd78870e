"""What an inspection says of a data set is true: planted facts are found and counted, and nothing else is."""

import gzip
import json
import random
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.cells import cell_len

import orpo
from orpo import cli
from orpo.curation.advice import advice
from orpo.curation.bias import FEWEST, audit
from orpo.curation.lengths import padded_tokens, spread
from orpo.curation.repeats import RUN, RunIndex, overlap
from orpo.curation.texts import PairTexts
from orpo.curation.wording import is_mojibake, refusals
from orpo.data.near_duplicates import SIMILARITY, near_duplicates
from orpo.data.refusals import refuses
from orpo.data.words import runs_of, words_of
from orpo.errors import DataError
from orpo.evaluation.statistics import share_interval

DEMO = Path(cli.__file__).parent / "demo"
NOUNS = [f"{a}{b}" for a in ("kel", "mor", "tas", "vin", "lop", "sar", "dun", "fir") for b in "abcdefghijkl"]


def sentence(random_, number=12):
    return " ".join(random_.choice(NOUNS) for _ in range(number)) + "."


def rows_of(number, seed=0, longer=0.5):
    """Rows of random words, the sides different; the chosen one is the longer one in a share of the rows."""
    random_ = random.Random(seed)
    rows = []
    for index in range(number):
        long, short = sentence(random_, 16), sentence(random_, 8)
        sides = (long, short) if index < longer * number else (short, long)
        rows.append({"prompt": sentence(random_), "chosen": sides[0], "rejected": sides[1]})
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


# -------------------------------------------------------------------------------- planted facts


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder of three splits and an evaluation set, with known faults."""
    folder = tmp_path_factory.mktemp("planted")
    rows = rows_of(200)
    base = [dict(row) for row in rows]
    words = base[5]["prompt"].split()
    nearly = " ".join([*words[:-1], "other."])  # 9 of 11 runs of three words are the same
    rows += [base[0], base[0], base[1]]  # 3 duplicates
    rows.append(base[2] | {"chosen": base[2]["rejected"], "rejected": base[2]["chosen"]})  # a contradiction
    rows.append(rows_of(1, seed=9)[0] | {"prompt": nearly})
    rows.append(
        rows_of(1, seed=10)[0] | {"chosen": "one two three four.", "rejected": "One two three, four!"}
    )
    rows.append(rows_of(1, seed=11)[0] | {"rejected": "donâ€™t say cafÃ© to them"})
    rows.append(rows_of(1, seed=12)[0] | {"chosen": "half \ufffd a word"})
    rows.append(rows_of(1, seed=13)[0] | {"prompt": "a bell \x07 rings"})
    rows.append(rows_of(1, seed=14)[0] | {"prompt": "it\x92s a quote of Windows"})
    rows.append(rows_of(1, seed=15)[0] | {"chosen": "I\u2019m sorry, but I can\u2019t help with that."})
    rows.append({"prompt": "p", "chosen": "same", "rejected": "same "})
    rows += [
        '{"prompt": "cut\n',
        '{"prompt": "cut again\n',
        '{"prompt": 3, "chosen": "a", "rejected": "b"}\n',
    ]
    rows.append(json.dumps(base[4] | {"chosen": "\ud83d"}) + "\n")  # half a character
    write(folder / "data/train.jsonl", rows)
    write(folder / "data/test.jsonl", [base[6] | {"chosen": "new"}, *rows_of(20, seed=2)])
    write(folder / "data/validation.jsonl", [*rows_of(1, seed=2), *rows_of(20, seed=3)])
    near = " ".join(["other", *base[8]["prompt"].split()[1:]])
    questions = [base[7]["prompt"], near, f"What of {base[9]['chosen']} Or else?", "Nothing of the kind?"]
    write(folder / "mt_bench.jsonl", [{"question_id": 1, "question": text} for text in questions])
    return folder


@pytest.fixture(scope="module")
def inspected(planted):
    return orpo.inspect_data(
        planted / "data", str(DEMO / "model"), against=[str(planted / "mt_bench.jsonl")], max_length=64
    )


def test_rows_that_do_not_train_are_counted_and_the_first_three_named(inspected):
    rows = inspected.rows
    assert (rows.total, inspected.pairs, sum(rows.skipped.values())) == (216, 211, 4)
    (cut,) = [reason for reason in rows.skipped if "is not JSON" in reason]
    assert rows.first_rows(cut) == ["train.jsonl:213", "train.jsonl:214"]
    assert any("half of a character" in reason for reason in rows.skipped)
    assert (inspected.identical, inspected.prompts) == (1, 207)


def test_repeats_and_contradictions_are_counted(inspected):
    findings = inspected.findings
    assert (findings.duplicates, findings.near_duplicates, findings.contradictions) == (3, 1, 2)
    assert inspected.first("near_duplicates") == ["train.jsonl:205"]
    assert inspected.nearly_identical.first == ("train.jsonl:206",)
    assert inspected.nearly_identical.number == 1


def test_prompts_of_two_splits_are_found_between_all_of_them(inspected):
    assert list(inspected.splits) == ["test", "train", "validation"]
    shared = {one.splits: (one.prompts, one.rows.first) for one in inspected.shared}
    assert shared == {
        ("train", "test"): (1, ("test.jsonl:1",)), ("test", "validation"): (1, ("validation.jsonl:1",)),
    }  # fmt: skip


def test_overlap_with_an_evaluation_set_is_found_in_each_of_three_ways(inspected):
    (one,) = inspected.overlaps
    assert one.questions == 4
    assert (one.exact.first, one.near.first, one.runs.first) == (
        ("train.jsonl:8",), ("train.jsonl:9",), ("train.jsonl:10",),
    )  # fmt: skip
    assert one.pairs == 3
    assert len(one.run.split()) == RUN


def test_broken_text_and_refusals_are_counted(inspected):
    encoding = {name: found.first for name, found in inspected.encoding.items()}
    assert encoding == {
        "replacement characters": ("train.jsonl:208",),
        "control characters": ("train.jsonl:209", "train.jsonl:210"),
        "mojibake": ("train.jsonl:207",),
    }
    assert inspected.refusals.only_chosen.first == ("train.jsonl:211",)
    assert inspected.refusals.rejected == 0


def test_each_limit_says_what_it_drops_as_a_run_with_it_does(inspected, planted):
    from orpo.data.source import read_pairs
    from orpo.engine.loading import load_tokenizer
    from orpo.settings.config import OrpoSettings

    rows = []
    for length in (3, 30, 120):  # a last question that fits, with older turns that do not
        turns = [{"role": role, "content": "word " * length} for role in ("user", "assistant")] * 2
        last = {"role": "user", "content": "And now? " * (length // 3)}
        rows.append(
            {
                "prompt": [*turns, last],
                "chosen": [{"role": "assistant", "content": "Yes."}],
                "rejected": [{"role": "assistant", "content": "No, not at all."}],
            }
        )
    rows.append(rows[0] | {"prompt": [{"role": "user", "content": "word " * 120}]})  # no turn to leave out
    found = orpo.inspect_data(rows, str(DEMO / "model"), max_length=100)
    tokenizer = load_tokenizer(str(DEMO / "model"))
    for limit in found.tokens.limits:
        read = read_pairs(rows, OrpoSettings(max_length=limit.max_length, max_dropped=1.0), tokenizer)
        assert limit.dropped == read.counts.num_dropped
        assert limit.cut == sum(read.counts.changed.values())
        assert limit.shared_tokens == read.pairs.lengths.sum()
    assert (found.tokens.limits[0].cut, found.tokens.limits[0].dropped) == (1, 2)
    assert inspected.tokens.set_limit.max_length == 64


def test_a_padded_trainer_pays_two_lines_as_wide_as_the_longest_side():
    lengths = np.random.default_rng(0).integers(1, 50, (37, 3))
    order = np.random.default_rng(0).permutation(37)
    total = 0
    for start in range(0, 37, 8):
        batch = [lengths[index] for index in order[start : start + 8]]
        lines = [line for prompt, chosen, rejected in batch for line in (prompt + chosen, prompt + rejected)]
        total += len(lines) * max(lines)
    assert padded_tokens(lengths, 8) == total


def test_a_distribution_is_that_of_its_lengths():
    values = np.random.default_rng(0).integers(0, 5000, 999)
    one = spread(values)
    assert one.median == np.sort(values)[499]
    edges = [lower for lower, _ in one.histogram] + [10**9]
    for (lower, number), upper in zip(one.histogram, edges[1:], strict=True):
        assert number == ((values >= lower) & (values < upper)).sum()
    assert spread([]) is None


# -------------------------------------------------------------------------------- the audit


@pytest.fixture(scope="module")
def biased():
    return orpo.inspect_data(rows_of(600, longer=0.71))


def test_a_length_bias_of_known_strength_is_found(biased):
    look = biased.audit.strongest
    assert (look.name, look.leaning) == ("length", "the longer answer is the chosen one")
    assert look.accuracy.share == pytest.approx(0.71)
    assert 0.65 < look.accuracy.low < 0.67 < 0.75 < look.accuracy.high < 0.77
    line = biased.audit.sentence()
    assert line.startswith(
        "Length alone tells chosen from rejected in 71 % of held-out pairs (95 % interval 66 to 76"
    )
    assert advice(biased)[0].level == "act"
    assert "judge it at equal length" in advice(biased)[0].sentence


def test_without_a_bias_nothing_is_found():
    for seed in range(2):
        looked = audit(_texts(rows_of(300, seed=seed)), seed=seed)
        assert not any(look.predicts for look in looked.looks)
        assert looked.sentence().startswith("Nothing trivial predicts the preference")


def test_words_that_mark_the_chosen_answers_are_named():
    rows = rows_of(200)
    for row in rows:
        row["chosen"] = row["chosen"].replace(" ", " zebra ", 1)
    looks = {look.name: look for look in audit(_texts(rows)).looks}
    assert looks["words"].accuracy.share > 0.95
    assert "chosen answers have “zebra”" in looks["words"].leaning
    assert not looks["refusal"].predicts
    assert looks["words"].accuracy.high == pytest.approx(1)
    assert looks["words"].accuracy.low < 0.98  # no certainty without a width


def test_pairs_of_a_prompt_are_held_out_together():
    """Answers repeated under one prompt would be recognised, if some of its pairs were learned from."""
    random_ = random.Random(0)
    rows = []
    for number in range(60):
        chosen, rejected = f"aye{number} " + sentence(random_), f"nay{number} " + sentence(random_)
        rows += [{"prompt": f"prompt {number}", "chosen": chosen, "rejected": rejected}] * 6
    looked = audit(_texts(rows))
    assert (looked.pairs, looked.prompts) == (360, 60)
    assert not looked.looks[-1].predicts
    width = looked.looks[0].accuracy.high - looked.looks[0].accuracy.low
    assert width > 0.25  # of 60 prompts, not of 360 pairs


def test_a_small_set_is_too_small():
    looked = audit(_texts(rows_of(FEWEST - 1)))
    assert looked.looks == ()
    assert looked.sentence().startswith("Too few prompts")


def test_accuracy_and_auc_equal_those_of_both_orders():
    from sklearn.metrics import roc_auc_score

    from orpo.curation.bias import _measure

    scores = np.random.default_rng(0).normal(0.4, 1, 300).round(1)
    accuracy, auc = _measure(scores, np.arange(300))
    both = np.concatenate([scores, -scores])
    assert auc.share == pytest.approx(roc_auc_score([1] * 300 + [0] * 300, both))
    assert accuracy.share == pytest.approx(((scores > 0) + (scores == 0) / 2).mean())


def test_intervals_hold_as_often_as_they_say():
    random_ = np.random.default_rng(0)
    held = auc_held = 0
    from scipy.stats import norm

    from orpo.curation.bias import _measure

    for _ in range(300):
        scores = random_.normal(0.5, 1, 80)
        accuracy, auc = _measure(scores, np.arange(80))
        held += accuracy.low <= norm.cdf(0.5) <= accuracy.high
        auc_held += auc.low <= norm.cdf(0.5 * np.sqrt(2)) <= auc.high
    assert held >= 288 and auc_held >= 288  # 7 looks: 99.3 % each
    at_chance = [_measure(random_.normal(0, 1, 400), np.arange(400))[1] for _ in range(300)]
    errors = [(one.high - one.low) / 2 / norm.ppf(1 - 0.025 / 7) for one in at_chance]
    assert np.mean(errors) > 0.93 * np.std([one.share for one in at_chance])
    shares = torch.from_numpy(random_.integers(0, 2, 200).astype(float))
    once = share_interval(shares, torch.arange(200))
    four_times = share_interval(shares.repeat(4), torch.arange(200).repeat(4))
    assert four_times == pytest.approx(once, rel=0.02)
    one_large = share_interval(
        torch.cat([shares, torch.ones(200)]), torch.tensor([*range(200), *[200] * 200])
    )
    assert one_large.high - one_large.low > 3 * (once.high - once.low)


def _texts(rows):
    columns = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    return PairTexts(*columns, [str(index) for index in range(len(rows))])


# -------------------------------------------------------------------------------- slow twins


def real_prompts():
    texts = []
    for split in ("train", "validation", "test"):
        with gzip.open(DEMO / f"data/harmless/{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [str(json.loads(line)["chosen"]) for line in lines]
    return texts


def test_near_duplicates_are_those_of_the_exact_similarity():
    random_ = random.Random(1)
    texts = real_prompts()[:1000]
    for text in random_.sample(texts, 300):
        words = text.split()
        for _ in range(max(1, int(len(words) * random_.choice([0.01, 0.03, 0.12])))):
            words[random_.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    runs = [set(runs_of(words_of(text)[:512], 3)) for text in texts]
    where, best = {}, []
    for index, one in enumerate(runs):
        common = {}
        for run in one:
            for other in where.setdefault(run, []):
                common[other] = common.get(other, 0) + 1
            where[run].append(index)
        shares = [n / (len(one) + len(runs[k]) - n) for k, n in common.items() if texts[k] != texts[index]]
        best.append(0.0 if texts[index] in texts[:index] else max(shares, default=0.0))
    found = set(near_duplicates(texts))
    assert len(found) > 100
    sure = {index for index, share in enumerate(best) if share >= SIMILARITY + 0.06}
    assert len(sure - found) <= 0.03 * len(sure)
    assert all(best[index] > SIMILARITY - 0.12 for index in found)


def test_runs_in_common_are_found_wherever_they_begin():
    random_ = random.Random(0)
    known = [sentence(random_, random_.randrange(5, 40)) for _ in range(40)]
    index = RunIndex(known)
    runs = {run for text in known for run in runs_of(words_of(text), RUN)}
    for start in range(30):
        part = " ".join(known[start].split()[: random_.randrange(8, 30)])
        text = sentence(random_, start) + " " + part + " " + sentence(random_, 9)
        assert set(index.find(text)) == runs & set(runs_of(words_of(text), RUN))
    exactly = next(" ".join(text.split()[:RUN]) for text in known if len(text.split()) >= RUN)
    for before in range(RUN):
        (found,) = index.find(" ".join(["x"] * before + [exactly]))
        assert found == b" ".join(words_of(exactly))


def test_a_pair_counts_once_in_an_overlap_however_much_it_has_in_common():
    random_ = random.Random(0)
    question = sentence(random_, 60)
    nearly = question.replace(question.split()[30], "other")
    part = " ".join(question.split()[:20])
    prompts = [question, nearly, f"{part} {sentence(random_, 40)}", sentence(random_, 60)]
    texts = _texts([{"prompt": one, "chosen": question, "rejected": "no"} for one in prompts])
    found = overlap(texts, [question], "held out", lambda number: None)
    assert (found.exact.first, found.near.first, found.runs.first) == (("0",), ("1",), ("2", "3"))
    assert found.pairs == 4


def test_a_refusal_on_one_side_alone_is_told_from_one_on_both():
    no, yes = "I'm sorry, but I can't help with that.", "Here is how to do it: first take the lid off."
    rows = [("p", no, no), ("p", no, yes), ("p", yes, no), ("p", yes, yes)]
    found = refusals(_texts([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]))
    assert (found.chosen, found.rejected) == (0.5, 0.5)
    assert (found.only_chosen.first, found.only_rejected.first) == (("1",), ("2",))


def test_words_of_scripts_without_blanks_and_of_typographic_text():
    assert words_of("Don\u2019t — “Möwe”!") == words_of("don t möwe")
    assert len(words_of("今天天气很好")) == 6
    chinese = "请把下面这句话翻译成英文然后解释每一个词的意思和用法谢谢你"
    assert near_duplicates([chinese, chinese[:-1] + "您"]) == [1]
    known = [chinese[:-1] + "您", "quite another text", "the same text again"]
    assert near_duplicates([chinese, "a third text altogether", "the same text again"], known) == [0]


def test_mojibake_is_told_from_accents():
    from ftfy import fix_encoding

    def is_broken(text):
        return is_mojibake(text, text.encode(), fix_encoding)

    russian = "Привет, мир".encode().decode("cp1251")
    for text in ("cafÃ©", "x" * 500 + " donâ€™t", russian):
        assert is_broken(text), text
    for text in ("l\u2019été \u2013 déjà»", "Привет, мир! Россия", "今天天气很好", "plain"):
        assert not is_broken(text), text


def test_refusals_are_told_from_help():
    for text in (
        "I can\u2019t help with that.", "I'm sorry, but I'm not able to assist.", "As an AI, I do not",
        "I must respectfully decline.", "Unfortunately, I cannot do this", "I won't provide that.",
    ):  # fmt: skip
        assert refuses(text), text
    for text in (
        "You can't help it: it rains.",
        "Sorry to hear that! Try tea.",
        "Sure, I can help.",
        "",
        "It cannot fly.",
    ):
        assert not refuses(text), text


# -------------------------------------------------------------------------------- what is printed


class _Page(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "onerror")]

    def handle_data(self, data):
        self.text += data


def test_page_terminal_and_json_say_the_same(inspected):
    said = [one.sentence for one in advice(inspected)]
    assert 3 <= len(said) <= 6
    page = _Page(inspected.page())
    assert not {"script", "img", "link", "iframe"} & set(page.tags) and page.loads == []
    text = " ".join(" ".join(inspected.lines()).split())
    result = json.loads(json.dumps(inspected.to_json()))
    for one in said:
        assert one in page.text
        assert one in text
    assert [one["sentence"] for one in result["advice"]] == said
    assert all(cell_len(line) <= 80 for line in inspected.lines(80) if "/" not in line)
    assert result["repeats"]["duplicates"] == {
        "number": 3,
        "first": ["train.jsonl:201", "train.jsonl:202", "train.jsonl:203"],
    }
    assert result["tokens"]["limits"][0]["max_length"] == 64


def test_what_the_data_says_runs_nowhere():
    attack = "<script>alert(1)</script>"
    rows = [
        {"prompt": attack + str(n), "chosen": attack, "rejected": "no", attack: 1, "source": attack}
        for n in range(4)
    ]
    page = _Page(orpo.inspect_data(rows).page())
    assert "script" not in page.tags
    assert attack in page.text


def test_the_command_writes_page_and_json(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "new" / "out"
    words = ["data", "inspect", planted / "data/train.jsonl", "--out", out]
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"page        {out / 'inspect.html'}"
    assert "What you should know before training\n1  " in printed
    assert json.loads((out / "inspect.json").read_text())["pairs"] == 211


def test_without_the_extra_the_rest_is_looked_at(planted, monkeypatch, capsys):
    for name in ("sklearn.feature_extraction.text", "sklearn.linear_model", "py3langid", "ftfy"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["data", "inspect", str(planted / "data/train.jsonl"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["audit"], result["languages"]) == (None, None)
    assert "mojibake" not in result["encoding"]
    assert result["left_out"] == [
        "left out: languages, the bias audit, mojibake; pip install 'orpo[data]' adds it"
    ]
    assert result["repeats"]["duplicates"]["number"] == 3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["/nothing.jsonl"], "no such file"),
        (["{file}", "--against", "/nothing.jsonl"], "no such file"),
        (["{file}", "--against", "{odd}"], "no row says what it asks"),
        (["{file}", "--out", "{file}/x"], "--out {file}/x: cannot be made"),
        (["{file}", "--max_lenght", "9"], "did you mean 'max_length'"),
        (["{odd}"], "error: {odd}: cannot tell the format"),
    ],
)
def test_a_mistake_is_one_line(words, line, tmp_path, capsys):
    paths = {
        "file": write(tmp_path / "p.jsonl", rows_of(3)),
        "odd": write(tmp_path / "odd.jsonl", [{"x": 1}]),
    }
    assert cli.main(["data", "inspect", *(word.format(**paths) for word in words)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line.format(**paths) in said


def test_evaluation_sets_are_read_in_the_shapes_they_have(tmp_path):
    from orpo.curation.repeats import evaluation_questions

    for row, asks in (
        ({"turns": ["One?", "Two?"]}, "One?\n\nTwo?"),
        ({"instruction": "Do.", "output": "Done."}, "Do."),
        ({"prompt": "P", "chosen": "a", "rejected": "b"}, "P"),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]}, None),
    ):
        file = write(tmp_path / "set.jsonl", [row, row])
        if asks is not None:
            assert evaluation_questions(str(file)) == [asks, asks]
    write(tmp_path / "folder/test.jsonl", [{"question": "A", "answer": "B"}])
    assert evaluation_questions(str(tmp_path / "folder")) == ["A"]
    with pytest.raises(DataError, match="no row says what it asks"):
        evaluation_questions(str(write(tmp_path / "empty.jsonl", ["[]\n"])))
