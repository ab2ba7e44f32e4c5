"""What the constructor accepts, in every combination that has a meaning."""

import copy
import warnings

import pytest
import torch
from torch import nn

from gpbridge import LinearizedGP
from tests import oracles_linearized as oracles
from tests.linearized.problems import (
    PROBLEMS,
    both_spaces,
    build,
    every_likelihood,
    gaussian_likelihoods,
    inputs,
    network,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@both_spaces
@gaussian_likelihoods
def test_the_networks_mean_has_the_linear_models_covariance(name, space):
    X_test = inputs(5, seed=7)
    options = {"mean": "network", "noise": 0.05}
    if name in ("fixed_noise", "multitask_rank_1"):
        return  # their noise cannot be set
    net = network(PROBLEMS[name].m)
    model = build(name, space, net=net, **options)
    posterior = model.posterior(X_test)
    torch.testing.assert_close(posterior.mean, net(X_test).detach(), **EXACT)
    twin = build(name, space, net=net, noise=0.05).posterior(X_test)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix,
        twin.distribution.covariance_matrix,
        **EXACT,
    )
    # In train mode a call returns the linear model's prior, whatever the mean is.
    prior = model.train()(X_test)
    test = oracles.tangent(net, X_test)
    torch.testing.assert_close(prior.mean.reshape(-1), test.mean(), **EXACT)


@both_spaces
def test_the_last_layer_alone_is_a_linear_model_of_its_inputs(space):
    net, X = network(), inputs()
    X_test = inputs(5, seed=7)
    Y = targets("gaussian", X)
    model = build("gaussian", space, parameters="last_layer", noise=0.05)
    assert model.functional.num_params == 7

    def features(x):
        return torch.cat([net[:2](x), torch.ones(len(x), 1).double()], -1).detach()

    Phi, Phi_test = features(X), features(X_test)
    H = Phi.T @ Phi / model.noise_variance + torch.eye(7).double() / 0.4
    mean = Phi_test @ torch.linalg.solve(H, Phi.T @ Y) / model.noise_variance
    variance = (Phi_test * torch.linalg.solve(H, Phi_test.T).T).sum(-1, keepdim=True)
    posterior = model.posterior(X_test)
    torch.testing.assert_close(posterior.mean, mean, **EXACT)
    torch.testing.assert_close(posterior.variance, variance, **EXACT)


@pytest.mark.parametrize("parameters", [["0"], ["0.weight", "2.bias"]])
def test_only_the_chosen_weights_are_random(parameters):
    names = {"0": ["0.weight", "0.bias"]}.get(parameters[0], parameters)
    net, X = network(), inputs()
    X_test, noise = inputs(5, seed=7), 0.03 * torch.eye(12).double()
    Y = targets("gaussian", X)
    train, test = (oracles.tangent(net, x, names) for x in (X, X_test))
    mean, covariance = oracles.gaussian_posterior(train, test, 0.4, noise, Y)
    posterior = build("gaussian", parameters=parameters).posterior(X_test)
    torch.testing.assert_close(posterior.mean[:, 0], mean, **EXACT)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, **EXACT)


@every_likelihood
def test_a_g_prior_does_not_depend_on_the_scale_of_a_layer(name):
    m, X_test = PROBLEMS[name].m, inputs(5, seed=7)
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, m)).double()
    scaled = copy.deepcopy(net)
    with torch.no_grad():  # the same function
        scaled[0].weight *= 7.0
        scaled[0].bias *= 7.0
        scaled[2].weight /= 7.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="BernoulliLikelihood is the probit")
        one, other = (build(name, net=n, g_prior=True) for n in (net, scaled))
        plain, moved = (build(name, net=n) for n in (net, scaled))
    assert not one.offset
    got, expected = one.posterior(X_test), other.posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-7, atol=1e-9)
    evidence = one.log_evidence(), other.log_evidence()
    torch.testing.assert_close(*evidence, rtol=1e-7, atol=1e-9)
    ratio = plain.posterior(X_test).variance / moved.posterior(X_test).variance
    assert (ratio - 1).abs().max() > 0.01  # which the plain prior does


def test_a_g_prior_is_the_inverse_size_of_each_feature_and_zero_where_it_is_dead():
    net, X = network(), inputs()
    with torch.no_grad():
        net[2].weight[0, 0] = 0.0  # the weights into unit 0 have no effect
    model = build("gaussian", net=net, g_prior=True)
    J = oracles.tangent(net, X).J
    scale = J.square().sum(0).rsqrt()
    scale[J.square().sum(0) == 0] = 0.0
    assert (scale == 0).sum() == 3
    torch.testing.assert_close(model.functional.weight_scale, scale, **EXACT)
    mean, covariance = oracles.gaussian_posterior(
        oracles.tangent(net, X),
        oracles.tangent(net, X[:3]),
        0.4 * scale**2,
        0.03 * torch.eye(12).double(),
        targets("gaussian", X),
        offset=False,
    )
    posterior = model.posterior(X[:3])
    torch.testing.assert_close(posterior.mean[:, 0], mean, **EXACT)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, **EXACT)


@pytest.mark.parametrize("groups", ["layer", "tensor"])
@both_spaces
def test_groups_have_a_variance_each(groups, space):
    net, X, X_test = network(), inputs(), inputs(5, seed=7)
    model = build("gaussian", space, groups=groups)
    sizes = {"layer": [18, 7], "tensor": [12, 6, 6, 1]}[groups]
    values = torch.linspace(0.2, 1.1, len(sizes), dtype=torch.float64)
    model.prior_variance = values
    variance = values.repeat_interleave(torch.tensor(sizes))
    train, test = (oracles.tangent(net, x) for x in (X, X_test))
    noise, Y = 0.03 * torch.eye(12).double(), targets("gaussian", X)
    mean, covariance = oracles.gaussian_posterior(train, test, variance, noise, Y)
    posterior = model.posterior(X_test)
    torch.testing.assert_close(posterior.mean[:, 0], mean, **EXACT)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, **EXACT)
    expected = oracles.gaussian_log_evidence(train, variance, noise, Y)
    torch.testing.assert_close(model.log_evidence(), expected, **EXACT)


def test_a_kernel_that_vanishes_at_few_points_is_measured_at_more():
    net = nn.Linear(2, 10, bias=False).double()

    def model(n):
        X = torch.zeros(n, 2).double()
        X[1] = 1.0  # not among the points that are looked at first
        return LinearizedGP(net, X, torch.arange(n) % 10)

    bounds = model(200).covar_module.raw_prior_variance_constraint
    assert float(bounds.upper_bound) == pytest.approx(2.2e4 / (2 / 200))
    with pytest.raises(ValueError, match="zero on the training inputs.*dead units"):
        model(800)
