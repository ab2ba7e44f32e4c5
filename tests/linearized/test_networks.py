"""Every structure of network through the whole model, and none of them changed."""

import copy
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import SoftmaxLikelihood
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.selection import fit_evidence
from gpbridge.testing import assert_module_unchanged
from tests import oracles_linearized as oracles
from tests.cases import LOOPED, NETS, SLOW, every_net

EXACT = {"rtol": 1e-8, "atol": 1e-10}
NOISE = 0.05
REFUSED = (ValueError, TypeError, RuntimeError, InputDataError)


def data(case, m, n=6):
    X = case.inputs(n)
    Y = torch.sin(2 * X[:, :1] + torch.arange(m))
    return X, Y


def shaped(case, X):
    return X if case.input_shape is None else X.reshape(-1, *case.input_shape)


@every_net
def test_every_network_has_the_dense_posterior_and_evidence(case, m):
    torch.manual_seed(1)
    net = case.network(m)
    X, Y = data(case, m)
    X_test = case.inputs(3, seed=5)
    with assert_module_unchanged(net):
        model = LinearizedGP(net, X, Y, noise=NOISE, input_shape=case.input_shape)
        model.prior_variance = 0.7
        posterior = model.posterior(X_test)
        evidence = model.log_evidence()
    noise = model.noise_variance.repeat(6).diag()
    train, test = (oracles.tangent(net, shaped(case, x)) for x in (X, X_test))
    mean, covariance = oracles.gaussian_posterior(train, test, 0.7, noise, Y)
    torch.testing.assert_close(posterior.mean, mean.reshape(3, m), **EXACT)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, **EXACT)
    expected = oracles.gaussian_log_evidence(train, 0.7, noise, Y)
    torch.testing.assert_close(evidence, expected, **EXACT)


def every_call(model, X, Y):
    """What a user can ask of a model, one after the other."""
    model.train()
    model(X)
    model.eval()
    posterior = model.posterior(X.clone().requires_grad_())
    posterior.variance.sum().backward()
    model.predict(X)
    model.draw(2)(X)
    if model.noise == "learn" and not hasattr(model.likelihood, "num_classes"):
        fit_evidence(model, warn=False)
    model.condition_on_observations(X[:1], Y[:1]).posterior(X)
    copy.deepcopy(model).posterior(X)
    if not any(nn.utils.parametrize.is_parametrized(m) for m in model.modules()):
        pickle.loads(pickle.dumps(model)).posterior(X)
    model.load_state_dict(model.state_dict())
    repr(model)


@SLOW
@pytest.mark.parametrize("name", NETS)
def test_no_call_changes_the_users_network(name):
    torch.manual_seed(1)
    case = NETS[name]
    m = case.outputs[0]
    net = case.network(m).train()
    net.register_forward_hook(lambda *args: None)
    net.register_forward_pre_hook(lambda *args: None)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
        break
    X, Y = data(case, m)
    with assert_module_unchanged(net):
        model = LinearizedGP(net, X, Y, input_shape=case.input_shape)
        every_call(model, X, Y)


@pytest.mark.parametrize("name", ["batch_norm", "dropout", "transformer", "images"])
def test_nor_under_labels(name):
    torch.manual_seed(1)
    case = NETS[name]
    net = case.network(3).train()
    X, Y = case.inputs(6), torch.arange(6) % 3
    with assert_module_unchanged(net):
        likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
        model = LinearizedGP(net, X, Y, likelihood, input_shape=case.input_shape)
        every_call(model, X, Y)
        fit_evidence(model)
        _ = model.train_gap


@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.parametrize("name", LOOPED)
def test_networks_that_cannot_be_vectorised_work_one_point_at_a_time(name):
    case = LOOPED[name]
    torch.manual_seed(1)
    net = case.network(2)
    X, Y = data(case, 2)
    X_test = case.inputs(3, seed=5)
    with assert_module_unchanged(net):
        model = LinearizedGP(net, X, Y, noise=NOISE)
        posterior = model.posterior(X_test)
        draws = model.draw(3)(X_test)
    noise = model.noise_variance.repeat(6).diag()
    train, test = (oracles.tangent(net, x) for x in (X, X_test))
    mean, covariance = oracles.gaussian_posterior(train, test, 1.0, noise, Y)
    torch.testing.assert_close(posterior.mean, mean.reshape(3, 2), **EXACT)
    got = posterior.distribution.covariance_matrix
    torch.testing.assert_close(got, covariance, **EXACT)
    assert draws.shape == (3, 3, 2)


class Broken(nn.Module):
    """Fails, or misbehaves, after a number of calls."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 1), calls

    def forward(self, x):
        if torch.is_grad_enabled() and self.calls == 0:
            raise RuntimeError("no more")
        return self.layer(x)


def test_nor_does_a_call_that_fails():
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 1)).double()
    net.train()
    X = torch.rand(6, 2, dtype=torch.float64)
    Y = X[:, :1].sin()
    broken = Broken(0).double()
    with assert_module_unchanged(net), assert_module_unchanged(broken):
        for bad in (
            {"train_X": X * float("nan")},
            {"train_Y": Y * float("nan")},
            {"train_Y": Y[:3]},
            {"train_Y": Y[:, 0]},
            {"parameters": ["nothing"]},
            {"parameters": lambda name: False},
            {"groups": [["0.weight"]]},
            {"mean": "network"},
            {"noise": -1.0},
            {"input_shape": (3, 1)},
        ):
            with pytest.raises(REFUSED):
                LinearizedGP(**{"network": net, "train_X": X, "train_Y": Y} | bad)
        with pytest.raises(RuntimeError, match="no more"):
            LinearizedGP(broken, X, Y)
        model = LinearizedGP(net, X, Y)
        for bad_X in (X[:, :1], X * float("inf"), X.float()):
            for call in (model.posterior, model.predict, model.subset_output):
                with pytest.raises(REFUSED):
                    call(bad_X)


def test_batch_normalisation_uses_the_statistics_of_training():
    torch.manual_seed(1)
    net = NETS["batch_norm"].network(1).train()
    X, Y = data(NETS["batch_norm"], 1)
    model = LinearizedGP(net, X, Y, mean="network", noise=0.1)
    before = net[1].running_mean.clone(), net[1].num_batches_tracked.clone()
    alone = torch.cat([model.posterior(x[None]).mean for x in X])
    torch.testing.assert_close(model.posterior(X).mean, alone, **EXACT)
    net.eval()
    torch.testing.assert_close(alone, net(X).detach(), **EXACT)
    assert torch.equal(before[0], net[1].running_mean)
    assert torch.equal(before[1], net[1].num_batches_tracked)


def test_the_model_keeps_its_copy_when_the_user_trains_on():
    torch.manual_seed(1)
    net = NETS["tanh_mlp"].network(1)
    X, Y = data(NETS["tanh_mlp"], 1)
    model = LinearizedGP(net, X, Y, noise=NOISE)
    before = model.posterior(X).mean
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.0)
    torch.testing.assert_close(model.posterior(X).mean, before, rtol=0, atol=0)
