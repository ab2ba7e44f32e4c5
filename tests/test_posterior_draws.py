"""Conditioned draws obey Matheron's rule, and have the moments of the posterior."""

import copy
import pickle

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
from gpytorch.means import ConstantMean
from torch import nn

from gpbridge.checks import NotConvergedWarning, ShapeError
from gpbridge.kernels import NeuralTangentKernel
from gpbridge.posterior_draws import condition, kernel_products
from gpbridge.prior_draws import draw_prior
from gpbridge.solvers import ConjugateGradients, SketchAndProject
from gpbridge.testing import assert_gradients_match_finite_differences
from gpbridge.types import FunctionDraws
from tests import oracles
from tests import oracles_sampling as sampling

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape, seed=1):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(seed))


def targets(X, m=1):
    phases = torch.arange(m).to(X)
    return torch.sin(5 * X.sum(-1, keepdim=True) + phases)


def matern(dtype=torch.float64):
    kernel = ScaleKernel(MaternKernel(1.5)).to(dtype)
    kernel.outputscale, kernel.base_kernel.lengthscale = 0.75, 0.5  # exact in binary
    return kernel


def covariance(X, Z):
    return sampling.matern(X, Z, 0.5, 1.5, 0.75)


@pytest.mark.parametrize("n", [1, 30])
@pytest.mark.parametrize("solver", [None, ConjugateGradients(tolerance=1e-12)])
def test_the_moments_are_those_of_the_posterior(n, solver):
    X, Xt = points(n), points(6, seed=2)
    prior = draw_prior(matern(), 2, 2000, generator=seeded())
    draw = condition(prior, X, targets(X), 0.01, solver, generator=seeded(1))
    mean, cov = sampling.gp_posterior(
        covariance(X, X), covariance(Xt, X), covariance(Xt, Xt), 0.01, targets(X)
    )
    deviations = draw(Xt)[..., 0] - mean[:, 0]
    errors = deviations.mean(0) / (cov.diagonal() / 2000).sqrt()
    assert errors.abs().max() < 4.5
    assert sampling.covariance_errors(deviations, cov).abs().max() < 4.5


def test_one_seed_for_prior_and_noise_does_not_correlate_them():
    X, Xt = points(4), points(3, seed=2)
    kernel = LinearKernel().double()
    kernel.variance = 0.75
    prior = draw_prior(kernel, 2, 4000, generator=seeded())
    draw = condition(prior, X, targets(X), 0.5, generator=seeded())
    K = [0.75 * a @ b.mT for a, b in ((X, X), (Xt, X), (Xt, Xt))]
    mean, cov = sampling.gp_posterior(*K, 0.5, targets(X))
    errors = sampling.covariance_errors(draw(Xt)[..., 0] - mean[:, 0], cov)
    assert errors.abs().max() < 4.5


def test_a_draw_is_matherons_rule():
    X, Xt, noise = points(20), points(5, seed=2), torch.linspace(0.01, 0.1, 20).double()
    prior = draw_prior(matern(), 2, 4, num_outputs=2, generator=seeded())
    mean = ConstantMean(batch_shape=torch.Size([2])).double()
    mean.constant = torch.tensor([1.0, -2.0])
    draw = condition(prior, X, targets(X, 2), noise, mean=mean, generator=seeded(1))
    seed = 2**31 + int(torch.randint(2**31, (), generator=seeded(1)))
    epsilon = torch.randn(256, 8, generator=seeded(seed), dtype=torch.float64)
    epsilon = epsilon[:20].unflatten(-1, (4, 2))
    epsilon = noise.sqrt()[:, None, None] * epsilon
    for output, constant in enumerate((1.0, -2.0)):
        expected = sampling.matheron(
            prior(Xt)[..., output],
            prior(X)[..., output],
            epsilon[..., output].mT,
            covariance(X, X),
            covariance(Xt, X),
            noise,
            targets(X, 2)[:, output] - constant,
        )
        got = draw(Xt)[..., output]
        torch.testing.assert_close(got, expected + constant, **EXACT)


def test_draws_interpolate_at_tiny_noise():
    # pytorch/botorch issue 2337: data that are ignored in silence.
    X = points(25)
    prior = draw_prior(matern(), 2, 16, generator=seeded())
    draw = condition(prior, X, targets(X), 1e-10)
    assert (draw(X) - targets(X)).abs().max() < 1e-4
    assert (prior(X) - targets(X)).abs().max() > 0.1


SOLVERS = [
    None,
    ConjugateGradients(tolerance=1e-9),
    SketchAndProject(tolerance=1e-6, block_size=7),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_repeated_points_without_noise_are_one_point_each(solver):
    X = points(8).repeat(2, 1)
    prior = draw_prior(matern(), 2, 4, generator=seeded())
    draw = condition(prior, X, targets(X), 0.0, solver)
    assert draw.solution.converged
    assert (draw(X) - targets(X)).abs().max() < 1e-3
    once = condition(prior, X[:8], targets(X[:8]), 0.0)
    Z = points(5, seed=2)
    torch.testing.assert_close(draw(Z), once(Z), rtol=0, atol=1e-3)


def test_contradictions_without_noise_are_said_and_stay_finite():
    X = points(8).repeat(2, 1)
    Y = targets(X)
    Y[8:] += 1.0
    prior = draw_prior(matern(), 2, 4, generator=seeded())
    with pytest.warns(NotConvergedWarning, match="nearly singular: raise the noise"):
        draw = condition(prior, X, Y, 0.0)
    assert bool(draw(X).isfinite().all()) and draw.solution.residual_norm > 0.1


def test_the_posterior_of_a_network_is_exact_in_weight_space():
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(3), dtype=p.dtype))
    X, Xt = points(12), points(4, seed=2)
    kernel = NeuralTangentKernel(net).double()
    kernel.prior_variance = 0.5
    prior = draw_prior(kernel, 2, 4000, generator=seeded())
    draw = condition(prior, X, targets(X), 0.05, generator=seeded(1))
    Phi, Phi_t = (oracles.tangent_rows(net, Z, 0.5) for Z in (X, Xt))
    root = torch.full((12, 1, 1), 0.05**-0.5).double()
    mean, cov = oracles.weight_posterior(Phi, root, targets(X) * 0.05**-0.5)
    deviations = draw(Xt)[..., 0] - Phi_t @ mean
    errors = sampling.covariance_errors(deviations, Phi_t @ cov @ Phi_t.T)
    assert errors.abs().max() < 4.5


def test_without_data_a_draw_is_the_prior_draw():
    X = points(2, 4)
    prior = draw_prior(matern(), 2, 3, generator=seeded())
    draw = condition(prior, points(0), targets(points(0)), 0.1)
    torch.testing.assert_close(draw(X), prior(X), rtol=0, atol=0)
    own = points(3, 4)
    torch.testing.assert_close(draw.each(own), prior.each(own), rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 2])
def test_batches_of_points_equal_a_loop(m, monkeypatch):
    X, Z = points(9), points(2, 3, 4, seed=2)
    prior = draw_prior(matern(), 2, 5, num_outputs=m, generator=seeded())
    draw = condition(prior, X, targets(X, m), 0.01)
    assert isinstance(draw, FunctionDraws)
    whole = draw(Z)
    assert whole.shape == (5, 2, 3, 4, m)
    torch.testing.assert_close(whole[:, 1, 2], draw(Z[1, 2]), **EXACT)
    own = points(5, 3, 4, seed=4)
    expected = torch.stack([draw(own[s])[s] for s in range(5)])
    torch.testing.assert_close(draw.each(own), expected, **EXACT)
    torch.testing.assert_close(draw.take(torch.tensor([2]))(Z), whole[2:3], **EXACT)
    # In tiles of three rows, with and without gradients.
    monkeypatch.setattr("gpbridge.posterior_draws.TILE_BYTES", 8 * 9 * 3)
    torch.testing.assert_close(draw(Z), whole, **EXACT)
    torch.testing.assert_close(draw(Z.clone().requires_grad_()), whole, **EXACT)
    torch.testing.assert_close(draw.each(own), expected, **EXACT)


def test_products_with_no_points_or_no_rows_are_empty():
    kernel, V = matern(), torch.ones(9, 2).double()
    assert kernel_products(kernel, points(3, 0), points(9), V).shape == (3, 0, 2)
    assert not kernel_products(kernel, points(3), points(0), V[:0]).any()


def test_draws_are_differentiable_and_survive_copies():
    X = points(9)
    prior = draw_prior(matern(), 2, 2, generator=seeded())
    draw = condition(prior, X, targets(X), 0.01, generator=seeded(1))
    assert_gradients_match_finite_differences(draw, points(2, 2, seed=3))
    before = draw(points(4))
    other = condition(draw_prior(matern(), 2, 2), X, targets(X), 0.5)
    other.load_state_dict(draw.state_dict())
    for twin in (other, copy.deepcopy(draw), pickle.loads(pickle.dumps(draw))):
        assert torch.equal(twin(points(4)), before)


def test_draws_do_not_follow_what_they_were_made_of():
    X, kernel, mean = points(9), matern(), ConstantMean().double()
    prior = draw_prior(kernel, 2, 2, follow=True)
    draw = condition(prior, X, targets(X), 0.01, mean=mean)
    before = draw(points(4))
    kernel.base_kernel.lengthscale, mean.constant = 3.0, 1.0
    assert torch.equal(draw(points(4)), before)


def test_float32_data_are_solved_in_float64():
    X = points(30).float()
    prior = draw_prior(matern(torch.float32), 2, 4, generator=seeded())
    draw = condition(prior, X, targets(X), 1e-8)
    assert draw(X).dtype == torch.float32
    assert (draw(X) - targets(X)).abs().max() < 1e-3


def test_the_solution_and_its_warm_start():
    X = points(40)
    prior = draw_prior(matern(), 2, 4, generator=seeded())
    solver = ConjugateGradients(tolerance=1e-8, preconditioner_rank=0)
    draw = condition(prior, X, targets(X), 0.01, solver, generator=seeded(1))
    assert draw.solution.converged and draw.solution.residual_norm < 1e-8
    again = condition(
        prior, X, targets(X), 0.01, solver, generator=seeded(1), initial=draw.weights
    )
    assert again.solution.iterations == 0
    short = ConjugateGradients(1e-8, max_iterations=1, preconditioner_rank=0)
    with pytest.warns(NotConvergedWarning):
        stopped = condition(prior, X, targets(X), 0.01, short)
    assert not stopped.solution.converged


def test_noise_comes_from_the_generator():
    X, before = points(9), torch.get_rng_state()
    prior = draw_prior(matern(), 2, 4, generator=seeded())
    one, two, three, four = (
        condition(prior, X, targets(X), 0.1, generator=g)(X)
        for g in (seeded(), seeded(), None, None)
    )
    assert torch.equal(one, two) and not torch.equal(three, four)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(5, 0, 2), (5, 3, 0, 2), (5, 0, 4, 2)])
@pytest.mark.parametrize("n", [0, 9])
def test_no_points_have_no_values(shape, n):
    prior = draw_prior(matern(), 2, 5, num_outputs=3, generator=seeded())
    draw = condition(prior, points(n), targets(points(n), 3), 0.01)
    Z = torch.zeros(shape).double()
    for functions in (prior, draw):
        assert functions.each(Z).shape == (*shape[:-1], 3)
        assert functions(Z[0]).shape == (*shape[:-1], 3)


class TestRefusals:
    prior = draw_prior(matern(), 2, 3)

    def test_a_kernel_in_place_of_a_draw(self):
        with pytest.raises(TypeError, match="but is ScaleKernel. Try draw_prior"):
            condition(matern(), points(9), targets(points(9)), 0.1)

    def test_data_of_another_width_or_kind(self):
        X = points(9)
        with pytest.raises(ShapeError, match=r"x 2``.* has shape \(9, 4\)"):
            condition(self.prior, torch.cat([X, X], -1), targets(X), 0.1)
        with pytest.raises(TypeError, match="Y must be a torch.Tensor, but is list"):
            condition(self.prior, X, [1.0] * 9, 0.1)

    @pytest.mark.parametrize("noise", [torch.ones(4), torch.ones(9, 2)])
    def test_noise_of_another_length(self, noise):
        with pytest.raises(ShapeError, match="n`` = 9 of them.* but has shape"):
            condition(self.prior, points(9), targets(points(9)), noise)

    def test_points_of_another_shape(self):
        draw = condition(self.prior, points(9), targets(points(9)), 0.1)
        for functions in (self.prior, draw):
            with pytest.raises(ShapeError, match=r"For one point try X\[None\]"):
                functions(points(9)[0])
            with pytest.raises(ShapeError, match=r"but has shape \(4, 3\)"):
                functions(torch.ones(4, 3).double())
            with pytest.raises(ShapeError, match="3 x ... x n x 2``"):
                functions.each(points(2, 4))
            with pytest.raises(ShapeError, match="3 x ... x n x 2``"):
                functions.each(points(3))


def test_targets_of_another_shape_are_refused():
    prior = draw_prior(matern(), 2, 4)
    with pytest.raises(
        ShapeError, match=r"Y must be ``n x 1`` .* shape \(9, 2\) and X"
    ):
        condition(prior, points(9), targets(points(9), 2), 0.1)
