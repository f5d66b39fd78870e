"""The two terms and their slopes: identities, float64 twins, and finiteness up to certainty."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from orpo.engine.objective import (
    EPSILON,
    Side,
    log_odds,
    log_odds_slope,
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


def _sides(log_odds_ratio):
    """Two sides whose values differ by as much."""
    return [Side(value, None, None) for value in (log_odds_ratio, torch.zeros_like(log_odds_ratio))]


def odds_ratio_loss(log_odds_ratio, scale=1.0):
    """Eq. 7, of a log odds ratio."""
    return preference_loss(*_sides(log_odds_ratio), Objective(compares="means", scale=scale))


def odds_ratio_slope(log_odds_ratio, scale=1.0):
    """The derivative of `odds_ratio_loss`."""
    return preference_slopes(*_sides(log_odds_ratio), Objective(compares="means", scale=scale))[0]


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
        name: (o.preference_weight, o.nll_weight, o.compares, o.scale, o.margin, o.nll_on, o.nll_reduction)
        for name, o in PRESETS.items()
    } == {
        "orpo": (0.1, 1.0, "odds", 1.0, 0.0, "full", "token"),
        "sft": (0.0, 1.0, "odds", 1.0, 0.0, "full", "token"),
        "response": (0.1, 1.0, "odds", 1.0, 0.0, "response", "token"),
        "llamafactory": (0.1, 1.0, "odds", 1.0, 0.0, "response", "pair"),
        "tempered_odds": (1.0, 0.0, "odds", 0.5, 0.0, "full", "token"),
        "simpo": (1.0, 0.0, "means", 2.0, 1.0, "full", "token"),
        "cpo_simpo": (1.0, 1.0, "means", 2.0, 1.0, "response", "token"),
        "cpo": (1.0, 1.0, "sums", 0.1, 0.0, "response", "token"),
        "dpo": (1.0, 0.0, "ratios", 0.1, 0.0, "full", "token"),
    }


TEXTBOOK = {
    "odds": lambda a, n, ref: torch.log(a.exp() / (1 - a.exp())),
    "means": lambda a, n, ref: a,
    "sums": lambda a, n, ref: n * a,
    "ratios": lambda a, n, ref: n * a - n * ref,
}


@given(
    *[st.floats(-30, -1e-3)] * 2,
    *[st.floats(-30, 0)] * 2,
    *[st.integers(1, 50)] * 2,
    st.sampled_from(sorted(TEXTBOOK)),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 1.5]),
)
def test_value_and_slopes_of_every_objective_are_those_of_autograd(
    chosen, rejected, ref_w, ref_l, n_w, n_l, compares, smoothing, margin
):
    """The slow twin: the equations as they stand in the papers, in float64, and their gradients."""
    objective = Objective(compares=compares, scale=0.3, margin=margin, label_smoothing=smoothing)
    a_w, a_l = (double(value).requires_grad_() for value in (chosen, rejected))
    z = 0.3 * (TEXTBOOK[compares](a_w, n_w, ref_w) - TEXTBOOK[compares](a_l, n_l, ref_l)) - margin
    zero = torch.zeros_like(z)
    expected = (1 - smoothing) * torch.logaddexp(zero, -z) + smoothing * torch.logaddexp(zero, z)
    sides = [Side(a.detach(), double(n), double(ref)) for a, n, ref in ((a_w, n_w, ref_w), (a_l, n_l, ref_l))]
    torch.testing.assert_close(preference_loss(*sides, objective), expected.detach(), rtol=1e-9, atol=1e-11)
    exact = torch.autograd.grad(expected.sum(), [a_w, a_l])
    torch.testing.assert_close(preference_slopes(*sides, objective), exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
def test_every_objective_is_finite_where_the_model_is_certain_or_has_no_idea(name, dtype):
    ends = torch.tensor([*NEAR_CERTAIN, *ORDINARY], dtype=dtype)
    chosen_P, rejected_P = torch.cartesian_prod(ends, ends).unbind(1)
    tokens_P = torch.full_like(chosen_P, 1000.0)
    sides = [Side(mean_P, tokens_P, torch.full_like(mean_P, -2.0)) for mean_P in (chosen_P, rejected_P)]
    for smoothing in (0.0, 0.4):
        objective = replace(PRESETS[name], label_smoothing=smoothing)
        found = [preference_loss(*sides, objective), *preference_slopes(*sides, objective)]
        assert all(torch.isfinite(each).all() for each in found)
        assert (found[1].abs() + found[2].abs() > 0).any()


def test_dpo_of_the_reference_itself_is_ln_2_and_pulls_by_its_beta():
    side = Side(double(-1.25), double(8), double(-1.25))
    other = Side(double(-0.5), double(3), double(-0.5))
    assert preference_loss(side, other, PRESETS["dpo"]).item() == pytest.approx(math.log(2), abs=1e-15)
    slopes = preference_slopes(side, other, PRESETS["dpo"])  # in the means: the sums' times the tokens
    assert [slope.item() for slope in slopes] == pytest.approx([-0.1 * 0.5 * 8, 0.1 * 0.5 * 3])


def test_beta_is_the_papers_own():
    """The weight of ORPO's term, the scale inside the sigmoid of the others."""
    assert resolve_objective(OrpoSettings(beta=0.3))[0] == Objective(preference_weight=0.3)
    for name in ("tempered_odds", "simpo", "cpo_simpo", "cpo", "dpo"):
        objective, notices = resolve_objective(OrpoSettings(objective=name, beta=0.3))
        assert objective == replace(PRESETS[name], scale=0.3)
        assert notices == [f"beta: 0.3 beats {PRESETS[name].scale}, the value in objective: {name}"]


def test_sft_is_orpo_with_beta_0():
    assert resolve_objective(OrpoSettings(objective="sft")) == resolve_objective(OrpoSettings(beta=0.0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": "dpo", "simpo_gamma": 1.0}, "objective dpo has none; simpo, cpo_simpo do"),
        ({"objective": "sft", "beta": 0.1}, "objective sft has none"),
        (
            {"objective": "simpo", "odds_scale": 0.5},
            "objective simpo has none; orpo, response, lla",
        ),
        ({"objective": "dpo", "beta": 0.0}, "beta: 0 would leave nothing of the comparison"),
    ],
)
def test_a_setting_that_an_objective_does_not_have_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        resolve_objective(OrpoSettings(**settings))


@pytest.mark.parametrize("name", PRESETS)
def test_settings_without_explicit_keys_resolve_to_the_preset(name):
    assert resolve_objective(OrpoSettings(objective=name)) == (PRESETS[name], [])


def test_an_explicit_key_beats_the_preset_and_says_so():
    objective, notices = resolve_objective(OrpoSettings(objective="llamafactory", beta=0.3, nll_on="full"))
    assert objective == Objective(preference_weight=0.3, nll_on="full", nll_reduction="pair")
    assert len(notices) == 2
    assert all("objective: llamafactory" in notice for notice in notices)


def test_an_explicit_key_that_agrees_with_the_preset_says_nothing():
    assert resolve_objective(OrpoSettings(objective="response", nll_on="response"))[1] == []


def test_training_on_nothing_is_refused():
    with pytest.raises(ConfigError, match="nothing would be trained"):
        resolve_objective(OrpoSettings(beta=0.0, nll_weight=0.0))
