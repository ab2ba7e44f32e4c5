"""Trackers and data that the choice of a scale is tested on."""

import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import nn

from gpbridge.dnn.swag import SWAG

NOISE = 0.04


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gaussian():
    likelihood = GaussianLikelihood().double()
    likelihood.noise = NOISE
    return likelihood


def tracked(network, spread, steps=30):
    tracker, generator = SWAG(network, rank=5), seeded(1)
    start = [p.detach().clone() for p in network.parameters()]
    for _ in range(steps):
        with torch.no_grad():
            for p, w in zip(network.parameters(), start, strict=True):
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p.copy_(w + spread * noise)
        tracker.update(network)
    return tracker


def problem(shift, spread=0.5):
    """Held-out data of a line whose weights are off by a shift."""
    network = nn.Linear(2, 1).double()
    X = normal(40, 2)
    with torch.no_grad():
        wrong = network.weight + shift
        Y = X @ wrong.mT + network.bias + NOISE**0.5 * normal(40, 1, seed=2)
    return tracked(network, spread), X, Y
