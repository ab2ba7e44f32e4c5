"""Ensembles as functions, against their modules one by one."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn import SWAG, DeepEnsemble, MCDropout, MultiSWAG, fit_ensemble, fit_map
from gpbridge.dnn.divergence import DivergedError
from gpbridge.dnn.replica_fit import ReplicaFit
from gpbridge.draws import JoinedDraws
from gpbridge.functional import FunctionalNet
from gpbridge.testing import assert_module_unchanged
from gpbridge.types import FunctionDraws, WeightPosterior
from gpbridge.weights import GaussianWeights
from tests.dnn.ensemble_problems import Nested


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def mlp(activation=nn.Tanh, width=3):
    return nn.Sequential(
        nn.Linear(2, width), activation(), nn.Linear(width, 1)
    ).double()


ENSEMBLES = {
    "one": lambda: [mlp()],
    "alike": lambda: [mlp() for _ in range(4)],
    "nested": lambda: [Nested() for _ in range(3)],
    "settings": lambda: [Nested(), Nested(scale=3.0), Nested(), Nested(scale=3.0)],
    "different": lambda: [mlp(), Nested(), mlp(nn.ReLU), mlp(width=5), mlp()],
    "slopes": lambda: [mlp(partial(nn.LeakyReLU, s)) for s in (0.1, 0.5, 0.1)],
}


@pytest.mark.parametrize("kind", ENSEMBLES)
def test_every_member_comes_once_in_order_with_its_own_statistics(kind):
    networks = ENSEMBLES[kind]()
    ensemble, X = DeepEnsemble(networks), random(3, 5, 2)
    with assert_module_unchanged(networks[0]):
        values = ensemble.draw()(X)
    expected = [net(X.reshape(-1, 2)).reshape(3, 5, 1) for net in networks]
    torch.testing.assert_close(values, torch.stack(expected))
    assert isinstance(ensemble, WeightPosterior)
    assert isinstance(ensemble.draw(), FunctionDraws)
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        torch.testing.assert_close(twin.draw()(X), values)
    other = DeepEnsemble(ENSEMBLES[kind]())
    other.load_state_dict(ensemble.state_dict())
    torch.testing.assert_close(other.draw()(X), values)
    X.requires_grad_()
    assert torch.autograd.grad(ensemble.draw()(X).sum(), X)[0].abs().max() > 0


def test_networks_that_differ_in_weights_alone_are_stacked():
    sizes = {
        kind: [group.num_members for group in DeepEnsemble(build()).groups]
        for kind, build in ENSEMBLES.items()
    }
    assert sizes == {
        "one": [1], "alike": [4], "nested": [3], "settings": [2, 2],
        "different": [2, 1, 1, 1], "slopes": [2, 1],
    }  # fmt: skip
    hooked = mlp()
    hooked.register_forward_hook(lambda *args: None)  # stays behind
    assert len(DeepEnsemble([hooked, mlp()]).groups) == 1


@pytest.mark.parametrize("kind", ["alike", "different"])
def test_members_come_evenly_and_from_the_seed(kind):
    networks = ENSEMBLES[kind]()
    ensemble, X, k = DeepEnsemble(networks), random(6, 2), len(networks)
    members = ensemble.draw()(X)
    for num_samples in (k - 2, k, 2 * k + 1):
        values = ensemble.draw(num_samples, seeded(1))(X)
        assert torch.equal(values, ensemble.draw(num_samples, seeded(1))(X))
        found = (values[:, None] - members).abs().amax((-2, -1)) < 1e-12
        assert torch.equal(found.sum(1), torch.ones(num_samples).long())
        counts = found.sum(0)
        assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="num_samples must be positive"):
        ensemble.draw(0)


def test_results_of_training_are_members():
    X, Y = random(20, 2), random(20, 1)
    options = {"epochs": 2, "progress": False}
    fit = fit_ensemble(mlp(), X, Y, 3, **options)
    expected = torch.stack([network(X) for network in fit.networks])
    torch.testing.assert_close(DeepEnsemble(fit).draw()(X), expected)
    results = [fit_map(mlp(), X, Y, **options), fit.member(1)]
    torch.testing.assert_close(DeepEnsemble(results).draw()(X)[1], expected[1])


def test_images_come_as_rows():
    networks = [
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        for _ in range(2)
    ]
    X = torch.randn(5, 16, generator=seeded())
    values = DeepEnsemble(networks, input_shape=(1, 4, 4)).draw()(X)
    torch.testing.assert_close(values[1], networks[1](X.reshape(5, 1, 4, 4)))


def test_an_ensemble_of_images_knows_their_shape():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1))
    X, Y = torch.randn(10, 16, generator=seeded()), torch.zeros(10, 1)
    fit = fit_ensemble(network, X, Y, 2, input_shape=(1, 4, 4), epochs=1)
    expected = fit.networks[1](X.reshape(10, 1, 4, 4))
    torch.testing.assert_close(DeepEnsemble(fit).draw()(X)[1], expected)


def test_an_ensemble_that_diverged_is_one_as_it_was_before():
    X, Y = random(20, 2), random(20, 1)
    for epochs in (0, 2):

        def poison(epoch, state, entry, last=epochs):
            if epoch == last - 1:
                state["0.bias"][1] = torch.nan

        options = {"epochs": 5, "progress": False, "early_stopping": False}
        scale = 1e200 if epochs == 0 else 1.0
        with pytest.raises(
            DivergedError, match=r"\.last_good.*learning_rate"
        ) as caught:
            fit_ensemble(mlp(), X, Y * scale, 3, callback=poison, **options)
        kept = caught.value.last_good
        assert DeepEnsemble(kept).draw()(X).isfinite().all() and len(repr(kept)) < 300
        assert len(kept.member(1).history.get("train_loss", [])) == epochs
        if epochs:
            fit = fit_ensemble(mlp(), X, Y, 3, **{**options, "epochs": 2})
            assert torch.equal(fit.weights, kept.weights)
    with pytest.raises(TypeError, match="a ReplicaFit, which holds weights alone"):
        DeepEnsemble(ReplicaFit(fit.weights, {}, {}, None))


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: DeepEnsemble([]), ValueError, "at least one network, but is empty"),
        (lambda: DeepEnsemble([len]), TypeError, "one is builtin_function_or_method"),
        (
            lambda: DeepEnsemble([mlp(), Nested(2)]).draw()(random(3, 2)),
            ShapeError,
            r"one number of outputs, but these architectures have \[1, 2\]",
        ),
        (lambda: DeepEnsemble(mlp()), TypeError, "one Sequential. Pass a list of net"),
        (lambda: MultiSWAG(mlp()), TypeError, "one Sequential. Pass a list of net"),
        (lambda: MultiSWAG([]), ValueError, "at least one module, but is empty"),
        (
            lambda: MultiSWAG([mlp(), mlp()]).update([mlp()]),
            ValueError,
            "must be the 2 that the tracker was built for, but are 1",
        ),
        (
            lambda: MultiSWAG([mlp(), mlp()]).update({}),
            ValueError,
            "but have no common number",
        ),
        (
            lambda: refresh_batch_norm(
                JoinedDraws([MCDropout(nn.Dropout()).draw(1)]), [random(2, 2)]
            ),
            TypeError,
            "nonlinear network, but are DropoutDraws",
        ),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_refreshed_statistics_replace_those_of_the_members():
    networks = [Nested() for _ in range(3)]
    with torch.no_grad():
        networks[1].body[0].bias.add_(1.0)  # frozen, and yet its own
    X, draws = random(30, 2), DeepEnsemble(networks).draw()
    before = draws(X)
    refresh_batch_norm(draws, [X])
    assert (draws(X) - before).abs().max() > 1e-3
    for network, values in zip(networks, draws(X), strict=True):
        torch.optim.swa_utils.update_bn([X], network)
        torch.testing.assert_close(values, network.eval()(X))


def test_members_are_networks_of_one_dtype():
    one = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="member 0 is torch.float32 and member 1 is"):
        DeepEnsemble([one, copy.deepcopy(one).double()])
    net = FunctionalNet(one)
    for wrong in (GaussianWeights(net, torch.zeros(3)), SWAG(one)):
        with pytest.raises(TypeError, match="Posteriors are joined by"):
            DeepEnsemble([wrong])
    ensemble = DeepEnsemble([one, nn.Linear(2, 1), nn.Sequential(one)])
    assert "num_members=3, architectures=2" in repr(ensemble)
    with pytest.raises(TypeError, match="Draw functions"):
        ensemble(torch.zeros(4, 2))
