"""The weight decay that matches the prior of highest evidence, and its schedule."""

import pytest
import torch
from gpytorch.likelihoods import BernoulliLikelihood
from scipy.optimize import minimize_scalar
from torch import nn

from gpbridge.dnn import fit_map
from gpbridge.selection import MatchedWeightDecay
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized as oracles
from tests.cases import NETS
from tests.linearized.problems import (
    PROBLEMS,
    curvature,
    inputs,
    network,
    targets,
)


def updated(decay, net, X, Y):
    return decay(decay.first_epoch, net, X, Y)


def best_decay(name, net, X, Y):
    """Maximise the evidence at the trained weights over s / v, v in closed form."""
    train = oracles.tangent(net, X)
    n, count = len(X), len(train.value)
    if PROBLEMS[name].gaussian:
        error = (Y.reshape(-1) - train.value).square().sum()
        lam = torch.eye(count).double()
    else:
        lam = curvature(name, net, X)
    norm = train.weights.square().sum()

    def loss(log_ratio):
        ratio = torch.tensor(10.0**log_ratio).double()  # s / v
        H = torch.eye(train.J.shape[1]).double() + ratio * train.J.T @ lam @ train.J
        value = -0.5 * torch.logdet(H)
        if PROBLEMS[name].gaussian:
            noise = (error + norm / ratio) / count
            return -float(value - 0.5 * count * noise.log())
        return -float(value - 0.5 * norm / ratio)

    grid = torch.linspace(-6, 6, 49)
    start = min(grid.tolist(), key=loss)
    found = minimize_scalar(loss, bounds=(start - 0.3, start + 0.3), method="bounded")
    return 1 / (10**found.x * n)


@pytest.mark.parametrize("n", [12, 40])  # fewer and more than p weights
@pytest.mark.parametrize("name", ["gaussian", "multitask", "logistic", "softmax"])
def test_it_maximises_the_evidence_at_the_trained_weights(name, n):
    net, X = network(PROBLEMS[name].m), inputs(n)
    Y = targets(name, X)
    expected = best_decay(name, net, X, Y)
    decay = MatchedWeightDecay(bounds=(1e-12, 1e6))
    got = updated(decay, net, X, Y)
    # Two neighbours of its grid are a quarter of a decade apart.
    assert 10**-0.15 < got / expected < 10**0.15


def test_a_likelihood_can_be_chosen():
    net, X = network(), inputs(40)
    Y = targets("probit", X)
    expected = best_decay("probit", net, X, Y)
    decay = MatchedWeightDecay(bounds=(1e-12, 1e6), likelihood=BernoulliLikelihood())
    assert 10**-0.15 < updated(decay, net, X, Y) / expected < 10**0.15


def test_it_stays_in_its_bounds():
    net, X = network(), inputs(12)
    Y = targets("gaussian", X)
    assert updated(MatchedWeightDecay(bounds=(5.0, 6.0)), net, X, Y) == 5.0
    assert updated(MatchedWeightDecay(bounds=(1e-9, 1e-8)), net, X, Y) == 1e-8


def test_updates_come_at_their_epochs(monkeypatch):
    seen = []

    def update(self, network, X, Y):
        seen.append(len(seen))
        return float(len(seen))

    monkeypatch.setattr(MatchedWeightDecay, "_update", update)
    decay = MatchedWeightDecay(epochs=50, initial=0.5, first_epoch=10, every=20)
    values = [decay(epoch, None, None, None) for epoch in range(50)]
    assert values == [0.5] * 10 + [1.0] * 20 + [2.0] * 20
    assert len(seen) == 2
    late = MatchedWeightDecay(epochs=50, first_epoch=35, every=10)
    assert len({late(epoch, None, None, None) for epoch in range(50)}) == 2


@pytest.mark.parametrize("name", ["gaussian", "softmax"])
def test_training_with_it_moves_the_decay_and_not_the_users_network(name):
    X, net = inputs(40), network(PROBLEMS[name].m)
    Y = targets(name, X)
    decay = MatchedWeightDecay(epochs=30, first_epoch=5, every=10)
    with assert_module_unchanged(net):
        result = fit_map(
            net,
            X,
            Y,
            epochs=30,
            weight_decay=decay,
            validation_fraction=0.0,
            schedule="cosine",
            progress=False,
        )
    history = result.history["weight_decay"]
    assert history[:5] == [1e-3] * 5 and len(set(history)) >= 3
    assert result.weight_decay == history[-1] == decay.value
    assert 1e-7 <= result.weight_decay <= 1e-1


def test_networks_on_images_and_in_float32():
    case = NETS["images"]
    net = case.network(3).float()
    X = case.inputs(12).float()
    Y = torch.arange(12) % 3
    decay = MatchedWeightDecay(input_shape=case.input_shape)
    with assert_module_unchanged(net):
        assert 1e-7 <= updated(decay, net, X, Y) <= 1e-1


def test_noisier_targets_ask_for_more_decay():
    # Weights that fit noise are too large: the evidence takes them back.
    X, net = inputs(60), network(scale=0.5)
    with torch.no_grad():
        clean = net(X)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    decays = [
        updated(MatchedWeightDecay(bounds=(1e-12, 1e6)), net, X, clean + c * noise)
        for c in (0.01, 0.1, 1.0)
    ]
    assert decays[0] < decays[1] < decays[2]


@pytest.mark.parametrize("name", ["epochs", "initial", "every"])
def test_options_must_be_positive(name):
    with pytest.raises(
        ValueError, match=f"{name} must be positive and finite, but is 0"
    ):
        MatchedWeightDecay(**{name: 0})


def test_it_leaves_the_mode_of_the_network_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    X = inputs(10)
    with assert_module_unchanged(net.train()):
        updated(MatchedWeightDecay(), net, X, targets("gaussian", X))
