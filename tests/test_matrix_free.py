import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from gpbridge.checks import NotConvergedWarning
from gpbridge.features import dense_features
from gpbridge.functional import FunctionalNet
from gpbridge.matrix_free import MatrixFreeStrategy
from gpbridge.prediction import FunctionSpaceStrategy
from gpbridge.solvers import ConjugateGradients
from tests import oracles
from tests.cases import NETS
from tests.conftest import ROOT


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make(m=1, n=150, hidden=12, noise=0.01, root=None, **options):
    """A matrix-free strategy, the dense one, and the features of any inputs."""
    network = nn.Sequential(
        nn.Linear(3, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, m),
    ).double()
    net = FunctionalNet(network)
    X = random(n, 3)
    net.probe(X)
    std = {name: 0.5 + 0.2 * i + random() * 0 for i, name in enumerate(net.params)}
    if root is None:
        root = torch.eye(m, dtype=torch.float64).expand(n, m, m) / noise**0.5
    if root == "softmax":
        root = oracles.softmax_root(3 * net(X).detach())
    features = dense_features(net, X, std)
    dense = FunctionSpaceStrategy(features, features.gram(), root)
    solver = ConjugateGradients(**options)
    free = MatrixFreeStrategy(net, X, std, root, solver)
    return free, dense, lambda Z: dense_features(net, Z, std)


PROBLEMS = {
    "gaussian": {"noise": 0.01},
    "gaussian, two outputs": {"m": 2, "noise": 0.1},
    "small noise": {"noise": 1e-6, "n": 80, "preconditioner_rank": 80},
    "softmax": {"m": 4, "root": "softmax", "n": 90},
    "fewer weights than data": {"hidden": 3, "n": 300},
    "rough tolerance": {"tolerance": 1e-2, "preconditioner_rank": 0},
    "no preconditioner": {"noise": 0.1, "preconditioner_rank": 0},
}
every_problem = pytest.mark.parametrize("options", PROBLEMS.values(), ids=PROBLEMS)


@every_problem
def test_variances_are_at_most_a_tolerance_too_large_and_never_too_small(options):
    free, dense, features = make(**options)
    test = features(random(20, 3, seed=1))
    got = free.project(test).blocks.diagonal(dim1=-2, dim2=-1)
    exact = dense.project(test).blocks.diagonal(dim1=-2, dim2=-1)
    error = (got - exact) / exact
    assert error.max() <= 2 * free.solver.tolerance + 1e-7
    assert error.min() >= -1e-7  # round-off of the dense answer


@every_problem
def test_means_are_wrong_by_less_than_a_fraction_of_the_posterior_deviation(options):
    free, dense, features = make(**options)
    whitened = random(*dense.features.value.shape, seed=2) * 10
    test = features(random(30, 3, seed=1))
    difference = free.mean_weights(whitened) - dense.mean_weights(whitened)
    variance = dense.project(test).blocks.diagonal(dim1=-2, dim2=-1)
    error = test.matmul(difference).square() / variance
    assert error.max() <= free.solver.tolerance


@pytest.mark.parametrize("options", [{"m": 2}, {"m": 3, "root": "softmax", "n": 60}])
def test_a_tight_tolerance_reproduces_the_dense_strategy(options):
    free, dense, features = make(tolerance=1e-10, **options)
    near, far = features(random(4, 3, seed=1)), features(random(2, 5, 3, seed=2))
    close = {"rtol": 1e-7, "atol": 1e-9}
    for left, right in [(near, None), (near, far), (far, near), (far, None)]:
        got = free.covariance(
            free.project(left), None if right is None else free.project(right)
        )
        exact = dense.covariance(
            dense.project(left), None if right is None else dense.project(right)
        )
        torch.testing.assert_close(got, exact, **close)
    whitened = random(*dense.features.value.shape, seed=3)
    torch.testing.assert_close(
        free.mean_weights(whitened), dense.mean_weights(whitened), **close
    )
    cross = free.cross_weights(free.project(far))
    exact = dense.cross_weights(dense.project(far))
    torch.testing.assert_close(cross, exact, rtol=1e-5, atol=1e-7)


def test_covariances_are_symmetric_and_positive_however_rough_the_solve():
    free, _, features = make(noise=1e-4, tolerance=0.5, preconditioner_rank=0)
    joint = free.covariance(free.project(features(random(10, 3, seed=1))))
    torch.testing.assert_close(joint, joint.T, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(joint).min() > -1e-12


def test_draws_have_the_posterior_covariance():
    free, dense, features = make(hidden=4, n=40)
    generator = torch.Generator().manual_seed(0)
    draws = free.draw_weights(4000, generator)
    test = features(random(3, 3, seed=1))
    values = draws @ test.rows().T  # s x t
    exact = dense.covariance(dense.project(test))
    scale = exact.diagonal().sqrt()
    empirical = values.T @ values / len(values)
    # The standard error of an empirical covariance is at most sqrt(2 / s) deviations.
    error = (empirical - exact).abs() / scale / scale[:, None]
    assert error.max() < 4 * (2 / len(values)) ** 0.5
    mean = values.mean(0).abs() / scale
    assert mean.max() < 4 / len(values) ** 0.5


def test_draws_are_those_of_their_generator_and_leave_the_global_one():
    free, _, _ = make(n=20, hidden=3)
    state = torch.get_rng_state()
    first = free.draw_weights(3, torch.Generator().manual_seed(1))
    again = free.draw_weights(3, torch.Generator().manual_seed(1))
    other = free.draw_weights(3, torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(free.draw_weights(3), free.draw_weights(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_one_column_at_a_time_gives_the_same(monkeypatch):
    free, _, features = make(n=40, hidden=4, m=2)
    test = features(random(3, 3, seed=1))
    joint = free.covariance(free.project(test))
    draws = free.draw_weights(3, torch.Generator().manual_seed(1))
    monkeypatch.setattr("gpbridge.matrix_free._COLUMN_BYTES", 1)
    monkeypatch.setattr("gpbridge.operators.JACOBIAN_BYTES", 20_000)
    again = free.covariance(free.project(test))
    torch.testing.assert_close(again, joint, rtol=1e-5, atol=1e-9)
    other = free.draw_weights(3, torch.Generator().manual_seed(1))
    torch.testing.assert_close(other, draws, rtol=1e-3, atol=1e-4)


def test_input_gradients_of_the_variance_equal_the_dense_ones():
    free, dense, features = make(tolerance=1e-8, m=2, n=60)
    grads = []
    for strategy in (free, dense):
        Z = random(3, 3, seed=1).requires_grad_()
        strategy.project(features(Z)).blocks.square().sum().backward()
        grads.append(Z.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


def test_weights_that_are_not_named_or_named_in_another_order():
    case = NETS["nested"]
    net = FunctionalNet(case.network(2))
    X = case.inputs(12)
    net.probe(X)
    names = list(net.params)
    std = {name: torch.tensor(0.8).double() for name in (names[2], names[0])}
    root = random(12, 2, 2)
    free = MatrixFreeStrategy(net, X, std, root, ConjugateGradients(tolerance=1e-10))
    features = dense_features(net, X, std)
    dense = FunctionSpaceStrategy(features, features.gram(), root)
    test = dense_features(net, case.inputs(5, seed=1), std)
    torch.testing.assert_close(
        free.project(test).blocks, dense.project(test).blocks, rtol=1e-7, atol=1e-9
    )
    whitened = random(12, 2, seed=1)
    got, exact = free.mean_weights(whitened), dense.mean_weights(whitened)
    torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-9)
    assert free.draw_weights(2).shape == (2, len(exact))


def test_a_float32_network_is_solved_in_float64():
    case = NETS["tanh_mlp"]
    net = FunctionalNet(case.network(1).float())
    X = case.inputs(30).float()
    net.probe(X)
    std = {name: torch.tensor(1.0) for name in net.params}
    free = MatrixFreeStrategy(net, X, std, 10 * torch.ones(30, 1, 1))
    assert free.operator.dtype == torch.float64
    assert net.dtype == torch.float32
    blocks = free.project(dense_features(net, X[:3], std)).blocks
    assert blocks.dtype == torch.float64 and (blocks > 0).all()


def test_data_that_say_nothing_leave_the_prior():
    free, _, features = make(root=torch.zeros(20, 1, 1).double(), n=20)
    test = features(random(5, 3, seed=1))
    torch.testing.assert_close(free.project(test).blocks, test.blocks())


def test_too_few_iterations_are_announced():
    free, _, features = make(noise=1e-8, max_iterations=3, preconditioner_rank=0)
    with pytest.warns(NotConvergedWarning, match="Conjugate gradients stopped"):
        free.project(features(random(2, 3, seed=1)))


MEMORY = """
    import resource, sys
    import torch
    from torch import nn
    from gpbridge.features import dense_features
    from gpbridge.functional import FunctionalNet
    from gpbridge.matrix_free import MatrixFreeStrategy
    from gpbridge.solvers import ConjugateGradients

    torch.set_num_threads(1)
    n = 5_000
    net = FunctionalNet(nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1)))
    X = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    net.probe(X)
    std = {name: torch.tensor(0.1) for name in net.params}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    solver = ConjugateGradients(tolerance=0.1, preconditioner_rank=10)
    free = MatrixFreeStrategy(net, X, std, torch.ones(n, 1, 1), solver)
    free.mean_weights(torch.ones(n, 1))
    free.project(dense_features(net, X[:1], std))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((after - before) / 1024)
"""


@pytest.mark.slow
def test_the_jacobian_and_the_kernel_matrix_are_never_formed():
    # Jacobian 72 MB in float64 and kernel matrix 200 MB; a chunk's budget is lowered.
    code = textwrap.dedent(MEMORY).replace(
        "torch.set_num_threads(1)",
        "import gpbridge.operators\n"
        "gpbridge.operators.JACOBIAN_BYTES = 2**22\n"
        "torch.set_num_threads(1)",
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr
    assert float(child.stdout) < 50  # MB
