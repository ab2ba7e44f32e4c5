"""Subspaces of weights: bases, coordinates, posteriors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gpbridge.checks import ShapeError
from gpbridge.dnn.subspace import Subspace
from gpbridge.dnn.swag import SWAG
from gpbridge.draws import WeightDraws
from gpbridge.functional import FunctionalNet
from gpbridge.stacked_layers import stack_layers
from gpbridge.testing import assert_module_unchanged
from gpbridge.weights import EmpiricalWeights


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def small():
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def tracked(steps, rank=4, centering="running"):
    network, generator = small(), seeded(1)
    tracker = SWAG(network, rank=rank, centering=centering)
    for _ in range(steps):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        tracker.update(network)
    return tracker


@pytest.mark.parametrize("centering", ["running", "final"])
@pytest.mark.parametrize("steps", [3, 9])
def test_all_principal_directions_have_the_covariance_of_swag(centering, steps):
    tracker = tracked(steps, rank=min(steps, 4), centering=centering)
    subspace = Subspace.pca(tracker)
    low_rank = tracker.posterior(1.0, diagonal=False)
    torch.testing.assert_close(
        subspace.basis.mT @ subspace.basis, low_rank.covariance.to_dense()
    )
    torch.testing.assert_close(subspace.origin, low_rank.mean)
    lifted = subspace.gaussian_of(torch.zeros(subspace.dim).double())
    torch.testing.assert_close(
        lifted.covariance.to_dense(), low_rank.covariance.to_dense()
    )


def test_fewer_principal_directions_are_the_largest():
    tracker = tracked(9)
    whole, part = Subspace.pca(tracker), Subspace.pca(tracker, 2)
    torch.testing.assert_close(part.basis, whole.basis[:2])
    gram = whole.basis @ whole.basis.mT
    torch.testing.assert_close(gram, gram.diagonal().diag())
    assert bool((gram.diagonal().diff() < 0).all())
    with pytest.raises(
        ValueError, match="dim must be at most .* is 5 .* tracker has 4"
    ):
        Subspace.pca(tracker, 5)
    with pytest.raises(ValueError, match="is 4 and the tracker has 3 .of a rank of 4"):
        Subspace.pca(tracked(3), 4)
    with pytest.raises(RuntimeError, match="1 snapshots and needs 2"):
        Subspace.pca(tracked(1))


def test_a_subspace_does_not_follow_its_tracker():
    network = small()
    tracker = SWAG(network, rank=2, parameters="last_layer")
    for _ in range(3):
        with torch.no_grad():
            network[2].weight.add_(1.0)
        tracker.update(network)
    subspace, X = Subspace.pca(tracker), normal(4, 2)
    origin, basis = subspace.origin.clone(), subspace.basis.clone()
    before = subspace.posterior_of(torch.ones(1, 2)).draw()(X)
    with torch.no_grad():
        network[0].weight.add_(1.0)  # not random, and so taken at the last update
    tracker.update(network)
    assert torch.equal(subspace.origin, origin) and torch.equal(subspace.basis, basis)
    assert torch.equal(subspace.posterior_of(torch.ones(1, 2)).draw()(X), before)


@pytest.mark.parametrize("orthonormal", [True, False])
def test_random_directions_have_the_length_asked_for(orthonormal):
    net = FunctionalNet(small())
    subspace = Subspace.random(
        net, None, 5, orthonormal=orthonormal, length=0.3, generator=seeded()
    )
    gram = subspace.basis @ subspace.basis.mT / 0.3**2
    torch.testing.assert_close(gram.diagonal(), torch.ones(5).double())
    off = (gram - gram.diagonal().diag()).abs().max()
    assert off < 1e-12 if orthonormal else off > 0.05
    torch.testing.assert_close(subspace.origin, net.flatten(net.params).detach())
    again = Subspace.random(
        net, None, 5, orthonormal=orthonormal, length=0.3, generator=seeded()
    )
    assert torch.equal(again.basis, subspace.basis)
    with pytest.raises(ValueError, match="number of random weights, 13, but is 14"):
        Subspace.random(net, None, 14)


def test_the_plane_of_a_curve_holds_its_ends_and_its_middle():
    net = FunctionalNet(small())
    start, end, control = normal(3, 13)
    subspace = Subspace.curve(net, start, end, control)
    middle = 0.25 * start + 0.5 * control + 0.25 * end
    for w in (start, middle, end):
        torch.testing.assert_close(subspace.weights(subspace.coordinates(w)), w)
    u, v = subspace.basis
    torch.testing.assert_close(u, (end - start) / 3**0.5)
    assert abs(u @ v) < 1e-12
    height = (middle - start) - ((middle - start) @ u) / (u @ u) * u
    torch.testing.assert_close(v, height / 1.5)
    torch.testing.assert_close(subspace.origin, (start + middle + end) / 3)
    with pytest.raises(ValueError, match="lie on a line"):
        Subspace.curve(net, start, end, (start + end) / 2)
    with pytest.raises(ValueError, match="lie on a line"):
        Subspace.curve(net, start, start, control)


def test_coordinates_invert_weights_and_project_others():
    subspace = Subspace.random(
        FunctionalNet(small()), normal(13), 4, generator=seeded()
    )
    z = normal(2, 3, 4)
    w = subspace.weights(z)
    assert w.shape == (2, 3, 13)
    torch.testing.assert_close(subspace.coordinates(w), z)
    away = w + normal(13, seed=1)
    residual = away - subspace.weights(subspace.coordinates(away))
    assert (residual @ subspace.basis.mT).abs().max() < 1e-12
    # A direction of length zero is left alone.
    flat = Subspace(
        subspace.net, subspace.origin, subspace.basis * (z[0, 0] < 9)[:, None]
    )
    flat.basis[3] = 0
    assert bool((flat.coordinates(w)[..., 3] == 0).all())


def test_posteriors_over_coordinates_are_lifted_to_weights():
    subspace = Subspace.random(
        FunctionalNet(small()), normal(13), 3, generator=seeded()
    )
    z = normal(2, 5, 3)
    members = subspace.posterior_of(z)
    assert isinstance(members, EmpiricalWeights) and members.num_members == 10
    torch.testing.assert_close(members.weights, subspace.weights(z.reshape(10, 3)))
    L = normal(3, 3).tril()
    gaussian = subspace.gaussian_of(z[0, 0], L)
    B = subspace.basis
    torch.testing.assert_close(gaussian.covariance.to_dense(), B.mT @ L @ L.mT @ B)
    torch.testing.assert_close(gaussian.mean, subspace.weights(z[0, 0]))
    std = torch.tensor([1.0, 2.0, 3.0]).double()
    narrow = subspace.gaussian_of(z[0, 0], std).covariance.to_dense()
    torch.testing.assert_close(narrow, B.mT @ std.square().diag() @ B)


def test_state_and_copies_hold_everything():
    network = small()
    with assert_module_unchanged(network):
        subspace = Subspace.random(FunctionalNet(network), None, 2, generator=seeded())
        other = Subspace(subspace.net, normal(13), normal(2, 13, seed=1))
        other.load_state_dict(subspace.state_dict())
        for twin in (
            other,
            copy.deepcopy(subspace),
            pickle.loads(pickle.dumps(subspace)),
        ):
            assert torch.equal(
                twin.weights(torch.ones(2)), subspace.weights(torch.ones(2))
            )
        assert subspace.float().weights(torch.ones(2)).dtype == torch.float32
    assert "2 directions of 13 weights" in repr(subspace)


def test_tensors_that_do_not_fit_are_refused():
    net = FunctionalNet(small())
    with pytest.raises(ShapeError, match=r"origin must be ``13`` .* shape \(12,\)"):
        Subspace(net, normal(12), normal(2, 13))
    with pytest.raises(ShapeError, match=r"basis must be ``r x 13``.*shape \(13, 2\)"):
        Subspace(net, normal(13), normal(13, 2))
    with pytest.raises(ShapeError, match=r"basis must be ``r x 13``.*shape \(0, 13\)"):
        Subspace(net, normal(13), normal(0, 13))
    with pytest.raises(ShapeError, match=r"z must be ``... x 2`` coordinates.*\(3,\)"):
        Subspace(net, normal(13), normal(2, 13)).weights(normal(3))


class Tied(nn.Module):
    """A module of its own, whose two layers share their weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.head = nn.Linear(3, 3)
        self.head.weight = self.body[0].weight

    def forward(self, x):
        return self.head(self.body(x))


def stacks():
    act = nn.ReLU()
    frozen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    frozen[0].requires_grad_(False)
    half = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    half[2].bias.requires_grad_(False)
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    return {
        "tied": tied,
        "tied in a module": Tied(),
        "batch norm": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(),
        "dropout in eval mode": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).eval(),
        "nested": nn.Sequential(
            nn.Sequential(nn.Linear(3, 4), nn.SiLU()), nn.Linear(4, 2)
        ),
        "shared activation": nn.Sequential(
            nn.Linear(3, 4), act, nn.Linear(4, 5, bias=False), act, nn.Linear(5, 1)
        ),
        "fixed layer": frozen,
        "fixed bias": half,
        "one layer": nn.Linear(3, 2),
    }


@pytest.mark.parametrize("name", stacks())
def test_a_stack_has_the_outputs_and_gradients_of_the_network(name):
    net = FunctionalNet(stacks()[name].double())
    w = normal(4, net.num_params).requires_grad_()
    X = normal(5, 3, seed=1)
    fast = stack_layers(net)(net.unflatten(w), X.expand(4, 5, 3))
    slow = WeightDraws(net, w)(X)
    torch.testing.assert_close(fast, slow)
    weight = normal(*fast.shape, seed=2)
    torch.testing.assert_close(
        *(torch.autograd.grad((f * weight).sum(), w) for f in (fast, slow))
    )
