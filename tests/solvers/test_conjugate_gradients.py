import warnings

import pytest
import torch
from linear_operator import to_linear_operator
from linear_operator.operators import DiagLinearOperator

from gpbridge.checks import NotConvergedWarning
from gpbridge.solvers import ConjugateGradients, nystrom_preconditioner
from gpbridge.types import Solver


def spd(spectrum, seed=0):
    """A dense matrix with a given spectrum."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    basis = torch.randn(n, n, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(basis).Q
    return (Q * spectrum) @ Q.T


def right_sides(n, k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


DECAYING = 1 + 1e4 * torch.arange(1.0, 81.0, dtype=torch.float64) ** -3


@pytest.mark.parametrize("rank", [0, 20, 500])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-12])
def test_every_column_reaches_the_tolerance(tolerance, rank):
    A, b = spd(DECAYING), right_sides(80, 7)
    b[:, 0] *= 1e6  # columns of different size
    b[:, 1] = A[:, 0]  # and of different difficulty
    solver = ConjugateGradients(tolerance=tolerance, preconditioner_rank=rank)
    solution = solver(to_linear_operator(A), b)
    residual = (b - A @ solution.value).norm(dim=0) / b.norm(dim=0)
    assert residual.max() <= tolerance and solution.converged
    torch.testing.assert_close(solution.residual_norm, residual.max().item())
    exact = torch.linalg.solve(A, b)
    error = (solution.value - exact).norm(dim=0) / exact.norm(dim=0)
    assert error.max() <= 1e4 * tolerance  # the condition number


def test_a_batch_of_operators_is_solved_as_each_alone():
    A = torch.stack([spd(DECAYING, seed) for seed in (0, 1)])
    b = torch.stack([right_sides(80, 3, seed) for seed in (2, 3)])
    solver = ConjugateGradients(tolerance=1e-11, preconditioner_rank=10)
    value = solver(to_linear_operator(A), b).value
    torch.testing.assert_close(value, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-9)


def test_the_preconditioner_removes_the_large_eigenvalues():
    spectrum = torch.ones(200, dtype=torch.float64)
    spectrum[:15] += 10 ** torch.linspace(1, 8, 15, dtype=torch.float64)
    operator, b = to_linear_operator(spd(spectrum)), right_sides(200, 2)
    plain = ConjugateGradients(tolerance=1e-8, preconditioner_rank=0)(operator, b)
    helped = ConjugateGradients(tolerance=1e-8, preconditioner_rank=20)
    solution = helped(operator, b)
    assert solution.converged and solution.iterations < plain.iterations
    inverse = nystrom_preconditioner(operator, 20, shift=1.0)
    whitened = inverse(operator.to_dense())
    values = torch.linalg.eigvals(whitened).real
    assert values.max() / values.min() < 1.01


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_the_preconditioner_is_symmetric_and_positive(rank):
    for spectrum in (DECAYING, torch.ones(80, dtype=torch.float64)):
        operator = to_linear_operator(spd(spectrum))
        inverse = nystrom_preconditioner(operator, rank)(torch.eye(80).double())
        torch.testing.assert_close(inverse, inverse.T, rtol=1e-9, atol=1e-12)
        assert torch.linalg.eigvalsh(inverse).min() > 0


def test_a_solve_that_stops_early_warns_and_says_so():
    operator = to_linear_operator(spd(torch.logspace(0, 10, 60).double()))
    solver = ConjugateGradients(max_iterations=3, preconditioner_rank=0)
    with pytest.warns(NotConvergedWarning, match="stopped after .* Raise max_iter"):
        solution = solver(operator, right_sides(60, 2))
    assert not solution.converged and solution.residual_norm > solver.tolerance


def test_round_off_ends_the_iteration_and_keeps_the_best():
    operator = to_linear_operator(spd(torch.logspace(0, 12, 60).double()))
    solver = ConjugateGradients(
        tolerance=1e-17, max_iterations=2000, preconditioner_rank=60
    )
    with pytest.warns(NotConvergedWarning):
        solution = solver(operator, right_sides(60, 2))
    assert solution.residual_norm < 1e-3 and solution.iterations < 2000


def test_a_good_first_guess_costs_nothing():
    A, b = spd(DECAYING), right_sides(80, 3)
    solver = ConjugateGradients(tolerance=1e-9)
    exact = torch.linalg.solve(A, b)
    solution = solver(to_linear_operator(A), b, initial=exact)
    assert solution.iterations == 0 and torch.equal(solution.value, exact)
    near = solver(to_linear_operator(A), b, initial=exact + 1e-6)
    assert near.converged


def test_zero_and_no_right_hand_sides():
    operator = to_linear_operator(spd(DECAYING))
    zero = torch.zeros(80, 2, dtype=torch.float64)
    solution = ConjugateGradients()(operator, zero)
    assert solution.converged and torch.equal(solution.value, zero)
    assert ConjugateGradients()(operator, zero[:, :0]).value.shape == (80, 0)


def test_one_equation():
    solution = ConjugateGradients()(
        DiagLinearOperator(torch.tensor([4.0])), torch.tensor([[2.0]])
    )
    torch.testing.assert_close(solution.value, torch.tensor([[0.5]]))


def test_float32_operators_give_float32_solutions():
    A, b = spd(DECAYING).float(), right_sides(80, 3).float()
    solution = ConjugateGradients(tolerance=1e-3)(to_linear_operator(A), b)
    assert solution.value.dtype == torch.float32 and solution.converged


def test_a_solver_is_one_of_the_protocol_and_leaves_the_global_random_state():
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConjugateGradients()(to_linear_operator(spd(DECAYING)), right_sides(80, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(ConjugateGradients(), Solver)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="tolerance must be positive"):
        ConjugateGradients(tolerance=0.0)
    with pytest.raises(ValueError, match="max_iterations must be positive"):
        ConjugateGradients(max_iterations=0)
