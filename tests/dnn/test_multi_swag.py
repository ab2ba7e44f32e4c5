"""Mixtures of SWAG, against the SWAG of each network."""

import copy

import pytest
import torch

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.dnn import MultiSWAG
from gpbridge.draws import JoinedDraws, WeightDraws
from tests.dnn.ensemble_problems import Nested


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def collected(steps=4, k=2):
    networks = [Nested() for _ in range(k)]
    tracker, generator = MultiSWAG(networks, rank=3), seeded(7)
    for _ in range(steps):
        with torch.no_grad():
            for network in networks:
                for p in network.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
        tracker.update(networks)
    return tracker, networks


def test_multi_swag_is_the_mixture_of_the_swags_of_its_networks():
    tracker, networks = collected()
    by_name, by_module = (MultiSWAG(networks, rank=3) for _ in range(2))
    names = networks[0].state_dict().keys()
    for step in range(2):
        with torch.no_grad():
            networks[1].head[1].bias.add_(step)
        by_module.update(networks)
        by_name.update(
            {n: torch.stack([m.state_dict()[n] for m in networks]) for n in names}
        )
    a, b = by_name.state_dict(), by_module.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["trackers.0.mean"], a["trackers.1.mean"])
    posterior = tracker.posterior(0.3)
    for part, one in zip(posterior.parts, tracker.trackers, strict=True):
        assert torch.equal(part.root, one.posterior(0.3).root)
    X = random(5, 2)
    assert posterior.draw(5, seeded())(X).shape == (5, 5, 1)
    twin, _ = collected()
    twin.load_state_dict(tracker.state_dict())
    again = twin.posterior(0.3).draw(5, seeded())
    torch.testing.assert_close(again(X), posterior.draw(5, seeded())(X))


def test_if_one_network_diverges_none_is_taken_in():
    tracker, networks = collected()
    before = copy.deepcopy(tracker.state_dict())
    with torch.no_grad():
        networks[0].head[1].bias.add_(1.0)
        networks[1].head[1].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="keeps the 4 snapshots before"):
        tracker.update(networks)
    after = tracker.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_statistics_of_a_mixture_are_those_of_update_bn_in_one_pass():
    tracker, networks = collected()
    draws = tracker.posterior().draw(5, seeded())
    assert isinstance(draws, JoinedDraws)
    X = random(40, 2, seed=3)
    batches = iter(X.split(20))  # can be passed over once only
    assert refresh_batch_norm(draws, batches) is draws
    values = iter(draws(X))
    for part in draws.parts:
        assert isinstance(part, WeightDraws)
        for weights in part.weights:
            single = copy.deepcopy(part.net.network)
            for name, value in part.net.unflatten(weights).items():
                dict(single.named_parameters())[name].data.copy_(value)
            torch.optim.swa_utils.update_bn(X.split(20), single)
            torch.testing.assert_close(next(values), single.eval()(X))
