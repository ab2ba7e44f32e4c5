"""Descent over minibatches of points, against dense factors of the same precision."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from gpbridge import data_features, solvers
from gpbridge.checks import NotConvergedWarning
from gpbridge.data_features import DataFeatures, OutputOperator, PrecisionOperator
from gpbridge.functional import FunctionalNet
from gpbridge.linearized import Sampled
from gpbridge.solvers import ConjugateGradients, MinibatchDescent
from gpbridge.types import Solver
from tests import oracles
from tests.linearized.problems import build

FINE = MinibatchDescent(tolerance=1e-5, max_passes=3000, batch_size=4)


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(m):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, m)).double()


def problem(n=30, m=2, net=None, X=None, points_per_chunk=None, std=0.5):
    """The operator, the same by one backward pass per output, and two columns."""
    net = network(m) if net is None else net.eval()
    X = random(n, 3) if X is None else X
    functional = FunctionalNet(net)
    functional.probe(X)
    root = 0.5 * random(len(X), m, m, seed=2)
    std = std * random(functional.num_params, seed=3).abs()
    data = DataFeatures(functional, X, points_per_chunk=points_per_chunk)
    rows = (root.mT @ oracles.jacobian(net, X)).flatten(0, 1) * std  # R' J S^(1/2)
    dense = torch.eye(len(std), dtype=torch.float64) + rows.mT @ rows
    rhs = random(len(std), 2, seed=4) + rows.mT @ random(len(rows), 2, seed=5)
    return PrecisionOperator(root, std, data), dense, rhs


def error(value, dense, rhs):
    exact = torch.linalg.solve(dense, rhs)
    return ((value - exact).norm(dim=0) / exact.norm(dim=0)).max()


def quiet(solver, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        return solver(*args)


def test_it_is_a_solver_that_reads_as_its_options():
    assert isinstance(FINE, Solver)
    assert eval(repr(FINE), vars(solvers)) == FINE


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("n, chunk", [(30, None), (31, 7), (1, None), (2, 1)])
def test_the_solution_is_that_of_the_dense_factor(n, m, chunk):
    operator, dense, rhs = problem(n, m, points_per_chunk=chunk)
    solution = FINE(operator, rhs)
    assert solution.converged
    assert error(solution.value, dense, rhs) < 1e-3
    true = (rhs - dense @ solution.value).norm(dim=0) / rhs.norm(dim=0)
    torch.testing.assert_close(solution.residual_norms, true, rtol=1e-6, atol=1e-12)


def test_features_that_are_streamed_or_formed_again(monkeypatch):
    operator, dense, rhs = problem(std=0.2)
    net, X = operator.data.net, operator.data.X
    again = DataFeatures(net, X, 0.0, points_per_chunk=10)
    monkeypatch.setattr(data_features, "_CHUNK_BYTES", 1)
    for data in (again, DataFeatures(net, X)):
        other = PrecisionOperator(operator.root, operator.std, data)
        assert error(FINE(other, rhs).value, dense, rhs) < 1e-3


def test_repeated_points():
    operator, dense, rhs = problem(X=random(10, 3).repeat(3, 1))
    assert error(FINE(operator, rhs).value, dense, rhs) < 1e-3


def test_batch_norm_in_eval_mode():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    net = net.double()
    net(random(50, 3, seed=9))  # statistics
    operator, dense, rhs = problem(net=net)
    assert error(FINE(operator, rhs).value, dense, rhs) < 1e-3


@pytest.mark.parametrize("name", ["gaussian", "softmax", "multitask"])
def test_draws_are_those_of_other_solvers_and_of_function_space(name):
    tight = ConjugateGradients(1e-11, preconditioner_rank=0)
    draws = []
    descent = replace(FINE, tolerance=1e-7)
    for solver, space in ((tight, "weight"), (tight, "function"), (descent, "weight")):
        model = build(name, inference=Sampled(3, solver, space=space))
        draws.append(model.problem.draws(torch.tensor([0.003])).omega)
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(draws[2], draws[0], rtol=1e-4, atol=1e-5)


def test_a_warm_start_saves_passes_and_a_done_one_takes_none():
    operator, dense, rhs = problem()
    cold = FINE(operator, rhs)
    near = torch.linalg.solve(dense, rhs) + 1e-4 * random(*rhs.shape, seed=7)
    warm = FINE(operator, rhs, near)
    assert warm.converged and warm.passes < 0.8 * cold.passes
    done = FINE(operator, rhs, cold.value)
    assert done.iterations == 0 and torch.equal(done.value, cold.value)


def test_an_interrupted_run_goes_on_from_what_the_callback_saw():
    operator, dense, rhs = problem()
    seen = []
    whole = replace(FINE, callback=seen.append)(operator, rhs)
    assert all(0 < p.passes <= whole.passes for p in seen)
    resumed = FINE(operator, rhs, seen[len(seen) // 2].value)
    assert resumed.converged and resumed.passes < whole.passes
    assert error(resumed.value, dense, rhs) < 1e-3


def test_a_step_that_is_a_hundred_times_too_long_is_halved():
    operator, dense, rhs = problem()
    found = {}
    FINE.steps(system := solvers.system.System(operator, rhs, torch.Generator()))
    automatic = system.cache["step"]
    for reduction in (True, False):
        solver = replace(
            FINE, step_size=100 * automatic, variance_reduction=reduction, tolerance=0.1
        )
        found[reduction] = quiet(solver, operator, rhs)
        assert torch.isfinite(found[reduction].value).all()
    assert found[True].converged


def test_a_hopeless_step_stops_with_the_remedy_and_without_nan():
    operator, _, rhs = problem()
    solver = replace(FINE, step_size=1e30, max_passes=5)
    with pytest.warns(NotConvergedWarning, match="Leave step_size to the automatic"):
        solution = solver(operator, rhs)
    assert torch.isfinite(solution.value).all() and not solution.converged
    assert solution.residual_norm <= 1.0


def test_only_variance_reduction_reaches_a_small_residual():
    """The noise of plain descent stays at the solution; that of SAGA vanishes."""
    operator, _, rhs = problem()
    options = {"tolerance": 1e-4, "max_passes": 150}
    reduced = quiet(replace(FINE, **options), operator, rhs)
    plain = quiet(replace(FINE, variance_reduction=False, **options), operator, rhs)
    assert reduced.converged and not plain.converged


def test_plain_descent_gives_a_rough_answer():
    operator, dense, rhs = problem(std=0.2)
    solver = replace(FINE, variance_reduction=False, tolerance=0.1)
    assert solver(operator, rhs).converged


def test_points_sorted_by_class_are_mixed():
    """Batches in the order of the data would hold one class each."""
    X = torch.arange(1000.0, dtype=torch.float64)[:, None]
    net = FunctionalNet(nn.Linear(1, 1).double())
    net.probe(X)
    data = DataFeatures(net, X, points_per_chunk=100)
    batches = data.batches(30)
    rows = [data.rows_of(batch) for batch in batches]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(1000))
    assert max(map(len, rows)) <= 30 and min(map(len, rows)) >= 20
    means = torch.stack([r.double().mean() for r in rows])
    assert (means - 500).abs().max() < 5 * 1000 / (12 * 25) ** 0.5
    product = data.matmul(random(2, 1))  # its rows are in the order of the data
    torch.testing.assert_close(product[:, 0], X * random(2, 1)[0] + random(2, 1)[1])


def test_randomness_is_that_of_the_seed():
    operator, _, rhs = problem()
    state = torch.get_rng_state()
    rough = replace(FINE, tolerance=0.1)
    first, again = rough(operator, rhs), rough(operator, rhs)
    other = replace(rough, seed=1)(operator, rhs)
    assert torch.equal(first.value, again.value)
    assert not torch.equal(first.value, other.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_single_precision_features():
    operator, dense, rhs = problem()
    net = copy.deepcopy(operator.data.net).to(torch.float32)
    data = DataFeatures(net, operator.data.X.float())
    single = PrecisionOperator(operator.root, operator.std, data)
    solution = replace(FINE, tolerance=1e-4)(single, rhs)
    assert solution.converged and error(solution.value, dense, rhs) < 1e-3


def test_no_column_and_a_zero_column():
    operator, _, rhs = problem()
    assert FINE(operator, rhs[:, :0]).value.shape == (len(rhs), 0)
    rhs[:, 1] = 0.0
    solution = FINE(operator, rhs)
    assert solution.converged and solution.value[:, 1].eq(0).all()


def test_operators_without_batches_are_refused_with_what_has_them():
    operator, dense, rhs = problem()
    outputs = OutputOperator(operator.root, operator.std, operator.data)
    for bad in (dense, outputs):
        with pytest.raises(TypeError, match="PrecisionOperator, but got .*space='wei"):
            FINE(bad, rhs)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="momentum must be at least 0"):
        MinibatchDescent(momentum=1.0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        MinibatchDescent(batch_size=0)
