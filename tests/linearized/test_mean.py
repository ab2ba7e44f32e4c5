"""The prior mean f - J w*: upstream's contract, and use in upstream's models."""

import unittest

import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.test.base_mean_test_case import BaseMeanTestCase
from torch import nn

from gpbridge.functional import FunctionalNet
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.linearized.mean import TangentMean
from gpbridge.testing import assert_gradients_match_finite_differences
from tests import oracles_linearized as oracles
from tests.cases import every_net
from tests.linearized.problems import build, inputs, network, targets

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Padded(nn.Module):
    """Takes a vector or any width up to ten, since upstream's contract feeds both."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.layers(nn.functional.pad(x, (0, 10 - x.shape[-1])))


class TestTangentMean(BaseMeanTestCase, unittest.TestCase):
    def create_mean(self):
        return TangentMean(FunctionalNet(Padded()))


@every_net
def test_it_is_the_output_minus_its_first_order_part(case, m):
    torch.manual_seed(1)
    net, X = case.network(m), case.inputs(4)
    shaped = X if case.input_shape is None else X.reshape(-1, *case.input_shape)
    expected = oracles.tangent(net, shaped).mean().reshape(4, m)
    mean = TangentMean(FunctionalNet(net, input_shape=case.input_shape))
    got = mean(X)
    assert got.shape == ((4,) if m == 1 else (4, m))
    torch.testing.assert_close(got.reshape(4, m), expected, **EXACT)


def test_a_network_linear_in_its_weights_has_none():
    net = nn.Linear(2, 3).double()
    assert TangentMean(FunctionalNet(net))(inputs(5)).abs().max() < 1e-12


def test_its_gradient_in_the_inputs_matches_finite_differences():
    mean = TangentMean(FunctionalNet(network(2)))
    assert_gradients_match_finite_differences(mean, inputs(3))


def test_with_the_tangent_kernel_it_makes_upstreams_gp_the_linearized_one():
    net, X = FunctionalNet(network()), inputs()
    Y, X_test = targets("gaussian", X), inputs(5, seed=7)
    likelihood = GaussianLikelihood().double()
    likelihood.noise = torch.tensor([0.03], dtype=torch.float64)
    kernel = NeuralTangentKernel(net)
    kernel.prior_variance = 0.4
    model = SingleTaskGP(
        X,
        Y,
        likelihood=likelihood,
        mean_module=TangentMean(net),
        covar_module=kernel,
        outcome_transform=None,
    )
    got, expected = model.posterior(X_test), build("gaussian").posterior(X_test)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.variance, expected.variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian", "multitask", "softmax"])
def test_without_offset_the_mean_is_zero_also_as_a_module(name):
    model, X = build(name, offset=False), inputs(4, seed=7)
    assert not isinstance(model.mean_module, TangentMean)
    assert torch.equal(model.mean_module(X), torch.zeros_like(model(X).mean))
    assert torch.equal(model.train()(X).mean, model.mean_module(X))
    assert not [key for key in model.state_dict() if key.startswith("mean_module")]


def test_the_network_appears_once_in_the_state():
    model = build("gaussian")
    names = [name for name in model.state_dict() if "0.weight" in name]
    assert len(names) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_follows_the_dtype_of_the_inputs(dtype):
    mean = TangentMean(FunctionalNet(network()))
    assert mean(inputs(3).to(dtype)).dtype == dtype
