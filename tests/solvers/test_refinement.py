import io
import sys

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator

from gpbridge.checks import NotConvergedWarning
from gpbridge.kernel_operator import KernelMatrixOperator
from gpbridge.solvers import (
    AlternatingProjections,
    Cholesky,
    ConjugateGradients,
    SketchAndProject,
    choose_solver,
    factors,
    refinement,
)
from gpbridge.solvers.factors import factorise


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Failing(DenseLinearOperator):
    """One product is NaN."""

    calls = 0

    def _matmul(self, rhs):
        Failing.calls += 1
        return super()._matmul(rhs) * (torch.nan if Failing.calls == 5 else 1.0)


def test_a_product_that_is_nan_leaves_the_last_finite_iterate():
    Failing.calls = 0
    H = Failing(torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64)))
    with pytest.warns(NotConvergedWarning, match="diverged after"):
        solution = ConjugateGradients(preconditioner_rank=0)(H, random(40, 2))
    assert torch.isfinite(solution.value).all()
    assert not solution.converged and solution.residual_norm < 1.0


def test_columns_that_are_done_leave():
    widths = []

    class Counting(DenseLinearOperator):
        def _matmul(self, rhs):
            widths.append(rhs.shape[-1])
            return super()._matmul(rhs)

    H = Counting(torch.diag(torch.arange(1.0, 41.0, dtype=torch.float64)))
    b = random(40, 4)
    b[:, :3] = torch.eye(40, dtype=torch.float64)[:, :3]  # one step each
    solution = ConjugateGradients(preconditioner_rank=0, tolerance=1e-8)(H, b)
    assert solution.converged
    assert widths[0] == 4 and 1 in widths and widths[-1] == 4  # the last one is exact


def test_a_progress_bar_is_silent_without_a_terminal(monkeypatch):
    H, b = DiagLinearOperator(torch.arange(1.0, 9.0)), torch.ones(8, 1)
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    ConjugateGradients(progress=True)(H, b)
    assert written.getvalue() == ""
    written.isatty = lambda: True
    ConjugateGradients(progress=False)(H, b)
    assert written.getvalue() == ""
    ConjugateGradients(progress=True)(H, b)
    assert "Conjugate gradients" in written.getvalue()


def test_the_choice_of_a_solver():
    small, large = torch.zeros(10, 1), torch.zeros(5000, 1)
    kernel = RBFKernel()
    assert choose_solver(KernelMatrixOperator(small, 0.1, kernel=kernel)) == Cholesky(
        tolerance=1e-2
    )
    operator = KernelMatrixOperator(large, 0.1, kernel=kernel)
    assert choose_solver(operator, 0.1) == SketchAndProject(tolerance=0.1)
    products = DiagLinearOperator(torch.ones(5000))
    assert choose_solver(products) == ConjugateGradients(tolerance=1e-2)


def test_a_singular_block_has_a_pseudo_inverse():
    A = random(6, 3)
    block = A @ A.T
    expected = torch.linalg.pinv(block, hermitian=True, rtol=1e-10)
    got = factorise(block)(torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="eigenvalue of -"):
        factorise(block - 0.1 * torch.eye(6))


def test_a_factor_beyond_the_budget_is_refused():
    H = DiagLinearOperator(torch.ones(2000))
    with pytest.raises(MemoryError, match="2000 equations needs about 0.06 GiB"):
        Cholesky(memory_budget=1e6)(H, torch.ones(2000, 1))


def ill_conditioned(compute_dtype):
    kernel = ScaleKernel(RBFKernel()).double().requires_grad_(False)
    X = torch.linspace(0, 6, 150, dtype=torch.float64)[:, None]
    return KernelMatrixOperator(X, 1e-5, kernel=kernel, compute_dtype=compute_dtype)


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradients(1e-7, preconditioner_rank=0),
        SketchAndProject(1e-7, block_size=50, max_passes=600),
    ],
    ids=lambda solver: solver.name,
)
def test_tiles_in_single_precision_give_way_where_they_cannot_go_on(
    solver, monkeypatch
):
    H, low = ill_conditioned(None), ill_conditioned(torch.float32)
    b = random(150, 2)
    solution = solver(low, b)
    assert solution.converged
    left = (b - H.to_dense() @ solution.value).norm(dim=0)
    assert (left < 1e-6 * b.norm(dim=0)).all()
    # Without a sharper operator the same run stops short, or names the operator.
    monkeypatch.setattr(refinement, "full_precision", lambda operator: operator)
    try:
        with pytest.warns(NotConvergedWarning):
            assert not solver(low, b).converged
    except factors.IndefiniteError:
        pass


def test_a_factor_is_in_full_precision():
    low = ill_conditioned(torch.float32)
    b = random(150, 1)
    assert Cholesky(1e-6)(low, b).converged


def test_the_limit_that_ended_a_solve_is_named():
    X = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None]
    H = (-50 * (X - X.mT).square()).exp() + 1e-4 * torch.eye(60, dtype=torch.float64)
    rhs = random(60, 1)
    solver = AlternatingProjections(tolerance=1e-8, block_size=10, max_passes=3)
    with pytest.warns(
        NotConvergedWarning, match="max_passes=3 ended it. Raise max_pas"
    ):
        solver(DenseLinearOperator(H), rhs)
