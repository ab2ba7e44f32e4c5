"""The scale of SWAG on held-out data, and the score that chooses it."""

import math

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.dnn.multi_swag import MultiSWAG
from gpbridge.dnn.point_likelihood import mixture_log_density
from gpbridge.dnn.scale_tuning import tune_scale
from gpbridge.dnn.swag import SWAG
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import MixtureWeights
from tests.dnn.scale_problems import gaussian, problem, tracked

NOISE = 0.04


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def test_every_scale_is_scored_by_draws_of_its_own_posterior():
    tracker, X, Y = problem(0.3)
    found = tune_scale(tracker, X, Y, gaussian(), num_draws=9, generator=seeded())
    assert found.scales == (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
    for scale, score in zip(found.scales[1:], found.scores[1:], strict=True):
        draws = tracker.posterior(scale).draw(9, seeded())
        expected = mixture_log_density(gaussian(), draws, X, Y)
        torch.testing.assert_close(score, expected)
    mean = X @ tracker.mean[:2, None] + tracker.mean[2]
    swa = torch.distributions.Normal(mean, NOISE**0.5).log_prob(Y).mean()
    torch.testing.assert_close(found.scores[0], swa)
    best = int(found.scores.argmax())
    assert found.scale == found.scales[best]
    if found.scale:
        expected = tracker.posterior(found.scale).covariance.to_dense()
        torch.testing.assert_close(found.posterior.covariance.to_dense(), expected)


def test_weights_that_are_right_want_no_spread_and_wrong_ones_want_it():
    assert tune_scale(*problem(0.0), gaussian(), generator=seeded()).scale == 0.0
    assert tune_scale(*problem(0.5), gaussian(), generator=seeded()).scale >= 0.25
    tracker, X, Y = problem(0.0)
    swa = tune_scale(tracker, X, Y, gaussian(), (0.0,)).posterior
    assert swa.root is None and swa.variance is None
    torch.testing.assert_close(swa.mean, tracker.mean)


def test_networks_together_have_the_scale_of_the_best_mixture():
    first, X, Y = problem(0.3)
    tracker = MultiSWAG([nn.Linear(2, 1).double() for _ in range(2)], rank=5)
    tracker.trackers[0] = first
    tracker.trackers[1] = tracked(nn.Linear(2, 1).double(), 0.3)
    scales = (0.0, 0.5, 1.0)
    options = {"num_draws": 9, "generator": seeded()}
    found = tune_scale(tracker, X, Y, gaussian(), scales, **options)
    assert isinstance(found.posterior, MixtureWeights) and found.scales == scales
    for scale, score in zip(scales[1:], found.scores[1:], strict=True):
        draws = tracker.posterior(scale).draw(18, seeded())
        expected = mixture_log_density(gaussian(), draws, X, Y)
        torch.testing.assert_close(score, expected)
    means = torch.stack([t.mean for t in tracker.trackers])
    outputs = X @ means[:, :2, None] + means[:, None, 2:]
    densities = torch.distributions.Normal(outputs, NOISE**0.5).log_prob(Y).exp()
    torch.testing.assert_close(found.scores[0], densities[..., 0].mean(0).log().mean())
    assert repr(found).startswith(f"ScaleTuning(scale={found.scale:g}, scores={{0: ")


def test_the_edge_of_the_candidates_and_a_lack_of_snapshots_are_said_once():
    tracker, X, Y = problem(3.0)
    with pytest.warns(UserWarning, match=r"largest candidate, 0.5.*scales=\(0.5, 1, "):
        tune_scale(tracker, X, Y, gaussian(), (0.0, 0.5), generator=seeded())
    few = tracked(nn.Linear(2, 1).double(), 0.1, steps=3)
    with pytest.warns(UserWarning) as caught:
        tune_scale(few, X, X[:, :1], gaussian(), generator=seeded())
    assert sum("for a rank of 5" in str(w.message) for w in caught) == 1


def test_the_diagonal_can_be_left_out_and_the_network_stays_as_it_was():
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    tracker = tracked(network, 0.1)
    before = torch.get_rng_state()
    with assert_module_unchanged(network):
        given = {"scales": (0.5,), "diagonal": False, "generator": seeded()}
        found = tune_scale(tracker, normal(4, 2), normal(4, 1), gaussian(), **given)
    assert found.posterior.variance is None and found.posterior.root.shape == (13, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_norm_is_refreshed_for_every_draw():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    tracker = tracked(network.double(), 0.3)
    X, Y = 2 + normal(20, 2), normal(20, 1)
    with pytest.raises(ValueError, match="batch normalisation.*pass the training"):
        tune_scale(tracker, X, Y, gaussian())
    found = tune_scale(tracker, X, Y, gaussian(), (1.0,), X=X, generator=seeded())
    draws = refresh_batch_norm(tracker.posterior(1.0).draw(30, seeded()), [X])
    score = mixture_log_density(gaussian(), draws, X, Y)
    torch.testing.assert_close(found.scores[0], score)


def test_held_out_data_have_noise_of_their_own():
    tracker, X, Y = problem(0.3)
    noise = 0.02 + torch.rand(40, generator=seeded(4)).double()
    likelihood = FixedNoiseGaussianLikelihood(torch.ones(40).double())  # in training
    found = tune_scale(
        tracker, X, Y, likelihood, (0.5,), noise_val=noise, generator=seeded()
    )
    f = tracker.posterior(0.5).draw(30, seeded())(X)[..., 0]
    logs = torch.distributions.Normal(f, noise.sqrt()).log_prob(Y[:, 0])
    torch.testing.assert_close(found.scores[0], logs.exp().mean(0).log().mean())
    with pytest.raises(ValueError, match="noise of the training data.*noise_val="):
        tune_scale(tracker, X, Y, likelihood)
    with pytest.raises(ValueError, match="X has 40, noise has 39"):
        tune_scale(tracker, X, Y, likelihood, noise_val=noise[1:])


def test_of_equal_scores_the_first_wins_and_what_is_not_finite_never():
    tracker, X, Y = problem(0.0)
    levels = iter([math.nan, 1.0, 1.0, -math.inf])

    def given(f, y):
        return torch.full_like(f[..., 0], next(levels))

    found = tune_scale(tracker, X, Y, given, (0.1, 0.25, 0.5, 1.0))
    assert found.scale == 0.25
    expected = tracker.posterior(0.25)
    assert torch.equal(found.posterior.root, expected.root)


def test_bad_arguments_are_refused():
    tracker, X, Y = problem(0.0)
    with pytest.raises(ValueError, match="finite, zero or above, but are .0.0, -0.5"):
        tune_scale(tracker, X, Y, gaussian(), (0.0, -0.5))
    with pytest.raises(ValueError, match="scales must hold at least one"):
        tune_scale(tracker, X, Y, gaussian(), ())
    with pytest.raises(ValueError, match="num_draws must be a whole number"):
        tune_scale(tracker, X, Y, gaussian(), num_draws=0)
    with pytest.raises(ValueError, match="X_val has 40, Y_val has 39"):
        tune_scale(tracker, X, Y[1:], gaussian())
    with pytest.raises(RuntimeError, match="0 snapshots and needs"):
        tune_scale(SWAG(nn.Linear(2, 1).double()), X, Y, gaussian())

    with pytest.raises(TypeError, match="tracker itself, not its posterior"):
        tune_scale(tracker.posterior(), X, Y, gaussian())

    def nothing(f, y):
        return torch.full_like(f[..., 0], math.nan)

    with pytest.raises(ValueError, match="No candidate has a finite log density"):
        tune_scale(tracker, X, Y, nothing)
