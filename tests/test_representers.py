"""The solved system is the dense one, and a correction the system of all data."""

import copy
import pickle

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.means import ConstantMean

from gpbridge.prior_draws import draw_prior
from gpbridge.representers import Data, correct, right_hand_sides, solve_representers
from gpbridge.solvers import Cholesky, ConjugateGradients
from gpbridge.solvers.factors import factorise
from tests import oracles_sampling as oracles

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape, seed=1):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(seed))


def covariance(X, Z):
    return oracles.matern(X, Z, 0.5, 1.5, 0.75)


def problem(n, m=1):
    kernel = ScaleKernel(MaternKernel(1.5)).double().requires_grad_(False)
    kernel.outputscale, kernel.base_kernel.lengthscale = 0.75, 0.5
    mean = ConstantMean(batch_shape=torch.Size([m] if m > 1 else [])).double()
    mean.requires_grad_(False).initialize(constant=0.25)
    prior = draw_prior(kernel, 2, 6, num_outputs=m, generator=seeded())
    X = points(n)
    Y = torch.sin(5 * X.sum(-1, keepdim=True) + torch.arange(m).to(X))
    return prior, mean, Data(X, Y, 0.01 + X[:, 0])


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 15])
def test_weights_solve_the_dense_system(n, m):
    prior, mean, data = problem(n, m)
    solved = solve_representers(prior, mean, data, seed=3)
    H = covariance(data.X, data.X) + data.noise.diag()
    rhs = right_hand_sides(prior, mean, data, seed=3)
    torch.testing.assert_close(H @ solved.columns(), rhs, **EXACT)
    torch.testing.assert_close(rhs[:, :m], data.Y - 0.25, **EXACT)
    Z = points(3, 4, seed=2)
    found, deviations = solved.moments(Z)
    flat = covariance(Z.reshape(-1, 2), data.X)
    expected = 0.25 + flat @ solved.mean_weights
    torch.testing.assert_close(found, expected.reshape(3, 4, m), **EXACT)
    pulled = torch.einsum("tn,nsm->stm", flat, solved.sample_weights)
    expected = prior(Z) - pulled.reshape(6, 3, 4, m)
    torch.testing.assert_close(deviations, expected, **EXACT)


@pytest.mark.parametrize("solver", [None, ConjugateGradients(tolerance=1e-12)])
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 2), (4, 1, 2)])
def test_a_correction_is_the_system_of_all_data(shape, solver):
    prior, mean, data = problem(12, m=2)
    base = solve_representers(prior, mean, data, 3, solver)
    X = points(*shape, seed=5)
    Y, noise = X.cos(), 0.02 + X[..., 1]
    corrected = correct(base, Data(X, Y, noise), solver)
    assert corrected.batch_shape == shape[:-1]
    Z = points(3, 5, seed=6) if len(shape) < 3 else points(5, seed=6)
    means, deviations = corrected.moments(base, Z)
    batch = torch.broadcast_shapes(shape[:-1], Z.shape[:-2])
    assert means.shape == (*batch, 5, 2) and deviations.shape == (6, *batch, 5, 2)

    def pick(index, tensor, own):
        own_shape = tensor.shape[tensor.dim() - own :]
        return tensor.expand(*batch, *own_shape)[index]

    for index in ((0,) * len(batch), tuple(i - 1 for i in batch)):
        both = Data(
            torch.cat([data.X, pick(index, X, 2)]),
            torch.cat([data.Y, pick(index, Y, 2)]),
            torch.cat([data.noise, pick(index, noise, 1)]),
        )
        expected = solve_representers(prior, mean, both, 3).moments(pick(index, Z, 2))
        torch.testing.assert_close(means[index], expected[0], **EXACT)
        some = deviations[(slice(None), *index)]
        torch.testing.assert_close(some, expected[1], **EXACT)


@pytest.mark.parametrize("solver", [None, Cholesky()])
def test_a_system_is_factorised_once_for_all_corrections(solver, monkeypatch):
    prior, mean, data = problem(12)
    base = solve_representers(prior, mean, data, 3, solver)
    calls = []

    def counted(block):
        calls.append(block.shape)
        return factorise(block)

    monkeypatch.setattr("gpbridge.representers.factorise", counted)
    monkeypatch.setattr("gpbridge.solvers.cholesky.factorise", counted)
    Z = points(4, seed=6)
    found, gradients = [], []
    copies = base, copy.deepcopy(base), pickle.loads(pickle.dumps(base))
    for i, system in enumerate((base, base, base.take_outputs([0]), *copies[1:])):
        X = points(3, 2, seed=5).requires_grad_()
        new = Data(X, X.cos()[..., :1], torch.full((3, 2), 0.1).double())
        mean_there, deviations = correct(system, new, solver).moments(system, Z)
        (gradient,) = torch.autograd.grad((mean_there**2).sum(), X)
        found.append(deviations.detach())
        gradients.append(gradient)
        assert len(calls) == max(1, i - 1)  # copies factorise for themselves
    for a, b in zip(found + gradients, found[:1] * 5 + gradients[:1] * 5, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert pickle.loads(pickle.dumps(base)).factor._inverse is None


def test_no_further_data_change_nothing():
    prior, mean, data = problem(12)
    base = solve_representers(prior, mean, data, 3)
    none = Data(points(0), points(0)[:, :1], torch.zeros(0).double())
    Z = points(4, seed=6)
    for got, expected in zip(
        correct(base, none).moments(base, Z), base.moments(Z), strict=True
    ):
        torch.testing.assert_close(got, expected, **EXACT)


def test_a_view_of_some_outputs_is_corrected_with_the_same_noise():
    prior, mean, data = problem(12, m=2)
    base = solve_representers(prior, mean, data, 3)
    X, Z = points(2, seed=5), points(4, seed=6)
    noise = 0.02 + X[..., 1]
    whole = correct(base, Data(X, X.cos(), noise)).moments(base, Z)
    view = base.take_outputs([1])
    part = correct(view, Data(X, X.cos()[:, 1:], noise)).moments(view, Z)
    for some, all_outputs in zip(part, whole, strict=True):
        torch.testing.assert_close(some, all_outputs[..., 1:], **EXACT)
