"""What every solver promises, over a registry: a new solver is one line here."""

import inspect
import math
import warnings
from dataclasses import fields, replace

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import MaternKernel
from linear_operator import to_linear_operator

from gpbridge import solvers
from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import (
    AlternatingProjections,
    Cholesky,
    ConjugateGradients,
    SketchAndProject,
    StochasticDualDescent,
    StochasticGradientDescent,
    choose_solver,
)
from gpbridge.types import Solver

SOLVERS = {
    "Cholesky": Cholesky(),
    "ConjugateGradients": ConjugateGradients(tolerance=1e-3, preconditioner_rank=5),
    "AlternatingProjections": AlternatingProjections(tolerance=1e-3, block_size=17),
    "SketchAndProject": SketchAndProject(tolerance=1e-3, block_size=17),
    "SketchAndProject, low rank": SketchAndProject(
        tolerance=1e-3, block_size=17, rank=6, max_passes=500
    ),
    "StochasticDualDescent": StochasticDualDescent(
        tolerance=1e-3, batch_size=11, max_passes=1000
    ),
    "StochasticGradientDescent": StochasticGradientDescent(
        tolerance=5e-2, batch_size=30, max_passes=20_000
    ),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
ITERATIVE = {name: s for name, s in SOLVERS.items() if name != "Cholesky"}
iterative = pytest.mark.parametrize("solver", ITERATIVE.values(), ids=ITERATIVE)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def matern32(X, lengthscale):
    """Rasmussen and Williams (2006), eq. (4.17)."""
    r = math.sqrt(3) * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist")
    return (1 + r / lengthscale) * torch.exp(-r / lengthscale)


def problem(n=60, k=3, noise=0.5, X=None):
    X = random(n, 2) if X is None else X
    kernel = MaternKernel(1.5).double()
    kernel.lengthscale = torch.tensor(0.4, dtype=torch.float64)
    H = KernelMatrixOperator(X, noise, kernel=kernel)
    dense = matern32(X, 0.4) + noise * torch.eye(len(X), dtype=X.dtype)
    return H, dense, random(len(X), k, seed=1)


def quick(solver, limit=3):
    """The same solver with too small a budget."""
    if isinstance(solver, ConjugateGradients):
        return replace(solver, max_iterations=limit, tolerance=1e-12)
    return replace(solver, max_passes=limit, tolerance=1e-12)


def relative_residuals(dense, value, b):
    norms = b.norm(dim=0)
    return (b - dense @ value).norm(dim=0) / torch.where(norms > 0, norms, 1.0)


def test_the_registry_is_complete():
    public = {
        name
        for name, value in inspect.getmembers(solvers, inspect.isclass)
        if isinstance(value, type) and hasattr(value, "remedy")
    }
    # MinibatchDescent takes sums over points only: see test_minibatch_descent.
    public -= {"MinibatchDescent"}
    assert {name.partition(",")[0] for name in SOLVERS} == public


@every_solver
def test_a_solver_is_one_of_the_protocol_and_reads_as_its_options(solver):
    assert isinstance(solver, Solver)
    assert eval(repr(solver), vars(solvers)) == solver
    assert all(f.default is not f.default_factory for f in fields(solver))


@every_solver
@pytest.mark.parametrize("kind", ["kernel", "linear operator", "tensor"])
def test_the_solution_is_that_of_the_dense_matrix(solver, kind):
    H, dense, b = problem()
    b[:, 0] *= 1e6  # columns of different size
    b[:, 1] = dense[:, 0]  # and of different difficulty
    operators = {
        "kernel": H,
        "linear operator": to_linear_operator(dense),
        "tensor": dense,
    }
    condition = torch.linalg.cond(dense).item()
    bound = 50 * solver.tolerance if solver.name.endswith("gradient descent") else 1e-3
    solver = replace(solver, tolerance=bound / condition)
    solution = solver(operators[kind], b)
    assert solution.converged
    exact = torch.linalg.solve(dense, b)
    error = (solution.value - exact).norm(dim=0) / exact.norm(dim=0)
    assert error.max() <= bound


@every_solver
def test_the_residual_is_exact_and_one_per_column(solver):
    H, dense, b = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        found = [(solver.tolerance, solver(H, b))]
        if solver != Cholesky():
            found.append((1e-12, quick(solver)(H, b)))
    for tolerance, solution in found:
        true = relative_residuals(dense, solution.value, b)
        torch.testing.assert_close(solution.residual_norms, true, rtol=1e-6, atol=1e-12)
        assert solution.residual_norm == solution.residual_norms.max().item()
        assert solution.converged == (solution.residual_norm <= tolerance)


@iterative
def test_stopping_early_warns_with_residual_passes_and_remedy(solver):
    H, _, b = problem(noise=1e-3)
    with pytest.warns(NotConvergedWarning) as caught:
        solution = quick(solver)(H, b)
    message = str(caught[0].message)
    assert not solution.converged
    assert f"residual of {solution.residual_norm:.1e}" in message
    assert f"{solution.passes:.1f} passes" in message and solver.remedy in message
    assert caught[0].filename == __file__


@iterative
def test_a_warm_start_saves_passes(solver):
    H, dense, b = problem()
    cold = solver(H, b)
    near = torch.linalg.solve(dense, b) * (1 + 2 * solver.tolerance)
    warm = solver(H, b, initial=near)
    assert warm.converged and warm.passes < cold.passes
    done = solver(H, b, initial=cold.value)
    assert done.iterations == 0 and torch.equal(done.value, cold.value)


@iterative
def test_an_interrupted_run_goes_on_where_it_was(solver):
    H, dense, b = problem()
    seen = []
    full = replace(solver, callback=seen.append)(H, b)
    assert all(0 < p.passes <= full.passes for p in seen)
    assert seen[0].residual_norms.shape == (3,)
    assert seen[-1].residual_norms.max() <= solver.tolerance
    half = seen[len(seen) // 2]
    resumed = solver(H, b, initial=half.value)
    # From zero it would take all passes again.
    assert resumed.converged and resumed.passes < 0.8 * full.passes
    bound = 2 * solver.tolerance * torch.linalg.cond(dense)
    error = (resumed.value - full.value).norm(dim=0) / full.value.norm(dim=0)
    assert error.max() <= bound


@every_solver
def test_columns_are_solved_as_each_alone(solver):
    H, dense, b = problem()
    together = solver(H, b)
    exact = torch.linalg.solve(dense, b)
    bound = 2 * solver.tolerance * torch.linalg.cond(dense)
    for j in range(3):
        alone = solver(H, b[:, j : j + 1]).value
        error = (alone[:, 0] - together.value[:, j]).norm() / exact[:, j].norm()
        assert error <= bound


@every_solver
def test_a_batch_of_operators(solver):
    X = random(2, 30, 2)
    kernel = MaternKernel(1.5).double()
    H = KernelMatrixOperator(X, 0.5, kernel=kernel)
    b = random(2, 30, 2, seed=1)
    solution = solver(H, b)
    assert solution.converged and solution.value.shape == b.shape
    with torch.no_grad():
        residual = (b - H.to_dense() @ solution.value).norm(dim=-2) / b.norm(dim=-2)
    torch.testing.assert_close(solution.residual_norms, residual, rtol=1e-6, atol=1e-12)


@every_solver
@pytest.mark.parametrize("of_operator", [True, False])
def test_a_batch_on_one_side_only(solver, of_operator):
    X, b = random(3, 20, 2), random(3, 20, 2, seed=1)
    kernel = MaternKernel(1.5).double()
    X, b = (X, b[0]) if of_operator else (X[0], b)
    H = KernelMatrixOperator(X, 0.5, kernel=kernel)
    solution = solver(H, b)
    assert solution.converged and solution.value.shape == (3, 20, 2)
    assert solution.residual_norms.shape == (3, 2)
    with torch.no_grad():
        residual = (b - H.to_dense() @ solution.value).norm(dim=-2) / b.norm(dim=-2)
    torch.testing.assert_close(solution.residual_norms, residual, rtol=1e-6, atol=1e-12)


@every_solver
def test_the_covariance_of_gpytorch_is_an_operator(solver):
    X, b = random(30, 2), random(30, 2, seed=1)
    kernel = MaternKernel(1.5).double().requires_grad_(False)
    solution = solver(kernel(X).add_diagonal(torch.tensor(0.5)), b)
    expected = solver(KernelMatrixOperator(X, 0.5, kernel=kernel), b)
    torch.testing.assert_close(solution.value, expected.value)


@every_solver
def test_operators_that_are_none(solver):
    b = torch.ones(3, 1).double()
    broken = torch.eye(3).double()
    broken[1, 1] = torch.nan
    for operator, error, message in (
        (torch.ones(3, 2).double(), ShapeError, "operator must be square"),
        (torch.eye(3, dtype=torch.long), TypeError, "must be of floating point"),
        (broken, InputDataError, "operator contains NaN"),
    ):
        with pytest.raises(error, match=message):
            solver(to_linear_operator(operator), b)


@pytest.mark.parametrize("tolerance", [1.0, 2.0, 0.0, -1.0])
@every_solver
def test_a_tolerance_is_a_share(solver, tolerance):
    with pytest.raises(ValueError, match="tolerance must be"):
        replace(solver, tolerance=tolerance)


def test_the_default_tolerance_follows_the_noise():
    X, kernel = random(5000, 1), MaternKernel(1.5).double()
    found = [
        choose_solver(KernelMatrixOperator(X, noise, kernel=kernel)).tolerance
        for noise in (1.0, 1e-2, 1e-4, 1e-12)
    ]
    expected = [1e-2, 0.1 * (1e-2 / 1.01) ** 0.5, 0.1 * (1e-4 / 1.0001) ** 0.5, 1e-4]
    assert found == pytest.approx(expected)


@every_solver
@pytest.mark.parametrize("n", [1, 2, 18])
def test_few_points_and_blocks_that_do_not_divide(solver, n):
    H, dense, b = problem(n)
    solution = solver(H, b)
    assert relative_residuals(dense, solution.value, b).max() <= solver.tolerance


@every_solver
def test_no_point_no_column_and_a_zero_column(solver):
    H, _, b = problem(20)
    assert solver(H, b[:, :0]).value.shape == (20, 0)
    b[:, 1] = 0.0
    solution = solver(H, b)
    assert solution.converged and solution.value[:, 1].eq(0).all()
    assert solver(H, torch.zeros_like(b)).converged


@every_solver
def test_repeated_points(solver):
    H, dense, b = problem(X=random(30, 2).repeat(2, 1))
    solution = solver(H, b)
    assert relative_residuals(dense, solution.value, b).max() <= solver.tolerance


@every_solver
def test_repeated_points_without_noise_never_give_nan(solver):
    H, dense, _ = problem(X=random(20, 2).repeat(2, 1), noise=0.0)
    b = dense @ random(40, 2, seed=3)  # a solution exists
    reference = solver.name == "Stochastic gradient descent"
    if solver != Cholesky():
        solver = replace(quick(solver, 30), tolerance=0.2 if reference else 1e-2)
    solution = solver(H, b)
    assert solution.converged
    assert relative_residuals(dense, solution.value, b).max() <= solver.tolerance
    # Without a solution: equal points, other targets.
    b[:20] += 1.0
    with pytest.warns(NotConvergedWarning):
        solution = solver(H, b)
    assert torch.isfinite(solution.value).all() and solution.residual_norm <= 1.0


@every_solver
def test_an_indefinite_operator_is_named(solver):
    _, dense, b = problem()
    negative = to_linear_operator(dense - 20 * torch.eye(60, dtype=dense.dtype))
    with pytest.raises(ValueError, match="must be symmetric and positive semi-def"):
        solver(negative, b)


@pytest.mark.parametrize(
    "solver",
    [
        solver
        for name, solver in SOLVERS.items()
        if name != "StochasticGradientDescent"  # on H squared, which is definite
    ],
    ids=[name for name in SOLVERS if name != "StochasticGradientDescent"],
)
def test_one_negative_eigenvalue_is_named(solver):
    _, dense, b = problem()
    values, vectors = torch.linalg.eigh(dense)
    values[0] = -1.0
    operator = to_linear_operator((vectors * values) @ vectors.mT)
    if solver != Cholesky() and not isinstance(solver, ConjugateGradients):
        solver = replace(solver, max_passes=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        with pytest.raises(ValueError, match="must be symmetric and positive semi-def"):
            solver(operator, b)


@iterative
def test_an_indefinite_operator_is_never_said_to_be_solved_if_it_is_not(solver):
    _, dense, b = problem()
    values, vectors = torch.linalg.eigh(dense)
    values[0] = -0.1
    indefinite = (vectors * values) @ vectors.mT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        try:
            solution = quick(solver, 50)(to_linear_operator(indefinite), b)
        except ValueError:
            return
    true = relative_residuals(indefinite, solution.value, b).max()
    assert solution.residual_norm == pytest.approx(true.item(), rel=1e-6)
    assert not solution.converged and true <= 1.0 + 1e-12


@every_solver
def test_float32(solver):
    X = random(40, 2).float()
    H = KernelMatrixOperator(X, 0.5, kernel=MaternKernel(1.5))
    b = random(40, 2, seed=1).float()
    solution = replace(solver, tolerance=1e-2)(H, b)
    assert solution.value.dtype == torch.float32 and solution.converged


@every_solver
def test_single_precision_tiles_are_corrected_by_exact_products(solver):
    H, dense, b = problem()
    low = KernelMatrixOperator(
        H.X, H.noise, kernel=H.kernel, compute_dtype=torch.float32
    )
    solution = solver(low, b)
    assert relative_residuals(dense, solution.value, b).max() <= solver.tolerance


@every_solver
def test_randomness_is_that_of_the_seed(solver):
    H, _, b = problem(30)
    state = torch.get_rng_state()
    first, again = solver(H, b), solver(H, b)
    assert torch.equal(first.value, again.value)
    assert torch.equal(torch.get_rng_state(), state)


@every_solver
def test_bad_input_is_refused(solver):
    H, _, b = problem(20)
    with pytest.raises(ShapeError, match=r"rhs must be .* try rhs\[:, None\]"):
        solver(H, b[:, 0])
    with pytest.raises(ShapeError, match="initial must have the shape of rhs"):
        solver(H, b, b[:10])
    with pytest.raises(InputDataError, match="rhs contains NaN"):
        solver(H, torch.full_like(b, torch.nan))
    with pytest.raises(ValueError, match="tolerance must be positive"):
        replace(solver, tolerance=0.0)
