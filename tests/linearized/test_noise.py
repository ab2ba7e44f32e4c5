"""Noise from where it is asked to come."""

import pytest
import torch

from gpbridge import FitResult, LinearizedGP
from tests.linearized.problems import (
    PROBLEMS,
    build,
    gaussian_likelihoods,
    inputs,
    network,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("m", [1, 2])
def test_noise_comes_from_where_it_is_asked(m):
    X, net = inputs(), network(m)
    Y = targets("multitask", X)[:, :m]
    result = FitResult(
        net,
        torch.arange(8),
        torch.arange(8, 12),
        torch.full((m,), 0.2).double(),
        torch.full((m,), 0.3).double(),
        1e-4,
    )

    def noise(**options):
        return LinearizedGP.from_fit(result, X, Y, **options).noise_variance

    for options, expected in (
        ({"noise": "fit_residual"}, 0.2),
        ({"noise": "validation"}, 0.3),
        ({"noise": 0.07}, 0.07),
        ({"mean": "network"}, 0.2),
        ({"parameters": "last_layer"}, 0.3),
    ):
        got = noise(**options)
        torch.testing.assert_close(
            got, torch.full((m,), expected).double(), rtol=1e-5, atol=0
        )
    torch.testing.assert_close(noise(), 0.1 * Y.var(0, correction=0), rtol=1e-5, atol=0)
    fixed = LinearizedGP.from_fit(result, X, Y, noise=0.07)
    assert not any(p.requires_grad for p in fixed.likelihood.parameters())
    misfit = (Y - net(X)).detach().square().mean(0)
    with pytest.warns(UserWarning, match="without a fit result takes the residuals of"):
        model = LinearizedGP(net, X, Y, noise="fit_residual")
    torch.testing.assert_close(model.noise_variance, misfit, rtol=1e-5, atol=0)


@gaussian_likelihoods
def test_noise_variances_are_those_of_the_likelihood(name):
    noise = build(name).noise_variance
    expected = PROBLEMS[name].noise(12).diagonal().reshape(12, -1)
    if name != "fixed_noise":
        expected = expected[0]
    torch.testing.assert_close(noise, expected, **EXACT)
