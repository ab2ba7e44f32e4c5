"""The posterior against dense oracles, in every space and under every likelihood."""

import functools

import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.checks import ShapeError
from tests import oracles_linearized as oracles
from tests.linearized.problems import (
    PRIOR_VARIANCE,
    PROBLEMS,
    both_spaces,
    build,
    curvature,
    every_likelihood,
    gaussian_likelihoods,
    inputs,
    label_likelihoods,
    network,
    point_noise,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def tangents(name, net=None, X=None, X_test=None):
    net = network(PROBLEMS[name].m) if net is None else net
    X = inputs() if X is None else X
    X_test = inputs(5, seed=7) if X_test is None else X_test
    return oracles.tangent(net, X), oracles.tangent(net, X_test)


def assert_moments(posterior, mean, covariance, tolerance=EXACT):
    m = posterior.mean.shape[-1]
    got = posterior.distribution
    torch.testing.assert_close(posterior.mean, mean.reshape(-1, m), **tolerance)
    torch.testing.assert_close(got.covariance_matrix, covariance, **tolerance)


@both_spaces
@gaussian_likelihoods
@pytest.mark.parametrize("offset", [True, False])
def test_under_gaussian_noise_it_is_the_conditional_of_the_joint(name, space, offset):
    X = inputs()
    train, test = tangents(name)
    noise = PROBLEMS[name].noise(len(X))
    expected = oracles.gaussian_posterior(
        train, test, PRIOR_VARIANCE, noise, targets(name, X), offset
    )
    model = build(name, space, offset=offset)
    assert_moments(model.posterior(inputs(5, seed=7)), *expected)


@both_spaces
@label_likelihoods
def test_under_labels_it_is_laplaces_around_the_network(name, space):
    X, net = inputs(), network(PROBLEMS[name].m)
    train, test = tangents(name)
    covariance = oracles.laplace_covariance(
        train, test, PRIOR_VARIANCE, curvature(name, net, X)
    )
    posterior = build(name, space).posterior(inputs(5, seed=7))
    assert_moments(posterior, test.value, covariance)


@both_spaces
@label_likelihoods
def test_the_linear_models_mean_under_labels_is_its_optimum(name, space):
    X, m = inputs(), PROBLEMS[name].m
    train, test = tangents(name)
    v, _ = oracles.laplace_mode(
        train, PRIOR_VARIANCE, PROBLEMS[name].log_density, targets(name, X), m
    )
    model = build(name, space, mean="linear_model")
    expected = (test.features(PRIOR_VARIANCE) @ v).reshape(-1, m)
    got = model.posterior(inputs(5, seed=7)).mean
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@functools.cache  # once for all spaces
def in_sixty_digits(n, signal_to_noise):
    X = inputs(n)
    train, test = tangents("gaussian", network(), X)
    power = train.features(PRIOR_VARIANCE).square().sum(-1).mean()
    noise = (power / signal_to_noise).item()
    Y = targets("gaussian", X)
    return noise, *oracles.precise_gaussian(train, test, PRIOR_VARIANCE, noise, Y)


@pytest.mark.parametrize("signal_to_noise", [1e4, 1e6])
@pytest.mark.parametrize(
    "space, n",
    [
        ("function", 12),
        ("weight", 12),
        ("matrix_free", 12),
        ("auto", 40),
        ("weight", 40),
        ("matrix_free", 40),
    ],
)
def test_little_noise_takes_no_digits(space, n, signal_to_noise):
    # Against 60 digits; mean in units of itself, variances relative.
    X = inputs(n)
    Y = targets("gaussian", X)
    noise, mean, variance, evidence = in_sixty_digits(n, signal_to_noise)
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-12)).double()
    likelihood.noise = torch.tensor([noise], dtype=torch.float64)
    model = build("gaussian", space, X, Y, likelihood=likelihood)
    posterior = model.posterior(inputs(5, seed=7))
    tolerance = {"rtol": 1e-8, "atol": 1e-8 * mean.abs().max().item()}
    torch.testing.assert_close(posterior.mean[:, 0], mean, **tolerance)
    torch.testing.assert_close(posterior.variance[:, 0], variance, rtol=1e-8, atol=0.0)
    if space != "matrix_free":
        assert model.log_evidence().item() == pytest.approx(evidence, rel=1e-8)


@pytest.mark.filterwarnings("ignore:BernoulliLikelihood is the probit link")
@every_likelihood
@pytest.mark.parametrize("n, prior_variance", [(12, 1.0), (60, 1e-3), (60, 1e3)])
def test_every_space_gives_the_same_answer(name, n, prior_variance):
    X, X_test = inputs(n), inputs(5, seed=7)
    options = {"X": X, "mean": "linear_model"}
    if name == "fixed_noise":
        options["likelihood"] = FixedNoiseGaussianLikelihood(point_noise(n))
    models = {
        space: build(name, space, **options)
        for space in ("function", "weight", "matrix_free")
    }
    for model in models.values():
        model.prior_variance = prior_variance
    expected = models["function"].posterior(X_test)
    std = expected.variance.reshape(-1).sqrt()
    # The optimum under labels is iterated: to a part of the posterior's own width.
    close = {"rtol": 1e-8, "atol": 1e-8 * expected.mean.abs().max().item()}
    if not PROBLEMS[name].gaussian:
        close["atol"] += 1e-6 * std.min().item()
    covariance = expected.distribution.covariance_matrix / std / std[:, None]
    for space in ("weight", "matrix_free"):
        got = models[space].posterior(X_test)
        torch.testing.assert_close(got.mean, expected.mean, **close)
        correlation = got.distribution.covariance_matrix / std / std[:, None]
        torch.testing.assert_close(correlation, covariance, rtol=1e-8, atol=1e-8)
    evidence = models["weight"].evidence(), models["function"].evidence()
    for weight, function in zip(*evidence, strict=True):
        torch.testing.assert_close(weight, function, rtol=1e-8, atol=1e-8)


@both_spaces
@every_likelihood
def test_batches_of_test_points_equal_a_loop(name, space):
    model = build(name, space, mean="linear_model")
    X = inputs(24, seed=5).reshape(2, 3, 4, 2)
    whole = model.posterior(X)
    m = PROBLEMS[name].m
    assert whole.mean.shape == (2, 3, 4, m)
    for i in range(2):
        for j in range(3):
            part = model.posterior(X[i, j])
            torch.testing.assert_close(whole.mean[i, j], part.mean, **EXACT)
            got = whole.distribution.covariance_matrix[i, j]
            torch.testing.assert_close(
                got, part.distribution.covariance_matrix, **EXACT
            )
    for nothing in (X[:, :0], X[..., :0, :]):
        if m == 1:
            assert model.posterior(nothing).mean.shape == (*nothing.shape[:-1], 1)
        else:  # gpytorch has no joint distribution of no points with several outputs
            with pytest.raises(ShapeError, match="at least one point"):
                model.posterior(nothing)


@every_likelihood
def test_the_order_of_the_data_does_not_matter(name):
    X, order = inputs(), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    Y, options = targets(name, X), {}
    if name == "fixed_noise":
        options["likelihood"] = FixedNoiseGaussianLikelihood(point_noise()[order])
    model = build(name, X=X, Y=Y)
    shuffled = build(name, X=X[order], Y=Y[order], **options)
    X_test = inputs(5, seed=7)
    torch.testing.assert_close(
        model.posterior(X_test).variance, shuffled.posterior(X_test).variance, **EXACT
    )
    torch.testing.assert_close(model.log_evidence(), shuffled.log_evidence(), **EXACT)


@both_spaces
@gaussian_likelihoods
def test_infinite_noise_returns_the_prior(name, space):
    problem, X_test = PROBLEMS[name], inputs(5, seed=7)
    train, test = tangents(name)
    if name == "fixed_noise":
        likelihood = FixedNoiseGaussianLikelihood(torch.full((12,), 1e30).double())
    else:
        likelihood = problem.make()
        if name == "gaussian" or likelihood.has_global_noise:
            likelihood.noise = torch.tensor([1e30], dtype=torch.float64)
        else:
            likelihood.task_noises = torch.full((2,), 1e30, dtype=torch.float64)
    model = build(name, space, likelihood=likelihood)
    Phi = test.features(PRIOR_VARIANCE)
    assert_moments(model.posterior(X_test), test.mean(), Phi @ Phi.T)
    model.train()  # where a call returns the prior
    prior = model(X_test)
    torch.testing.assert_close(prior.mean.reshape(-1), test.mean(), **EXACT)
    torch.testing.assert_close(prior.covariance_matrix, Phi @ Phi.T, **EXACT)


@every_likelihood
@pytest.mark.parametrize("space", ["function", "weight", "matrix_free"])
def test_one_point_is_enough(name, space):
    m = PROBLEMS[name].m
    X, options = inputs(1), {}
    if name == "fixed_noise":
        options["likelihood"] = FixedNoiseGaussianLikelihood(point_noise(1))
    model = build(name, space, X, **options)
    posterior = model.posterior(inputs(5, seed=7))
    assert posterior.mean.shape == (5, m)
    assert torch.isfinite(posterior.mean).all() and (posterior.variance > 0).all()
    if space != "matrix_free":
        assert torch.isfinite(model.log_evidence())


def test_one_weight_is_enough():
    class Slope(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x):
            return self.slope * x.sin()

    X, X_test = inputs(12, d=1), inputs(5, seed=7, d=1)
    Y = targets("gaussian", X)
    train, test = tangents("gaussian", Slope(), X, X_test)
    noise = 0.03 * torch.eye(12, dtype=torch.float64)
    expected = oracles.gaussian_posterior(train, test, PRIOR_VARIANCE, noise, Y)
    for space in ("auto", "function", "weight", "matrix_free"):
        model = build("gaussian", space, X, Y, net=Slope())
        assert_moments(model.posterior(X_test), *expected)


@both_spaces
def test_duplicated_rows_are_rows_with_half_the_noise(space):
    # 18-duplicated-rows of the catalogue: finite, and the weighted problem.
    X = inputs()
    Y = targets("gaussian", X)
    twice = build("gaussian", space, torch.cat([X, X]), torch.cat([Y, Y]))
    once = build(
        "gaussian",
        space,
        likelihood=FixedNoiseGaussianLikelihood(0.015 * torch.ones(12).double()),
    )
    X_test = inputs(5, seed=7)
    got, expected = twice.posterior(X_test), once.posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, **EXACT)
    torch.testing.assert_close(got.variance, expected.variance, **EXACT)


def test_more_data_never_raise_the_variance():
    X, X_test = inputs(40), inputs(30, seed=7)
    few = build("gaussian", X=X[:20], Y=targets("gaussian", X)[:20])
    many = build("gaussian", X=X)
    ratio = many.posterior(X_test).variance / few.posterior(X_test).variance
    assert ratio.max() <= 1 + 1e-9


@both_spaces
def test_draws_without_a_generator_are_fresh_and_leave_the_global_state(space):
    model = build("gaussian", space)
    more = inputs(2, seed=9)
    model = model.condition_on_observations(more, more[:, :1])
    state, X = torch.get_rng_state(), inputs(5, seed=7)
    one, other = (model.draw(2)(X) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_of_more_values_than_weights_stays_small_in_float32():
    """As many values as a grid has; upstream's own jitter is the limit."""
    net, X = nn.Linear(2, 1), torch.rand(30, 2, generator=torch.Generator())
    model = LinearizedGP(net, X, X.sum(-1, keepdim=True), noise=0.1)
    grid = torch.rand(400, 2, generator=torch.Generator())
    together = model.posterior(grid).variance
    alone = model.posterior(grid[:, None]).variance[:, 0]
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-4 * float(alone.mean()))
