"""Preconditioners from columns of a matrix are what their formulas say."""

import pytest
import torch
from gpytorch.kernels import MaternKernel

from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import pivoted_cholesky_preconditioner
from gpbridge.solvers.preconditioners import partial_cholesky
from tests import oracles_sampling as oracles

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def covariance(X, noise):
    return oracles.matern(X, X, 0.8, 1.5) + noise * torch.eye(len(X)).double()


def operator(X, noise):
    kernel = MaternKernel(1.5).double().requires_grad_(False)
    kernel.lengthscale = torch.tensor(0.8, dtype=torch.float64)
    return KernelMatrixOperator(X, noise, kernel=kernel)


def test_a_partial_factor_is_exact_at_its_pivots_and_below_the_matrix():
    X = random(40, 2)
    K = covariance(X, 0.0)
    F = partial_cholesky(operator(X, 0.0), 15)
    left = K - F @ F.mT
    assert F.shape == (40, 15)
    assert torch.linalg.eigvalsh(left).min() > -1e-12
    assert (left.diagonal() < 1e-10).sum() == 15
    # Near the best of this rank: pivots are where variance is left.
    best = torch.linalg.eigvalsh(K)[:-15].sum()
    assert left.trace() < 4 * best


def test_with_all_columns_it_is_the_inverse():
    X = random(20, 2)
    inverse = pivoted_cholesky_preconditioner(operator(X, 0.1), 20)
    got = inverse(torch.eye(20).double())
    torch.testing.assert_close(got, torch.linalg.inv(covariance(X, 0.1)), **EXACT)


def test_with_some_columns_it_is_the_inverse_of_the_approximation():
    H = operator(random(40, 2), 0.1)
    F = partial_cholesky(H, 15, 0.1)
    expected = torch.linalg.inv(F @ F.mT + 0.1 * torch.eye(40).double())
    got = pivoted_cholesky_preconditioner(H, 15)(torch.eye(40).double())
    torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.1])
def test_a_kernel_of_low_rank_needs_no_root_of_nothing(noise):
    # Five points eight times: after five pivots no variance is left.
    X = random(5, 2).repeat(8, 1)
    inverse = pivoted_cholesky_preconditioner(operator(X, noise), 30)
    value = inverse(torch.eye(40).double())
    assert bool(value.isfinite().all())
    assert torch.linalg.eigvalsh(0.5 * (value + value.mT)).min() > 0
    F = partial_cholesky(operator(X, noise), 30, noise)
    assert F.shape[-1] < 10
    torch.testing.assert_close(F @ F.mT, covariance(X, 0.0), rtol=0, atol=1e-7)
