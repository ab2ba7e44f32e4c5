"""Weights as a Gaussian, as a set and as a mixture, against dense formulas."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn
from torch.distributions import LowRankMultivariateNormal

from gpbridge.checks import ShapeError
from gpbridge.functional import FunctionalNet
from gpbridge.types import FunctionDraws, WeightPosterior
from gpbridge.weights import EmpiricalWeights, GaussianWeights, MixtureWeights
from tests import oracles_sampling as oracles


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@pytest.fixture
def net():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    return FunctionalNet(network)


def gaussian(net, k=3, seed=0):
    p = net.num_params
    variance = 0.5 + torch.rand(p, generator=seeded(seed), dtype=torch.float64)
    root = random(p, k, seed=seed) if k else None
    return GaussianWeights(net, random(p, seed=seed + 1), variance, root)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_moments_and_densities_are_those_of_the_dense_gaussian(net, k):
    weights = gaussian(net, k)
    U = weights.root if k else torch.zeros(net.num_params, 1).double()
    dense = torch.diag(weights.variance) + U @ U.mT
    torch.testing.assert_close(weights.covariance.to_dense(), dense)
    exact = LowRankMultivariateNormal(weights.mean, U, weights.variance)
    for shape in ((), (4,), (2, 3)):
        w = random(*shape, net.num_params, seed=5)
        torch.testing.assert_close(weights.log_prob(w), exact.log_prob(w))
    drawn = weights.sample_weights(4000, seeded(3))
    assert oracles.covariance_errors(drawn - weights.mean, dense).abs().max() < 5
    error = (drawn.mean(0) - weights.mean) / (dense.diagonal() / 4000).sqrt()
    assert error.abs().max() < 4.5


def test_a_temperature_scales_the_covariance(net):
    weights = gaussian(net)
    half = weights.temper(0.25)
    torch.testing.assert_close(
        half.covariance.to_dense(), 0.25 * weights.covariance.to_dense()
    )
    base, scaled = (w.sample_weights(3, seeded()) for w in (weights, half))
    torch.testing.assert_close(scaled - half.mean, 0.5 * (base - weights.mean))
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="scale must be"):
            weights.temper(scale)


def test_a_point_is_a_gaussian_without_covariance(net):
    point = GaussianWeights(net, random(net.num_params))
    assert torch.equal(point.covariance.to_dense(), torch.zeros(17, 17).double())
    assert torch.equal(point.sample_weights(2), point.mean.expand(2, -1))
    with pytest.raises(ValueError, match="have no density"):
        point.log_prob(point.mean)


def test_draws_are_frozen_functions(net):
    weights, X = gaussian(net), random(4, 5, 2)
    draws = weights.draw(6, seeded(1))
    assert isinstance(draws, FunctionDraws) and isinstance(weights, WeightPosterior)
    values = draws(X)
    assert values.shape == (6, 4, 5, 2) and torch.equal(values, draws(X))
    params = net.unflatten(draws.weights[3])
    torch.testing.assert_close(values[3], net.apply_network(params, X))
    X.requires_grad_()
    assert torch.autograd.grad(draws(X).sum(), X)[0].abs().min() > 0
    torch.testing.assert_close(weights.draw(6, seeded(1))(X), values)


def test_states_and_copies(net):
    weights, other = gaussian(net), gaussian(net, seed=7)
    other.load_state_dict(weights.state_dict())
    w = random(net.num_params)
    assert torch.equal(other.log_prob(w), weights.log_prob(w))
    for twin in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert torch.equal(twin.log_prob(w), weights.log_prob(w))


def test_tensors_are_copied_so_that_a_loaded_state_changes_nothing_else(net):
    mean, rows = random(17), random(2, 17)
    moments, own = mean.clone(), rows.clone()
    parent = GaussianWeights(net, mean, torch.ones(17).double(), random(17, 2))
    half, other = parent.temper(0.5), gaussian(net, 2, seed=7)
    members = EmpiricalWeights(net, rows, {"extra": rows})
    half.load_state_dict(other.state_dict())
    zeros = EmpiricalWeights(net, 0 * rows, {"extra": 0 * rows})
    members.load_state_dict(zeros.state_dict())
    assert torch.equal(half.mean, other.mean) and not members.weights.any()
    assert torch.equal(parent.mean, moments) and torch.equal(mean, moments)
    assert torch.equal(rows, own)


def test_members_come_evenly(net):
    members = EmpiricalWeights(net, random(3, net.num_params))
    assert torch.equal(members.draw().weights, members.weights)
    some = members.draw(2, seeded()).weights
    assert len(some.unique(dim=0)) == 2
    _, counts = members.draw(7, seeded()).weights.unique(dim=0, return_counts=True)
    assert sorted(counts.tolist()) == [2, 2, 3]


def test_a_mixture_draws_from_every_part(net):
    points = [GaussianWeights(net, random(net.num_params, seed=i)) for i in range(3)]
    draws, X = MixtureWeights(points).draw(7, seeded()), random(4, 2)
    values = draws(X)
    assert values.shape == (7, 4, 2)
    each = torch.cat([p.draw(1)(X) for p in points])
    found = (values[:, None] - each).abs().amax((-2, -1)) < 1e-12
    assert sorted(found.sum(0).tolist()) == [2, 2, 3]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda net: GaussianWeights(net, torch.zeros(3)), ShapeError, "mean must be"),
        (
            lambda net: GaussianWeights(net, torch.zeros(17), -torch.ones(17)),
            ValueError,
            "variance must be at least zero, but is as low as -1",
        ),
        (
            lambda net: GaussianWeights(net, torch.zeros(17), None, torch.ones(2, 17)),
            ShapeError,
            r"root must be ``17 x 17``.*\(2, 17\)",
        ),
        (
            lambda net: EmpiricalWeights(net, torch.zeros(0, 17)),
            ShapeError,
            "at least one row",
        ),
        (lambda net: MixtureWeights([]), ValueError, "at least one posterior"),
        (
            lambda net: GaussianWeights(net, torch.full((17,), torch.nan)),
            InputDataError,
            "mean contains NaN",
        ),
    ],
)
def test_bad_input(net, build, error, message):
    with pytest.raises(error, match=message):
        build(net)


def test_a_posterior_is_not_called_and_says_what_to_do():
    net = FunctionalNet(nn.Linear(2, 1))
    gaussian = GaussianWeights(net, torch.zeros(3))
    members = EmpiricalWeights(net, torch.zeros(2, 3))
    for posterior in (gaussian, members, MixtureWeights([gaussian, members])):
        with pytest.raises(TypeError, match=r"Draw functions, .draw\(num_samples\)"):
            posterior(torch.zeros(4, 2))


def test_reprs_say_sizes():
    net = FunctionalNet(nn.Linear(2, 1))
    gaussian = GaussianWeights(net, torch.zeros(3), root=torch.ones(3, 4))
    assert "p=3, diagonal=False, rank=4, std=2" in repr(gaussian)
    members = EmpiricalWeights(net, torch.zeros(2, 3))
    assert "num_members=2" in repr(members)
    assert "num_parts=2" in repr(MixtureWeights([gaussian, members]))
    assert "num_draws=5" in repr(gaussian.draw(5))


def test_a_network_that_returns_no_tensor_or_wants_images_says_so():
    class Named(nn.Linear):
        def forward(self, x):
            return {"mean": super().forward(x)}

    images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 1))
    for network, shape, kind, message in (
        (Named(36, 1), None, TypeError, "returns dict. Wrap it"),
        (images, None, ShapeError, r"input_shape=\(c, h, w\)"),
        (images, (1, 5, 5), ShapeError, "has 25 entries, but X has 36"),
    ):
        net = FunctionalNet(network, input_shape=shape)
        draws = GaussianWeights(net, net.flatten(net.params)).draw(2)
        with pytest.raises(kind, match=message):
            draws(torch.zeros(4, 36))


def test_a_posterior_that_moves_leaves_the_tempered_one_where_it_is():
    net = FunctionalNet(nn.Linear(2, 1))
    posterior = GaussianWeights(net, torch.zeros(3), variance=torch.ones(3))
    wide = posterior.temper(4.0)
    wide.double()
    assert (posterior.net.dtype, posterior.mean.dtype) == (torch.float32,) * 2
    assert (wide.net.dtype, wide.mean.dtype) == (torch.float64,) * 2
