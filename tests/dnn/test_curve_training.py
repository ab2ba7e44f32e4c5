"""Training of curves: round barriers, by the published schedule, good to the end."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpbridge.data import two_moons
from gpbridge.dnn import BezierCurve, PolyChain, curve_losses, fit_curve, fit_map
from gpbridge.dnn.divergence import DivergedError
from gpbridge.testing import assert_module_unchanged
from tests import oracles_weight_space as oracles
from tests.dnn.curve_problems import QUICK, data, pair

KINDS = [BezierCurve, PolyChain]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained_pair():
    X, y = two_moons(60, seeded(), noise_std=0.1)

    def network(seed):
        torch.manual_seed(seed)
        start = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 1)).double()
        options = {"epochs": 80, "learning_rate": 0.05, "batch_size": 60}
        fit = fit_map(
            start, X, y, early_stopping=False, progress=False, generator=seeded(seed),
            **options,
        )  # fmt: skip
        return fit.network

    return network(0), network(1), X, y


def test_a_trained_curve_goes_round_the_barrier_of_the_line():
    start, end, X, y = trained_pair()
    for kind in KINDS:
        curve = kind(start, end)
        line = curve_losses(PolyChain(start, end, 2), X, y, t=21)
        untrained = curve_losses(curve, X, y, t=21)
        torch.testing.assert_close(untrained.loss, line.loss)
        with assert_module_unchanged(start), assert_module_unchanged(end):
            history = fit_curve(
                curve, X, y, epochs=100, learning_rate=0.05, batch_size=30,
                optimizer="adam", weight_decay=0.0, progress=False,
            )  # fmt: skip
        along = curve_losses(curve, X, y, t=21)
        assert line.barrier() > 0.2
        assert along.barrier() < 0.3 * line.barrier()
        assert along.length > line.length
        assert torch.equal(along.loss[[0, -1]], line.loss[[0, -1]])
        assert len(history["train_loss"]) == 100


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fitting_moves_only_the_bends_and_repeats_with_its_seed(optimizer):
    networks, (X, Y) = pair(), data()
    results = []
    state = torch.get_rng_state()
    for _ in range(2):
        curve = BezierCurve(*networks)
        before = copy.deepcopy(curve.state_dict())
        with (
            assert_module_unchanged(networks[0]),
            assert_module_unchanged(networks[1]),
            torch.no_grad(),
        ):
            fit_curve(curve, X, Y, optimizer=optimizer, generator=seeded(2), **QUICK)
        results.append(curve.bends.detach().clone())
        for name, value in curve.state_dict().items():
            assert torch.equal(value, before[name]) == (name != "bends"), name
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), state)


def test_default_arguments_bring_bends_back_to_the_solution():
    X, _ = data(20)
    network = nn.Linear(2, 1).double()
    nn.init.ones_(network.weight), nn.init.zeros_(network.bias)
    curve = BezierCurve(network, copy.deepcopy(network))
    with torch.no_grad():
        curve.bends.add_(2.0)
    history = fit_curve(curve, X, X.sum(-1, keepdim=True), progress=False)
    assert history["train_loss"][-1] < 0.05 * history["train_loss"][0]


def test_sgd_follows_the_published_schedule():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(torch.full((1, 1), value, dtype=torch.float64))

        def forward(self, x):
            return x * 0 + self.w

    curve = PolyChain(Constant(0.0), Constant(0.0))
    X = torch.ones(1, 1, dtype=torch.float64)
    twin, times = copy.deepcopy(curve), seeded(7)
    stepper = torch.optim.SGD([twin.bends], lr=1.0, momentum=0.9)
    for epoch in range(10):
        torch.randperm(1, generator=times)
        stepper.param_groups[0]["lr"] = 0.01 * oracles.curve_rate(epoch / 10)
        stepper.zero_grad()
        t = torch.rand(1, generator=times).double()
        (0.5 * (twin.weights(t) - 1).square().sum()).backward()
        stepper.step()
    fit_curve(
        curve, X, X, epochs=10, learning_rate=0.01, weight_decay=0.0,
        generator=seeded(7), progress=False,
    )  # fmt: skip
    torch.testing.assert_close(curve.bends, twin.bends, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size, steps", [(1, 5), (2, 3), (4, 2)])
def test_every_row_is_seen_in_an_epoch_also_alone(batch_size, steps):
    networks = [nn.Linear(2, 1).double() for _ in range(2)]
    curve, counts = BezierCurve(*networks), []
    curve.net.network.register_forward_hook(lambda _, X, out: counts.append(len(out)))
    X = data(5)[0]
    options = {"epochs": 1, "batch_size": batch_size, "progress": False}
    fit_curve(curve, X, X[:, :1], **options)
    assert sum(counts[-steps:]) == 5


def test_batch_norm_needs_two_rows():
    curve, (X, Y) = BezierCurve(*pair()), data(5)
    history = fit_curve(curve, X, Y, epochs=1, batch_size=4, progress=False)
    assert math.isfinite(history["train_loss"][0])
    with pytest.raises(ValueError, match="batches of two rows or more"):
        fit_curve(curve, X, Y, batch_size=1, progress=False)


def test_divergence_stops_with_the_last_good_bends():
    # Each step multiplies the bend by about 1e40: the loss overflows in epoch 4.
    networks = [nn.Linear(1, 1, bias=False).double() for _ in range(2)]
    X = torch.full((8, 1), 1e20, dtype=torch.float64)
    for w, network in enumerate(networks):
        nn.init.constant_(network.weight, float(w))
    curve, twin = BezierCurve(*networks), BezierCurve(*networks)
    options = {"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    match = r"diverged in epoch 4.*\.last_good.*learning_rate=0.015"
    with pytest.raises(DivergedError, match=match) as caught:
        fit_curve(
            curve, X, X * 0, epochs=20, generator=seeded(), progress=False, **options
        )
    assert caught.value.last_good is curve
    generator = seeded()
    for _ in range(3):
        torch.randperm(8, generator=generator)
        loss = twin.loss(lambda f, y: 0.5 * F.mse_loss(f, y), X, X * 0,
                         generator=generator)  # fmt: skip
        with torch.no_grad():
            twin.bends.sub_(torch.autograd.grad(loss, [twin.bends])[0])
    torch.testing.assert_close(curve.bends, twin.bends)
    assert curve.bends.grad is None
