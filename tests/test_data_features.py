"""Products of a data set, held, formed again or streamed, against the Jacobian."""

import functools

import pytest
import torch
from torch import nn

from gpbridge import data_features
from gpbridge.data_features import DataFeatures, OutputOperator, PrecisionOperator
from gpbridge.functional import FunctionalNet
from gpbridge.partial_products import smallest_eigenvalue
from tests import oracles
from tests.cases import every_net

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@functools.cache  # a probe takes longer than what most tests do with it
def problem(case, m, n=5):
    network = case.network(m)
    net = FunctionalNet(network, input_shape=case.input_shape)
    X = case.inputs(n)
    net.probe(X)
    shaped = X.reshape(-1, *(case.input_shape or (case.width,)))
    return net, X, oracles.jacobian(network, shaped)  # n x m x p


@every_net
@pytest.mark.parametrize("way", ["held", "formed again", "streamed"])
def test_products_equal_those_of_the_dense_jacobian(case, m, way, monkeypatch):
    if way == "streamed":
        monkeypatch.setattr(data_features, "_CHUNK_BYTES", 1)
    net, X, J = problem(case, m)
    budget = 0 if way == "formed again" else 2**30
    data = DataFeatures(net, X, budget, points_per_chunk=2)
    assert data.num_chunks == 3
    W, U = random(J.shape[-1], 3), random(*J.shape[:2], 2)
    for _ in range(2):  # the second time from what is held
        torch.testing.assert_close(data.matmul(W), J @ W, **EXACT)
        expected = torch.einsum("nmp,nmk->pk", J, U)
        torch.testing.assert_close(data.t_matmul(U), expected, **EXACT)
    assert len(data._held) == (3 if way == "held" else 0)


@pytest.mark.parametrize("chunk_bytes", [1, 64 * 2**20])
def test_some_of_the_weights_and_single_precision(chunk_bytes, monkeypatch):
    monkeypatch.setattr(data_features, "_CHUNK_BYTES", chunk_bytes)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    X = random(9, 3)
    J = oracles.jacobian(network, X)[..., 20:]  # of the last layer
    W, U = random(J.shape[-1], 3), random(9, 2, 4)
    for dtype, close in ((torch.float64, EXACT), (torch.float32, {"rtol": 1e-4})):
        net = FunctionalNet(network, "last_layer").to(dtype)
        net.probe(X.to(dtype))
        data = DataFeatures(net, X.to(dtype))
        assert data.shape == (18, 12)
        close = {"atol": 1e-5} | close
        torch.testing.assert_close(data.matmul(W), J @ W, **close)  # in W's dtype
        expected = torch.einsum("nmp,nmk->pk", J, U)
        torch.testing.assert_close(data.t_matmul(U), expected, **close)


def test_a_budget_is_used_up_and_not_exceeded():
    net = FunctionalNet(nn.Linear(3, 1).double())
    X = random(10, 3)
    net.probe(X)
    whole = DataFeatures(net, X, points_per_chunk=2)
    whole.matmul(random(4, 1))
    one = data_features.feature_bytes(whole._held[0])
    data = DataFeatures(net, X, 2.5 * one, points_per_chunk=2)
    data.matmul(random(4, 1))
    assert sorted(data._held) == [0, 1]


@pytest.mark.parametrize("n, m", [(4, 2), (1, 1), (7, 3)])
def test_the_two_matrices_of_the_linear_model(n, m):
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, m)).double()
    net = FunctionalNet(network)
    X = random(n, 2)
    net.probe(X)
    data = DataFeatures(net, X, points_per_chunk=2)
    root, std = random(n, m, m), random(net.num_params).abs()
    J = oracles.jacobian(network, X)
    rows = (root.mT @ J).flatten(0, 1) * std  # R' J S^(1/2)
    for make, dense in (
        (PrecisionOperator, rows.mT @ rows),
        (OutputOperator, rows @ rows.mT),
    ):
        operator, eye = make(root, std, data), torch.eye(len(dense)).double()
        assert operator.shape == dense.shape
        torch.testing.assert_close(operator @ eye, eye + dense, **EXACT)
        torch.testing.assert_close(operator @ eye[0], (eye + dense)[0], **EXACT)
        bound = smallest_eigenvalue(operator)  # a preconditioner's shift
        assert 0 < bound <= torch.linalg.eigvalsh(eye + dense)[0] * (1 + 1e-12)


def test_a_product_with_the_precision_forms_what_is_not_held_once(monkeypatch):
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net, X = FunctionalNet(network), random(9, 2)
    net.probe(X)
    data = DataFeatures(net, X, 0.0, points_per_chunk=3)
    operator = PrecisionOperator(random(9, 2, 2), random(net.num_params), data)
    formed, form = [], data._form
    monkeypatch.setattr(data, "_form", lambda x: formed.append(len(x)) or form(x))
    operator @ random(net.num_params, 2)
    assert formed == [3, 3, 3]


@pytest.mark.parametrize("budget", [0.0, 2**30])
@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_batches_are_disjoint_parts_that_add_up(budget, size):
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net, X = FunctionalNet(network), random(9, 2)
    net.probe(X)
    data = DataFeatures(net, X, budget, points_per_chunk=4)
    J, W, U = oracles.jacobian(network, X), random(net.num_params, 3), random(9, 2, 3)
    total, seen = torch.zeros_like(W), []
    for batch in data.batches(size):
        rows = data.rows_of(batch)
        assert 1 <= len(rows) <= size
        seen += rows.tolist()
        torch.testing.assert_close(data.matmul(W, batch), J[rows] @ W, **EXACT)
        total += data.t_matmul(U[rows], batch)
    assert sorted(seen) == list(range(9)) and seen != sorted(seen)
    expected = torch.einsum("nmp,nmk->pk", J, U)
    torch.testing.assert_close(total, expected, **EXACT)
