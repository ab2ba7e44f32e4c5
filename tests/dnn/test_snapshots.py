"""Copies along a run, kept, resumed and drawn."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.dnn import Snapshots
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import EmpiricalWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.register_buffer("weights", torch.zeros(()))  # a name that we use too

    def forward(self, x):
        return self.head(self.body(x)) + self.weights


def run(tracker, network, steps, seed=1):
    """Random weights and statistics in place of training; returns the copies."""
    generator, copies = seeded(seed), []
    for _ in range(steps):
        with torch.no_grad():
            for value in [*network.parameters(), *network.buffers()]:
                if value.is_floating_point():
                    new = torch.rand(
                        value.shape, generator=generator, dtype=value.dtype
                    )
                    value.copy_(new + 0.5)
        tracker.update(network)
        copies.append(copy.deepcopy(network).eval())
    return copies


@pytest.mark.parametrize("steps, most", [(1, None), (11, None), (3, 4), (11, 4)])
def test_members_are_the_last_copies_with_their_own_statistics(steps, most):
    network = Nested().double()
    tracker = Snapshots(network, most)
    copies = run(tracker, network, steps)[-(most or steps) :]
    posterior, X = tracker.posterior(), torch.randn(5, 2, generator=seeded()).double()
    assert isinstance(posterior, EmpiricalWeights)
    expected = torch.stack([each(X) for each in copies])
    torch.testing.assert_close(posterior.draw()(X), expected)
    for twin in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        torch.testing.assert_close(twin.draw()(X), expected)
    chosen = posterior.draw(1, seeded(3))(X)[0]
    assert (chosen - expected).abs().amax((1, 2)).min() < 1e-12


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("before, room", [(3, 0), (10, 0), (0, 10)])
def test_a_run_resumed_from_its_state_is_the_same_bit_for_bit(before, room, most):
    whole, half = (Snapshots(Nested().double(), most) for _ in range(2))
    run(half, Nested().double(), room, seed=8)  # another size than the state's
    run(whole, Nested().double(), before, seed=5)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    for tracker in (whole, half):
        run(tracker, Nested().double(), 7, seed=6)
    a, b = whole.posterior().state_dict(), half.posterior().state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "before, there, here",
    [(3, None, 4), (10, None, 4), (10, 6, 4), (5, 6, 4), (5, 6, None), (5, 6, 9)]
    + [(2, 6, 4), (6, 6, None), (0, None, 4), (0, 4, None), (9, None, 20)],
)
def test_a_state_of_another_maximum_has_the_snapshots_that_fit(before, there, here):
    """It goes on as a tracker that had this maximum from the beginning."""
    network = Nested().double()
    given, whole = Snapshots(network, there), Snapshots(network, here)
    for tracker in (given, whole):
        run(tracker, Nested().double(), before, seed=5)
    found = Snapshots(network, here)
    found.load_state_dict(copy.deepcopy(given.state_dict()))
    for more in (0, 1, 3, 4):
        for tracker in (found, whole):
            run(tracker, Nested().double(), more, seed=6)
        if before + more:
            a, b = found.posterior().state_dict(), whole.posterior().state_dict()
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("here, wanted", [(None, 9), (6, 6)])
def test_a_state_that_has_too_few_snapshots_is_refused(here, wanted):
    given = Snapshots(Nested(), 4)
    run(given, Nested(), 9)
    message = rf"last 4 of 9 .* would keep {wanted} .* max_snapshots=4 or less"
    with pytest.raises(ValueError, match=message):
        Snapshots(Nested(), here).load_state_dict(given.state_dict())


def test_the_network_is_read_and_not_changed():
    network = Nested().train()
    tracker = Snapshots(network, parameters=["head"])
    with assert_module_unchanged(network):
        tracker.update(network)
        posterior = tracker.posterior()
    assert posterior.weights.shape == (1, 5)
    X = torch.rand(4, 2, generator=seeded())
    torch.testing.assert_close(posterior.draw()(X)[0], network.eval()(X))


def test_weights_by_name_stand_for_a_module():
    network = Nested()
    one, other = Snapshots(network), Snapshots(network)
    for step in range(2):
        with torch.no_grad():
            network.body[1].running_mean.add_(step + 1.0)
        one.update(network)
        other.update(dict(network.state_dict()))
    a, b = one.state_dict(), other.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_input():
    network = Nested()
    tracker = Snapshots(network)
    with pytest.raises(RuntimeError, match="has 0 snapshots and needs 1"):
        tracker.posterior()
    with pytest.raises(ValueError, match="max_snapshots must be a whole number"):
        Snapshots(network, 0)
    tracker.update(network)
    with torch.no_grad():
        network.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="keeps the 1 snapshots before"):
        tracker.update(network)
    assert tracker.posterior().num_members == 1
