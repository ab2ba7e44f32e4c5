"""Which kernels have finitely many features, and which depend on distances only."""

import pytest
import torch
from gpytorch.kernels import (
    CosineKernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RFFKernel,
    RQKernel,
    ScaleKernel,
)

from gpbridge.augmentation import FiniteOrbit, Rotation2d
from gpbridge.kernels import (
    DeepKernel,
    FeatureKernel,
    InvariantKernel,
    NeuralTangentKernel,
    draw_feature_map,
)
from gpbridge.kernels.exact_features import has_exact_features, is_isotropic
from tests.kernels.orbit_problems import EXACT, dense, network, points, rbf

FINITE = {
    "linear": lambda: LinearKernel(),
    "frequencies": lambda: RFFKernel(5, num_dims=2),
    "network": lambda: FeatureKernel(network(4)),
    "tangent": lambda: NeuralTangentKernel(network()),
    "scale": lambda: ScaleKernel(LinearKernel()),
    "sum": lambda: LinearKernel() + ScaleKernel(FeatureKernel(network(4))),
    "product": lambda: LinearKernel() * FeatureKernel(network(4)),
    "deep": lambda: DeepKernel(network(4), LinearKernel()),
    "averaged": lambda: InvariantKernel(LinearKernel(), Rotation2d(3)),
}
INFINITE = {
    "squared exponential": lambda: RBFKernel(),
    "sum": lambda: LinearKernel() + RBFKernel(),
    "deep": lambda: DeepKernel(network(4), RBFKernel()),
    "averaged": lambda: InvariantKernel(RBFKernel(), Rotation2d(3)),
}


@pytest.mark.parametrize("name", FINITE)
def test_products_of_exact_features_are_the_kernel(name):
    kernel, x = FINITE[name]().double(), points(5)
    assert has_exact_features(kernel)
    features = draw_feature_map(kernel, 2, 1)(x)
    torch.testing.assert_close(features @ features.mT, dense(kernel, x), **EXACT)


@pytest.mark.parametrize("name", INFINITE)
def test_kernels_without_a_finite_map_are_known(name):
    assert not has_exact_features(INFINITE[name]())


def test_an_average_of_an_average_is_that_of_all_products():
    inner = InvariantKernel(rbf(), Rotation2d(3, init=1.0)).double()
    x = points(4)
    kernel = InvariantKernel(inner, FiniteOrbit.permutations(2)).double()
    swapped = x.flip(-1)
    expected = [dense(inner, a, b) for a in (x, swapped) for b in (x, swapped)]
    torch.testing.assert_close(dense(kernel, x), sum(expected) / 4, **EXACT)


@pytest.mark.parametrize(
    "kernel, expected",
    [
        (RBFKernel(), True),
        (MaternKernel(), True),
        (ScaleKernel(RQKernel()) + RBFKernel() * MaternKernel(), True),
        (RBFKernel(ard_num_dims=2), False),
        (RBFKernel(active_dims=[0]), False),
        (ScaleKernel(RBFKernel(), active_dims=[0]), False),
        (PeriodicKernel(), False),
        (RBFKernel() + CosineKernel(), False),
        (RFFKernel(5, num_dims=2), False),  # an RBFKernel by inheritance
    ],
)
def test_kernels_of_the_distance_only_are_known(kernel, expected):
    assert is_isotropic(kernel) == expected
    if expected:  # rotated inputs have the same distances
        x = points(4).float()
        turned = torch.stack([-x[:, 1], x[:, 0]], -1)
        torch.testing.assert_close(dense(kernel, x), dense(kernel, turned))
