"""A GP that shows its training data to the network once is upstream's GP."""

import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

from gpbridge.kernels import NeuralTangentKernel
from gpbridge.models import NetworkKernelGP
from gpbridge.testing import assert_gradients_match_finite_differences

CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def points(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)


def kernel(name):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    tangent = NeuralTangentKernel(net)
    matern = ScaleKernel(MaternKernel(nu=2.5)).double()
    return {
        "alone": lambda: tangent,
        "sum": lambda: ScaleKernel(tangent).double() + matern,
        "product": lambda: tangent * matern,
        "matern": lambda: matern,
    }[name]()


def pair(name, n=15, transforms=True):
    X = points(n)
    Y = torch.sin(6 * X.sum(-1, keepdim=True))
    models = []
    for kind in (NetworkKernelGP, SingleTaskGP):
        options = {}
        if transforms:
            bounds = torch.tensor([[-1.0, -1.0], [2.0, 2.0]], dtype=torch.float64)
            options = {
                "input_transform": Normalize(2, bounds=bounds),
                "outcome_transform": Standardize(1),
            }
        else:
            Y = (Y - Y.mean()) / Y.std()
            options = {"outcome_transform": None}
        model = kind(X, Y, covar_module=kernel(name), **options)
        model.likelihood.noise = torch.tensor([0.03], dtype=torch.float64)
        models.append(model)
    return models


def assert_same(model, other, X):
    got, expected = model.posterior(X), other.posterior(X)
    torch.testing.assert_close(got.mean, expected.mean, **CLOSE)
    torch.testing.assert_close(
        got.distribution.covariance_matrix,
        expected.distribution.covariance_matrix,
        **CLOSE,
    )


@pytest.mark.parametrize("transforms", [True, False])
@pytest.mark.parametrize("name", ["alone", "sum", "product", "matern"])
def test_posteriors_are_upstreams(name, transforms):
    model, other = pair(name, transforms=transforms)
    for shape in ((4,), (3, 4), (2, 3, 1)):
        assert_same(model, other, points(*shape, seed=5))


@pytest.mark.parametrize("name", ["alone", "sum", "product"])
def test_conditioned_models_and_fantasies_are_upstreams(name):
    X, Y = points(2, seed=6), points(2, seed=7)[:, :1]
    conditioned = []
    fantasies = []
    for model in pair(name):
        model.posterior(points(3))
        conditioned.append(model.condition_on_observations(X, Y))
        sampler = SobolQMCNormalSampler(torch.Size([3]), seed=0)
        fantasies.append(model.fantasize(X, sampler))
    assert_same(*conditioned, points(4, seed=5))
    assert_same(*fantasies, points(4, seed=5))


def test_a_fit_and_new_data_are_seen():
    model, other = pair("sum")
    for m in (model, other):
        mll = ExactMarginalLogLikelihood(m.likelihood, m)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 5}})
    assert_same(model, other, points(4, seed=5))
    for m in (model, other):
        m.set_train_data(points(15, seed=9), m.train_targets, strict=False)
        m.eval()
    assert_same(model, other, points(4, seed=5))


def test_acquisitions_have_upstreams_values_and_gradients():
    model, other = pair("sum")
    X = points(3, 2, seed=5)
    sampler = SobolQMCNormalSampler(torch.Size([16]), seed=0)
    ours, theirs = (
        qLogExpectedImprovement(m, 0.5, sampler=sampler) for m in (model, other)
    )
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-7)
    assert_gradients_match_finite_differences(ours, X[:1], rtol=1e-4)


def test_the_network_sees_the_training_data_once(monkeypatch):
    model, _ = pair("sum", transforms=False)
    seen = []
    plain = NeuralTangentKernel._features

    def counted(self, x, group):
        seen.append(x.shape[-2])
        return plain(self, x, group)

    monkeypatch.setattr(NeuralTangentKernel, "_features", counted)
    monkeypatch.setattr(
        model.covar_module.kernels[0].base_kernel, "representation", "function"
    )
    model.posterior(points(3, 2, seed=5))
    seen.clear()
    for seed in range(4):
        model.posterior(points(3, 2, seed=seed))
    assert max(seen) < 15  # not the fifteen points of training


def test_independent_outputs_are_upstreams():
    X, batch = points(15), torch.Size([2])
    Y = torch.cat([torch.sin(6 * X[:, :1]), torch.cos(4 * X[:, 1:])], -1)
    models = []
    for kind in (NetworkKernelGP, SingleTaskGP):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        tangent = NeuralTangentKernel(net, batch_shape=batch)
        tangent.prior_variance = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
        models.append(
            kind(X, Y, covar_module=tangent, outcome_transform=Standardize(2))
        )
    for shape in ((4,), (3, 4)):
        got, expected = (m.posterior(points(*shape, seed=5)) for m in models)
        torch.testing.assert_close(got.mean, expected.mean, **CLOSE)
        torch.testing.assert_close(got.variance, expected.variance, **CLOSE)
