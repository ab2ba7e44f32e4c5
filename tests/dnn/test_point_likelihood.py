"""Log densities of mixtures of draws, against sums by hand."""

import math

import torch

from gpbridge.dnn.point_likelihood import mixture_log_density
from tests.dnn.scale_problems import gaussian, problem

NOISE = 0.04


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_score_is_the_mean_log_density_of_the_mixture():
    tracker, X, Y = problem(0.3)
    draws = tracker.posterior(1.0).draw(7, seeded())
    densities = torch.distributions.Normal(draws(X), NOISE**0.5).log_prob(Y).exp()
    expected = densities[..., 0].mean(0).log().mean()
    torch.testing.assert_close(mixture_log_density(gaussian(), draws, X, Y), expected)

    def own(f, y):
        return log_normal(f, y)

    def log_normal(f, y):
        error = (y - f)[..., 0].square() / NOISE
        return -0.5 * (error + math.log(2 * math.pi * NOISE))

    torch.testing.assert_close(mixture_log_density(own, draws, X, Y), expected)
