"""The two terms and their slopes: identities, float64 twins, and finiteness up to certainty."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from orpo.engine.objective import (
    EPSILON,
    log_odds,
    log_odds_slope,
    odds_ratio_loss,
    odds_ratio_slope,
    preference_loss,
    preference_slopes,
)
from orpo.errors import ConfigError
from orpo.settings.config import PRESETS, Objective, OrpoSettings, resolve_objective

NEAR_CERTAIN = [0.0, -1e-45, -1e-30, -1e-9, -3e-8, -1e-7, -1e-6]
ORDINARY = [-1e-5, -1e-3, -0.1, -math.log(2), -1.0, -5.0, -20.0, -87.0, -104.0, -700.0, -1e4]
mean_logprobs = st.floats(-700, 0, allow_subnormal=True)
apart = st.floats(-50, -1e-3)
ratios = st.floats(-100, 100)
scales = st.floats(0.05, 4)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def exact_log_odds(mean_logprob):
    """log(p / (1 - p)) in eighty decimal places."""
    with localcontext(prec=80):
        p = Decimal(mean_logprob).exp()
        return float((p / (1 - p)).ln())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean_logprob", NEAR_CERTAIN + ORDINARY)
def test_value_and_slope_are_finite_up_to_certainty(mean_logprob, dtype):  # peers 2, 21, 33, 42
    a = torch.tensor([mean_logprob], dtype=dtype)
    assert torch.isfinite(log_odds(a)).all()
    assert torch.isfinite(log_odds_slope(a)).all()
    for chosen, rejected in [(a, a), (a, a.new_full((1,), -3.0)), (a.new_full((1,), -3.0), a)]:
        log_odds_ratio = log_odds(chosen) - log_odds(rejected)
        outer = odds_ratio_slope(log_odds_ratio)
        assert torch.isfinite(odds_ratio_loss(log_odds_ratio)).all()
        assert torch.isfinite(outer * log_odds_slope(chosen)).all()
        assert torch.isfinite(outer * log_odds_slope(rejected)).all()


@pytest.mark.parametrize("mean_logprob", ORDINARY[:-2])
def test_log_odds_equals_eighty_decimal_places(mean_logprob):
    expected = exact_log_odds(mean_logprob)
    assert log_odds(double(mean_logprob)).item() == pytest.approx(expected, rel=1e-12)
    single = torch.tensor([mean_logprob], dtype=torch.float32)
    assert log_odds(single).item() == pytest.approx(exact_log_odds(single.item()), rel=3e-7, abs=3e-7)


@pytest.mark.parametrize("mean_logprob", NEAR_CERTAIN)
def test_log_odds_of_a_certain_answer_are_capped(mean_logprob):
    assert log_odds(double(mean_logprob)).item() == pytest.approx(-math.log(math.expm1(EPSILON)), rel=1e-9)


@pytest.mark.parametrize("mean_logprob", NEAR_CERTAIN)
def test_the_slope_of_a_certain_answer_is_capped_and_not_cut_to_zero(mean_logprob):
    assert log_odds_slope(double(mean_logprob)).item() == pytest.approx(1 / EPSILON, rel=1e-6)


def test_a_rejected_answer_the_model_is_certain_of_is_still_pushed_down():
    chosen, rejected = double(-0.5), double(0.0)
    log_odds_ratio = log_odds(chosen) - log_odds(rejected)
    slope_of_rejected = -odds_ratio_slope(log_odds_ratio) * log_odds_slope(rejected)
    assert slope_of_rejected.item() > 1e5


@given(st.lists(apart, min_size=1, max_size=8))
def test_log_odds_slope_is_the_derivative_of_the_textbook_formula(values):
    a = double(*values).requires_grad_()
    textbook = torch.log(a.exp() / (1 - a.exp()))
    slope = torch.autograd.grad(textbook.sum(), a)[0]
    torch.testing.assert_close(log_odds_slope(a.detach()), slope, rtol=1e-9, atol=0)


@given(apart)
def test_log_odds_slope_is_the_central_difference_of_log_odds(mean_logprob):
    h = 1e-5 * abs(mean_logprob)
    difference = (log_odds(double(mean_logprob + h)) - log_odds(double(mean_logprob - h))) / (2 * h)
    torch.testing.assert_close(log_odds_slope(double(mean_logprob)), difference, rtol=1e-5, atol=1e-6)


@given(ratios, scales)
def test_odds_ratio_slope_is_the_derivative_of_odds_ratio_loss(log_odds_ratio, scale):
    r = double(log_odds_ratio).requires_grad_()
    textbook = torch.log1p(torch.exp(-scale * r))
    torch.testing.assert_close(odds_ratio_loss(r.detach(), scale), textbook.detach(), rtol=1e-9, atol=1e-12)
    slope = torch.autograd.grad(textbook, r)[0]
    torch.testing.assert_close(odds_ratio_slope(r.detach(), scale), slope, rtol=1e-9, atol=1e-14)


@given(apart, apart)
def test_slopes_in_the_mean_logprobs_are_those_of_equation_nine(chosen, rejected):
    a_w, a_l = double(chosen), double(rejected)
    p_w, p_l = a_w.exp(), a_l.exp()
    delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    outer = odds_ratio_slope(log_odds(a_w) - log_odds(a_l))
    torch.testing.assert_close(outer * log_odds_slope(a_w), -delta / (1 - p_w), rtol=1e-8, atol=0)
    torch.testing.assert_close(-outer * log_odds_slope(a_l), delta / (1 - p_l), rtol=1e-8, atol=0)


@given(mean_logprobs, mean_logprobs)
def test_the_loss_never_rises_with_the_chosen_and_never_falls_with_the_rejected(chosen, rejected):
    outer = odds_ratio_slope(log_odds(double(chosen)) - log_odds(double(rejected)))
    assert (outer * log_odds_slope(double(chosen))).item() <= 0
    assert (-outer * log_odds_slope(double(rejected))).item() >= 0


@given(st.floats(-700, -1e-5))
def test_log_sigmoid_of_the_log_odds_is_the_mean_logprob(mean_logprob):
    torch.testing.assert_close(
        F.logsigmoid(log_odds(double(mean_logprob))), double(mean_logprob), rtol=1e-9, atol=1e-12
    )


@given(apart, apart)
def test_odds_ratio_loss_decomposes_as_in_the_paper(chosen, rejected):
    a_w, a_l = double(chosen), double(rejected)
    p_w, p_l = a_w.exp(), a_l.exp()
    expected = -a_w - torch.log(1 - p_l) + torch.log(p_w * (1 - p_l) + p_l * (1 - p_w))
    torch.testing.assert_close(odds_ratio_loss(log_odds(a_w) - log_odds(a_l)), expected, rtol=1e-9, atol=1e-9)


@given(mean_logprobs, mean_logprobs)
def test_swapping_the_sides_negates_the_log_odds_ratio(chosen, rejected):
    one = log_odds(double(chosen)) - log_odds(double(rejected))
    other = log_odds(double(rejected)) - log_odds(double(chosen))
    assert torch.equal(one, -other)
    # -log sigmoid(r) + log sigmoid(-r) = -r
    torch.testing.assert_close(odds_ratio_loss(one) - odds_ratio_loss(other), -one)


@given(mean_logprobs)
def test_equal_sides_give_ln_2_and_a_delta_of_one_half(mean_logprob):
    log_odds_ratio = log_odds(double(mean_logprob)) - log_odds(double(mean_logprob))
    assert odds_ratio_loss(log_odds_ratio).item() == pytest.approx(math.log(2), abs=1e-15)
    assert odds_ratio_slope(log_odds_ratio).item() == -0.5


@given(st.lists(mean_logprobs, min_size=2, max_size=20))
def test_log_odds_never_fall_as_the_mean_logprob_rises(values):
    assert (log_odds(double(*sorted(values))).diff() >= 0).all()


@given(mean_logprobs)
def test_log_odds_slope_is_at_least_one(mean_logprob):
    assert log_odds_slope(double(mean_logprob)).item() >= 1


@given(ratios, scales)
def test_odds_scale_multiplies_the_log_odds_ratio_inside_the_sigmoid(log_odds_ratio, scale):
    r = double(log_odds_ratio)
    torch.testing.assert_close(odds_ratio_loss(r, scale), odds_ratio_loss(scale * r), rtol=0, atol=0)
    expected = scale * odds_ratio_slope(scale * r)
    torch.testing.assert_close(odds_ratio_slope(r, scale), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("log_odds_ratio", [-1e4, 1e4])
def test_loss_of_an_extreme_log_odds_ratio_does_not_overflow(log_odds_ratio):  # peers 37
    r = torch.tensor([log_odds_ratio], dtype=torch.float32)
    assert odds_ratio_loss(r).item() == max(-log_odds_ratio, 0.0)
    assert odds_ratio_slope(r).item() == (-1.0 if log_odds_ratio < 0 else 0.0)


def test_presets_are_what_the_peers_of_that_name_minimise():  # peers 10, 24
    assert {
        name: (o.beta, o.nll_weight, o.odds_scale, o.compares, o.target_margin, o.nll_on, o.nll_reduction)
        for name, o in PRESETS.items()
    } == {
        "orpo": (0.1, 1.0, 1.0, "odds", 0.0, "full", "token"),
        "response": (0.1, 1.0, 1.0, "odds", 0.0, "response", "token"),
        "llamafactory": (0.1, 1.0, 1.0, "odds", 0.0, "response", "pair"),
        "tempered": (0.1, 0.0, 0.5, "odds", 0.0, "full", "token"),
        "simpo": (1.0, 0.0, 2.0, "logprobs", 1.0, "full", "token"),
        "cpo_simpo": (1.0, 1.0, 2.0, "logprobs", 1.0, "response", "token"),
    }


@given(*[st.floats(-30, 0)] * 2, st.sampled_from(sorted(PRESETS)))
def test_slopes_of_every_objective_are_those_of_autograd_and_finite(chosen, rejected, name):
    """The slow twin: the equation as it stands in the module, in float64, and its gradient."""
    objective = PRESETS[name]
    a_w, a_l = (double(min(value, -1e-4)).requires_grad_() for value in (chosen, rejected))
    value = (lambda a: a) if objective.compares == "logprobs" else (lambda a: a - torch.log(-torch.expm1(a)))
    above = objective.odds_scale * (value(a_w) - value(a_l)) - objective.target_margin
    expected = torch.log1p(torch.exp(-above))
    torch.testing.assert_close(preference_loss(a_w, a_l, objective), expected, rtol=1e-9, atol=1e-12)
    exact = torch.autograd.grad(expected.sum(), [a_w, a_l])
    slopes = preference_slopes(a_w.detach(), a_l.detach(), objective)
    torch.testing.assert_close(slopes, exact, rtol=1e-8, atol=1e-12)
    for one, other in ((0.0, -1e4), (-1e4, 0.0), (0.0, 0.0)):
        found = (
            preference_loss(double(one), double(other), objective),
            *preference_slopes(double(one), double(other), objective),
        )
        assert all(torch.isfinite(each).all() for each in found)


@pytest.mark.parametrize("name", PRESETS)
def test_settings_without_explicit_keys_resolve_to_the_preset(name):
    assert resolve_objective(OrpoSettings(objective=name)) == (PRESETS[name], [])


def test_an_explicit_key_beats_the_preset_and_says_so():
    objective, notices = resolve_objective(OrpoSettings(objective="llamafactory", beta=0.3, nll_on="full"))
    assert objective == Objective(beta=0.3, nll_on="full", nll_reduction="pair")
    assert len(notices) == 2
    assert all("objective: llamafactory" in notice for notice in notices)


def test_an_explicit_key_that_agrees_with_the_preset_says_nothing():
    assert resolve_objective(OrpoSettings(objective="response", nll_on="response"))[1] == []


def test_training_on_nothing_is_refused():
    with pytest.raises(ConfigError, match="nothing would be trained"):
        resolve_objective(OrpoSettings(beta=0.0, nll_weight=0.0))
