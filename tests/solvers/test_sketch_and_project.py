import warnings
from dataclasses import replace

import pytest
import torch
from gpytorch.kernels import MaternKernel

from gpbridge.checks import NotConvergedWarning
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import SketchAndProject


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def setting():
    """N = 600, Matérn-3/2, d = 3, lengthscale .8, noise .0025, columns N(0, H)."""
    kernel = MaternKernel(1.5).double().requires_grad_(False)
    kernel.lengthscale = 0.8
    H = KernelMatrixOperator(random(600, 3), 0.0025, kernel=kernel).to_dense()
    return H, torch.linalg.cholesky(H) @ random(600, 3, seed=1)


def residual(solver, setting):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return replace(solver, tolerance=1e-9)(*setting).residual_norm


@pytest.mark.parametrize("passes", [20, 50])
def test_acceleration_pays_with_blocks_of_low_rank(setting, passes):
    # Rathore et al. (2025): 10 blocks of rank 40.
    fast = SketchAndProject(block_size=60, rank=40, max_passes=passes)
    assert residual(fast, setting) < residual(replace(fast, accelerated=False), setting)


def test_factors_of_the_blocks_beat_their_approximation(setting):
    exact = SketchAndProject(block_size=60, max_passes=20)
    assert residual(exact, setting) < residual(replace(exact, rank=40), setting)


def test_blocks_of_low_numerical_rank_have_finite_factors():
    # Reference: 200 points of rank 5, sketch of rank 20, in float32, no noise.
    kernel = MaternKernel(1.5)
    X = random(5, 2).float().repeat(40, 1)
    H = KernelMatrixOperator(X, 1e-3, kernel=kernel)
    solver = SketchAndProject(block_size=100, rank=20, tolerance=1e-3)
    solution = solver(H, H._matmul(random(200, 1).float()))
    assert solution.converged
