import warnings
from dataclasses import replace

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

from gpbridge.checks import NotConvergedWarning
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import StochasticDualDescent, StochasticGradientDescent
from gpbridge.solvers.dual_descent import automatic_step_size
from gpbridge.solvers.system import System


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
    # .0054 as published, and .0115 with half the step.
    assert (K @ solution.value - exact).norm() < 8e-3 * exact.norm()


# Each d and lengthscale with each batch size, each of both with each momentum.
CONFIGURATIONS = [
    (d, lengthscale, b, (0.0, 0.5, 0.9)[(i + j) % 3])
    for i, (d, lengthscale) in enumerate([(1, 0.3), (3, 0.8), (8, 2.0)])
    for j, b in enumerate((16, 40, 100))
]


def descend(solver, H, rhs, passes=20):
    """Residual after some passes, and the step that the guard has left."""
    system = System(H, rhs, torch.Generator().manual_seed(0))
    steps = solver.steps(system)
    for _ in range(passes):
        value, _ = next(steps)
    return (rhs - H @ value).norm() / rhs.norm(), system.cache["step"]


@pytest.mark.parametrize("d, lengthscale, b, momentum", CONFIGURATIONS)
def test_the_automatic_step_neither_diverges_nor_is_timid(d, lengthscale, b, momentum):
    H = covariance(random(400, d), lengthscale, 0.0025)
    rhs = torch.linalg.cholesky(H) @ random(400, 2, seed=1)
    step = automatic_step_size(H, b, momentum, torch.Generator().manual_seed(0))
    solver = StochasticDualDescent(batch_size=b, momentum=momentum)
    residual, left = descend(solver, H, rhs)
    assert left == step and residual < 0.5  # no halving
    # Thresholds were between .8 and 2.6 times the two limits, of which this is half.
    wild = replace(solver, step_size=16 * step)
    assert descend(wild, H, rhs)[1] < 16 * step
    timid = descend(replace(solver, step_size=step / 16), H, rhs)[0]
    assert residual < 0.7 * timid


@pytest.mark.parametrize("b", [16, 40])
def test_momentum_does_not_outlive_the_visits_of_a_coordinate(b):
    # Nearly diagonal: the eigenvalue of a block alone would allow a step far too long.
    H = covariance(random(400, 8), 0.3, 0.0025)
    rhs = torch.linalg.cholesky(H) @ random(400, 2, seed=1)
    step = automatic_step_size(H, b, 0.9, torch.Generator().manual_seed(0))
    residual, left = descend(StochasticDualDescent(batch_size=b), H, rhs)
    assert left == step and residual < 0.02


@pytest.mark.parametrize("factor", [100.0, 1e6])
def test_a_step_that_diverges_is_halved_until_it_does_not(factor):
    H = covariance(random(300, 3), 1.0, 0.25)
    rhs = random(300, 2, seed=1)
    step = automatic_step_size(H, 50, 0.9, torch.Generator().manual_seed(0))
    solver = StochasticDualDescent(batch_size=50, step_size=factor * step)
    assert descend(solver, H, rhs)[1] < 10 * step
    solution = replace(solver, max_passes=500)(H, rhs)
    assert solution.converged
    assert (rhs - H @ solution.value).norm() <= 0.01 * rhs.norm()


@pytest.mark.parametrize("kind", [StochasticDualDescent, StochasticGradientDescent])
def test_a_hopeless_step_stops_with_the_remedy_and_without_nan(kind):
    H = covariance(random(100, 2), 1.0, 0.25)
    solver = kind(batch_size=20, step_size=1e200, max_passes=5)
    remedy = r"passes over the matrix\) at a relative residual of 1.0e\+00, .*automatic"
    with pytest.warns(NotConvergedWarning, match=remedy):
        solution = solver(H, random(100, 2, seed=1))
    assert torch.isfinite(solution.value).all() and solution.residual_norm <= 1


@pytest.mark.parametrize("kind", [StochasticDualDescent, StochasticGradientDescent])
def test_momentum_of_one_is_refused(kind):
    with pytest.raises(ValueError, match="below 1, but is 1.0"):
        kind(momentum=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind(momentum=0.0)


@pytest.mark.parametrize("b", [100, 200])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e30, 1e200])
def test_a_step_that_is_far_too_long_is_found_out_within_a_few_passes(b, factor):
    """Also where a pass has one or two steps, and ends before the growth is seen."""
    H = covariance(random(200, 3), 1.0, 0.25)
    rhs, step = random(200, 2, seed=1), 1 / torch.linalg.eigvalsh(H)[-1].item()
    found = []
    for size in (None, factor * 200 * step):
        solver = StochasticDualDescent(batch_size=b, step_size=size)
        found.append(descend(solver, H, rhs, passes=80))
    (usual, _), (residual, left) = found
    assert usual < 0.02 and residual < 0.6 and left < 2 * 200 * step


def test_a_right_hand_side_of_few_rows_is_no_growth():
    H = covariance(random(600, 3), 1.0, 0.25)
    rhs = torch.zeros(600, 1, dtype=torch.float64)
    rhs[7] = 1.0
    step = automatic_step_size(H, 4, 0.9, torch.Generator().manual_seed(0))
    solver = StochasticDualDescent(batch_size=4, max_passes=30)
    residual, left = descend(solver, H, rhs)
    assert left == step and residual < 0.5


def test_no_step_that_is_short_enough_ends_the_run_and_says_so(monkeypatch):
    monkeypatch.setattr("gpbridge.solvers.descent._CHANGES", 0)
    H = covariance(random(100, 2), 1.0, 0.25)
    solver = StochasticDualDescent(batch_size=50, step_size=1e6)
    with pytest.warns(NotConvergedWarning, match=r"diverged after .* residual of 1.0e"):
        solution = solver(H, random(100, 2, seed=1))
    assert solution.passes < 10 and not solution.converged
