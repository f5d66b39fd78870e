"""Which settings a probe tries, by a grid and by Optuna, on curves whose best place is known."""

import importlib.util
import math

import pytest

from orpo.comparing import search as module
from orpo.comparing.methods import candidates
from orpo.comparing.search import GRID, search

START = {"learning_rate": 1e-3, "beta": 0.1}
has_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")


def curve(best, tried, batches, *, failing=(), forbidden=lambda choice: False):
    """Squared distance from the best place in factors of three; forbidden settings look better than all."""

    def values(choices):
        batches.append(len(choices))
        found = []
        for choice in choices:
            tried.append(choice)
            away = sum(math.log(choice[name] / best[name], 3) ** 2 for name in best)
            beyond = 1.0 if forbidden(choice) else -1.0
            found.append(None if len(tried) in failing else (away - 100 * (beyond > 0), beyond))
        return found

    return values


def test_few_settings_are_those_of_the_grid():
    tried, batches = [], []
    assert search(START, GRID, 3, curve(START, tried, batches), at_once=1, seed=0) == "grid"
    assert tried == candidates(START, GRID, 3) and batches == [GRID]


def test_many_settings_without_optuna_are_a_grid_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    tried, batches = [], []
    assert search(START, 11, 3, curve(START, tried, batches), at_once=1, seed=0) == "grid"
    assert tried == candidates(START, 11, 3)
    assert "pip install optuna" in capsys.readouterr().out


@has_optuna
@pytest.mark.parametrize("at_once", [1, 2])
def test_optuna_begins_with_the_grid_comes_nearer_and_asks_nothing_twice(at_once):
    best = {"learning_rate": 1e-2, "beta": 0.9}
    tried, batches = [], []
    name = search(START, 30, 3, curve(best, tried, batches, failing={9}), at_once=at_once, seed=0)
    assert name.startswith("optuna ")
    assert tried[:GRID] == candidates(START, GRID, 3) and batches[0] == GRID
    assert max(batches[1:]) == at_once and len(tried) == 30
    assert len({tuple(one.values()) for one in tried}) == 30

    def away(choice):
        return sum(math.log(choice[name] / best[name], 3) ** 2 for name in best)

    assert min(map(away, tried[GRID:])) < min(map(away, tried[:GRID])) / 2
    again, _ = [], []
    search(START, 30, 3, curve(best, again, [], failing={9}), at_once=at_once, seed=0)
    assert again == tried, "so that a probe that goes on finds what it has trained"


@has_optuna
def test_optuna_keeps_away_from_what_the_rule_forbids():
    """Settings that lose the chosen answers have the lowest loss of all, and are not followed."""
    tried = []

    def forbidden(choice):
        return choice["learning_rate"] > 2e-3

    search(START, 30, 3, curve(START, tried, [], forbidden=forbidden), at_once=1, seed=0)
    assert sum(map(forbidden, tried[15:])) <= 5


@has_optuna
def test_one_setting_with_nowhere_left_to_go_ends():
    tried = []
    search({"learning_rate": 1e-3}, 12, 1.0001, curve({"learning_rate": 1e-3}, tried, []), at_once=1, seed=0)
    assert GRID <= len(tried) <= 12
