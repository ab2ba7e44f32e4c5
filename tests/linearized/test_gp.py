import unittest

import torch
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import nn

from gpbridge import Exact, LinearizedGP
from gpbridge.testing import ModelContractTestCase


def network(num_outputs, dtype=torch.float64):
    """A tanh network with fixed weights, independent of the global random state."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, num_outputs))
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def likelihood(num_outputs, dtype):
    if num_outputs == 1:
        made = GaussianLikelihood().to(dtype)
        made.noise = 0.02
    else:
        made = MultitaskGaussianLikelihood(num_outputs, has_global_noise=False).to(dtype)
        made.task_noises = torch.linspace(0.02, 0.04, num_outputs).to(dtype)
    return made


class Contract(ModelContractTestCase):
    space = "auto"

    def create_model(self, dtype, num_outputs=1, **options):
        model = LinearizedGP(
            self.watch(network(num_outputs, dtype)),
            likelihood=likelihood(num_outputs, dtype),
            inference=Exact(space=self.space),
            **options,
        )
        model.prior_variance = 0.5
        return model


class TestFunctionSpace(Contract, unittest.TestCase):
    space = "function"


class TestWeightSpace(Contract, unittest.TestCase):
    space = "weight"
