"""A cyclical ensemble against a loop that follows the paper."""

import copy

import pytest
import torch
from torch import nn

from gpbridge.dnn import FastGeometricEnsemble


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def train(ensemble, network, steps, first=0):
    """A run that starts at a step; returns the weights and rates of each step."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    X = torch.randn(8, 2, generator=seeded())
    rows = []
    for step in range(first, first + steps):
        rate = 0.5 * ensemble.factor(step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (network(X) - X.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        ensemble.update(network)
        weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
        rows.append((rate, weights.clone()))
    return rows


@pytest.mark.parametrize("cycle", [2, 6])
def test_members_are_the_weights_where_the_rate_is_lowest(cycle):
    network = nn.Linear(2, 1)
    ensemble = FastGeometricEnsemble(network, cycle, 0.1)
    rows = train(ensemble, network, 3 * cycle)
    # alpha(i) of the paper's eq. (3), with t(i) from 0 at the first step.
    t = [(i % cycle) / cycle for i in range(3 * cycle)]
    rates = [0.5 * (1 - 0.9 * 2 * s if s <= 0.5 else 1 - 0.9 * (2 - 2 * s)) for s in t]
    assert [rate for rate, _ in rows] == pytest.approx(rates)
    members = torch.stack([w for rate, w in rows if rate == pytest.approx(0.05)])
    assert len(members) == 3
    assert torch.equal(ensemble.posterior().weights, members)


@pytest.mark.parametrize("before", [2, 3, 7])
def test_a_run_resumed_mid_cycle_is_the_same_bit_for_bit(before):
    network = nn.Linear(2, 1)
    whole = FastGeometricEnsemble(network, 6)
    train(whole, network, before)
    half = FastGeometricEnsemble(nn.Linear(2, 1), 6)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    other = copy.deepcopy(network)
    train(whole, network, 14, before), train(half, other, 14, before)
    assert torch.equal(whole.posterior().weights, half.posterior().weights)


def test_defaults_and_bad_input():
    network = nn.Linear(2, 1)
    ensemble = FastGeometricEnsemble(network)
    train(ensemble, network, 2)
    with pytest.raises(RuntimeError, match="0 snapshots and needs 1"):
        ensemble.posterior()
    train(ensemble, network, 1, 2)
    assert ensemble.posterior().num_members == 1
    with pytest.raises(ValueError, match="cycle must be an even number"):
        FastGeometricEnsemble(network, 3)
    with pytest.raises(ValueError, match="low must be positive"):
        FastGeometricEnsemble(network, low=0.0)
