"""Findings are what no single row shows."""

from dataclasses import replace

import numpy as np
import pytest

from orpo.data.dataset import TokenizedDataset
from orpo.data.findings import find, length_bias
from orpo.data.near_duplicates import near_duplicates
from orpo.pairs import PreferencePair, TokenizedPair


def pair(prompt, chosen, rejected, source):
    def turn(role, text):
        return [{"role": role, "content": text}]

    return PreferencePair(
        turn("user", prompt),
        turn("assistant", chosen),
        rejected and turn("assistant", rejected),
        source=source,
    )


def test_duplicates_contradictions_and_shared_prompts():
    train = [
        pair("P", "a", "b", "t:0"), pair("P", "a", "b", "t:1"), pair("Q", "a", "b", "t:2"),
        pair("Q", "b", "a", "t:3"),
        pair("R", "a", None, "t:4"), pair("R", "a", "c", "t:5"), pair("P", "a", "b", "t:6"),
    ]  # fmt: skip
    report = find(train, [pair("P", "x", "y", "e:0"), pair("Z", "x", "y", "e:1")])
    assert (report.duplicates, report.contradictions, report.shared_prompts) == (2, 2, 1)
    assert report.examples == {
        "duplicates": ["t:1", "t:6"], "contradictions": ["t:2", "t:3"], "shared_prompts": ["e:0"],
    }  # fmt: skip
    assert len(report.lines()) == 3 and report.to_dict()["pairs"] == 7
    clean = find(train[4:6] * 2)
    assert (clean.lines(), clean.shared_prompts) == ([], None)


def test_length_bias_counts_responses_only():
    tokens = [
        TokenizedPair([1] * 5, [2] * 4, [3] * 2),
        TokenizedPair([1], [2] * 6, [3] * 4, chosen_context=3, rejected_context=0),
        TokenizedPair([1], [2] * 3, [3] * 3),
        TokenizedPair([1], [2] * 90, []),
    ]
    bias = length_bias(TokenizedDataset.from_pairs(tokens))
    differences = np.array([2, -1, 0])
    assert bias.mean_difference == pytest.approx(differences.mean())
    assert bias.standard_error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert bias.chosen_longer == pytest.approx(0.5)
    assert length_bias(TokenizedDataset.from_pairs(tokens[3:])) is None
    report = replace(find([pair("P", "a", "b", "t")]), length_bias=bias)
    assert report.lines() == [
        "chosen answers are 0.3 tokens longer on average (standard error 0.9); "
        "the longer answer is the chosen one in 50% of the pairs"
    ]


def test_near_duplicates_are_prompts_with_most_word_runs_in_common():
    words = [f"word{number}" for number in range(60)]
    text = " ".join(words)
    changed = " ".join([*words[:30], "other", *words[31:]])
    half = " ".join([*words[:30], *(f"new{number}" for number in range(30))])
    assert near_duplicates([text, changed, half, text, "two words"]) == [1]
    report = find([pair(text, "a", "b", "t:0"), pair(changed, "a", "b", "t:1"), pair(half, "a", "b", "t:2")])
    assert (report.near_duplicates, report.examples["near_duplicates"]) == (1, ["t:1"])
