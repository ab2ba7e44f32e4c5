"""GPyTorch's lazy covariances have the products of their dense matrices."""

import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import (
    InducingPointKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from linear_operator.operators import DiagLinearOperator

from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.lazy_covariance import tiled
from tests.test_kernel_operator import EXACT, KERNELS, problem, random, scaled

kernels = pytest.mark.parametrize(
    "kernel",
    [
        KERNELS["no amplitude"],
        KERNELS["matern52"],
        KERNELS["two of the inputs"],
        MaternKernel(0.5, active_dims=[2, 0], ard_num_dims=2).double(),
        ScaleKernel(KERNELS["two of the inputs"]).double(),
        KERNELS["sum"],
        (RBFKernel(active_dims=[1]) + KERNELS["two of the inputs"]).double(),
        scaled(PeriodicKernel(active_dims=[1])),
    ],
)


@kernels
def test_a_lazy_kernel_with_noise_becomes_tiles(kernel):
    X, each = random(70, 3), random(70, seed=1).abs()
    one = torch.tensor(0.3).double()
    prior = MultivariateNormal(torch.zeros(70).double(), kernel(X))
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.3
    fixed = FixedNoiseGaussianLikelihood(each)
    with torch.no_grad():
        K = kernel(X).to_dense()
    V = random(70, 2, seed=2)
    for operator, noise in (
        (kernel(X), 0 * each),
        (kernel(X, X.clone()), 0 * each),
        (kernel(X).add_diagonal(one), one.expand(70)),
        (kernel(X).add_diagonal(each), each),
        (DiagLinearOperator(each) + kernel(X), each),
        (kernel(X).add_diagonal(each).add_jitter(0.3), each + 0.3),
        (likelihood(prior).lazy_covariance_matrix, one.expand(70)),
        (fixed(prior).lazy_covariance_matrix, each),
    ):
        found = tiled(operator)
        assert isinstance(found, KernelMatrixOperator)
        exact = K @ V + noise[:, None] * V
        torch.testing.assert_close(found._matmul(V), exact, **EXACT)
        torch.testing.assert_close(found.noise, noise, **EXACT)


def test_the_kernel_of_the_caller_keeps_its_columns():
    kernel = KERNELS["two of the inputs"]
    tiled(kernel(random(5, 3)))
    assert kernel.active_dims is not None
    assert kernel.base_kernel.active_dims is not None


def test_other_lazy_kernels_are_evaluated():
    X, V = random(20, 3), random(20, 2, seed=1)
    kernel, other = KERNELS["gaussian"], KERNELS["matern32"]
    batch = RBFKernel(batch_shape=torch.Size([2])).double()
    inducing = InducingPointKernel(other, X[:4], GaussianLikelihood()).double()
    for operator in (
        kernel(X) + other(X),
        2.0 * kernel(X).add_diagonal(torch.tensor(0.1).double()),
        kernel(X[:7], X),
        kernel(X).add_diagonal(torch.tensor(-1e-3).double()),
        batch(X),
        kernel(torch.stack([X, X])),
        inducing(X),
    ):
        found = tiled(operator)
        exact = operator.to_dense() @ V
        assert not isinstance(found, KernelMatrixOperator)
        torch.testing.assert_close(found._matmul(V), exact, **EXACT)


def test_what_has_products_comes_back_as_it_is():
    H, dense = problem(KERNELS["gaussian"])
    for operator in (H, dense, H.add_diagonal(torch.tensor(0.1).double())):
        assert tiled(operator) is operator
