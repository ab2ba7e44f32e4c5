"""The log posterior against densities written out, and its minibatches."""

import pytest
import torch
from gpytorch.likelihoods import GaussianLikelihood, SoftmaxLikelihood
from torch import nn
from torch.distributions import Categorical, Normal

from gpbridge.checks import ShapeError
from gpbridge.dnn.log_posterior import LogPosterior
from gpbridge.dnn.priors import GaussianPrior, WeightPrior
from gpbridge.functional import FunctionalNet

SOFTMAX = SoftmaxLikelihood(num_classes=3, mixing_weights=False)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(outputs):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    net = FunctionalNet(network)
    net.probe(random(3, 2))
    return net, {name: p.detach() for name, p in net.params.items()}, random(12, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_it_is_likelihood_and_prior(outputs, reduction, temperature):
    net, params, X = problem(outputs)
    values = net.apply_network(params, X)
    if outputs == 1:
        likelihood, Y = GaussianLikelihood().double(), random(12, 1, seed=1)
        likelihood.noise = 0.25
        fit = Normal(values, 0.5).log_prob(Y).sum()
    else:
        likelihood, Y = SOFTMAX, torch.arange(12) % 3
        fit = Categorical(logits=values).log_prob(Y).sum()
    prior = sum(Normal(0.0, 2.0).log_prob(p).sum() for p in params.values())
    expected = fit / temperature + prior
    if reduction == "mean":
        expected = expected / 12
    weights = WeightPrior(GaussianPrior(4.0))
    log_posterior = LogPosterior(net, likelihood, 12, weights, temperature, reduction)
    torch.testing.assert_close(log_posterior(params, X, Y), expected)


def test_minibatches_are_unbiased():
    net, params, X = problem(1)
    Y, likelihood = random(12, 1, seed=1), GaussianLikelihood().double()
    log_posterior = LogPosterior(net, likelihood, 12)
    parts = [
        log_posterior(params, x, y) for x, y in zip(X.split(4), Y.split(4), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), log_posterior(params, X, Y))


def test_gradients_reach_weights_and_noise():
    net, params, X = problem(1)
    likelihood = GaussianLikelihood().double()
    log_posterior = LogPosterior(net, likelihood, 12)
    params = {name: p.requires_grad_() for name, p in params.items()}
    wanted = [*params.values(), likelihood.noise_covar.raw_noise]
    value = log_posterior(params, X, random(12, 1, seed=1))
    for gradient in torch.autograd.grad(value, wanted):
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood_temperature": 0.0}, "likelihood_temperature must be positive"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"num_data": 0}, "num_data must be a whole number above zero"),
    ],
)
def test_bad_options(options, message):
    net, *_ = problem(1)
    with pytest.raises(ValueError, match=message):
        LogPosterior(net, GaussianLikelihood(), **({"num_data": 12} | options))


def test_an_empty_batch():
    net, params, X = problem(1)
    with pytest.raises(ShapeError, match="batch is empty"):
        LogPosterior(net, GaussianLikelihood(), 12)(params, X[:0], X[:0, :1])
