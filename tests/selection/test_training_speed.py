"""Sums of training losses: what they are, whom they watch, how they resume."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn import fit_map, train_replicas
from gpbridge.selection import TrainingSpeed
from gpbridge.testing import assert_module_unchanged
from tests import oracles_selection

LOSSES = [3.0, 1.5, 0.25, 0.5]


def tracked(losses=LOSSES):
    return TrainingSpeed.from_history(losses)


def noise(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def test_scores_are_sums_over_the_means_of_epochs():
    speed = TrainingSpeed()
    steps = noise((5, 4))
    for epoch in steps:
        for loss in epoch:
            speed.update(loss)
        speed.end_epoch()
    means = steps.mean(-1)
    torch.testing.assert_close(speed.epoch_losses, means)
    torch.testing.assert_close(speed.tse(), means.sum())
    torch.testing.assert_close(speed.tse_e(2), means[3:].sum())
    torch.testing.assert_close(speed.tse_e(5), speed.tse())
    torch.testing.assert_close(speed.tse_e(), means[-1])


def test_a_smaller_batch_counts_less():
    speed = TrainingSpeed()
    speed.update(1.0, num_data=100)
    speed.update(4.0, num_data=50)
    speed.end_epoch()
    assert speed.tse().item() == 2.0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_the_moving_average_is_the_recursion_that_is_normalised(gamma):
    expected = oracles_selection.moving_average(LOSSES, gamma)
    assert tracked().tse_ema(gamma).item() == pytest.approx(expected, rel=1e-12)


def test_the_moving_average_averages():
    losses = noise(2000)
    found = tracked(losses).tse_ema(0.99)
    # A public version gives the newest loss the weight 0.99: it would be the last loss.
    assert abs(float(found) - 0.5) < 0.1 < abs(float(losses[-1]) - 0.5)
    assert tracked(torch.full((7,), 2.5).double()).tse_ema().item() == 2.5
    assert tracked().tse_ema(0.0) == LOSSES[-1]
    torch.testing.assert_close(tracked().tse_ema(1.0), tracked().tse() / 4)


def test_many_networks_are_what_each_is_alone():
    losses = noise((6, 3))
    together = TrainingSpeed.from_history(losses)
    for score in ("tse", "tse_e", "tse_ema"):
        alone = [getattr(tracked(column), score)() for column in losses.T]
        torch.testing.assert_close(getattr(together, score)(), torch.stack(alone))
    assert repr(together) == "TrainingSpeed(num_epochs=6, num_networks=3)"
    assert repr(tracked()) == "TrainingSpeed(num_epochs=4, num_networks=1)"


def small_fit(width, **options):
    X = noise((30, 2))
    network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
    network.double()
    options = {"epochs": 4, "batch_size": 8, "progress": False} | options
    with assert_module_unchanged(network):
        return fit_map(network, X, X.sum(-1, keepdim=True), **options)


def test_it_watches_fit_map_and_reads_its_history_alike():
    speed = TrainingSpeed()
    fit = small_fit(3, callback=speed)
    assert speed.epoch_losses.tolist() == fit.history["train_loss"]
    for run in (fit, fit.history, fit.history["train_loss"]):
        again = TrainingSpeed.from_history(run)
        assert torch.equal(again.epoch_losses, speed.epoch_losses)


def test_runs_of_several_architectures_become_columns():
    fits = [small_fit(width) for width in (1, 4)]
    found = TrainingSpeed.from_history(*fits, noise((4, 3))).tse()
    assert found.shape == (5,)
    for value, fit in zip(found, fits, strict=False):
        assert value.item() == pytest.approx(sum(fit.history["train_loss"]))


def test_it_watches_replicas_and_reads_their_history_alike():
    X, speed = noise((30, 2)), TrainingSpeed()
    fit = train_replicas(
        nn.Linear(2, 1).double(),
        noise((5, 3)),
        X,
        X.sum(-1, keepdim=True),
        nn.functional.mse_loss,
        epochs=3,
        progress=False,
        callback=speed,
    )
    assert speed.tse().shape == (5,)
    torch.testing.assert_close(speed.tse(), fit.history["train_loss"].sum(0))
    assert torch.equal(TrainingSpeed.from_history(fit).epoch_losses, speed.epoch_losses)


def test_it_watches_a_loop_of_ones_own_and_leaves_the_loss_alone():
    network, X = nn.Linear(2, 1), noise((16, 2)).float()
    speed = TrainingSpeed()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        for rows in X.split(8):
            loss = (network(rows)[:, 0] - rows.sum(-1)).square().mean()
            optimizer.zero_grad()
            speed.update(loss)
            loss.backward()
            optimizer.step()
        speed.end_epoch()
    assert speed.epoch_losses.dtype == torch.float32
    assert not speed.tse().requires_grad


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_state_in_the_middle_of_an_epoch_resumes_to_the_same_bits(shape, tmp_path):
    steps = noise((7, 5, *shape)).float()

    def run(speed, epochs, start=0):
        for epoch in range(start, epochs):
            for loss in steps[epoch][0 if epoch > start else min(start, 2) :]:
                speed.update(loss, 3)
            speed.end_epoch()

    whole = TrainingSpeed()
    run(whole, 7)
    part = TrainingSpeed()
    run(part, 4)
    for loss in steps[4][:2]:
        part.update(loss, 3)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed = TrainingSpeed()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state)
    copies = [resumed, copy.deepcopy(part), pickle.loads(pickle.dumps(part))]
    for speed in copies:
        run(speed, 7, start=4)
        assert torch.equal(speed.epoch_losses, whole.epoch_losses)
        assert torch.equal(speed.tse_ema(), whole.tse_ema())
    untouched = TrainingSpeed()
    untouched.load_state_dict(TrainingSpeed().state_dict())
    assert untouched.num_epochs == 0


def test_it_moves_to_another_dtype():
    assert tracked().to(torch.float32).tse().dtype == torch.float32


# -- bad input ------------------------------------------------------------------------


def test_an_epoch_without_losses_is_refused():
    with pytest.raises(RuntimeError, match=r"Call update\(loss\) at every step"):
        TrainingSpeed().end_epoch()
    for score in ("tse", "tse_e", "tse_ema"):
        with pytest.raises(RuntimeError, match="No epoch has ended yet"):
            getattr(TrainingSpeed(), score)()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_network_is_named_and_the_epochs_before_stay(bad):
    speed = TrainingSpeed()
    speed.update(torch.tensor([1.0, 2.0, 3.0]))
    speed.end_epoch()
    speed.update(torch.tensor([1.0, bad, 3.0]))
    with pytest.raises(ValueError, match=r"of epoch 1 is NaN or infinite for .* \[1\]"):
        speed.end_epoch()
    assert speed.tse().tolist() == [1.0, 2.0, 3.0]
    speed.update(torch.tensor([1.0, 1.0, 1.0]))
    speed.end_epoch()
    assert speed.tse().tolist() == [2.0, 3.0, 4.0]


def test_losses_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match=r"a number or ``k``, .* has shape \(2, 2\)"):
        TrainingSpeed().update(torch.ones(2, 2))
    for first, second in ((torch.ones(3), 1.0), (1.0, torch.ones(3))):
        speed = TrainingSpeed()
        speed.update(first)
        with pytest.raises(ShapeError, match=r"Try loss.mean\(\)"):
            speed.update(second)
        speed.end_epoch()
        with pytest.raises(ShapeError, match="at every step"):
            speed.update(second)


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match="loss must be float32 or float64"):
        TrainingSpeed().update(torch.tensor(1))
    with pytest.raises(ValueError, match="num_data must be a whole number above zero"):
        TrainingSpeed().update(1.0, num_data=0)


def test_an_epoch_of_another_run_is_refused():
    speed = TrainingSpeed()
    small_fit(2, callback=speed)
    with pytest.raises(ValueError, match="has 4 epochs, but epoch 0 came"):
        small_fit(2, callback=speed)


@pytest.mark.parametrize(
    "runs, error, message",
    [
        ((), ValueError, "at least one run"),
        (([1.0, 2.0], [1.0]), ShapeError, r"have \[2, 1\]. Pass .* the first 1"),
        (({"loss": [1.0]},), ValueError, "must have train_loss, but has loss"),
        (([],), ShapeError, "at least one epoch"),
        ((torch.ones(2, 2, 2),), ShapeError, "``t`` or ``t x k``"),
        (([1.0, float("nan")],), ValueError, "epoch 1 is NaN"),
    ],
)
def test_histories_that_do_not_fit_are_refused(runs, error, message):
    with pytest.raises(error, match=message):
        TrainingSpeed.from_history(*runs)


@pytest.mark.parametrize("num_epochs", [0, 5, 1.5])
def test_a_wrong_number_of_last_epochs_is_refused(num_epochs):
    with pytest.raises(ValueError, match="num_epochs must be"):
        tracked().tse_e(num_epochs)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_gamma_outside_of_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        tracked().tse_ema(gamma)
