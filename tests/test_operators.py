import copy
import functools
import pickle
import unittest

import pytest
import torch
from linear_operator import settings
from linear_operator.test.linear_operator_test_case import (
    LinearOperatorTestCase,
    RectangularLinearOperatorTestCase,
)
from torch import nn
from torch.func import functional_call

from gpbridge.functional import FunctionalNet
from gpbridge.operators import GGNOperator, JacobianOperator, WhitenedKernelOperator
from tests import oracles
from tests.cases import NETS, every_looped_net, every_net

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@functools.cache  # a probe takes longer than most tests of the suites
def small_net(*layers):
    with torch.random.fork_rng():
        torch.manual_seed(len(layers))
        net = FunctionalNet(nn.Sequential(*(layer() for layer in layers)))
        net.probe(torch.randn(3, 2))
    return net


HIDDEN = functools.partial(nn.Linear, 2, 2)


@torch.enable_grad()
def dense_features(operator):
    """The rows of the features by one backward pass each, differentiable."""
    net, X = operator.net, operator.X
    rows = X.reshape(-1, X.shape[-1])
    theta = operator.theta
    if not theta.requires_grad:
        theta = theta.detach().requires_grad_()
    outputs = functional_call(
        net.network, net.unflatten(theta), (rows,), strict=False
    ).reshape(-1)
    grads = [
        torch.autograd.grad(f, theta, create_graph=True, retain_graph=True)[0]
        for f in outputs
    ]
    J = torch.stack(grads).reshape(*X.shape[:-2], -1, len(theta))
    return J * operator.std


def dense_root(operator):
    """The block-diagonal R."""
    blocks = operator.root.reshape(-1, *operator.root.shape[-3:])
    matrices = torch.stack([torch.block_diag(*block) for block in blocks])
    return matrices.reshape(*operator.root.shape[:-3], *matrices.shape[1:])


# --- the contract suites of linear_operator


class TestJacobianOperator(RectangularLinearOperatorTestCase, unittest.TestCase):
    batch = ()
    transposed = False

    def create_linear_op(self):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        net = small_net(HIDDEN, nn.Tanh, HIDDEN)
        X = torch.randn(*self.batch, 4, 2, generator=generator)
        std = torch.rand(net.num_params, generator=generator) + 0.5
        return JacobianOperator(X, std=std, net=net, transposed=self.transposed)

    def evaluate_linear_op(self, linear_op):
        dense = dense_features(linear_op)
        return dense.mT if self.transposed else dense


class TestJacobianOperatorMultiBatch(TestJacobianOperator):
    batch = (2, 3)


class TestTransposedJacobianOperator(TestJacobianOperator):
    batch = (3,)
    transposed = True


class TestWhitenedKernelOperator(LinearOperatorTestCase, unittest.TestCase):
    seed = 0
    batch = ()

    def setUp(self):
        super().setUp()
        # Importing botorch switches CG and Lanczos off, which the suite looks for.
        self.enterContext(
            settings.fast_computations(
                covar_root_decomposition=True, log_prob=True, solves=True
            )
        )

    def create_linear_op(self):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        net = small_net(HIDDEN, nn.Tanh, HIDDEN)
        X = torch.randn(*self.batch, 3, 2, generator=generator)
        root = torch.randn(*self.batch, 3, 2, 2, generator=generator)
        std = torch.rand(net.num_params, generator=generator) + 0.5
        return WhitenedKernelOperator(X, root, std=std, net=net)

    def evaluate_linear_op(self, linear_op):
        half = dense_root(linear_op).mT @ dense_features(linear_op.features)
        return half @ half.mT + torch.eye(half.shape[-2])


class TestWhitenedKernelOperatorBatch(TestWhitenedKernelOperator):
    batch = (2,)


class TestGGNOperator(TestWhitenedKernelOperator):
    # Positive definite, as the suite wants it: more rows than weights.
    def create_linear_op(self):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        net = small_net(HIDDEN, nn.Tanh)
        X = torch.randn(*self.batch, 9, 2, generator=generator)
        root = torch.randn(*self.batch, 9, 2, 2, generator=generator)
        return GGNOperator(X, root, net=net)

    def evaluate_linear_op(self, linear_op):
        half = dense_root(linear_op).mT @ dense_features(linear_op.features)
        return half.mT @ half


# --- products


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def problem(case, m, n=4, k=3):
    """A probed net, inputs, and the dense features by the oracle."""
    network = case.network(m)
    X = case.inputs(n)
    net = FunctionalNet(network, input_shape=case.input_shape)
    net.probe(X)
    std = random(net.num_params).abs() + 0.3
    shaped = X.reshape(-1, *(case.input_shape or (case.width,)))
    Phi = oracles.jacobian(network, shaped).flatten(0, 1) * std
    return net, X, std, Phi


def check_products(net, X, std, Phi):
    J = JacobianOperator(X, std=std, net=net)
    assert J.shape == Phi.shape
    V, U = random(Phi.shape[1], 3), random(Phi.shape[0], 2)
    torch.testing.assert_close(J @ V, Phi @ V, **EXACT)
    torch.testing.assert_close(J.mT @ U, Phi.T @ U, **EXACT)
    torch.testing.assert_close(J @ V[:, 0], Phi @ V[:, 0], **EXACT)
    dense = J.rows(0, len(X)).flatten(0, 1)
    torch.testing.assert_close(dense, Phi, **EXACT)


@every_net
def test_products_equal_those_with_one_backward_pass_per_output(case, m):
    check_products(*problem(case, m))


@every_looped_net
@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
def test_products_of_a_network_that_cannot_be_traced_go_through_dense_rows(case, m):
    net, X, std, Phi = problem(case, m)
    assert not net.vectorized
    check_products(net, X, std, Phi)
    J = JacobianOperator(X[:, None], std=std, net=net)  # a batch of single points
    V = random(*J.shape[:-2], Phi.shape[1], 2)
    expected = Phi.unflatten(0, (len(X), -1)) @ V
    torch.testing.assert_close(J @ V, expected, **EXACT)


@pytest.mark.parametrize("name", ["tanh_mlp", "images", "no_forward_mode"])
def test_one_point_per_pass_gives_the_same_products(name, monkeypatch):
    net, X, std, Phi = problem(NETS[name], 3)
    monkeypatch.setattr("gpbridge.operators.JACOBIAN_BYTES", 1)
    check_products(net, X, std, Phi)
    root = random(len(X), 3, 3)
    half = oracles.block_diagonal(root).T @ Phi
    ggn = GGNOperator(X, root, std=std, net=net)
    whitened = WhitenedKernelOperator(X, root, std=std, net=net)
    torch.testing.assert_close(ggn.diagonal(), half.square().sum(0), **EXACT)
    torch.testing.assert_close(whitened.diagonal(), 1 + half.square().sum(1), **EXACT)


def test_a_batch_of_gauss_newton_matrices_is_each_of_them():
    case = NETS["tanh_mlp"]
    net, _, std, _ = problem(case, 2)
    X, root, V = case.inputs(3, 4), random(3, 4, 2, 2), random(3, net.num_params, 2)
    batch = GGNOperator(X, root, std=std, net=net)
    for i in range(3):
        alone = GGNOperator(X[i], root[i], std=std, net=net)
        torch.testing.assert_close((batch @ V)[i], alone @ V[i], **EXACT)
        torch.testing.assert_close(batch[i].to_dense(), alone.to_dense(), **EXACT)
        torch.testing.assert_close(batch.diagonal()[i], alone.diagonal(), **EXACT)
    shared = GGNOperator(X[0], root, std=std, net=net)  # one set, three likelihoods
    torch.testing.assert_close(shared[0].to_dense(), batch[0].to_dense(), **EXACT)


@pytest.mark.parametrize("points, columns", [((), (5,)), ((5,), ()), ((2, 1), (2, 3))])
def test_batches_of_points_and_columns_broadcast_as_in_matmul(points, columns):
    case = NETS["tanh_mlp"]
    net, _, std, _ = problem(case, 2)
    X = case.inputs(*points, 4)
    J = JacobianOperator(X, std=std, net=net)
    dense = J.to_dense()
    V = random(*columns, net.num_params, 2)
    U = random(*columns, 8, 2)
    torch.testing.assert_close(J @ V, dense @ V, **EXACT)
    torch.testing.assert_close(J.mT @ U, dense.mT @ U, **EXACT)


@every_net
def test_gauss_newton_and_whitened_kernel_equal_the_oracle(case, m):
    net, X, std, Phi = problem(case, m)
    root = random(len(X), m, m)
    R = oracles.block_diagonal(root)
    ggn = GGNOperator(X, root, std=std, net=net)
    J = Phi.unflatten(0, (len(X), m))
    torch.testing.assert_close(ggn.to_dense(), oracles.ggn(J, root), **EXACT)
    whitened = WhitenedKernelOperator(X, root, std=std, net=net)
    expected = torch.eye(len(R)) + R.T @ Phi @ Phi.T @ R
    torch.testing.assert_close(whitened.to_dense(), expected, **EXACT)
    assert torch.linalg.eigvalsh(whitened.to_dense())[0] > 1 - 1e-12 * len(R) ** 3


def test_rows_of_whole_points_stay_a_jacobian_operator():
    net, X, std, Phi = problem(NETS["tanh_mlp"], 3)
    J = JacobianOperator(X, std=std, net=net)
    part = J[3:9]
    assert isinstance(part, JacobianOperator) and part.X.shape[0] == 2
    torch.testing.assert_close(part.to_dense(), Phi[3:9], **EXACT)
    transposed = J.mT[:, 3:9]
    assert isinstance(transposed, JacobianOperator)
    torch.testing.assert_close(transposed.to_dense(), Phi[3:9].T, **EXACT)
    torch.testing.assert_close(J[4:9].to_dense(), Phi[4:9], **EXACT)


def test_weights_may_be_replaced():
    case = NETS["scalar_weight"]
    net, X, _, _ = problem(case, 2)
    theta = random(net.num_params)
    other = copy.deepcopy(net)
    other.network.load_state_dict(net.unflatten(theta))
    replaced = JacobianOperator(X, theta, net=net).to_dense()
    own = JacobianOperator(X, net=other).to_dense()
    torch.testing.assert_close(replaced, own, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["frozen", "batch_norm", "attention"])
def test_a_float32_network_gives_products_in_float64_and_stays_as_it_is(name):
    case = NETS[name]
    network = case.network(2).float()
    net = FunctionalNet(network, input_shape=case.input_shape)
    X = case.inputs(4)
    net.probe(X.float())
    exact = FunctionalNet(copy.deepcopy(network).double(), input_shape=case.input_shape)
    exact.probe(X)
    promoted = JacobianOperator(X.float(), net=net).to(torch.float64)
    promoted = JacobianOperator(X, promoted.theta, net=net)
    expected = JacobianOperator(X, net=exact).to_dense()
    torch.testing.assert_close(promoted.to_dense(), expected, **EXACT)
    assert all(p.dtype == torch.float32 for p in net.network.parameters())
    single = JacobianOperator(X.float(), net=net).to_dense()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-4)


def test_no_points_and_no_columns():
    net, X, _, _ = problem(NETS["tanh_mlp"], 2)
    p = net.num_params
    J = JacobianOperator(X[:0], net=net)
    assert (J @ random(p, 3)).shape == (0, 3)
    assert torch.equal(J.mT @ random(0, 3), torch.zeros(p, 3, dtype=X.dtype))
    assert (JacobianOperator(X, net=net) @ random(p, 0)).shape == (8, 0)


def test_gradients_in_inputs_and_weights_equal_finite_differences():
    case = NETS["tanh_mlp"]
    net, X, std, _ = problem(case, 2, n=2)
    theta = net.flatten(net.params).detach()
    root, V = random(2, 2, 2), random(4, 2)

    def product(X, theta, root, std):
        return WhitenedKernelOperator(X, root, theta, std, net=net) @ V

    leaves = [t.clone().requires_grad_() for t in (X, theta, root, std)]
    assert torch.autograd.gradcheck(product, leaves)


def test_operators_survive_pickle_and_deepcopy():
    net, X, std, Phi = problem(NETS["nested"], 2)
    J = JacobianOperator(X, std=std, net=net)
    for other in (pickle.loads(pickle.dumps(J)), copy.deepcopy(J)):
        torch.testing.assert_close(other.to_dense(), Phi, **EXACT)
