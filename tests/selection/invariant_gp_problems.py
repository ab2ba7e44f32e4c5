"""Invariant GPs, exact and sparse, and radial targets."""

import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import RBFKernel, ScaleKernel

from gpbridge.augmentation import Rotation2d
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import InvariantKernel

DOUBLE = torch.float64

QUIET = {"progress": False}


def points(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1


def radial(X):
    return torch.sin(4 * X.norm(dim=-1, keepdim=True))


def exact(X, Y, law=None, **options):
    law = Rotation2d(4) if law is None else law
    kernel = ScaleKernel(InvariantKernel(RBFKernel(), law))
    return SingleTaskGP(X, Y, covar_module=kernel, outcome_transform=None, **options)


def sparse(X, law=None, num_inducing=6):
    kernel = ScaleKernel(InvariantKernel(RBFKernel(), law or Rotation2d(4)))
    return SparseGP(kernel, X[:num_inducing].clone()).to(X)
