import warnings

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

from gpbridge.checks import NotConvergedWarning
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import StochasticDualDescent, StochasticGradientDescent
from gpbridge.solvers.dual_descent import automatic_step_size


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def covariance(X, lengthscale, noise, amplitude=1.0):
    kernel = ScaleKernel(MaternKernel(1.5)).double().requires_grad_(False)
    kernel.base_kernel.lengthscale, kernel.outputscale = lengthscale, amplitude
    return KernelMatrixOperator(X, noise, kernel=kernel).to_dense()


def test_the_published_toy_problem():
    # Lin et al. (2024), sdd.ipynb: n = 200, b = 10, beta n = .2, 3000 steps.
    X = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    H = covariance(X, 0.7, 0.04, 1.44)
    b = torch.sin(5 * X) + 0.2 * random(200, 1)
    solver = StochasticDualDescent(
        tolerance=1e-12, batch_size=10, step_size=0.2, max_passes=150, averaging=5.0
    )
    with pytest.warns(NotConvergedWarning):
        solution = solver(H, b)
    K = H - 0.04 * torch.eye(200, dtype=torch.float64)
    exact = K @ torch.linalg.solve(H, b)
    assert (K @ solution.value - exact).norm() < 2e-2 * exact.norm()


CONFIGURATIONS = [
    (d, lengthscale, b)
    for d, lengthscale in [(1, 0.3), (3, 0.8), (8, 2.0)]
    for b in (16, 40, 100)
]


@pytest.mark.parametrize("d, lengthscale, b", CONFIGURATIONS)
def test_the_automatic_step_does_not_diverge(d, lengthscale, b):
    H = covariance(random(400, d), lengthscale, 0.0025)
    rhs = torch.linalg.cholesky(H) @ random(400, 2, seed=1)
    step = automatic_step_size(H, b, 0.9, torch.Generator().manual_seed(0))
    solver = StochasticDualDescent(tolerance=1e-6, batch_size=b, max_passes=20)
    with pytest.warns(NotConvergedWarning, match="stopped after"):
        solution = solver(H, rhs)
    assert solution.residual_norm < 0.5
    # A guard that halved would have changed the path: a given step is the same one.
    again = StochasticDualDescent(
        tolerance=1e-6, batch_size=b, max_passes=20, step_size=step / 4
    )
    with pytest.warns(NotConvergedWarning):
        timid = again(H, rhs)
    assert solution.residual_norm < 1.5 * timid.residual_norm


@pytest.mark.parametrize("factor", [100.0, 1e6])
def test_a_step_that_diverges_is_halved_until_it_does_not(factor):
    H = covariance(random(300, 3), 1.0, 0.25)
    rhs = random(300, 2, seed=1)
    generator = torch.Generator().manual_seed(0)
    step = factor * automatic_step_size(H, 50, 0.9, generator)
    solver = StochasticDualDescent(batch_size=50, step_size=step, max_passes=500)
    solution = solver(H, rhs)
    assert solution.converged


@pytest.mark.parametrize("kind", [StochasticDualDescent, StochasticGradientDescent])
def test_a_hopeless_step_stops_with_the_remedy_and_without_nan(kind):
    H = covariance(random(100, 2), 1.0, 0.25)
    solver = kind(batch_size=20, step_size=1e200, max_passes=5)
    with pytest.warns(NotConvergedWarning, match="step_size to the automatic rule"):
        solution = solver(H, random(100, 2, seed=1))
    assert torch.isfinite(solution.value).all() and solution.residual_norm <= 1


@pytest.mark.parametrize("kind", [StochasticDualDescent, StochasticGradientDescent])
def test_momentum_of_one_is_refused(kind):
    with pytest.raises(ValueError, match="below 1, but is 1.0"):
        kind(momentum=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(momentum=0.0)
