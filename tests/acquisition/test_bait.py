"""Batches by Fisher embeddings: the greedy choice, by Woodbury as by dense inverses."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.acquisition import fisher_embeddings, select_bait
from gpbridge.acquisition.bait import _Trace
from gpbridge.checks import ShapeError
from gpbridge.likelihoods import hessian_root
from gpbridge.linearized import Diagonal, Exact, Kronecker, LowRank
from gpbridge.testing import assert_module_unchanged
from tests.oracles_decisions import bait, bait_objective


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Classifier(nn.Module):
    """Layers that are no Sequential."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.ModuleDict({"hidden": nn.Linear(2, 5)})
        self.head = nn.Linear(5, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.body["hidden"](x)))


def classifier(inference, n=12, **options):
    X, network = normal(n, 2), Classifier().double()
    y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
    return LinearizedGP(network, X, y, inference=inference, **options)


# (n, m, p): more weights than rows, fewer, and one output
SIZES = [(12, 2, 40), (30, 3, 6), (25, 1, 4)]


@pytest.mark.parametrize("n, m, p", SIZES)
@pytest.mark.parametrize("oversample", [1.0, 2.0, 2.5])
def test_the_choice_is_that_of_dense_inverses(n, m, p, oversample):
    pool, labelled = normal(n, m, p), normal(4, m, p, seed=1)
    found = select_bait(
        pool, 4, labelled=labelled, precision=0.3, oversample=oversample
    )
    assert found.tolist() == bait(pool, 4, labelled, 0.3, oversample)


@pytest.mark.parametrize("n, m, p", SIZES)
def test_gains_are_differences_of_the_objective(n, m, p):
    pool = normal(n, m, p)
    state, chosen = _Trace(pool, 4), []
    for sign, points in ((1.0, [3, 7, 1]), (-1.0, [7])):
        for point in points:
            before = bait_objective(pool, chosen)
            gain = float(state.gains(sign)[point])
            if sign > 0:
                chosen.append(point)
                assert gain > 0  # the objective of forward steps decreases
            else:
                chosen.remove(point)
            assert gain == pytest.approx(before - bait_objective(pool, chosen))
            state.move(torch.tensor(point), sign)
    at_the_end = float(state.gains(1.0)[0])
    expected = bait_objective(pool, chosen) - bait_objective(pool, [*chosen, 0])
    assert at_the_end == pytest.approx(expected)


def test_the_choice_does_not_know_the_order_of_the_pool():
    pool = normal(20, 2, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    found = order[select_bait(pool[order], 5)]
    assert found.tolist() == select_bait(pool, 5).tolist()


def test_the_choice_does_not_know_the_basis_of_the_weights():
    pool = normal(20, 2, 5)
    Q = torch.linalg.qr(normal(5, 5, seed=1)).Q
    assert select_bait(pool @ Q, 5).tolist() == select_bait(pool, 5).tolist()


def test_duplicates_are_not_taken_together():
    pool = normal(6, 2, 30)
    twice = torch.cat([pool, pool])
    assert len(set((select_bait(twice, 6) % 6).tolist())) == 6


def test_the_whole_pool_can_be_taken():
    assert sorted(select_bait(normal(5, 1, 3), 5).tolist()) == list(range(5))


def test_neither_input_nor_global_randomness_changes():
    pool, state = normal(9, 1, 3), torch.get_rng_state()
    copy = pool.clone()
    select_bait(pool, 3)
    assert torch.equal(pool, copy) and torch.equal(state, torch.get_rng_state())


def test_single_precision_chooses_the_same():
    pool = normal(20, 2, 5)
    assert select_bait(pool.float(), 5).tolist() == select_bait(pool, 5).tolist()


@pytest.mark.parametrize(
    "inference, options",
    [
        (Exact(), {}),  # more weights than rows
        (Exact(), {"n": 40}),
        (Exact(), {"parameters": "last_layer"}),
        (Kronecker(), {"n": 40}),
        (Diagonal(), {"n": 40}),
    ],
)
def test_embeddings_have_the_posterior_covariance(inference, options):
    model, X = classifier(inference, **options), normal(6, 2, seed=3)
    V = fisher_embeddings(model, X).flatten(0, 1)
    posterior = model.posterior(X)
    R = torch.block_diag(*hessian_root(model.likelihood, posterior.mean))
    covariance = posterior.distribution.covariance_matrix
    torch.testing.assert_close(V @ V.mT, R.mT @ covariance @ R, atol=1e-9, rtol=1e-6)


def test_under_gaussian_noise_embeddings_are_scaled_by_it():
    X = normal(15, 2)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model = LinearizedGP(network, X, X.prod(-1, keepdim=True), noise=0.25)
    V = fisher_embeddings(model, X[:5])[:, 0]
    variance = model.posterior(X[:5]).variance[:, 0]
    torch.testing.assert_close(V.square().sum(-1), variance / 0.25)


def test_embeddings_leave_the_network_alone():
    network, X = Classifier().double(), normal(10, 2)
    y = (X[:, 0] > 0).long() * 2
    with assert_module_unchanged(network):
        model = LinearizedGP(network, X, y, inference=Kronecker())
        select_bait(fisher_embeddings(model, X), 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: select_bait(normal(4, 3), 1), ShapeError, "n x m x p"),
        (lambda: select_bait(normal(4, 1, 3), 5), ValueError, "4 points of the pool"),
        (lambda: select_bait(normal(4, 1, 3), 0), ValueError, "above zero"),
        (lambda: select_bait(normal(4, 1, 3), 1, precision=0.0), ValueError, "positiv"),
        (lambda: select_bait(normal(4, 1, 3), 1, oversample=0.5), ValueError, "Pass 1"),
        (lambda: select_bait(normal(4, 1, 3) / 0, 1), InputDataError, "NaN or Inf"),
        (
            lambda: select_bait(normal(4, 1, 3), 1, labelled=normal(2, 1, 4)),
            ShapeError,
            "l x m x 3",
        ),
        (
            lambda: fisher_embeddings(classifier(Exact()), normal(2, 2, 2)),
            ShapeError,
            "n x d",
        ),
        (
            lambda: fisher_embeddings(classifier(Exact()), normal(3, 5)),
            ShapeError,
            "2 columns",
        ),
        (
            lambda: fisher_embeddings(classifier(LowRank(rank=2)), normal(3, 2)),
            NotImplementedError,
            "Kronecker",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of a rank too small
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
