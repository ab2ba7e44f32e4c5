"""Curves between networks: exact ends, the formulas, any module, training, barriers."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.data import two_moons
from gpbridge.dnn import BezierCurve, PolyChain, curve_losses, fit_curve, fit_map
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.loss_surface import CurveLosses, losses_at
from gpbridge.functional import FunctionalNet
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import WeightPosterior
from tests import oracles_weight_space as oracles

KINDS = [BezierCurve, PolyChain]
QUICK = {"epochs": 4, "batch_size": 16, "progress": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Nested(nn.Module):
    """Modules inside modules, batch norm, dropout, a buffer and a fixed weight."""

    def __init__(self, m=3):
        super().__init__()
        self.head = nn.ModuleDict({"out": nn.Linear(5, m)})
        self.body = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("shift", torch.full((2,), 0.1))

    def forward(self, x):
        return self.head["out"](torch.tanh(self.body(x + self.shift)) * self.fixed)


def pair(build=Nested, dtype=torch.float64):
    return build().to(dtype).train(), build().to(dtype).train()


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def moving(network):
    return torch.cat(
        [p.detach().flatten() for p in network.parameters() if p.requires_grad]
    )


def data(n=40):
    X = torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    return X, (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def bent(kind, num_bends, networks):
    curve = kind(*networks, num_bends=num_bends)
    with torch.no_grad():
        noise = torch.randn(curve.bends.shape, generator=seeded(3), dtype=torch.float64)
        curve.bends.add_(noise)
    return curve


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
