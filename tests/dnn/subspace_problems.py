"""Networks and methods that inference in a subspace is tested on."""

import torch
from gpytorch.likelihoods import (
    GaussianLikelihood,
)
from torch import nn

from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.subspace_methods import (
    EllipticalSliceSampling,
    HamiltonianMonteCarlo,
    VariationalInference,
)
from gpbridge.functional import FunctionalNet

NOISE, STD = 0.3, 1.5

METHODS = {
    "slice": EllipticalSliceSampling(num_samples=4, burn_in=1),
    "hamiltonian": HamiltonianMonteCarlo(num_samples=4, warm_up=8, num_steps=2),
    "variational": VariationalInference(num_steps=3),
    "full": VariationalInference(num_steps=3, full_covariance=True),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def gaussian(noise=NOISE):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = noise
    return likelihood


def linear_problem(n=12):
    """A linear network, so that the coordinates are those of linear regression."""
    net = FunctionalNet(nn.Linear(4, 1).double())
    subspace = Subspace(net, normal(5, seed=3) / 2, normal(3, 5, seed=2) / 2)
    w = subspace.weights(torch.tensor([1.0, -1.0, 0.5]).double())
    X = normal(n, 4)
    noise = NOISE**0.5 * normal(n, 1, seed=1)
    return subspace, X, X @ w[:4, None] + w[4] + noise


class Block(nn.Module):
    """A real module: nested, with layers that are no attributes of a Sequential."""

    def __init__(self, outputs=1, norm=False):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, outputs)})

    def forward(self, x):
        return self.heads["a"](torch.tanh(self.norm(self.first(x))))
