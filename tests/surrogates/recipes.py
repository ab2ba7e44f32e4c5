"""Every recipe in a size that trains in no time, and fits that several tests share."""

import warnings
from functools import cache

import pytest
import torch
from torch import nn

from gpbridge.surrogates import (
    DeepKernelSurrogate,
    DropoutSurrogate,
    EnsembleSurrogate,
    InfiniteWidthSurrogate,
    LastLayerSurrogate,
    LinearizedSurrogate,
    MaternTangentSurrogate,
    SGHMCSurrogate,
    SubspaceSurrogate,
    SWAGSurrogate,
    TangentSurrogate,
)

BOUNDS = torch.tensor([[-3.0, 10.0], [5.0, 30.0]], dtype=torch.float64)


def small(d, m):
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, m))


def relu(d, m):
    return nn.Sequential(nn.Linear(d, 8), nn.ReLU(), nn.Linear(8, m))


COMMON = {"network": small, "bounds": BOUNDS, "epochs": 20, "update_epochs": 5}
CHAINS = {"num_cycles": 1, "steps_per_cycle": 20, "samples_per_cycle": 4}
RECIPES = [
    LinearizedSurrogate(**COMMON),
    LastLayerSurrogate(**COMMON),
    MaternTangentSurrogate(**COMMON),
    TangentSurrogate(**COMMON),
    InfiniteWidthSurrogate(**COMMON | {"network": relu}),
    DeepKernelSurrogate(**COMMON),
    EnsembleSurrogate(num_members=3, **COMMON),
    DropoutSurrogate(num_samples=8, **COMMON),
    SWAGSurrogate(num_samples=8, rank=5, **COMMON),
    SubspaceSurrogate(num_samples=8, dim=2, **COMMON),
    SGHMCSurrogate(num_chains=2, **CHAINS, **COMMON),
]
OF = {type(recipe): recipe for recipe in RECIPES}
LINEARIZED, ENSEMBLE = OF[LinearizedSurrogate], OF[EnsembleSurrogate]
KERNELS = (
    MaternTangentSurrogate,
    TangentSurrogate,
    InfiniteWidthSurrogate,
    DeepKernelSurrogate,
)
GAUSSIAN = (LinearizedSurrogate, LastLayerSurrogate, *KERNELS)


def each(slow=()):
    """Run a test for every recipe, for the slow kinds among the slow tests."""
    return pytest.mark.parametrize(
        "recipe",
        [
            pytest.param(
                recipe,
                id=type(recipe).__name__,
                marks=[pytest.mark.slow] if isinstance(recipe, slow) else [],
            )
            for recipe in RECIPES
        ],
    )


def data(n=24, m=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    X = BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * Z
    Y = torch.stack([torch.sin(3 * Z[:, 0] + j) + Z[:, 1] for j in range(m)], -1)
    return X.to(dtype), (100 + 20 * Y).to(dtype)


def quiet(call, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


@cache
def fitted(kind, m=1):
    """The recipe's model of the first 20 rows; not to be changed."""
    X, Y = data(m=m)
    return quiet(OF[kind].fit, X[:20], Y[:20])


@cache
def updated(kind, m=1):
    """Its update to all 24 rows; not to be changed."""
    return quiet(OF[kind].update, fitted(kind, m), *data(m=m))


def moments(model, X):
    with torch.no_grad():
        posterior = model.posterior(X)
        return torch.stack([posterior.mean, posterior.variance])
