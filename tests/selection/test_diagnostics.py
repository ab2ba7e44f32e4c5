"""Diagnostics against dense formulas, their thresholds, and what they are for."""

import warnings

import pytest
import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.checks import ReliabilityWarning
from gpbridge.dnn import fit_map
from gpbridge.selection import fit_evidence
from gpbridge.selection.diagnostics import diagnose
from tests import oracles_linearized as oracles
from tests.linearized.problems import (
    both_spaces,
    build,
    inputs,
    network,
    point_noise,
    targets,
)


def evidence(model):
    with torch.no_grad():
        return model.evidence()


@both_spaces
def test_they_are_what_they_say(space):
    X, Y = inputs(40), targets("gaussian", inputs(40))
    model = build("gaussian", space, X, Y, groups="layer")
    model.prior_variance = torch.tensor([0.6, 0.2], dtype=torch.float64)
    found = diagnose(model, evidence(model), warn=False)
    train = oracles.tangent(network(), X)
    error = (Y[:, 0] - train.value).square().mean()
    assert found.noise_ratio == pytest.approx(0.03 / error.item(), rel=1e-6)
    variance = torch.tensor([0.6] * 18 + [0.2] * 7, dtype=torch.float64)
    noise = 0.03 * torch.eye(40).double()
    mean, _ = oracles.gaussian_posterior(train, train, variance, noise, Y)
    shift = ((mean - train.value).square().mean() / 0.03).sqrt()
    assert found.mean_shift == pytest.approx(shift.item(), rel=1e-6)
    assert found.group_ratio == pytest.approx(1 / 3)
    K = train.features(variance) @ train.features(variance).T
    dimension = torch.linalg.solve(K + noise, K).trace()
    assert found.effective_dimension == pytest.approx(dimension.item(), rel=1e-6)


def messages(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diagnose(model, evidence(model))
    return [
        str(w.message) for w in caught if issubclass(w.category, ReliabilityWarning)
    ]


@pytest.mark.parametrize("ratio, warned", [(1.19, False), (1.21, True)])
def test_noise_far_above_the_training_error_warns(ratio, warned):
    X, Y = inputs(40), targets("gaussian", inputs(40))
    error = (Y - network()(X)).square().mean().item()
    model = build("gaussian", X=X, Y=Y)
    model.likelihood.noise = torch.tensor([ratio * error], dtype=torch.float64)
    assert any("features are overfitted" in m for m in messages(model)) == warned
    fixed = LinearizedGP(network(), X, Y, noise=ratio * error)
    assert not any("overfitted" in m for m in messages(fixed))  # it was not learnt


def test_a_network_far_from_the_linear_optimum_warns_if_it_is_the_mean():
    X, Y = inputs(40), targets("gaussian", inputs(40))
    model = LinearizedGP(network(), X, Y, mean="network", noise=1e-3)
    assert any("Use mean='linear_model'" in m for m in messages(model))
    loose = LinearizedGP(network(), X, Y, mean="network", noise=50.0)
    assert not any("linear_model" in m for m in messages(loose))
    own = LinearizedGP(network(), X, Y, noise=1e-3)
    assert not any("Use mean" in m for m in messages(own))


@pytest.mark.parametrize("ratio, warned", [(0.11, False), (0.09, True)])
def test_pruned_layers_warn(ratio, warned):
    model = build("gaussian", groups="layer")
    model.prior_variance = torch.tensor([1.0, ratio], dtype=torch.float64)
    assert any("layers were pruned" in m for m in messages(model)) == warned


def test_interpolation_warns():
    model = build("gaussian", X=8 * inputs() - 4, net=network(width=30))
    model.likelihood.noise = torch.tensor([1.1e-4], dtype=torch.float64)
    assert any("12 directions of 12 observations" in m for m in messages(model))


def test_fixed_noise_has_no_ratio():
    likelihood = FixedNoiseGaussianLikelihood(point_noise())
    model = build("fixed_noise", likelihood=likelihood)
    found = diagnose(model, evidence(model), warn=False)
    assert found.noise_ratio != found.noise_ratio  # NaN


def test_the_fit_keeps_them_and_can_be_silent():
    X, Y = inputs(40), targets("gaussian", inputs(40))
    model = LinearizedGP(network(), X, Y, groups="layer")
    fit_evidence(model, warn=False)  # warnings are errors
    assert model.diagnostics == diagnose(model, evidence(model), warn=False)


# -- what they are for: small forms of the measured rules -----------------------------


def mlp(d, width, activation=nn.ReLU):
    return nn.Sequential(
        nn.Linear(d, width),
        activation(),
        nn.Linear(width, width),
        activation(),
        nn.Linear(width, 1),
    ).double()


def noisy(n, seed):
    """Six inputs, of which two matter a little: most of the variance is noise."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return X, 0.6 * X[:, :1] + 0.3 * torch.sin(2 * X[:, 1:2]) + 0.75 * noise


def nll_and_coverage(model, X, Y):
    law = model.predict(X)
    inside = ((Y - law.mean).abs() < 1.96 * law.stddev).double().mean().item()
    return -law.log_prob(Y).mean().item(), inside


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_on_noisy_data_covers_what_it_promises(seed):
    X, Y = noisy(250, seed)
    result = fit_map(mlp(6, 20), X, Y, epochs=60, progress=False)
    model = LinearizedGP.from_fit(result, X, Y)
    fit_evidence(model, warn=False)
    _, coverage = nll_and_coverage(model, *noisy(1000, 10 + seed))
    assert 0.90 <= coverage <= 0.98


@pytest.fixture(scope="module")
def overfitted():
    torch.manual_seed(0)
    X, Y = noisy(120, 0)
    trained = fit_map(
        mlp(6, 12), X, Y, epochs=250, validation_fraction=0.0, progress=False
    )
    return trained, X, Y


def test_overfitted_features_show_in_the_noise(overfitted):
    model = LinearizedGP.from_fit(*overfitted)
    with pytest.warns(ReliabilityWarning, match="times the network's training error"):
        fit_evidence(model)
    assert model.diagnostics.noise_ratio > 1.2


def test_variances_per_layer_raise_the_evidence_and_ruin_the_predictions(overfitted):
    one = LinearizedGP.from_fit(*overfitted)
    evidence_of_one = fit_evidence(one, warn=False).value
    layers = LinearizedGP.from_fit(*overfitted, groups="layer")
    with pytest.warns(ReliabilityWarning, match="layers were pruned and the posterior"):
        evidence_of_layers = fit_evidence(layers).value
    assert layers.diagnostics.group_ratio < 1e-3
    assert evidence_of_layers > evidence_of_one + 10
    X, Y = noisy(500, 5)
    nll, coverage = nll_and_coverage(layers, X, Y)
    safe, safe_coverage = nll_and_coverage(one, X, Y)
    assert nll > safe + 0.5 and coverage < safe_coverage


def test_with_little_noise_the_linear_model_is_far_ahead_of_its_network():
    torch.manual_seed(0)
    X = inputs(120)
    truth = torch.sin(6 * X[:, :1]) + X[:, 1:] ** 2
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(120, 1, generator=generator, dtype=torch.float64)
    Y = truth + 1e-3 * noise
    result = fit_map(mlp(2, 20, nn.Tanh), X, Y, epochs=30, progress=False)
    model = LinearizedGP.from_fit(result, X, Y, select=None)
    fit_evidence(model)  # silent: its own mean is not the network's
    assert model.diagnostics.mean_shift > 1
    X_test = inputs(200, seed=8)
    truth = torch.sin(6 * X_test[:, :1]) + X_test[:, 1:] ** 2
    error = (model.predict(X_test).mean - truth).square().mean()
    network_error = (result.network(X_test) - truth).square().mean()
    assert error < 1e-3 * network_error
    with pytest.raises(ValueError, match="mean='network' cannot learn its noise"):
        LinearizedGP.from_fit(result, X, Y, mean="network", noise="learn")


def test_residuals_at_the_optimum_carry_no_evidence_of_a_prior():
    # The residual variant: a GP on what the network left over. At the least squares
    # optimum of the last layer it is orthogonal to that layer's features.
    X, Y = inputs(40), targets("gaussian", inputs(40))
    net = network()
    with torch.no_grad():
        hidden = torch.cat([net[:2](X), torch.ones(40, 1).double()], -1)
        optimum = torch.linalg.lstsq(hidden, Y).solution[:, 0]
        net[2].weight.copy_(optimum[None, :-1])
        net[2].bias.copy_(optimum[-1:])
        left_over = Y - net(X)
    with pytest.warns(UserWarning, match="last_layer' with a learnt noise is overconf"):
        model = LinearizedGP(net, X, left_over, offset=False, parameters="last_layer")
    fit_evidence(model, warn=False)
    lower = model.covar_module.raw_prior_variance_constraint.lower_bound.item()
    assert model.prior_variance.item() < 100 * lower
