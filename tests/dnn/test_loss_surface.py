"""Losses along curves, lengths and barriers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpbridge.dnn import BezierCurve, PolyChain, curve_losses
from gpbridge.dnn.loss_surface import CurveLosses, losses_at
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import LogisticLikelihood
from tests.dnn.curve_problems import bent, data, moving, pair


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chunks", [(1, 7), (3, 40), (8, 1000)])
def test_losses_along_a_curve_are_those_of_each_network(chunks):
    networks, (X, Y) = pair(), data()
    curve = bent(BezierCurve, 3, networks)
    batches = list(X.split(20))
    along = curve_losses(
        curve, X, Y, t=5, batches=batches, chunk_size=chunks[0],
        row_chunk_size=chunks[1],
    )  # fmt: skip
    for s, time in enumerate(along.t):
        single = copy.deepcopy(networks[0])
        weights = curve.net.unflatten(curve.weights(time))
        single.load_state_dict({**single.state_dict(), **weights})
        torch.optim.swa_utils.update_bn(batches, single)
        outputs = single.eval()(X)
        torch.testing.assert_close(along.loss[s], F.cross_entropy(outputs, Y))
        wrong = (outputs.argmax(-1) != Y).double().mean()
        torch.testing.assert_close(along.error[s], wrong)


def test_binary_and_regression_losses_are_known_ones():
    X, _ = data()
    net = FunctionalNet(nn.Linear(2, 1).double())
    weights = torch.randn(4, 3, generator=seeded(), dtype=torch.float64)
    outputs = X @ weights[:, :2].mT + weights[:, 2]  # n x s
    y = (X[:, :1] > 0.3).double()
    loss, error = losses_at(net, weights, X, y, LogisticLikelihood())
    for s in range(4):
        expected = F.binary_cross_entropy_with_logits(outputs[:, s], y[:, 0])
        torch.testing.assert_close(loss[s], expected)
        wrong = ((outputs[:, s] > 0) != y[:, 0].bool()).double().mean()
        torch.testing.assert_close(error[s], wrong)
    loss, error = losses_at(net, weights, X, X[:, :1] * 0.7)
    expected = 0.5 * (outputs - 0.7 * X[:, :1]).square().mean(0)
    torch.testing.assert_close(loss, expected)
    assert error is None


def test_lengths_are_those_of_polygons_and_of_the_parabola():
    networks = pair()
    start, end = map(moving, networks)
    X, Y = data()
    line = curve_losses(PolyChain(*networks, 2), X, Y, t=4, batches=[X])
    assert math.isclose(line.length, float((end - start).norm()), rel_tol=1e-9)
    chain = bent(PolyChain, 4, networks)
    pieces = chain.control_points.diff(dim=0).norm(dim=-1)
    along = curve_losses(chain, X, Y, t=7, batches=[X])
    torch.testing.assert_close(along.arc[::2].diff(), pieces.detach())
    bezier = bent(BezierCurve, 3, networks)
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    exact = bezier.weights(t).diff(dim=0).norm(dim=-1).sum()
    length = curve_losses(bezier, X, Y, batches=[X]).length
    assert math.isclose(length, exact.item(), rel_tol=1e-3)


def test_barriers_compare_the_top_with_the_ends():
    t, arc = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 3.0, 4.0])
    losses = CurveLosses(t, torch.tensor([1.0, 5.0, 2.0]), None, arc)
    assert losses.barrier() == 3.5
    assert losses.barrier(above="larger") == 3.0
    assert losses.length == 4.0
    assert losses.mean_loss == pytest.approx((3 * 3.0 + 1 * 3.5) / 4)
    falling = losses._replace(loss=torch.tensor([3.0, 2.0, 1.0]), error=1 - t)
    assert falling.barrier(above="larger") == 0.0
    assert falling.barrier("error") == 0.5
    with pytest.raises(ValueError, match="no share of wrong labels"):
        losses.barrier("error")
    with pytest.raises(ValueError, match="above must be one of 'mean', 'larger'"):
        losses.barrier(above="start")
