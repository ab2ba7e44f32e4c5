"""Deep kernels fitted with held-out data: the noise is one that data support."""

import math
import warnings

import pytest
import torch
from botorch.exceptions.warnings import InputDataWarning, OptimizationWarning
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize
from gpytorch.kernels import RBFKernel
from torch import nn

from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.kernels.deep import DeepKernel
from gpbridge.selection import deep_kernel
from gpbridge.selection.deep_kernel import fit_deep_kernel, held_out_noise


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def data(generator):
    X = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(60, 1, dtype=X.dtype, generator=generator)
    return X, 5 + 2 * (X[:, :1] - torch.relu(X[:, 1:2])) + 0.8 * noise


def network(width=20):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5))


def fit(data, net=None, **options):
    options = {"max_epochs": 30, "check_every": 10, "progress": False} | options
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        warnings.simplefilter("ignore", InputDataWarning)
        warnings.simplefilter("ignore", OptimizationWarning)
        return fit_deep_kernel(net or network(), *data, generator=generator, **options)


def test_held_out_noise_is_the_best_of_all_noises(data):
    X, Y = data
    model = SingleTaskGP(X[:40], Y[:40], covar_module=RBFKernel())
    targets = model.outcome_transform(Y[40:])[0].squeeze(-1)
    found = held_out_noise(model.eval(), X[40:], targets)

    def score(noise):  # Rasmussen and Williams 2006, eqs. (2.22) to (2.24)
        x, y = model.train_inputs[0], model.train_targets
        mean = model.mean_module.constant
        with torch.no_grad():
            gram = model.covar_module(x).to_dense() + noise * torch.eye(40)
            cross = model.covar_module(X[40:], x).to_dense()
            solved = torch.linalg.solve(gram, cross.mT).mT
            mu = mean + solved @ (y - mean)
            v = 1 - (solved * cross).sum(-1) + noise
            return -torch.distributions.Normal(mu, v.sqrt()).log_prob(targets)

    at_best = score(found.noise_variance)
    torch.testing.assert_close(found.nll, at_best, rtol=1e-7, atol=1e-7)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert score(factor * found.noise_variance).mean() > at_best.mean()
    floor = held_out_noise(model, X[40:], targets, lowest=3.0)
    assert floor.noise_variance >= 3.0 - 1e-9


def test_the_model_predicts_and_its_noise_is_recorded(data):
    model = fit(data)
    record = model.deep_kernel_fit
    noise = model.likelihood.noise.item()
    assert noise == pytest.approx(record.noise_variance)
    assert noise >= record.learnt_noise_variance * (1 - 1e-9)
    assert len(record.validation_rows) == 15
    assert len(record.history) == 4
    # Units of the variance of the targets: the truth is 0.64 over about 5.
    truth = 0.64 / data[1].var().item()
    assert truth / 3 < noise < 3 * truth
    assert not model.training and model.train_targets.shape == (60,)
    X = torch.randn(200, 4, generator=torch.Generator().manual_seed(9)).double()
    posterior = model.posterior(X)
    error = posterior.mean - (5 + 2 * (X[:, :1] - torch.relu(X[:, 1:2])))
    assert error.square().mean().sqrt() < 0.8
    inside = (error.abs() < 1.96 * posterior.variance.sqrt()).double().mean()
    assert inside > 0.85


def test_it_is_deterministic_and_leaves_network_and_global_state(data):
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    first, second = fit(data, net), fit(data, net)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    X = data[0][:5]
    torch.testing.assert_close(first.posterior(X).mean, second.posterior(X).mean)


def test_features_are_trained_only_if_that_helps_by_a_standard_error(data, monkeypatch):
    monkeypatch.setattr(deep_kernel, "ADOPTED", math.inf)
    net = network()
    kept = fit(data, net, network_learning_rate=1e-2)
    assert kept.deep_kernel_fit.epoch == 0
    start = fit(data, net, freeze=True)
    X = data[0][:5] + 0.1
    torch.testing.assert_close(kept.posterior(X).mean, start.posterior(X).mean)


def test_trained_features_are_adopted_where_they_are_needed(generator):
    X = torch.rand(120, 4, dtype=torch.float64, generator=generator) * 2 - 1
    Y = torch.sign(X[:, :1] * X[:, 1:2]) + X[:, 2:3]
    torch.manual_seed(1)
    model = fit(
        (X, Y), network(50), network_learning_rate=1e-2, max_epochs=100, patience=5
    )
    record = model.deep_kernel_fit
    assert record.epoch > 0
    assert min(record.history) < record.history[0]


def test_frozen_networks_are_not_trained(data):
    net = network()
    model = fit(data, net, freeze=True)
    own = model.covar_module.network.network.state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(own[name], value.double(), rtol=0, atol=0)
    assert model.deep_kernel_fit.epoch == 0


def test_far_too_small_learnt_noise_is_told(data, monkeypatch):
    monkeypatch.setattr(deep_kernel, "FAR_BELOW", 0.5)
    with pytest.warns(
        UserWarning, match="the features overfit. The larger one is used"
    ):
        fit(data, freeze=True)


def test_options_reach_the_kernel(data):
    X, Y = data
    base = RBFKernel(ard_num_dims=5)
    model = fit(
        (10 * X + 3, Y),
        base_kernel=base,
        spectral_norm=0.9,
        input_transform=Normalize(4),
        validation_rows=torch.arange(10),
        freeze=True,
    )
    assert isinstance(model.covar_module, DeepKernel)
    assert model.covar_module.base_kernel is base
    assert model.covar_module.network.spectral_norm == 0.9
    assert model.deep_kernel_fit.validation_rows.tolist() == list(range(10))
    assert model.posterior(10 * X[:3] + 3).mean.shape == (3, 1)


def test_running_out_of_epochs_is_told(generator):
    X = torch.rand(80, 4, dtype=torch.float64, generator=generator) * 2 - 1
    Y = torch.sign(X[:, :1] * X[:, 1:2]) + X[:, 2:3]
    torch.manual_seed(1)
    with pytest.warns(NotConvergedWarning, match="still improved at epoch 2, the last"):
        fit_deep_kernel(
            network(50),
            X,
            Y,
            network_learning_rate=1e-2,
            max_epochs=2,
            check_every=1,
            progress=False,
            generator=generator,
        )


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


def test_a_breakdown_keeps_the_best_state(data):
    with pytest.warns(NotConvergedWarning, match="broke down at epoch"):
        model = fit_deep_kernel(
            nn.Sequential(nn.Linear(4, 3), Exponential()),
            *data,
            network_learning_rate=1e30,
            progress=False,
            max_epochs=20,
            generator=torch.Generator().manual_seed(0),
        )
    assert torch.isfinite(model.posterior(data[0][:3]).mean).all()


def test_float32_data_stay_float32(data):
    X, Y = data
    model = fit((X.float(), Y.float()), max_epochs=10)
    assert model.posterior(X[:2].float()).mean.dtype == torch.float32


class TestRefusals:
    def test_several_outputs(self, data):
        X, Y = data
        with pytest.raises(ShapeError, match="Fit one model per output and join"):
            fit((X, torch.cat([Y, Y], -1)))

    def test_too_few_rows(self, data):
        X, Y = data
        with pytest.raises(
            ValueError, match="leave two rows on either side, but holds 1"
        ):
            fit((X[:4], Y[:4]))

    def test_rows_on_one_side_only(self, data):
        with pytest.raises(ValueError, match="holds 60 of 60"):
            fit(data, validation_rows=torch.arange(60))
