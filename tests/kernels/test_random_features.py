"""Feature maps of stationary kernels have the right spectral measure."""

import math

import pytest
import torch
from botorch.sampling.pathwise.features import gen_kernel_features
from botorch.sampling.pathwise.features.maps import FeatureMap
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    LinearKernel,
    MaternKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

from gpbridge.kernels import draw_feature_map
from gpbridge.prior_draws import draw_prior
from tests import oracles_sampling as oracles

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STATIONARY = {0.5: MaternKernel, 1.5: MaternKernel, 2.5: MaternKernel, math.inf: None}


def stationary(nu, **options):
    kernel = RBFKernel(**options) if nu == math.inf else MaternKernel(nu, **options)
    return kernel.double()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed=1):
    return torch.rand(n, d, dtype=torch.float64, generator=seeded(seed))


@pytest.mark.parametrize("nu", STATIONARY)
def test_the_error_falls_as_the_root_of_the_number_of_features(nu):
    X = points(12, 3)
    lengthscale = torch.tensor([0.3, 0.6, 1.2]).double()
    kernel = stationary(nu, ard_num_dims=3)
    kernel.lengthscale = lengthscale
    exact = oracles.matern(X, X, lengthscale, nu)
    sizes, errors = (2**7, 2**13), []
    for num_features in sizes:
        squared = []
        for seed in range(8):
            phi = draw_feature_map(kernel, 3, num_features, seeded(seed))(X)
            squared.append((phi @ phi.mT - exact).square().mean())
        errors.append(torch.stack(squared).mean().sqrt().item())
    # One frequency has a standard deviation of at most the root of a half.
    for num_features, error in zip(sizes, errors, strict=True):
        assert error < (num_features / 2) ** -0.5
    assert errors[1] < errors[0] / 4  # a factor of 8 in the limit


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_one_chi_square_per_frequency(nu):
    # With one per input column the covariance would be a product over columns, which at
    # equal distance is larger along an axis than along a diagonal.
    kernel = stationary(nu)
    kernel.lengthscale = 1.0
    axis = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).double()
    diagonal = torch.tensor([[0.0, 0.0], [2**0.5, 2**0.5]]).double()
    feature_map = draw_feature_map(kernel, 2, 2**17, seeded())
    exact = oracles.matern(axis, axis, 1.0, nu)[0, 1]
    for X in (axis, diagonal):
        phi = feature_map(X)
        assert abs((phi[0] * phi[1]).sum() - exact) < 4 * 2**-8 * 0.7


def test_the_same_base_draws_serve_all_hyperparameters():
    kernel = ScaleKernel(stationary(1.5)).double()
    feature_map, X = draw_feature_map(kernel, 2, 64, seeded()), points(5, 2)
    kernel.outputscale, kernel.base_kernel.lengthscale = 2.0, 0.25
    moved = feature_map(X)
    fresh = draw_feature_map(kernel, 2, 64, seeded())
    torch.testing.assert_close(moved, fresh(X), **EXACT)
    unit = ScaleKernel(stationary(1.5)).double()
    unit.outputscale, unit.base_kernel.lengthscale = 1.0, 1.0
    expected = 2**0.5 * draw_feature_map(unit, 2, 64, seeded())(X / 0.25)
    torch.testing.assert_close(moved, expected, **EXACT)


def test_more_columns_than_quasi_random_numbers_have():
    kernel = stationary(math.inf)
    kernel.lengthscale = 100.0
    X = points(3, 21202)
    phi = draw_feature_map(kernel, 21202, 512, seeded())(X)
    exact = oracles.matern(X, X, 100.0, math.inf)
    assert (phi @ phi.mT - exact).abs().max() < 4 * 256**-0.5


@pytest.mark.parametrize(
    "kernel",
    [
        LinearKernel(),
        LinearKernel(ard_num_dims=2),
        LinearKernel(active_dims=[1]),
        ConstantKernel(),
        ConstantKernel(batch_shape=torch.Size([2])),
        ConstantKernel() + LinearKernel(),
    ],
    ids=str,
)
def test_linear_and_constant_kernels_are_exact(kernel):
    kernel, X = kernel.double(), points(5, 2)
    parts = kernel.kernels if isinstance(kernel, AdditiveKernel) else [kernel]
    # Upstream factorises the sum of such kernels, which is singular.
    exact = sum(part(X).to_dense() for part in parts)
    for feature_map in (
        draw_feature_map(kernel, 2, 8, seeded()),
        gen_kernel_features(kernel, num_inputs=2, num_outputs=8),
    ):
        phi = feature_map(X)
        assert phi.shape[-1] == feature_map.num_outputs
        torch.testing.assert_close(phi @ phi.mT, exact, **EXACT)


def test_a_kernel_without_features_is_told_which_have_some():
    with pytest.raises(
        NotImplementedError, match=r"RQKernel has no feature map; .*Mat"
    ):
        draw_feature_map(RQKernel(), 2, 8)
    with pytest.raises(
        NotImplementedError, match="@draw_feature_map.register on a fun"
    ):
        draw_feature_map(RQKernel() + RBFKernel(), 2, 8)


def test_a_kernel_registered_as_the_message_says_can_be_drawn_from():
    class Cosines(RQKernel):
        """Two cosines, whatever its base class is."""

        def forward(self, x1, x2, diag=False, **params):
            phase = (x1 - x2 if diag else x1[:, None] - x2).sum(-1)
            return phase.cos() + (3 * phase).cos()

    class Waves(FeatureMap):
        batch_shape, num_outputs = torch.Size(), 4

        def __init__(self):
            super().__init__()
            self.input_transform = self.output_transform = torch.nn.Identity()

        def forward(self, x):
            phase = x.sum(-1, keepdim=True)
            phase = torch.cat([phase, 3 * phase], -1)
            return torch.cat([phase.sin(), phase.cos()], -1)

    @draw_feature_map.register
    def _draw(kernel: Cosines, num_inputs, num_features, generator=None):
        return Waves()

    kernel, X = ScaleKernel(Cosines()).double(), points(5, 2)
    kernel.outputscale = torch.tensor(0.25).double()
    phi = draw_feature_map(kernel, 2, 8, seeded())(X)
    torch.testing.assert_close(phi @ phi.mT, kernel(X).to_dense(), **EXACT)
    values = draw_prior(kernel, 2, 2000, generator=seeded())(X)[..., 0]
    errors = oracles.covariance_errors(values, kernel(X).to_dense().detach())
    assert errors.abs().max() < 4.5
