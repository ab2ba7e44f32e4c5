"""Invariant kernels: the double sum, its shortcuts, exact groups, and frozen orbits."""

import math
import unittest

import gpytorch
import pytest
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    RBFKernel,
    RFFKernel,
    ScaleKernel,
)
from gpytorch.mlls import ExactMarginalLogLikelihood, VariationalELBO
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from gpbridge import LinearizedGP
from gpbridge.augmentation import (
    AveragedNetwork,
    FiniteOrbit,
    GaussianInputNoise,
    Rotation2d,
)
from gpbridge.kernels import (
    InvariantKernel,
    NeuralTangentKernel,
)
from gpbridge.testing import assert_module_unchanged
from tests import oracles_architecture as oracles
from tests.kernels.orbit_problems import EXACT, dense, network, rbf


def contract_kernel(augmentation, batch_shape=None, ard=None, **kwargs):
    base = MaternKernel(
        nu=2.5, batch_shape=batch_shape or torch.Size(), ard_num_dims=ard
    )
    return InvariantKernel(base, augmentation, **kwargs)


class TestDoubleContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        turns = Rotation2d(3, init=1.0, columns=(0, 1), sampling="qmc")
        return contract_kernel(turns, batch_shape, **kwargs)

    def create_kernel_ard(self, num_dims, batch_shape=None, **kwargs):
        turns = Rotation2d(3, init=1.0, columns=(0, 1))
        return contract_kernel(turns, batch_shape, num_dims, **kwargs)


class TestDifferenceContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        turns = Rotation2d(3, init=1.0, columns=(0, 1))
        return contract_kernel(turns, batch_shape, mode="difference", **kwargs)


class TestChunkedContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        turns = Rotation2d(3, init=1.0, columns=(0, 1))
        batch_shape = batch_shape or torch.Size()
        kernel = contract_kernel(
            turns, batch_shape, mode="double", chunk_size=20, **kwargs
        )
        return ScaleKernel(kernel, batch_shape=batch_shape)


class TestFeaturesContract(BaseKernelTestCase, unittest.TestCase):
    def create_kernel_no_ard(self, batch_shape=None, **kwargs):
        base = LinearKernel(batch_shape=batch_shape or torch.Size())
        turns = Rotation2d(3, init=1.0, columns=(0, 1))
        return InvariantKernel(base, turns, mode="features", **kwargs)


def test_the_double_sum_is_that_of_the_definition(X, X2):
    turns = Rotation2d(3, init=1.0).double()
    kernel = InvariantKernel(rbf(), turns, mode="double").double()

    def base(x, z):
        return oracles.squared_exponential(x, z, 0.7)

    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    expected = oracles.double_orbit_sum(base, turns(X), turns(X2), weights)
    torch.testing.assert_close(dense(kernel, X, X2), expected, **EXACT)
    own = oracles.double_orbit_sum(base, turns(X), turns(X), weights)
    torch.testing.assert_close(dense(kernel, X), own, **EXACT)
    torch.testing.assert_close(kernel(X, diag=True), own.diagonal(), **EXACT)
    pairs = kernel(X[:4], X2, diag=True)
    torch.testing.assert_close(pairs, expected[:4].diagonal(), **EXACT)


AUGMENTATIONS = {
    "rotation": lambda: Rotation2d(4, init=1.0),
    "sobol": lambda: Rotation2d(4, init=1.0, sampling="qmc"),
    "noise": lambda: GaussianInputNoise(2, 9, init=0.3, sampling="gauss"),
    "orders": lambda: FiniteOrbit.permutations(2),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_chunks_and_modes_agree(X, X2, name, chunk_size):
    augmentation = AUGMENTATIONS[name]().double()
    base = RFFKernel(num_samples=5, num_dims=2).double()
    reference = InvariantKernel(base, augmentation, mode="double").double()
    kernel = InvariantKernel(base, augmentation, chunk_size=chunk_size).double()
    assert kernel.resolved_mode(X) == "features"
    double = InvariantKernel(base, augmentation, "double", chunk_size=chunk_size)
    for other in (kernel, double.double()):
        for args in ((X,), (X, X2)):
            torch.testing.assert_close(
                dense(other, *args), dense(reference, *args), **EXACT
            )
        torch.testing.assert_close(
            other(X, diag=True), reference(X, diag=True), **EXACT
        )


def test_gradients_do_not_depend_on_mode_or_chunks(X):
    turns = Rotation2d(5, init=0.8).double()
    base = rbf()
    target = torch.outer(X[:, 0], X[:, 1])
    gradients = []
    for mode, chunk in (("double", None), ("double", 2), ("difference", None)):
        kernel = InvariantKernel(base, turns, mode, chunk_size=chunk).double()
        kernel.zero_grad()
        (dense(kernel, X) * target).sum().backward()
        gradients.append([p.grad.clone() for p in kernel.parameters()])
    assert len(gradients[0]) == 2
    for others in gradients[1:]:
        for mine, theirs in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["rotation", "orders"])
@pytest.mark.parametrize("base", [rbf, MaternKernel])
def test_the_law_of_differences_is_the_double_sum(X, X2, name, base):
    augmentation, base = AUGMENTATIONS[name]().double(), base().double()
    double = InvariantKernel(base, augmentation, "double").double()
    kernel = InvariantKernel(base, augmentation).double()
    assert kernel.resolved_mode(X) == "difference"
    torch.testing.assert_close(dense(kernel, X, X2), dense(double, X, X2), **EXACT)
    K = dense(kernel, X)
    torch.testing.assert_close(K, dense(double, X), **EXACT)
    assert torch.equal(K, K.mT)
    torch.testing.assert_close(kernel(X, diag=True), double(X, diag=True), **EXACT)


def test_a_fine_grid_converges_to_the_integral_over_the_triangle(X):
    # Midpoints of the triangular law itself, as a quadrature of the continuous average.
    turns = Rotation2d(81, init=1.0).double()
    found = dense(InvariantKernel(rbf(), turns).double(), X)
    u = 2 * (torch.arange(801).double() + 0.5) / 801 - 1
    weights = (1 - u.abs()) / (1 - u.abs()).sum()
    for i, j in ((0, 1), (2, 2), (3, 6)):
        values = [
            oracles.squared_exponential(X[i], oracles.rotated(X[j], 2 * angle), 0.7)
            for angle in u * turns.bound.item()
        ]
        expected = (weights * torch.stack(values)).sum()
        torch.testing.assert_close(found[i, j], expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("d", [1, 2])
def test_input_noise_on_a_squared_exponential_is_a_wider_one(d, generator):
    X = torch.randn(4, d, dtype=torch.float64, generator=generator)
    noise = GaussianInputNoise(d, 20**d, init=0.2, sampling="gauss").double()
    kernel = InvariantKernel(rbf(0.9), noise).double()
    found = dense(kernel, X)
    v = noise.variance.item()
    for i in range(4):
        for j in range(4):
            expected = oracles.smoothed_squared_exponential(X[i], X[j], 0.9, v)
            torch.testing.assert_close(found[i, j], expected, rtol=0, atol=1e-7)


def test_draws_of_input_noise_approach_the_closed_form(generator):
    X = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    noise = GaussianInputNoise(3, 256, init=0.05).double()
    found = dense(InvariantKernel(rbf(1.5), noise).double(), X)
    for i, j in ((0, 1), (0, 2), (1, 3)):
        expected = oracles.smoothed_squared_exponential(X[i], X[j], 1.5, 0.05)
        torch.testing.assert_close(found[i, j], expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("mode", ["double", "difference"])
@pytest.mark.parametrize("base", [rbf, MaternKernel])
def test_a_group_makes_a_kernel_invariant_exactly(mode, base, generator):
    X = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    orbit = FiniteOrbit.quarter_turns((4, 4), flips=True)
    kernel = InvariantKernel(base().double(), orbit, mode).double()
    kernel.base_kernel.lengthscale = 4.0
    K = dense(kernel, X)
    for a in range(8):
        moved = orbit(X)[:, a]
        assert (dense(kernel, moved, X) - K).abs().max() < 1e-12
        assert (dense(kernel, moved) - K).abs().max() < 1e-12
    assert torch.linalg.eigvalsh(K).min() > -1e-10


@pytest.mark.parametrize("s", [1, 2, 5])
def test_every_number_of_samples_gives_a_covariance(s, generator):
    X = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    for sampling in ("grid", "qmc", "fixed"):
        turns = Rotation2d(s, init=1.0, sampling=sampling)
        kernel = InvariantKernel(rbf(0.5), turns, "double").double()
        for _ in range(3):
            assert torch.linalg.eigvalsh(dense(kernel, X)).min() > -1e-10
            turns.resample(torch.Generator().manual_seed(turns.redraws))


def test_one_still_element_is_the_base_kernel(X, X2):
    kernel = InvariantKernel(rbf(), FiniteOrbit([[0, 1]])).double()
    torch.testing.assert_close(dense(kernel, X, X2), dense(rbf(), X, X2), **EXACT)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_averaged_network_has_the_invariant_tangent_kernel(X, X2, outputs):
    net, turns = network(outputs), Rotation2d(4, init=1.0).double()
    averaged = AveragedNetwork(net, turns)
    kernel = InvariantKernel(NeuralTangentKernel(net), turns).double()
    expected = NeuralTangentKernel(
        averaged, parameters=lambda name: name.startswith("network.")
    )
    assert kernel.resolved_mode(X) == ("features" if outputs == 1 else "double")
    torch.testing.assert_close(dense(kernel, X, X2), dense(expected, X, X2), **EXACT)
    torch.testing.assert_close(dense(kernel, X), dense(expected, X), **EXACT)
    torch.testing.assert_close(
        kernel(X, diag=True), dense(expected, X).diagonal(), **EXACT
    )
    assert dense(kernel, X).shape == (7 * outputs, 7 * outputs)


def test_the_linearized_averaged_network_is_the_gp_of_the_invariant_kernel(X, X2):
    net, turns = network(), Rotation2d(4, init=1.0).double()
    averaged = AveragedNetwork(net, turns)
    Y = X.norm(dim=-1, keepdim=True)
    with assert_module_unchanged(averaged):
        model = LinearizedGP(
            averaged,
            X,
            Y,
            parameters=lambda name: name.startswith("network."),
            mean="linear_model",
            noise=0.1,
        )
    kernel = InvariantKernel(NeuralTangentKernel(net), turns).double()
    K, cross = dense(kernel, X), dense(kernel, X2, X)
    residual = Y - averaged(X)
    J = NeuralTangentKernel(
        averaged, parameters=lambda name: name.startswith("network.")
    ).features
    weights = torch.cat([p.flatten() for p in net.parameters()])
    residual = residual + (J(X) @ weights)[:, None]
    solved = torch.linalg.solve(
        K + 0.1 * torch.eye(7), torch.cat([residual, cross.mT], 1)
    )
    mean = averaged(X2)[:, 0] - J(X2) @ weights + cross @ solved[:, 0]
    covariance = dense(kernel, X2) - cross @ solved[:, 1:]
    posterior = model.posterior(X2)
    torch.testing.assert_close(posterior.mean[:, 0], mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix, covariance, rtol=1e-5, atol=1e-7
    )


def test_gradients_of_the_bound_are_right_and_not_zero_at_the_start(generator):
    X = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    y = X.norm(dim=-1).sin()
    turns = Rotation2d(8).double()
    kernel = InvariantKernel(rbf(), turns).double()

    def evidence():
        K = dense(kernel, X) + 0.01 * torch.eye(20)
        normal = torch.distributions.MultivariateNormal(torch.zeros(20).double(), K)
        return normal.log_prob(y)

    evidence().backward()
    found = turns.raw_bound.grad.item()
    values = []
    for step in (1e-5, -2e-5):
        turns.raw_bound.data += step
        values.append(evidence().item())
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)
    assert abs(found) > 1e-2


def test_the_kernel_is_even_in_the_bound_so_that_zero_is_stationary(X):
    turns = Rotation2d(4, init=1e-6, cap=1.0).double()
    kernel = InvariantKernel(rbf(), turns).double()
    (gradient,) = torch.autograd.grad(dense(kernel, X).sum(), turns.raw_bound)
    # The sigmoid is 1e-6 there; the derivative in the bound itself is what is left.
    assert abs(gradient.item() / 1e-6) < 1e-4


def annulus(generator, n=60):
    radius = 0.3 + 1.2 * torch.rand(n, dtype=torch.float64, generator=generator)
    angle = 2 * math.pi * torch.rand(n, dtype=torch.float64, generator=generator)
    X = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    noise = torch.randn(n, dtype=torch.float64, generator=generator)
    return X, ((3 * radius).sin() + 0.05 * noise)[:, None]


def test_an_exact_gp_learns_the_bound_and_predicts(generator):
    X, Y = annulus(generator)
    covariance = ScaleKernel(InvariantKernel(RBFKernel(), Rotation2d(8)))
    model = SingleTaskGP(X, Y, covar_module=covariance, outcome_transform=None)
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(model.likelihood, model),
        optimizer_kwargs={"options": {"maxiter": 40}},
    )
    covariance = ScaleKernel(RBFKernel())
    plain = SingleTaskGP(X, Y, covar_module=covariance, outcome_transform=None)
    fit_gpytorch_mll(
        ExactMarginalLogLikelihood(plain.likelihood, plain),
        optimizer_kwargs={"options": {"maxiter": 40}},
    )
    turns = model.covar_module.base_kernel.augmentation
    assert turns.bound.item() > math.pi / 2
    test_X, test_Y = annulus(generator, 200)
    error, plain_error = (
        (m.posterior(test_X).mean - test_Y).square().mean() for m in (model, plain)
    )
    assert error < 0.5 * plain_error


def test_a_sparse_gp_trains_the_bound(generator):
    X, Y = annulus(generator)

    class Sparse(gpytorch.models.ApproximateGP):
        def __init__(self, Z):
            distribution = gpytorch.variational.CholeskyVariationalDistribution(len(Z))
            super().__init__(
                gpytorch.variational.VariationalStrategy(self, Z, distribution)
            )
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = ScaleKernel(
                InvariantKernel(RBFKernel(), Rotation2d(6, init=1.0))
            )

        def forward(self, x):
            covariance = self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(x), covariance
            )

    model = Sparse(X[:12].clone()).double()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    elbo = VariationalELBO(likelihood, model, num_data=60)
    parameters = [*model.parameters(), *likelihood.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -elbo(model(X), Y[:, 0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    turns = model.covar_module.base_kernel.augmentation
    assert losses[-1] < losses[0] - 0.1 and turns.bound.item() != pytest.approx(1.0)
    model.eval()
    assert model(X).variance.min() > 0
