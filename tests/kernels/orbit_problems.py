"""Inputs and kernels that the tests of orbit averages share."""

import torch
from gpytorch.kernels import RBFKernel

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def dense(kernel, *args):
    return kernel(*args).to_dense()


def rbf(lengthscale=0.7, **options):
    kernel = RBFKernel(**options).double()
    kernel.lengthscale = torch.tensor(lengthscale, dtype=torch.float64)
    return kernel


def points(n=7, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def network(outputs=1):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs)
    ).double()
