"""Standard errors that know which pairs share a prompt, against the usual formula and repetition."""

import pytest
import torch

from orpo.evaluation.statistics import clustered_mean
from orpo.run.log import Figure


def test_without_shared_prompts_it_is_the_usual_standard_error():
    values = torch.tensor([1.0, 0.0, 1.0, 1.0])
    figure = clustered_mean(values, torch.ones(4), torch.arange(4))
    assert figure.mean == pytest.approx(0.75)
    assert figure.se == pytest.approx(values.std().item() / 2)


def test_asking_the_same_prompts_twice_adds_no_certainty():
    values, ones, prompts = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4), torch.arange(4)
    once = clustered_mean(values, ones, prompts)
    twice = clustered_mean(values.repeat(2), ones.repeat(2), prompts.repeat(2))
    assert (twice.mean, twice.se) == pytest.approx((once.mean, once.se))


def test_the_error_of_a_token_mean_is_that_of_a_ratio():
    torch.manual_seed(0)
    weight = torch.randint(5, 20, (4000,)).float()
    draws = [
        clustered_mean(-weight * (1 + torch.randn(4000)), weight, torch.arange(4000)) for _ in range(200)
    ]
    means, errors = torch.tensor([(draw.mean, draw.se) for draw in draws]).T
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.15)


def test_errors_cover_pairs_that_share_prompts():
    """200 draws of 300 prompts with three pairs each, whose values move together."""
    torch.manual_seed(0)
    prompts = torch.arange(300).repeat_interleave(3)
    draws = [
        clustered_mean(torch.randn(300)[prompts] + torch.randn(900), torch.ones(900), prompts)
        for _ in range(200)
    ]
    means, errors = torch.tensor([(draw.mean, draw.se) for draw in draws]).T
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.15)


def test_pairs_without_weight_are_no_prompts():
    some = clustered_mean(torch.tensor([1.0, 3.0]), torch.ones(2), torch.arange(2))
    more = clustered_mean(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]), torch.arange(3))
    assert more == some


def test_one_prompt_has_a_mean_and_no_error_and_no_weight_has_neither():
    one = clustered_mean(torch.tensor([1.0, 2.0]), torch.ones(2), torch.zeros(2, dtype=torch.int64))
    assert one == Figure(1.5)
    assert clustered_mean(torch.zeros(2), torch.zeros(2), torch.arange(2)) is None
