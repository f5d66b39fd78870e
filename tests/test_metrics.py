"""Sums over a window and means over examples, against the obvious arithmetic in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo.engine.head import PairScores
from orpo.engine.metrics import SUMS, MetricWindow, trl_names
from orpo.evaluation.per_pair import PairResults
from orpo.settings.config import Objective

CPU = torch.device("cpu")
logprob = st.floats(-20, 0, width=32)
pair = st.tuples(logprob, logprob, st.integers(1, 50), st.floats(0, 10, width=32), st.booleans())


def scores(pairs):
    """From (chosen, rejected, NLL tokens, NLL of each, has a rejected side)."""
    chosen, rejected, tokens, nll, has = map(torch.tensor, zip(*pairs, strict=True))
    return PairScores(
        chosen.float(),
        rejected.float(),
        (nll * tokens).float(),
        tokens.float(),
        tokens.float(),
        torch.as_tensor(has),
        *(torch.full((len(pairs),), 0.5) for _ in range(3)),
        *(torch.full((len(pairs),), value) for value in (4.0, 3.0, torch.nan, torch.nan)),
    )


def evaluated_means(pairs_or_scores, objective):
    """Figures of pairs that share no prompt."""
    found = pairs_or_scores if isinstance(pairs_or_scores, PairScores) else scores(pairs_or_scores)
    number = len(found.nll_sum_P)
    return PairResults(found, torch.arange(number), [""] * number, [None] * number).figures(objective)


def odds(logp):
    p = math.exp(min(logp, -1e-6))
    return math.log(p) - math.log(1 - p)


def obvious(pairs):
    """The means, one pair at a time."""
    both = [p for p in pairs if p[4]]
    tokens = sum(p[2] for p in pairs)
    means = {
        "nll": sum(p[2] * p[3] for p in pairs) / tokens,
        "chosen_logprob": sum(p[0] for p in pairs) / len(pairs),
    }
    if both:
        ratios = [odds(p[0]) - odds(p[1]) for p in both]
        means |= {
            "rejected_logprob": sum(p[1] for p in both) / len(both),
            "margin": sum(p[0] - p[1] for p in both) / len(both),
            "accuracy": sum(p[0] > p[1] for p in both) / len(both),
            "log_odds_ratio": sum(ratios) / len(both),
            "odds_ratio_loss": sum(max(-r, 0) + math.log1p(math.exp(-abs(r))) for r in ratios) / len(both),
        }
    return means


def obvious_odds_share(pairs, beta):
    """One pair at a time, with a doubt of 0.5 everywhere (tests/test_verdict.py has it from autograd)."""
    both = [p for p in pairs if p[4]]
    if not both:
        return 0
    slopes = [sum(1 / max(-math.expm1(side), 1e-6) for side in p[:2]) for p in both]
    deltas = [1 / (1 + math.exp(odds(p[0]) - odds(p[1]))) for p in both]
    odds_term = beta * sum(0.5 * a * b for a, b in zip(slopes, deltas, strict=True)) / len(both)
    nll_term = 0.5 * len(pairs) / sum(p[2] for p in pairs)
    return odds_term / (odds_term + nll_term)


@given(st.lists(pair, min_size=1, max_size=8), st.integers(1, 4))
def test_window_means_do_not_depend_on_micro_batches(pairs, size):
    window = MetricWindow(Objective(), CPU)
    for start in range(0, len(pairs), size):
        window.add_pairs(scores(pairs[start : start + size]))
    window.add_step(torch.tensor(3.0), num_tokens=10, num_ranks=1)
    means = window.close(lambda sums: sums)
    assert means.pop("loss") == 3.0 and means.pop("tokens") == 10
    assert means.pop("prompt_share") == 0.0
    assert means.pop("odds_share", 0) == pytest.approx(obvious_odds_share(pairs, beta=0.1), rel=1e-3)
    assert means == pytest.approx(obvious(pairs), rel=1e-3, abs=1e-4)


def test_window_adds_ranks_before_it_divides():
    ranks = [MetricWindow(Objective(), CPU) for _ in range(2)]
    ranks[0].add_pairs(scores([(-1.0, -2.0, 1, 4.0, True)]))
    ranks[1].add_pairs(scores([(-1.0, -0.5, 3, 2.0, True), (-1.0, -0.5, 4, 2.0, True)]))
    for rank in ranks:
        rank.add_step(torch.tensor(0.5), num_tokens=7, num_ranks=2)
    total = ranks[0]._sums + ranks[1]._sums
    means = ranks[0].close(lambda sums: total.clone())
    assert means["nll"] == pytest.approx((4 + 14) / 8) and means["accuracy"] == pytest.approx(1 / 3)
    assert means["loss"] == pytest.approx(1.0), "the loss of a step is the sum over ranks"
    assert means["tokens"] == 14


def test_a_window_folded_and_restored_continues_as_if_it_had_not_been():
    whole, first, second = (MetricWindow(Objective(), CPU) for _ in range(3))
    batches = [scores([(-1.0, -2.0, 5, 0.1, True)]), scores([(-0.3, -0.2, 9, 0.7, True)])]
    for batch in batches:
        whole.add_pairs(batch)
        whole.add_step(torch.tensor(1.1), 3, 1)
        whole.fold(lambda sums: sums)
    first.add_pairs(batches[0])
    first.add_step(torch.tensor(1.1), 3, 1)
    second.restore(first.fold(lambda sums: sums))
    second.add_pairs(batches[1])
    second.add_step(torch.tensor(1.1), 3, 1)
    assert second.close(lambda sums: sums) == whole.close(lambda sums: sums)


def test_a_closed_window_is_empty():
    window = MetricWindow(Objective(), CPU)
    window.add_pairs(scores([(-1.0, -2.0, 5, 0.1, True)]))
    window.close(lambda sums: sums)
    assert window.fold(lambda sums: sums) == dict.fromkeys(SUMS, 0.0)


def test_rows_without_a_rejected_side_count_for_the_nll_alone():
    pairs = [(-1.0, -2.0, 5, 1.0, True), (-4.0, -0.1, 5, 3.0, False)]
    window = MetricWindow(Objective(), CPU)
    window.add_pairs(scores(pairs))
    means = window.close(lambda sums: sums)
    assert (
        means["nll"] == pytest.approx(2.0)
        and means["accuracy"] == 1.0
        and means["margin"] == pytest.approx(1.0)
    )
    evaluated = evaluated_means(pairs, Objective(preference_weight=0.5))
    expected = evaluated["nll"].mean + 0.5 * evaluated["odds_ratio_loss"].mean
    assert evaluated["loss"].mean == pytest.approx(expected, rel=1e-6)


def test_without_any_rejected_side_nothing_is_said_of_preferences():
    evaluated = evaluated_means([(-1.0, 0.0, 5, 1.0, False)] * 2, Objective())
    assert "accuracy" not in evaluated and evaluated["loss"].mean == pytest.approx(1.0)


@given(st.lists(pair.filter(lambda p: p[4]), min_size=2, max_size=8))
def test_evaluation_weights_every_example_the_same(pairs):
    evaluated = evaluated_means(pairs, Objective(preference_weight=0.3, nll_weight=0.7))
    nll = [p[3] for p in pairs]
    mean = sum(nll) / len(nll)
    assert evaluated["nll"].mean == pytest.approx(mean, rel=1e-4, abs=1e-5)
    variance = sum((value - mean) ** 2 for value in nll) / (len(nll) - 1)
    assert evaluated["nll"].se == pytest.approx(math.sqrt(variance / len(nll)), rel=1e-3, abs=1e-5)
    expected = 0.7 * evaluated["nll"].mean + 0.3 * evaluated["odds_ratio_loss"].mean
    assert evaluated["loss"].mean == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert evaluated["nll_token_mean"].mean == pytest.approx(obvious(pairs)["nll"], rel=1e-4, abs=1e-5)


def test_odds_scale_tempers_the_loss_and_not_the_reported_ratio():
    one, half = (evaluated_means([(-1.0, -2.0, 1, 1.0, True)], Objective(scale=s)) for s in (1.0, 0.5))
    assert one["log_odds_ratio"] == half["log_odds_ratio"]
    assert half["odds_ratio_loss"].mean == pytest.approx(
        math.log1p(math.exp(-0.5 * one["log_odds_ratio"].mean)), rel=1e-5
    )


def test_trl_names_are_trl_s_numbers():
    ours = {
        "chosen_logprob": -1.0,
        "rejected_logprob": -3.0,
        "margin": 2.0,
        "accuracy": 0.5,
        "log_odds_ratio": 2.5,
        "odds_ratio_loss": 0.1,
        "nll": 4.0,
    }
    theirs = trl_names(ours, Objective())
    assert theirs == pytest.approx(
        {
            "rewards/chosen": -0.1,
            "rewards/rejected": -0.3,
            "rewards/margins": 0.2,
            "rewards/accuracies": 0.5,
            "logps/chosen": -1.0,
            "logps/rejected": -3.0,
            "log_odds_chosen": 2.5,
            "nll_loss": 4.0,
        }
    )


def test_the_mean_over_tokens_counts_tokens_where_the_loss_weights_pairs_alike():
    """A token of a pair of n has the weight 1 / n under `nll_reduction: pair`."""
    sums, tokens = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 9.0])
    whole = torch.ones(2)
    found = PairScores(
        -whole, -whole, sums, whole, tokens, whole > 0, *[whole] * 5, whole * torch.nan, whole * torch.nan
    )
    figures = evaluated_means(found, Objective(nll_reduction="pair"))
    assert figures["nll"].mean == pytest.approx(2.5)
    assert figures["nll_token_mean"].mean == pytest.approx((1 * 1.0 + 9 * 4.0) / 10)
