"""Frozen functions at common inputs, and each at inputs of its own."""

import copy
import pickle

import pytest
import torch
from botorch.models import ModelListGP, SingleTaskGP
from gpytorch.kernels import MaternKernel, ScaleKernel
from torch import nn

from gpbridge import LinearizedGP
from gpbridge.acquisition import draw_functions
from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn import DeepEnsemble, MCDropout, build_deep_gp
from gpbridge.draws import WeightDraws
from gpbridge.function_draws import SeenDraws, SomeDraws, evaluate_each, take
from gpbridge.functional import FunctionalNet
from gpbridge.weights import EmpiricalWeights, GaussianWeights, MixtureWeights


class Nested(nn.Module):
    """No chain, so that it is vmapped."""

    def __init__(self, m=1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
        self.head = nn.Linear(4, m)

    def forward(self, X):
        return self.head(self.body(X)) + X.sum(-1, keepdim=True)


def points(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def seeded():
    return torch.Generator().manual_seed(0)


def gaussian(network):
    net = FunctionalNet(network.double())
    p = net.num_params
    return GaussianWeights(net, points(p), variance=torch.ones(p).double())


def chain(m=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, m)).double()


def weight_draws(network, chunk_size=None, vectorized=True):
    draws = gaussian(network).draw(4, seeded())
    draws.chunk_size, draws.net.vectorized = chunk_size, vectorized
    return draws


def with_statistics():
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    draws = gaussian(network.eval()).draw(4, seeded())
    refresh_batch_norm(draws, [points(20, 2)])
    return draws


def two_architectures():
    networks = [chain(), Nested().double(), chain(), Nested().double()]
    return DeepEnsemble([network.eval() for network in networks]).draw()


def dropout(chunk_size=None):
    network = nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 1)
    ).double()
    return MCDropout(network).draw(4, seeded(), chunk_size)


def deep_gp():
    return build_deep_gp(points(20, 2), num_inducing=5, generator=seeded()).draw(
        4, seeded()
    )


def several_outputs():
    X = points(8, 2)
    models = [SingleTaskGP(X, X[:, i : i + 1].sin()) for i in (0, 1)]
    return draw_functions(ModelListGP(*models), 4, seeded())


def linearized():
    X = points(9, 2)
    return LinearizedGP(chain(), X, X[:, :1]).draw(4, seeded())


KINDS = {
    "chain": lambda: weight_draws(chain()),
    "chain in chunks": lambda: weight_draws(chain(), 3),
    "nested": lambda: weight_draws(Nested(2)),
    "looped": lambda: weight_draws(Nested(), vectorized=False),
    "own statistics": with_statistics,
    "tangent": linearized,
    "mixture": lambda: MixtureWeights([gaussian(chain()), gaussian(Nested())]).draw(
        4, seeded()
    ),
    "two architectures": two_architectures,
    "dropout": dropout,
    "dropout in chunks": lambda: dropout(1),
    "deep gp": deep_gp,
    "several outputs": several_outputs,
    "some": lambda: SomeDraws(dropout(), torch.tensor([3, 0, 3, 1])),
    "seen": lambda: SeenDraws(
        weight_draws(chain()), torch.exp, lambda Y, Z: Y + Z[..., :1]
    ),
}
EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
def test_each_draw_at_its_own_inputs_is_that_draw(kind):
    draws, X = KINDS[kind](), points(4, 3, 5, 2)
    assert draws.num_samples == 4
    expected = torch.stack([draws(X[i])[i] for i in range(4)])
    torch.testing.assert_close(draws.each(X), expected)
    torch.testing.assert_close(evaluate_each(draws, X[:, 0]), expected[:, 0])


@EACH
def test_gradients_of_a_draw_reach_its_own_inputs(kind):
    draws, X = KINDS[kind](), points(4, 2, 2)
    own = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(draws.each(own).sum(), own)
    common = X.clone().requires_grad_()
    values = torch.stack([draws(common[i])[i] for i in range(4)]).sum()
    (expected,) = torch.autograd.grad(values, common)
    torch.testing.assert_close(gradient, expected)


@EACH
@pytest.mark.parametrize("numbers", [[2], [3, 1], [0, 0, 2, 0, 1]])
def test_some_of_the_functions_are_those(kind, numbers):
    draws, X, numbers = KINDS[kind](), points(5, 2), torch.tensor(numbers)
    some = take(draws, numbers)
    assert some.num_samples == len(numbers)
    torch.testing.assert_close(some(X), draws(X)[numbers])
    own = points(len(numbers), 3, 2)
    expected = torch.stack([draws(x)[i] for x, i in zip(own, numbers, strict=True)])
    torch.testing.assert_close(some.each(own), expected)


@pytest.mark.parametrize("kind", ["chain", "tangent", "several outputs", "some"])
def test_some_functions_can_be_copied_and_moved(kind):
    some, X = take(KINDS[kind](), torch.tensor([1, 2])), points(5, 2)
    for twin in (copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
        assert torch.equal(twin(X), some(X))


def test_functions_that_know_only_common_inputs_are_evaluated_at_all():
    slopes = torch.tensor([1.0, 2.0, 3.0]).double()

    def lines(X):
        return slopes.reshape(-1, *[1] * X.dim()) * X[..., :1]

    X = points(3, 4, 2)
    expected = slopes[:, None, None] * X[..., :1]
    torch.testing.assert_close(evaluate_each(lines, X), expected)
    some = take(lines, torch.tensor([2, 2]))
    torch.testing.assert_close(some.each(X[:2]), 3 * X[:2, :, :1])
    torch.testing.assert_close(some(X[0]), 3 * X[0, :, :1].expand(2, -1, -1))


def test_inputs_of_other_draws_are_refused():
    with pytest.raises(ShapeError, match="X must be ``4 x ... x n x 2``"):
        dropout().each(points(3, 5, 2))
    with pytest.raises(ShapeError, match="X must be ``4 x ... x n x 2``"):
        deep_gp().each(points(3, 5, 2))


def test_an_empirical_member_keeps_its_number():
    net = FunctionalNet(chain())
    weights = points(3, net.num_params)
    draws = EmpiricalWeights(net, weights).draw()
    X = points(4, 2)
    expected = WeightDraws(net, weights[1:2])(X)
    torch.testing.assert_close(draws.take(torch.tensor([1]))(X), expected)


def test_a_batch_of_kernels_is_drawn_output_by_output():
    X = points(8, 2)
    Y = torch.stack([X[:, 0].sin(), 5 + X[:, 1]], -1)
    kernel = ScaleKernel(
        MaternKernel(2.5, batch_shape=torch.Size([2])), batch_shape=torch.Size([2])
    )
    model = SingleTaskGP(X, Y, covar_module=kernel)
    model.likelihood.noise = torch.full((2, 1), 1e-4).double()
    draws = draw_functions(model, 2000, seeded())
    with torch.no_grad():
        posterior = model.posterior(points(3, 2, seed=1))
        values = draws(points(3, 2, seed=1))
    error = (values.mean(0) - posterior.mean).abs() / posterior.variance.sqrt()
    assert bool((error < 5 / 2000**0.5).all())
    torch.testing.assert_close(
        values.std(0), posterior.variance.sqrt(), rtol=0.15, atol=0
    )
