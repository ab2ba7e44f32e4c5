"""SWA and SWAG against moments of the stored snapshots."""

import copy

import pytest
import torch
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn.scale_tuning import ScaleTuning
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.dnn.subspace_methods import SubspaceChains
from gpbridge.dnn.swag import SWA, SWAG
from gpbridge.weights import GaussianWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def run(tracker, network, steps, seed=1):
    """A stream of Gaussian weights in place of training; returns them all."""
    generator, rows = seeded(seed), []
    for _ in range(steps):
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) + 3)
        tracker.update(network)
        rows.append(torch.cat([p.detach().reshape(-1) for p in network.parameters()]))
    return torch.stack(rows)


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("steps", [5, 12])
def test_the_moments_are_those_of_the_snapshots(centering, steps):
    network = small()
    tracker = SWAG(network, rank=4, centering=centering)
    W = run(tracker, network, steps)
    posterior = tracker.posterior(0.3)
    torch.testing.assert_close(posterior.mean, W.mean(0))
    variance = 0.3 * W.var(0, correction=0)
    torch.testing.assert_close(posterior.variance, variance)
    centres = W.mean(0).expand_as(W)
    if centering == "running":
        centres = W.cumsum(0) / torch.arange(1, steps + 1).double()[:, None]
    D = (W - centres)[-4:]
    expected = torch.diag(variance) + 0.3 / 3 * D.mT @ D
    torch.testing.assert_close(posterior.covariance.to_dense(), expected)
    without = tracker.posterior(0.3, diagonal=False)
    torch.testing.assert_close(
        without.covariance.to_dense(), expected - torch.diag(variance)
    )


def test_small_variances_around_large_weights_survive_float32():
    network = small().float()
    tracker = SWAG(network, rank=2)
    start = [p.detach().clone() for p in network.parameters()]
    generator, rows = seeded(), []
    for _ in range(200):
        with torch.no_grad():
            for p, w in zip(network.parameters(), start, strict=True):
                p.copy_(100 + w + 1e-3 * torch.randn(p.shape, generator=generator))
        tracker.update(network)
        rows.append(torch.cat([p.detach().reshape(-1) for p in network.parameters()]))
    exact = torch.stack(rows).double().var(0, correction=0)
    found = tracker.posterior(1.0).variance.double()
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)


def test_few_snapshots_have_few_columns():
    network = small()
    tracker = SWAG(network, rank=10)
    with pytest.raises(RuntimeError, match="0 snapshots and needs 2"):
        tracker.posterior()
    run(tracker, network, 3)
    with pytest.warns(UserWarning, match="3 snapshots for a rank of 10"):
        assert tracker.posterior().root.shape == (13, 3)


def test_a_run_that_diverges_keeps_the_last_good_state():
    network = small()
    tracker = SWAG(network, rank=2)
    W = run(tracker, network, 3)
    with torch.no_grad():
        network[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"keeps the 3 snapshots before"):
        tracker.update(network)
    torch.testing.assert_close(tracker.posterior().mean, W.mean(0))


def test_a_run_resumed_from_its_state_is_the_same_bit_for_bit():
    network = small()
    whole = SWAG(network, rank=3)
    run(whole, network, 2, seed=5)
    half = SWAG(small(seed=9), rank=3)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    for tracker in (whole, half):
        run(tracker, small(seed=2), 4, seed=6)
    a, b = whole.posterior(), half.posterior()
    for name in ("mean", "variance", "root"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_state_of_other_options_is_refused():
    """Rows that are kept are weights or deviations, which look alike."""
    network = small()
    tracker = SWAG(network, rank=3, centering="final")
    W = run(tracker, network, 5)
    state = tracker.state_dict()
    with pytest.raises(ValueError, match=r"Build it with centering='final'"):
        SWAG(network, rank=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"keeps 3 deviations.*Build it with rank=3"):
        SWAG(network, rank=4, centering="final").load_state_dict(state)
    twin = SWAG(network, rank=3, centering="final")
    twin.load_state_dict(state)
    torch.testing.assert_close(twin.deviations, W[[3, 4, 2]] - W.mean(0))


def test_the_network_is_read_and_not_changed():
    network = small().train()
    before = copy.deepcopy(network.state_dict())
    tracker = SWA(network, parameters="last_layer")
    tracker.update(network)
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    X = torch.rand(4, 2, generator=seeded()).double()
    with torch.no_grad():
        network[0].weight.add_(1.0)  # not averaged: that of the last update counts
    tracker.update(network)
    assert isinstance(tracker.posterior(), GaussianWeights)
    torch.testing.assert_close(tracker.posterior().draw(1)(X)[0], network(X))


@pytest.mark.parametrize("kind", [SWA, SWAG, Snapshots])
def test_a_posterior_does_not_follow_its_tracker(kind):
    network, X = small(), torch.rand(4, 2, generator=seeded()).double()
    options = {"rank": 2} if kind is SWAG else {}
    tracker = kind(network, parameters="last_layer", **options)
    for _ in range(2):
        tracker.update(network)
    posterior = tracker.posterior()
    before = posterior.draw(2, seeded())(X)
    with torch.no_grad():
        network[0].weight.add_(1.0)  # not tracked, and so taken at the last update
    tracker.update(network)
    assert torch.equal(posterior.draw(2, seeded())(X), before)
    assert not torch.equal(tracker.posterior().draw(2, seeded())(X), before)


def test_another_module_is_refused():
    with pytest.raises(ValueError, match="has no 0.weight"):
        SWA(small()).update(nn.Linear(2, 1))
    with pytest.raises(ValueError, match="scale must be positive"):
        tracker = SWAG(small(), rank=1)
        run(tracker, small(), 2)
        tracker.posterior(0.0)


@pytest.mark.parametrize("sizes", [(40,), (20, 20)])
def test_statistics_of_all_draws_are_those_of_update_bn(sizes):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3),
        nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1),
    ).double()  # fmt: skip
    tracker = SWAG(network, rank=2)
    run(tracker, network, 4)
    draws = tracker.posterior().draw(5, seeded(2))
    X = torch.randn(sum(sizes), 2, generator=seeded(3), dtype=torch.float64)
    before = draws(X)
    assert refresh_batch_norm(draws, [(x, None) for x in X.split(sizes)]) is draws
    for i, values in enumerate(draws(X)):
        single = copy.deepcopy(network)
        torch.nn.utils.vector_to_parameters(draws.weights[i], single.parameters())
        torch.optim.swa_utils.update_bn(X.split(sizes), single)
        torch.testing.assert_close(values, single.eval()(X))
    assert (draws(X) - before).abs().max() > 0.1
    # Of batches of unequal size, upstream weighs each alike; here each point counts.
    refresh_batch_norm(draws, X.split((30, 10)[: len(sizes)] if len(sizes) > 1 else 40))
    first = X @ draws.net.unflatten(draws.weights)["0.weight"].mT
    first = first + draws.net.unflatten(draws.weights)["0.bias"][:, None]
    torch.testing.assert_close(draws.statistics["1.running_mean"], first.mean(1))
    twin = copy.deepcopy(draws)
    torch.testing.assert_close(twin(X), draws(X))
    with pytest.raises(ValueError, match="at least one batch"):
        refresh_batch_norm(draws, iter(()))


def test_weights_by_name_stand_for_a_module():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    by_module, by_name = SWAG(network, rank=3), SWAG(network, rank=3)
    for step in range(3):
        with torch.no_grad():
            for value in [*network.parameters(), network[1].running_mean]:
                value.add_(step + 1.0)
        by_module.update(network)
        by_name.update({k: v.clone() for k, v in network.state_dict().items()})
    a, b = by_module.state_dict(), by_name.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert float(by_name.net.network[1].running_mean[0]) == 6.0
    stacked = {k: torch.stack([v, v]) for k, v in network.state_dict().items()}
    with pytest.raises(ShapeError, match=r"0.weight must have shape \(3, 2\).*\(2, 3,"):
        by_name.update(stacked)


def test_results_of_searches_have_short_reprs():
    network = nn.Linear(2, 1)
    tracker = SWAG(network)
    tracker.update(network)
    found = ScaleTuning(
        SWA.posterior(tracker), 0.5, (0.0, 0.5), torch.tensor([-1, 2.0])
    )
    assert repr(found) == "ScaleTuning(scale=0.5, scores={0: -1, 0.5: 2})"
    chains = SubspaceChains(
        found.posterior, torch.zeros(2, 7, 3), torch.zeros(2, 7), 9, None, None
    )
    assert repr(chains) == "SubspaceChains(chains=2, draws=7, coordinates=3)"
