"""A sample of benchmarks/torture.py: bad inputs end in one line, fuzzed ones in our own errors."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import torture
import torture_fuzz
from torture_inputs import cases

KINDS = (
    "file:arrow:zeros in the middle",
    "file:jsonl.gz:half",
    "file:jsonl text:half an emoji",
    "file:csv text:unquoted comma",
    "file:json text:two arrays",
    "file:path:named pipe",
    "file:disk:info a list",
    "row:conversational:chosen:content 5",
    "settings:unknown metric",
    "settings:galore",
    "settings:scheduler with others",
    "settings:beta 1.5",
    "settings:report to foo",
    "settings:targets",
    "settings:weight too large",
    "settings:environment",
    "setting:seed:-1",
    "recipe:NUL",
    "recipe:a float tag",
    "recipe:deep",
    "model:config.json:heads that do not divide",
    "model:tokenizer.json:an object",
    "model:pytorch_model.bin:a foreign pickle",
    "adapter:adapter_config.json:targets 5",
    "command:eval under a path",
)
"""One of each kind that once ended in a traceback, a hang or a silent misreading."""


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory):
    torture.preload()
    return {case.name: case for case in cases(tmp_path_factory.mktemp("world"))}


def test_there_are_many_cases_and_these_are_among_them(all_cases):
    assert len(all_cases) > 600
    assert not set(KINDS) - all_cases.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_bad_input_is_one_line(all_cases, name):
    verdict = torture.run_case(all_cases[name])
    assert (verdict.ended, verdict.failed) == ("refused", False), verdict


def test_the_judge_sees_what_it_must_not_let_pass():
    case = torture.Case("x:y", lambda folder: [], torture.REFUSED, says="d.jsonl:3")
    line = "orpo: error: d.jsonl:3: no"
    assert torture.judge(case, 2, line) == ("refused", False)
    for status, output in (
        (None, ""), (1, line), (-11, line), (3, line), (0, line), (2, ""), (2, f"{line}\n{line}"),
        (2, f"Traceback (most recent call last)\n{line}"), (2, "orpo: error: d.jsonl:4: no"),
    ):  # fmt: skip
        assert torture.judge(case, status, output)[1], (status, output)


@pytest.mark.parametrize("target", torture_fuzz.TARGETS)
def test_a_block_of_fuzz_has_no_escape(target):
    make = torture_fuzz.TARGETS[target][2]
    outcomes, escapes = torture_fuzz._run_block(make, target, 0, 80, seed=1)
    assert not escapes
    assert set(outcomes) <= {"ran", "refused"}
    assert sum(outcomes.values()) == 80


def test_an_escape_of_fuzz_is_seen():
    def wrong(draw: random.Random) -> str:
        raise KeyError(draw.randrange(3))

    outcomes, escapes = torture_fuzz._run_block(wrong, "wrong", 0, 3, seed=1)
    assert outcomes == {"escape": 3}
    assert "KeyError" in escapes[0]
