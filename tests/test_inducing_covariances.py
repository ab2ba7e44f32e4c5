"""Covariances of inducing variables: averages by brute force, compositions, columns."""

import pytest
import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel

from gpbridge.augmentation import Rotation2d
from gpbridge.checks import ShapeError
from gpbridge.inducing_covariances import (
    has_own_domain,
    inducing_covariance,
    inducing_cross_covariance,
    inducing_width,
)
from gpbridge.inducing_gp import SparseGP
from gpbridge.kernels import InvariantKernel
from tests import oracles_architecture as dense
from tests.inducing_problems import DOUBLE, NAMES, M, N, kernels, normal, rbf


def test_parts_that_see_different_columns_are_refused():
    kernel, d, width = kernels("convolutional")
    model = SparseGP(kernel + rbf(), normal(M, width))
    with pytest.raises(ShapeError, match="see 4, 16 columns"):
        model(normal(N, d))


def test_columns_of_a_scale_are_those_of_upstream():
    kernel = ScaleKernel(RBFKernel(), active_dims=[0]).double()
    Z = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)).double()
    expected = kernel(Z, x).to_dense()
    torch.testing.assert_close(inducing_cross_covariance(kernel, Z, x), expected)
    torch.testing.assert_close(inducing_covariance(kernel, Z), kernel(Z).to_dense())
    orbits = ScaleKernel(
        InvariantKernel(RBFKernel(), Rotation2d(4)), active_dims=[0, 1]
    )
    with pytest.raises(ValueError, match="active_dims on the inner kernel"):
        inducing_covariance(orbits, Z)


def scaled(kernel):
    """Twice in a scale."""
    kernel = ScaleKernel(ScaleKernel(kernel)).double()
    kernel.outputscale = torch.tensor(2.5, dtype=DOUBLE)
    kernel.base_kernel.outputscale = torch.tensor(0.7, dtype=DOUBLE)
    return kernel


@pytest.mark.parametrize("name", NAMES)
def test_covariances_with_the_function_are_averages_over_orbits(name):
    kernel, d, width = kernels(name)
    Z, x = normal(M, width, seed=1), normal(N, d, seed=2)
    orbits = kernel.augmentation(x)
    s = orbits.shape[-2]
    weights = kernel.augmentation.weights
    weights = torch.ones(s, dtype=DOUBLE) if weights is None else weights
    pairs = dense.squared_exponential_gram(Z, orbits.reshape(-1, width), 1.5)
    single = (pairs.reshape(M, N, s) * weights).mean(-1)
    own = dense.squared_exponential_gram(Z, Z, 1.5)
    for factor, k in ((1.0, kernel), (2.5 * 0.7, scaled(kernel))):
        found = inducing_cross_covariance(k, Z, x)
        assert (found - factor * single).abs().max() < 1e-12
        assert (inducing_covariance(k, Z) - factor * own).abs().max() < 1e-12


@pytest.mark.parametrize("composition", ["alone", "scaled", "sum", "product"])
def test_inducing_variables_and_function_are_jointly_positive(composition):
    kernel, d, width = kernels("turns")
    compositions = {
        "alone": kernel,
        "scaled": scaled(kernel),
        "sum": scaled(kernel) + rbf(0.7),
        "product": kernel * scaled(rbf(5.0)),
    }
    kernel = compositions[composition]
    Z, x = normal(M, width, seed=1), normal(N, d, seed=2)
    cross = inducing_cross_covariance(kernel, Z, x)
    top = torch.cat([inducing_covariance(kernel, Z), cross], -1)
    joint = torch.cat([top, torch.cat([cross.mT, kernel(x).to_dense()], -1)])
    assert torch.linalg.eigvalsh(joint).min() > -1e-10
    # And no more than that: the function is not independent of them.
    assert cross.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_inputs_are_loops(name):
    kernel, d, width = kernels(name)
    Z, x = normal(M, width, seed=1), normal(2, 3, N, d, seed=2)
    found = inducing_cross_covariance(kernel, Z, x)
    assert found.shape == (2, 3, M, N)
    single = inducing_cross_covariance(kernel, Z, x[1, 2])
    assert (found[1, 2] - single).abs().max() < 1e-12


@pytest.mark.parametrize(
    "name, width", [("convolutional", 4), ("rotation", 2), ("turns", 9)]
)
def test_the_width_is_what_the_base_kernel_sees(name, width):
    kernel, d, _ = kernels(name)
    assert inducing_width(kernel, d) == inducing_width(scaled(kernel), d) == width
    assert inducing_width(rbf(), d) == d


class Registered(Kernel):
    """A kernel with a rule of its own, that has no orbits."""


@inducing_covariance.register(Registered)
def _(kernel, Z):
    raise AssertionError("not evaluated")


def test_which_kernels_have_inducing_variables_in_another_domain():
    for name in NAMES:
        kernel = kernels(name)[0]
        for own in (kernel, scaled(kernel), rbf() + scaled(kernel), kernel * rbf()):
            assert has_own_domain(own)
    assert has_own_domain(scaled(Registered()))
    for plain in (rbf(), scaled(rbf()), rbf() + rbf(0.7), scaled(rbf() * rbf())):
        assert not has_own_domain(plain)
