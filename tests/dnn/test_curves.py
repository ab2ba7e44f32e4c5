"""Curves between networks: exact ends, the formulas, any module."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn import BezierCurve, PolyChain, curve_losses, fit_curve
from gpbridge.dnn.loss_surface import losses_at
from gpbridge.types import WeightPosterior
from tests import oracles_weight_space as oracles
from tests.dnn.curve_problems import QUICK, Nested, bent, data, moving, pair

KINDS = [BezierCurve, PolyChain]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bends", [2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_the_two_networks_bit_for_bit(kind, num_bends, dtype):
    networks = pair(dtype=dtype)
    curve = bent(kind, num_bends, networks).to(dtype)
    start, end = map(moving, networks)
    assert torch.equal(curve.weights(0.0), start)
    assert torch.equal(curve.weights(1), end)
    both = curve.weights(torch.tensor([1.0, 0.0]))
    assert torch.equal(both, torch.stack([end, start]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bends", [2, 3, 4])
def test_a_curve_is_that_of_the_paper(kind, num_bends):
    curve = bent(kind, num_bends, pair())
    t = torch.rand(7, generator=seeded(), dtype=torch.float64)
    formula = oracles.bezier if kind is BezierCurve else oracles.poly_chain
    expected = formula(curve.control_points.detach(), t)
    torch.testing.assert_close(curve.weights(t).detach(), expected)
    torch.testing.assert_close(curve.weights(t[0]).detach(), expected[0])


def test_the_middle_of_a_bezier_curve_is_a_quarter_half_quarter_mean():
    curve = bent(BezierCurve, 3, pair())
    w0, theta, w2 = curve.control_points
    torch.testing.assert_close(curve.weights(0.5), (w0 + w2) / 4 + theta / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_curve_is_the_straight_line(kind):
    networks = pair()
    start, end = map(moving, networks)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    line = start + t[:, None] * (end - start)
    torch.testing.assert_close(kind(*networks).weights(t).detach(), line)
    torch.testing.assert_close(kind(*networks, num_bends=2).weights(t).detach(), line)


def test_draws_at_times_are_the_networks_there():
    networks = pair()
    curve, (X, _) = bent(BezierCurve, 3, networks), data()
    t = torch.tensor([0.0, 0.3, 1.0])
    values = curve.draw_at(t)(X)
    for s, time in enumerate(t):
        single = copy.deepcopy(networks[0]).eval()
        weights = curve.net.unflatten(curve.weights(time))
        single.load_state_dict({**single.state_dict(), **weights})
        torch.testing.assert_close(values[s], single(X).detach())


def test_refreshed_ends_are_the_networks_with_statistics_of_the_data():
    networks, (X, _) = pair(), data()
    draws = PolyChain(*networks).draw_at(torch.tensor([0.0, 1.0]))
    values = refresh_batch_norm(draws, [X])(X)
    for value, network in zip(values, networks, strict=True):
        single = copy.deepcopy(network)
        torch.optim.swa_utils.update_bn([X], single)
        torch.testing.assert_close(value, single.eval()(X).detach())


def test_draws_are_at_uniform_times_and_follow_the_generator():
    curve = PolyChain(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), 2)
    assert isinstance(curve, WeightPosterior)
    state = torch.get_rng_state()
    draws = curve.draw(2000, seeded(5))
    t = (draws.weights - curve.start) / (curve.end - curve.start)
    expected = torch.linspace(0, 1, 2000)[:, None]
    assert (t.sort(0).values - expected).abs().max() < 0.04  # Kolmogorov-Smirnov
    assert torch.equal(draws.weights, curve.draw(2000, seeded(5)).weights)
    assert not torch.equal(draws.weights, curve.draw(2000, seeded(6)).weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_outputs_normalise_by_the_batch_without_dropout_or_side_effects():
    networks, (X, _) = pair(), data()
    curve = BezierCurve(*networks)
    before = copy.deepcopy(curve.state_dict())
    single = copy.deepcopy(networks[1])
    single.body[2].eval()
    torch.testing.assert_close(curve(X, 1.0), single(X))
    assert not any(module.training for module in curve.net.network.modules())
    for name, value in curve.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_loss_is_the_one_at_a_uniform_time_with_the_decay_of_the_point():
    curve, (X, Y) = bent(BezierCurve, 4, pair()), data()
    loss = curve.loss(F.cross_entropy, X, Y, weight_decay=0.3, generator=seeded(4))
    t = torch.rand(1, generator=seeded(4))[0]
    w = curve.weights(t)
    expected = F.cross_entropy(curve(X, t), Y) + 0.5 * 0.3 * (w @ w)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, [curve.bends])
    assert (gradient.abs().sum(-1) > 0).all()


def test_a_loop_of_ones_own_resumed_from_its_state_is_the_same_bit_for_bit():
    networks, (X, Y) = pair(), data()

    def loop(curve, stepper, generator, steps):
        for _ in range(steps):
            stepper.zero_grad()
            curve.loss(F.cross_entropy, X, Y, generator=generator).backward()
            stepper.step()

    def begin():
        curve = BezierCurve(*networks)
        return curve, torch.optim.SGD(curve.parameters(), lr=0.1, momentum=0.9)

    whole, stepper = begin()
    generator = seeded(3)
    loop(whole, stepper, generator, 3)
    saved = copy.deepcopy([whole.state_dict(), stepper.state_dict()])
    there = generator.get_state()
    loop(whole, stepper, generator, 3)
    half, other = begin()
    half.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    generator = torch.Generator()
    generator.set_state(there)
    loop(half, other, generator, 3)
    assert torch.equal(half.bends, whole.bends)
    assert [name for name, _ in half.named_parameters() if _.requires_grad] == ["bends"]


def test_a_curve_survives_deepcopy_saving_and_a_change_of_dtype():
    curve, (X, _) = bent(BezierCurve, 4, pair()), data()
    expected = curve.draw_at(0.4)(X)
    buffer = io.BytesIO()
    torch.save(curve, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(curve), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin.draw_at(0.4)(X), expected)
    small = copy.deepcopy(curve).float().draw_at(0.4)(X.float())
    torch.testing.assert_close(small, expected.float(), rtol=1e-4, atol=1e-5)


def test_part_of_the_weights_can_move():
    start = Nested().double()
    end = copy.deepcopy(start)
    with torch.no_grad():
        end.head["out"].weight.add_(1.0)
    curve = BezierCurve(start, end, parameters=["head"])
    assert curve.weights(0.5).shape == (18,)
    X, _ = data()
    torch.testing.assert_close(curve.draw_at(1.0)(X)[0], end.eval()(X).detach())


def test_images_may_come_in_their_own_shape():
    def build():
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2),
        )  # fmt: skip

    X = torch.randn(12, 1, 5, 5, generator=seeded(), dtype=torch.float64)
    Y = torch.arange(12) % 2
    first = None
    for rows, shape in [(X, (1, 5, 5)), (X.flatten(1), (1, 5, 5)), (X, None)]:
        torch.manual_seed(0)
        curve = BezierCurve(*pair(build), input_shape=shape)
        if shape is None:  # before and after training
            assert curve_losses(curve, X, Y, t=3, batches=[X]).loss.isfinite().all()
            assert curve.net.input_shape is None
        fit_curve(curve, rows, Y, generator=seeded(), **QUICK)
        along = curve_losses(curve, rows, Y, t=3, batches=[rows])
        first = along if first is None else first
        assert torch.equal(along.loss, first.loss)


def other_width():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    "end, error, message",
    [
        (
            nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)),
            ValueError,
            "module '1': start_network has ReLU, end_network has Tanh",
        ),
        (other_width(), ValueError, r"parameter '0.weight': .*\(3, 2\).*\(4, 2\)"),
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False)),
            ValueError,
            "parameter '2.bias': .* end_network has none",
        ),
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.ReLU()),
            ValueError,
            "module '3': start_network has none, end_network has ReLU",
        ),
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double(),
            ValueError,
            r"parameter '0.weight': .*float32.*float64",
        ),
        (torch.relu, TypeError, "end_network must be a torch.nn.Module"),
    ],
)
def test_ends_of_different_architectures_are_refused(end, error, message):
    start = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(error, match=message):
        BezierCurve(start, end)


def test_ends_that_compute_differently_with_equal_weights_are_refused():
    ends = [nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(a)) for a in (0.1, 0.3)]
    with pytest.raises(ValueError, match="module '1': .*slope=0.1, .*slope=0.3"):
        BezierCurve(*ends)


def test_what_does_not_move_must_agree():
    start, end = pair()
    with pytest.raises(ValueError, match="body.0.weight does not move"):
        BezierCurve(start, end, parameters=["head"])
    end.shift += 1
    with pytest.raises(ValueError, match="shift does not move"):
        BezierCurve(start, end)


def test_bad_input_is_refused_with_its_reason():
    networks, (X, Y) = pair(), data()
    curve = BezierCurve(*networks)
    for bad, message in ((1, "at least 2, but is 1"), (0, "num_bends must be a whole")):
        with pytest.raises(ValueError, match=message):
            BezierCurve(*networks, num_bends=bad)
    for bad in (1.5, -0.1, torch.nan, torch.zeros(1, 1)):
        with pytest.raises(ValueError, match=r"t must be a time in \[0, 1\]"):
            curve.weights(bad)
    with pytest.raises(ShapeError, match=r"t must be one time, but has shape \(2,\)"):
        curve(X, torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="nothing to train"):
        fit_curve(PolyChain(*networks, 2), X, Y)
    with pytest.raises(ValueError, match="optimizer must be one of"):
        fit_curve(curve, X, Y, optimizer="lbfgs")
    with pytest.raises(TypeError, match="train_X must be torch.float64"):
        fit_curve(curve, X.float(), Y)
    with pytest.raises(ValueError, match="Pass batches="):
        curve_losses(curve, X, Y)
    with pytest.raises(ValueError, match="passed over only once"):
        curve_losses(curve, X, Y, batches=iter([X]))
    for bad in (torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5, 0.5, 1.0]), 1):
        with pytest.raises(ValueError, match="increasing from 0 to 1"):
            curve_losses(curve, X, Y, t=bad, batches=[X])
    with pytest.raises(ValueError, match="weights must have at least one row"):
        losses_at(curve.net, [], X, Y, batches=[X])
