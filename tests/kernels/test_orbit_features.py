"""Features averaged over orbits, exact or of random frequencies."""

import torch
from gpytorch.kernels import (
    LinearKernel,
    ScaleKernel,
)
from torch import nn

from gpbridge.augmentation import (
    FiniteOrbit,
    Rotation2d,
)
from gpbridge.kernels import (
    DeepKernel,
    FeatureKernel,
    InvariantKernel,
    draw_feature_map,
)
from tests.kernels.orbit_problems import EXACT, dense, rbf


def test_features_of_compositions_are_averaged_too(X, X2):
    class Squares(nn.Module):
        def forward(self, x):
            return torch.cat([x, x.square()], -1)

    base = (
        ScaleKernel(FeatureKernel(Squares()))
        + LinearKernel() * FeatureKernel(Squares())
        + DeepKernel(Squares(), LinearKernel())
    ).double()
    turns = Rotation2d(3, init=1.0).double()
    kernel = InvariantKernel(base, turns).double()
    assert kernel.resolved_mode(X) == "features"
    double = InvariantKernel(base, turns, "double").double()
    torch.testing.assert_close(dense(kernel, X, X2), dense(double, X, X2), **EXACT)
    nested = InvariantKernel(kernel, FiniteOrbit.permutations(2)).double()
    assert nested.resolved_mode(X) == "features"
    twice = InvariantKernel(double, FiniteOrbit.permutations(2), "double").double()
    torch.testing.assert_close(dense(nested, X), dense(twice, X), **EXACT)


def test_random_features_of_the_base_kernel_are_averaged(X, generator):
    turns = Rotation2d(3, init=1.0).double()
    kernel = ScaleKernel(InvariantKernel(rbf(), turns)).double()
    kernel.outputscale = 2.0
    features = draw_feature_map(kernel, 2, 4096, generator)(X)
    error = features @ features.mT - dense(kernel, X)
    assert error.abs().max() < 2 * 4 * (1 / 2048) ** 0.5
