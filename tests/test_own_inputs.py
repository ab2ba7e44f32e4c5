"""Frozen functions are evaluated at common inputs, or each at inputs of its own."""

import pytest
import torch
from gpytorch.kernels import MaternKernel
from torch import nn

from gpbridge.batch_norm import refresh_batch_norm
from gpbridge.checks import ShapeError
from gpbridge.dnn import MCDropout
from gpbridge.draws import JoinedDraws, TangentDraws, WeightDraws
from gpbridge.function_draws import evaluate_each
from gpbridge.functional import FunctionalNet
from gpbridge.pathwise import condition, draw_prior
from tests.cases import LOOPED, NETS

EXACT = {"rtol": 1e-9, "atol": 1e-12}
S = 3


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def frozen(module, X):
    net = FunctionalNet(module.double())
    net.probe(X)
    return net


def chain():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def weight_draws(net, seed=1):
    return WeightDraws(net, normal(S, net.num_params, seed=seed))


def weights_of_a_chain():
    return weight_draws(frozen(chain(), normal(2, 4)))


def weights_of_a_nested_module():
    return weight_draws(frozen(NETS["nested"].network(2), NETS["nested"].inputs(2)))


def weights_of_a_network_for_images():
    network = nn.Sequential(
        nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten()
    )
    return weight_draws(frozen(network, normal(2, 4)))


def weights_of_a_network_without_vectorisation():
    case = LOOPED["skips_on_data"]
    return weight_draws(frozen(case.network(2), case.inputs(2)))


def weights_with_batch_norm_of_their_own():
    net = frozen(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), normal(2, 4))
    draws = weight_draws(net)
    refresh_batch_norm(draws, [normal(20, 4)])
    return draws


def tangent_models():
    net = frozen(chain(), normal(2, 4))
    return TangentDraws(net, normal(S, net.num_params))


def gaussian_processes():
    X, generator = normal(6, 4), torch.Generator().manual_seed(0)
    prior = draw_prior(
        MaternKernel(2.5).double(), 4, S, num_outputs=2, generator=generator
    )
    return condition(prior, X, X[:, :2].sin(), 1e-2, generator=generator)


def several_kinds():
    net = frozen(chain(), normal(2, 4))
    one = TangentDraws(net, normal(1, net.num_params))
    return JoinedDraws([one, WeightDraws(net, normal(S - 1, net.num_params))])


def dropout():
    network = nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)
    )
    generator = torch.Generator().manual_seed(0)
    posterior = MCDropout(network.double())
    return posterior.draw(S, generator)


KINDS = [
    *(weights_of_a_chain, weights_of_a_nested_module, weights_of_a_network_for_images),
    *(weights_of_a_network_without_vectorisation, weights_with_batch_norm_of_their_own),
    *(tangent_models, gaussian_processes, several_kinds, dropout),
]


@pytest.mark.filterwarnings("ignore:torch.func cannot vectorise")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_function_at_its_own_inputs_equals_all_at_all(kind):
    draws = kind()
    d = 3 if kind in KINDS[1:4:2] else 4
    X = normal(S, 2, 5, d, seed=7)
    expected = torch.stack([draws(X[i])[i] for i in range(S)])
    assert expected.shape[:-1] == (S, 2, 5) and not torch.equal(
        expected[0], expected[1]
    )
    torch.testing.assert_close(evaluate_each(draws, X), expected, **EXACT)


def test_chunks_of_draws_keep_their_inputs():
    draws, X = weights_of_a_chain(), normal(S, 5, 4, seed=7)
    whole = evaluate_each(draws, X)
    draws.chunk_size = 2
    torch.testing.assert_close(evaluate_each(draws, X), whole, **EXACT)


def test_functions_without_an_each_are_evaluated_one_after_the_other():
    slopes, X = normal(S, 1, 1), normal(S, 5, 1, seed=7)
    torch.testing.assert_close(
        evaluate_each(lambda x: slopes * x, X), slopes * X, **EXACT
    )


def test_they_are_differentiable_at_their_own_inputs_alone():
    draws, X = weights_of_a_chain(), normal(S, 5, 4, seed=7).requires_grad_()
    (gradient,) = torch.autograd.grad(evaluate_each(draws, X)[1].sum(), X)
    assert gradient[1].abs().min() > 0
    assert gradient[[0, 2]].abs().max() == 0


@pytest.mark.parametrize("kind", [weights_of_a_chain, tangent_models, several_kinds])
@pytest.mark.parametrize("shape", [(S + 1, 5, 4), (5, 4)])
def test_inputs_of_another_number_of_functions_are_refused(kind, shape):
    draws = kind()
    with pytest.raises(ShapeError, match=r"X must be ``3 x \.\.\. x n x d``"):
        evaluate_each(draws, normal(*shape))
    with pytest.raises(ShapeError, match=r"X must be ``3 x \.\.\. x n x d``"):
        draws.each(normal(*shape))


def test_what_is_no_set_of_functions_is_refused():
    network = nn.Linear(4, 2).double()
    with pytest.raises(ShapeError, match="Linear must map inputs ``s x"):
        evaluate_each(network, normal(S, 5, 4))
