import pytest
import torch
from gpytorch.kernels import MaternKernel

from gpbridge.checks import NotConvergedWarning
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import SketchAndProject


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def setting(n):
    """Matérn-3/2, d = 3, lengthscale .8, noise .0025, columns N(0, H)."""
    kernel = MaternKernel(1.5).double().requires_grad_(False)
    kernel.lengthscale = 0.8
    H = KernelMatrixOperator(random(n, 3), 0.0025, kernel=kernel).to_dense()
    return H, torch.linalg.cholesky(H) @ random(n, 3, seed=1)


def residuals(n, rank, accelerated, passes=100):
    """Exact ones with 10 blocks, after 20 passes and after the last."""
    H, b = setting(n)
    seen = {}

    def look(progress):
        error = (b - H @ progress.value).norm(dim=0) / b.norm(dim=0)
        seen[round(progress.passes)] = error.max().item()

    options = {"max_passes": passes, "block_size": n // 10, "rank": rank}
    solver = SketchAndProject(
        tolerance=1e-9, accelerated=accelerated, callback=look, **options
    )
    with pytest.warns(NotConvergedWarning):
        solution = solver(H, b)
    assert solution.residual_norm == pytest.approx(seen[max(seen)], rel=1e-6)
    return torch.tensor([seen[20], seen[passes]])


@pytest.fixture(scope="module")
def factors():
    return {fast: residuals(300, None, fast) for fast in (True, False)}


def test_acceleration_pays_after_20_and_after_100_passes(factors):
    assert bool((factors[True] < torch.tensor([0.9, 0.5]) * factors[False]).all())


def test_acceleration_pays_with_blocks_of_low_rank_which_factors_beat(factors):
    fast, plain = (residuals(300, 20, fast, 20)[0] for fast in (True, False))
    assert factors[True][0] < fast < 0.9 * plain


@pytest.fixture(scope="module")
def published():
    """Rathore et al. (2025): 600 points, 10 blocks of rank 40."""
    return [residuals(600, 40, fast) for fast in (True, False)]


@pytest.mark.slow
def test_acceleration_pays_in_the_published_setting(published):
    fast, plain = published
    assert bool((fast < torch.tensor([0.9, 0.8]) * plain).all())


@pytest.mark.slow
def test_acceleration_with_a_rank_gains_what_is_published(published):
    # Reference: 2.6 times at 20 passes, 7.6 at 100, one seed.
    fast, plain = published
    assert bool((fast < plain / torch.tensor([2.0, 4.0])).all())


def test_blocks_of_low_numerical_rank_have_finite_factors():
    # Reference: 200 points of rank 5, sketch of rank 20, in float32, no noise.
    kernel = MaternKernel(1.5)
    X = random(5, 2).float().repeat(40, 1)
    H = KernelMatrixOperator(X, 1e-3, kernel=kernel)
    solver = SketchAndProject(block_size=100, rank=20, tolerance=1e-3)
    solution = solver(H, H._matmul(random(200, 1).float()))
    assert solution.converged
