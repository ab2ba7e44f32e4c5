"""The Gaussian over functions, against closed forms of linear models and many draws."""

import copy
import pickle

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from linear_operator.operators import LowRankRootAddedDiagLinearOperator
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn.dropout import MCDropout
from gpbridge.dnn.ensembles import DeepEnsemble
from gpbridge.dnn.scale_tuning import ScaleTuning
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.function_draws import freeze
from gpbridge.function_space import FunctionSpace
from gpbridge.functional import FunctionalNet
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.testing import (
    assert_gradients_match_finite_differences,
    assert_module_unchanged,
)
from gpbridge.types import FitResult
from gpbridge.weights import EmpiricalWeights, GaussianWeights, MixtureWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def gaussian_weights(network, std=1.0, rank=2):
    """A spread around the network's own weights, diagonal and low rank."""
    net = FunctionalNet(network)
    mean = net.flatten(net.params).detach()
    p = len(mean)
    variance = std**2 * (0.5 + normal(p, seed=1).sigmoid()).to(mean)
    return GaussianWeights(net, mean, variance, std * normal(p, rank, seed=2).to(mean))


class Residual(nn.Module):
    """Nested, with a skip and a scale of its own."""

    def __init__(self, m=1):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.ModuleDict({"out": nn.Linear(6, m)})
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        h = self.inner(x)
        return self.scale * self.head["out"](torch.tanh(h) + h)


def residual(m=1, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Residual(m).to(dtype)


def linear_design(X, m):
    """Jacobian of nn.Linear(d, m) by hand, weight first, ``(n m) x (m d + m)``."""
    eye = torch.eye(m, dtype=X.dtype)
    weight = torch.einsum("nd,ij->nijd", X, eye).flatten(-2)
    return torch.cat([weight, eye.expand(len(X), m, m)], -1).flatten(0, 1)


@pytest.mark.parametrize("m", [1, 3])
def test_a_linear_model_has_the_covariance_of_its_weights_in_both_modes(m):
    torch.manual_seed(0)
    weights = gaussian_weights(nn.Linear(2, m).double())
    X = normal(5, 2, seed=3)
    Phi = linear_design(X, m)
    expected = Phi @ weights.covariance.to_dense() @ Phi.mT
    mean = (Phi @ weights.mean).reshape((5,) if m == 1 else (5, m))
    exact = FunctionSpace(weights, "linearized", jitter=0.25)(X)
    torch.testing.assert_close(exact.mean, mean)
    jittered = expected + 0.25 * torch.eye(5 * m).double()
    torch.testing.assert_close(exact.covariance_matrix, jittered)
    drawn = FunctionSpace(weights, num_samples=20000, jitter=0)(X)
    error = (drawn.covariance_matrix - expected).norm() / expected.norm()
    assert float(error) < 0.03
    scale = expected.diagonal().sqrt().reshape(mean.shape)
    assert float(((drawn.mean - mean) / scale).abs().max()) < 5 / 20000**0.5
    kind = MultivariateNormal if m == 1 else MultitaskMultivariateNormal
    assert type(exact) is kind and type(drawn) is kind


def test_a_narrow_posterior_of_a_network_is_that_of_its_tangent_model():
    weights = gaussian_weights(residual(2), std=0.01)
    X = normal(8, 2, seed=3)
    tangent = FunctionSpace(weights, "linearized", jitter=0)(X).covariance_matrix
    drawn = FunctionSpace(weights, num_samples=10000, jitter=0)(X).covariance_matrix
    assert float((tangent - drawn).norm() / drawn.norm()) < 0.1
    # At ten times the width curvature shows, so that the bound above says something.
    wide = gaussian_weights(residual(2), std=0.3)
    tangent = FunctionSpace(wide, "linearized", jitter=0)(X).covariance_matrix
    drawn = FunctionSpace(wide, num_samples=2000, jitter=0)(X).covariance_matrix
    assert float((tangent - drawn).norm() / drawn.norm()) > 0.2


def test_draws_of_the_tangent_model_have_its_covariance():
    weights = gaussian_weights(residual(), std=0.3)
    space = FunctionSpace(weights, "linearized", num_samples=20000, jitter=0)
    X = normal(4, 2, seed=3)
    expected = space(X).covariance_matrix
    values = space.values(X).squeeze(-1)  # s x n
    assert float((values.mT.cov() - expected).norm() / expected.norm()) < 0.03


def test_the_jacobian_is_taken_at_the_mean_of_the_weights():
    network, X = residual(), normal(3, 2, seed=3)
    weights = gaussian_weights(network)
    moved = GaussianWeights(weights.net, weights.mean + 0.3, weights.variance)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    at = gaussian_weights(other)
    expected = FunctionSpace(
        GaussianWeights(at.net, at.mean, weights.variance), "linearized"
    )(X)
    got = FunctionSpace(moved, "linearized")(X)
    torch.testing.assert_close(got.mean, other(X).squeeze(-1).detach())
    torch.testing.assert_close(got.covariance_matrix, expected.covariance_matrix)


def test_dropout_correlates_functions_across_inputs():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(2, 30), nn.ReLU(), nn.Dropout(0.2), nn.Linear(30, 1)
    ).double()
    X = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.6, 0.4]], dtype=torch.float64)
    K = FunctionSpace(MCDropout(network), num_samples=200, jitter=0)(X)
    K = K.covariance_matrix
    torch.testing.assert_close(K[0, 1], K[0, 0])  # one function, one value
    correlation = K[0, 2] / (K[0, 0] * K[2, 2]).sqrt()
    assert 0.8 < float(correlation) < 1


def test_the_covariance_is_that_of_the_draws():
    weights = gaussian_weights(residual(2), std=0.2)
    X = normal(3, 2, seed=3)
    space = FunctionSpace(weights, num_samples=9, jitter=0)
    values = space.draws(X)
    flat = values.flatten(1)  # point-major, output fastest
    torch.testing.assert_close(space(X).covariance_matrix, flat.mT.cov())
    torch.testing.assert_close(space(X).mean, values.mean(0))


def test_more_points_than_draws_keep_a_low_rank_root():
    weights = gaussian_weights(residual(), std=0.2)
    space, X = FunctionSpace(weights, num_samples=9, jitter=1e-4), normal(40, 2)
    distribution = space(X)
    lazy = distribution.lazy_covariance_matrix
    assert isinstance(lazy, LowRankRootAddedDiagLinearOperator)
    dense = space.draws(X).flatten(1).mT.cov() + 1e-4 * torch.eye(40)
    torch.testing.assert_close(distribution.covariance_matrix, dense)
    y = normal(40, seed=4)
    expected = torch.distributions.MultivariateNormal(distribution.mean, dense)
    torch.testing.assert_close(distribution.log_prob(y), expected.log_prob(y))


@pytest.mark.parametrize("mode", ["sample", "linearized"])
@pytest.mark.parametrize("m", [1, 2])
def test_batches_equal_loops(mode, m):
    space = FunctionSpace(gaussian_weights(residual(m), std=0.2), mode, 9)
    X = normal(2, 3, 4, 2)
    whole = space(X)
    for i, j in ((0, 1), (1, 2)):
        part = space(X[i, j])
        torch.testing.assert_close(whole.mean[i, j], part.mean)
        K = whole.covariance_matrix[i, j]
        torch.testing.assert_close(K, part.covariance_matrix)
    rows = space(X.flatten(0, 2)).variance.reshape(whole.variance.shape)
    torch.testing.assert_close(rows, whole.variance)


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_gradients_in_the_inputs_match_finite_differences(mode):
    space = FunctionSpace(gaussian_weights(residual(2), std=0.2), mode, 9)

    def moments(X):
        distribution = space(X)
        K = distribution.covariance_matrix
        return torch.cat([distribution.mean.flatten(), K.flatten()])

    assert_gradients_match_finite_differences(moments, normal(2, 2))


@pytest.mark.parametrize("mode", ["sample", "linearized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_inputs(mode, dtype):
    space = FunctionSpace(gaussian_weights(residual(dtype=torch.float32)), mode, 4)
    distribution = space(normal(3, 2, dtype=dtype))
    assert distribution.mean.dtype == distribution.covariance_matrix.dtype == dtype


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_copies_pickles_and_states_give_the_same_functions(mode):
    X = normal(3, 2)
    space = FunctionSpace(gaussian_weights(residual(), std=0.2), mode, 9)
    want = space(X)
    other = gaussian_weights(residual(seed=5), std=0.1)
    loaded = FunctionSpace(other, mode, 9, generator=seeded(7))
    assert not torch.equal(loaded(X).mean, want.mean)
    loaded.load_state_dict(space.state_dict())
    for twin in (copy.deepcopy(space), pickle.loads(pickle.dumps(space)), loaded):
        got = twin.train()(X)  # the mode changes nothing
        assert torch.equal(got.mean, want.mean)
        assert torch.equal(got.covariance_matrix, want.covariance_matrix)
        assert torch.equal(twin.values(X), space.values(X))
    assert not any(p.requires_grad for p in space.parameters())


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_draws_are_frozen_and_follow_the_generator(mode):
    weights, X = gaussian_weights(residual(), std=0.2), normal(3, 2)
    before = torch.get_rng_state()
    space = FunctionSpace(weights, mode, 9, generator=seeded(3))
    assert torch.equal(space.values(X), space.values(X))
    again = FunctionSpace(weights, mode, 9, generator=seeded(3))
    other = FunctionSpace(weights, mode, 9, generator=seeded(4))
    assert torch.equal(space.values(X), again.values(X))
    assert not torch.equal(space.values(X), other.values(X))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_nothing_of_the_posterior_is_shared(mode):
    network, X = residual(), normal(3, 2)
    weights = gaussian_weights(network, std=0.2)
    with assert_module_unchanged(network), assert_module_unchanged(weights):
        space = FunctionSpace(weights, mode, 4)
        space.float()(X.float())
    before = space(X).mean
    weights.mean.zero_()
    weights.net.network.scale.data.zero_()
    assert torch.equal(space(X).mean, before)


def test_members_of_a_small_ensemble_count_once():
    net = FunctionalNet(residual())
    members = normal(5, net.num_params)
    ensemble, X = EmpiricalWeights(net, members), normal(3, 2)
    values = FunctionSpace(ensemble).values(X)
    assert torch.equal(values, ensemble.draw()(X)) and len(values) == 5
    assert len(FunctionSpace(ensemble, num_samples=3).values(X)) == 3
    assert len(FunctionSpace(MixtureWeights([ensemble]), num_samples=3).values(X)) == 3


def test_draws_with_statistics_of_their_own_can_be_passed():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    weights, X = gaussian_weights(network.double(), std=0.3), normal(20, 2)
    draws = refresh_batch_norm(weights.draw(6, seeded()), [X])
    assert torch.equal(FunctionSpace(draws).values(X), draws(X))


def test_trackers_give_both_modes_and_an_average_has_no_spread():
    network = residual()
    tracker, average = SWAG(network, rank=3), SWA(network)
    for step in range(4):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * normal(*p.shape, seed=step))
        tracker.update(network)
        average.update(network)
    X = normal(3, 2)
    for diagonal in (True, False):
        posterior = tracker.posterior(0.1, diagonal=diagonal)
        tangent = FunctionSpace(posterior, "linearized", jitter=0)(X)
        drawn = FunctionSpace(posterior, num_samples=2000, jitter=0)(X)
        K = tangent.covariance_matrix
        assert float((drawn.covariance_matrix - K).norm() / K.norm()) < 0.2
    alone = FunctionSpace(average.posterior(), "linearized", jitter=1e-3)(X)
    expected = 1e-3 * torch.eye(3).double()
    torch.testing.assert_close(alone.covariance_matrix, expected)


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_predicted_noise_is_no_part_of_the_functions(mode):
    weights, X = gaussian_weights(residual(4), std=0.2), normal(3, 2)
    likelihood = HeteroscedasticGaussianLikelihood(2)
    all_four = FunctionSpace(weights, mode, 9)(X)
    space = FunctionSpace(weights, mode, 9, likelihood=likelihood)
    means = space(X)
    torch.testing.assert_close(means.mean, all_four.mean[:, :2])
    rows = torch.tensor([0, 1, 4, 5, 8, 9])
    K = all_four.covariance_matrix[rows][:, rows]
    torch.testing.assert_close(means.covariance_matrix, K)
    assert space.values(X).shape == (9, 3, 2)


def test_a_gpytorch_likelihood_adds_its_noise():
    space = FunctionSpace(gaussian_weights(residual()), num_samples=9)
    likelihood, X = GaussianLikelihood().double(), normal(3, 2)
    noisy = likelihood(space(X))
    added = noisy.variance - space(X).variance
    torch.testing.assert_close(added, likelihood.noise.expand(3))


def test_bad_input_says_what_to_try():
    weights = gaussian_weights(residual())
    with pytest.raises(ValueError, match="mode must be one of 'sample', 'linearized'"):
        FunctionSpace(weights, "laplace")
    with pytest.raises(TypeError, match="needs GaussianWeights.*Try mode='sample'"):
        FunctionSpace(MixtureWeights([weights]), "linearized")
    with pytest.raises(TypeError, match=r"draw\(num_samples, generator\).*float"):
        FunctionSpace(1.0)
    with pytest.raises(TypeError, match="type"):
        freeze(nn.Linear, 3)
    with pytest.raises(ValueError, match="jitter must be at least zero"):
        FunctionSpace(weights, jitter=-1.0)
    with pytest.raises(ValueError, match="num_samples must be a whole number"):
        FunctionSpace(weights, num_samples=0)
    with pytest.raises(ValueError, match="One function has no spread"):
        FunctionSpace(weights, num_samples=1)(normal(3, 2))
    for X in (normal(3, 2), normal(4, 3, 2)):
        with pytest.raises(ShapeError, match=r"Residual must map.*EmpiricalWeights"):
            FunctionSpace(residual())(X)  # a network is one function and no draws
    with pytest.raises(ShapeError, match="X must be"):
        FunctionSpace(weights)(normal(2))


def normalized():
    torch.manual_seed(0)
    layers = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_stale_batch_norm_warns_unless_batches_refresh_it(mode):
    X = normal(20, 2) + 3
    weights = gaussian_weights(normalized())
    weights.mean += 0.5
    with pytest.warns(ReliabilityWarning, match="Pass batches=") as record:
        stale = FunctionSpace(weights, mode, 8)
    assert len(record) == 1
    fresh = FunctionSpace(weights, mode, 8, batches=[X])
    if mode == "sample":
        expected = refresh_batch_norm(weights.draw(8, seeded()), [X])(X)
        torch.testing.assert_close(fresh.values(X), expected)
    else:
        alone = GaussianWeights(weights.net, weights.mean).draw(1)
        expected = refresh_batch_norm(alone, [X])(X)[0]
        torch.testing.assert_close(fresh(X).mean, expected[:, 0])
    assert not torch.allclose(fresh(X).mean, stale(X).mean)


def test_draws_with_statistics_of_their_own_do_not_warn():
    members = [normalized() for _ in range(3)]
    members[1][0].weight.data += 1
    assert FunctionSpace(DeepEnsemble(members)).draws.statistics
    tracker = Snapshots(members[0])
    for member in members:
        tracker.update(member)
    FunctionSpace(tracker.posterior())
    network = nn.Sequential(*normalized(), nn.Dropout(0.5))
    FunctionSpace(MCDropout(network), num_samples=3)


@pytest.mark.parametrize("mode", ["sample", "linearized"])
def test_what_leads_to_a_posterior_says_what_to_pass(mode):
    network, X = residual(), normal(6, 2)
    fitted = FitResult(network, torch.arange(6), torch.arange(0), None, None, 0.0)
    posterior = gaussian_weights(network)
    found = ScaleTuning(posterior, 1.0, (1.0,), X[0])
    for wrong, message in (
        (SWAG(network), "is a SWAG.*Pass its posterior()"),
        (found, "is a ScaleTuning.*Pass its .posterior"),
        (fitted, "is a FitResult, one network.*DeepEnsemble"),
        (nn.Sequential(network), "is a Sequential, one network.*DeepEnsemble"),
    ):
        with pytest.raises(TypeError, match=message):
            FunctionSpace(wrong, mode)


def test_functions_without_spread_are_found_when_they_come_in():
    weights, X = gaussian_weights(residual()), normal(6, 2)
    with pytest.raises(ValueError, match="One function has no spread"):
        FunctionSpace(weights, num_samples=1)
    FunctionSpace(weights, "linearized", num_samples=1)(X)
    net = weights.net
    same = net.flatten(net.params).expand(3, -1)
    with pytest.warns(ReliabilityWarning, match="All 3 draws have the same weights"):
        FunctionSpace(EmpiricalWeights(net, same))


def test_inputs_of_another_width_say_what_the_network_takes():
    weights, X = gaussian_weights(residual()), normal(6, 3)
    for mode in ("sample", "linearized"):
        with pytest.raises(ShapeError, match="takes ``... x 2``"):
            FunctionSpace(weights, mode, 4)(X)
        with pytest.raises(ShapeError, match="takes ``... x 2``"):
            FunctionSpace(weights, mode, 4).draws(X)
