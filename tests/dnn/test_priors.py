"""Priors of weights against torch's distributions and a dense Gaussian."""

import math

import pytest
import torch
from torch.distributions import Laplace, MultivariateNormal, Normal, StudentT

from gpbridge.dnn.priors import (
    ConvolutionPrior,
    GaussianPrior,
    LaplacePrior,
    StudentTPrior,
    WeightPrior,
)


def weights(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("prior", "exact"),
    [
        (GaussianPrior(0.25), Normal(0.0, 0.5)),
        (LaplacePrior(0.5), Laplace(0.0, 0.5)),
        (StudentTPrior(3.0, 0.5), StudentT(3.0, 0.0, 0.5)),
    ],
)
def test_independent_priors(prior, exact):
    w = weights(3, 4)
    torch.testing.assert_close(prior(w), exact.log_prob(w).sum())


@pytest.mark.parametrize("prior", [GaussianPrior(), LaplacePrior(), StudentTPrior()])
def test_weights_that_diverged_have_no_density(prior):
    assert prior(torch.tensor([0.0, math.nan])).isnan()


@pytest.mark.parametrize("window", [(3, 3), (2, 5), (4,)])
def test_filters_are_correlated_within_a_window_only(window):
    prior, w = ConvolutionPrior(0.5, 2.0), weights(4, 2, *window)
    places = torch.cartesian_prod(*map(torch.arange, window)).reshape(-1, len(window))
    C = torch.empty(len(places), len(places)).double()
    for i, a in enumerate(places.tolist()):
        for j, b in enumerate(places.tolist()):
            C[i, j] = 0.5 * math.exp(-math.dist(a, b) / 2.0)
    torch.testing.assert_close(prior.covariance(window), C)
    exact = MultivariateNormal(torch.zeros(len(C)).double(), C)
    torch.testing.assert_close(prior(w), exact.log_prob(w.flatten(2)).sum())


def test_the_first_rule_that_holds_counts():
    prior = WeightPrior(
        GaussianPrior(4.0),
        [
            (lambda name: name.endswith("bias"), LaplacePrior()),
            (lambda name: "conv" in name, ConvolutionPrior()),
        ],
    )
    params = {
        "conv.weight": weights(2, 1, 3, 3),
        "conv.bias": weights(2),
        "fc.weight": weights(3, 2),
    }
    expected = (
        ConvolutionPrior()(params["conv.weight"])
        + LaplacePrior()(params["conv.bias"])
        + GaussianPrior(4.0)(params["fc.weight"])
    )
    torch.testing.assert_close(prior(params), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianPrior(0.0), "variance must be positive"),
        (lambda: StudentTPrior(df=-1.0), "df must be positive"),
        (lambda: ConvolutionPrior()(weights(3, 2)), "takes filters ``out x in x"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
