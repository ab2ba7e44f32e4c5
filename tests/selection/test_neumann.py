"""The Neumann series: a geometric sum, published figures, named divergence."""

import pytest
import torch
from linear_operator import to_linear_operator
from linear_operator.operators import DenseLinearOperator

from gpbridge.checks import NotConvergedWarning
from gpbridge.selection import NeumannSeries, SeriesDivergedError, hypergradient
from gpbridge.solvers.factors import IndefiniteError
from gpbridge.types import Solver
from tests import oracles_selection as closed


def spread(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(values).double()
    normal = torch.randn(len(values), len(values), generator=generator).double()
    Q = torch.linalg.qr(normal).Q
    return Q @ torch.diag(values) @ Q.mT


H = spread([0.5, 1.0, 1.6, 2.0, 4.0])
b = torch.linspace(-1, 2, 5).double()[:, None]


@pytest.mark.parametrize("num_terms", [0, 1, 3, 10])
@pytest.mark.parametrize("step", [0.1, 0.25, 0.45])
def test_the_terms_are_a_geometric_sum(num_terms, step):
    series = NeumannSeries(num_terms, step, tolerance=None)
    found = series(to_linear_operator(H), b)
    exact = closed.neumann_inverse(H, num_terms, step) @ b
    torch.testing.assert_close(found.value, exact)
    left = (b - H @ exact).norm() / b.norm()
    assert found.residual_norm == pytest.approx(float(left), rel=1e-9)
    assert found.iterations == num_terms


def test_the_step_found_by_power_iteration_is_one_over_the_largest_eigenvalue():
    one = NeumannSeries(0, power_iterations=60, tolerance=None)
    found = one(to_linear_operator(H), b)
    torch.testing.assert_close(found.value, b / 4.0)
    many = NeumannSeries(300)(to_linear_operator(H), b)
    assert many.converged and many.residual_norm < 1e-10


def test_published_figures_of_ridge_regression():
    """Measured with a = 1 / lmax: .874, .970, .9974, and 1 - 3e-6 of the exact value.

    On a spectrum of 1, .853 and .64 of the largest eigenvalue, whose directions have
    .36, .49 and .15 of the gradient, the geometric sum gives these shares.
    """
    spectrum = torch.tensor([1.0, 0.853, 0.64]).double()
    share = torch.tensor([0.36, 0.49, 0.15]).double()
    decay = torch.tensor(0.1).double()
    X = torch.diag((3 * (spectrum - decay)).sqrt())  # X'X / 3 + decay = spectrum
    y = torch.ones(3).double()
    w = closed.ridge_weights(X, y, decay)
    slope = -share * spectrum / w  # of the held-out loss, so that each has its share

    def train_loss(params, hparams):
        penalty = 0.5 * hparams["decay"] * params["w"].square().sum()
        return 0.5 * (X @ params["w"] - y).square().mean() + penalty

    found = {
        K: hypergradient(
            train_loss,
            lambda params, hparams: slope @ params["w"],
            {"w": w},
            {"decay": decay},
            solver=NeumannSeries(K, power_iterations=80, tolerance=None),
        )
        for K in (0, 1, 3, 10)
    }
    reached = {K: float(f.grads["decay"]) for K, f in found.items()}  # of exactly one
    assert reached[0] == pytest.approx(0.874, abs=1e-3)
    assert reached[1] == pytest.approx(0.970, abs=1e-3)
    assert reached[3] == pytest.approx(0.9974, abs=3e-4)
    assert 1e-6 < 1 - reached[10] < 3e-6


@pytest.mark.parametrize("factor", [2.05, 2.2, 10.0])
def test_a_step_beyond_two_over_the_largest_eigenvalue_is_refused(factor):
    series = NeumannSeries(60, factor / 4.0, tolerance=None)
    with pytest.raises(SeriesDivergedError, match="series diverges: step_size"):
        series(to_linear_operator(H), b)


def test_a_step_just_below_converges():
    found = NeumannSeries(4000, 1.99 / 4.0)(to_linear_operator(H), b)
    assert found.converged and found.residual_norm < 1e-6


def test_growing_terms_are_seen_where_power_iteration_fell_short():
    matrix = torch.diag(torch.tensor([1.0] * 400 + [3.0])).double()
    rhs = torch.ones(401, 1).double()
    series = NeumannSeries(30, 0.8, power_iterations=1, tolerance=None)
    assert series._largest_eigenvalue(to_linear_operator(matrix), rhs) < 2.0
    with pytest.raises(SeriesDivergedError, match=r"at least (2.[5-9]|3)"):
        NeumannSeries(60, 0.8, power_iterations=1)(to_linear_operator(matrix), rhs)
    itself = NeumannSeries(60, power_iterations=1)
    assert itself(to_linear_operator(matrix), rhs).converged


class Counting(DenseLinearOperator):
    """Counts its products."""

    count = 0

    def _matmul(self, rhs):
        Counting.count += 1
        return super()._matmul(rhs)


def test_passes_are_products_those_of_sums_begun_anew_included():
    short = torch.diag(torch.tensor([1.0] * 400 + [3.0])).double()
    for matrix, rhs, options in (
        (H, b, {}),
        (H, b, {"step_size": 0.2}),
        (short, torch.ones(401, 1).double(), {"power_iterations": 1}),
    ):
        for start in (None, 0.1 * rhs):
            Counting.count = 0
            found = NeumannSeries(15, tolerance=None, **options)(
                Counting(matrix), rhs, start
            )
            assert found.passes == Counting.count


def test_negative_curvature_is_named():
    matrix = spread([-0.5, 1.0, 2.0])
    with pytest.raises(IndefiniteError, match="curvature"):
        NeumannSeries(60)(to_linear_operator(matrix), torch.ones(3, 1).double())


def test_a_first_guess_is_corrected():
    exact = torch.linalg.solve(H, b)
    near = NeumannSeries(3, tolerance=None)(to_linear_operator(H), b, exact + 1e-6)
    plain = NeumannSeries(3, tolerance=None)(to_linear_operator(H), b)
    assert near.residual_norm < 1e-4 * plain.residual_norm


def test_columns_are_solved_side_by_side():
    columns = torch.cat([b, b.flip(0)], 1)
    both = NeumannSeries(5, 0.2, tolerance=None)(to_linear_operator(H), columns)
    for i in range(2):
        one = NeumannSeries(5, 0.2, tolerance=None)(
            to_linear_operator(H), columns[:, i : i + 1]
        )
        torch.testing.assert_close(both.value[:, i : i + 1], one.value)


def test_few_terms_are_warned_of_unless_they_are_wanted():
    def losses(sign):
        return lambda p, h: 0.5 * p["w"] @ H @ p["w"] - sign * h["s"] * p["w"].sum()

    w = {"w": torch.linalg.solve(H, torch.ones(5).double())}
    s = {"s": torch.ones(()).double()}
    with pytest.warns(NotConvergedWarning, match="NeumannSeries stopped after 1"):
        hypergradient(losses(1), losses(2), w, s, solver=NeumannSeries(1))
    hypergradient(losses(1), losses(2), w, s, solver=NeumannSeries(1, tolerance=None))


def test_it_is_a_solver():
    assert isinstance(NeumannSeries(), Solver)
    assert NeumannSeries() == NeumannSeries() and hash(NeumannSeries())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_terms": -1}, "num_terms must be a whole number"),
        ({"num_terms": 1.5}, "num_terms must be a whole number"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"power_iterations": 0}, "power_iterations must be a whole number"),
        ({"tolerance": 2.0}, "tolerance must be below 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NeumannSeries(**options)


def test_a_matrix_of_zeros_has_no_step():
    zero = to_linear_operator(torch.zeros(3, 3).double())
    with pytest.raises(ValueError, match="no step size can be found"):
        NeumannSeries()(zero, torch.ones(3, 1).double())
