"""Sparse GPs and their bounds, for tests of fits."""

import torch
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import VariationalELBO

from gpbridge.augmentation import Rotation2d
from gpbridge.inducing_gp import SparseGP
from gpbridge.inducing_points import initial_inducing_points
from gpbridge.kernels import InvariantKernel
from gpbridge.selection import OrbitVariationalELBO

DOUBLE = torch.float64


def regression(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1
    noise = 0.1 * torch.randn(n, generator=generator, dtype=DOUBLE)
    return X, torch.sin(4 * X.norm(dim=-1)) + noise


def model_for(X, kernel=None, num_inducing=8, **options):
    kernel = RBFKernel() if kernel is None else kernel
    generator = torch.Generator().manual_seed(1)
    Z = initial_inducing_points(kernel, X, num_inducing, generator)
    return SparseGP(kernel, Z, GaussianLikelihood(), **options).double()


def bound(model, X):
    return VariationalELBO(model.likelihood, model, num_data=len(X))


def of_outputs(X, outputs, num_elements=None):
    kernel = InvariantKernel(RBFKernel(), Rotation2d(4))
    model = SparseGP(kernel, X[:5].clone(), num_outputs=outputs).double()
    if num_elements is None:
        return bound(model, X)
    return OrbitVariationalELBO(model.likelihood, model, len(X), num_elements)
