"""Scores of what a label would tell, and the best of a pool by them."""

import math

import pytest
import torch
from botorch.exceptions.errors import InputDataError

from gpbridge.acquisition import (
    bald,
    predictive_entropy,
    predictive_variance,
    select_top,
)
from gpbridge.checks import ShapeError
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.predictive_mixture import decompose
from tests.oracles_decisions import mutual_information


def draws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits.softmax(-1)


def test_bald_is_the_entropy_of_the_mean_less_the_mean_entropy():
    probabilities = draws(7, 20, 4)
    expected = mutual_information(probabilities)
    torch.testing.assert_close(bald(probabilities), expected)


def test_bald_is_zero_where_draws_agree_however_unsure():
    same = draws(1, 20, 4).expand(5, 20, 4)
    assert (bald(same) < 1e-15).all()
    assert (bald(draws(1, 20, 4)) == 0).all()


def test_bald_is_bounded_by_the_entropy_and_by_the_number_of_draws():
    probabilities = draws(3, 200, 6)
    found = bald(probabilities)
    assert (found >= 0).all()
    assert (found <= predictive_entropy(probabilities.mean(0))).all()
    one_hot = torch.eye(3)[:, None]  # three draws, each sure of another class
    assert bald(one_hot).item() == pytest.approx(math.log(3))


def test_bald_agrees_with_the_decomposition_of_logits():
    logits = torch.tensor([[[-9.0]], [[0.3]], [[2.0]]])
    p = logits.sigmoid()
    expected = decompose(LogisticLikelihood(), logits).mutual_information
    torch.testing.assert_close(bald(torch.cat([1 - p, p], -1)), expected)


def test_a_batch_of_pools_is_a_loop_over_pools():
    probabilities = draws(5, 3, 8, 4)
    for score in (bald, predictive_variance):
        each = torch.stack([score(probabilities[:, i]) for i in range(3)])
        torch.testing.assert_close(score(probabilities), each)


def test_scores_do_not_know_the_order_of_draws_points_or_classes():
    probabilities = draws(5, 8, 4)
    for score in (bald, predictive_variance):
        expected = score(probabilities)
        torch.testing.assert_close(score(probabilities.flip(0)), expected)
        torch.testing.assert_close(score(probabilities.flip(1)), expected.flip(0))
        torch.testing.assert_close(score(probabilities.flip(2)), expected)


def test_predictive_variance_is_the_sum_over_outputs():
    values = draws(5, 8, 3)
    by_hand = ((values - values.mean(0)) ** 2).mean(0).sum(-1)
    torch.testing.assert_close(predictive_variance(values), by_hand)


def test_scores_keep_the_dtype_and_have_gradients():
    logits = torch.randn(4, 6, 3, requires_grad=True)
    score = bald(logits.softmax(-1))
    assert score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_the_best_come_first_and_of_equal_ones_the_first():
    scores = torch.tensor([0.5, 2.0, 0.5, 3.0, 0.5])
    assert select_top(scores, 4).tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: bald(torch.ones(4, 3) / 3), ShapeError, "probabilities\\[None\\]"),
        (lambda: bald(torch.ones(0, 4, 3)), ShapeError, "at least one draw"),
        (lambda: bald(torch.randn(4, 5, 3)), ValueError, "softmax"),
        (lambda: bald(torch.full((2, 5, 3), torch.nan)), InputDataError, "NaN"),
        (lambda: predictive_variance(torch.ones(4)), ShapeError, "s x ... x n x m"),
        (lambda: select_top(torch.ones(3, 2), 1), ShapeError, "one number per point"),
        (lambda: select_top(torch.ones(3), 4), ValueError, "the 3 points of the pool"),
        (lambda: select_top(torch.ones(3), 0), ValueError, "above zero"),
        (lambda: select_top(torch.tensor([1.0, torch.nan]), 1), InputDataError, "NaN"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
