"""An iterative update stands in for botorch's factorisation, path for path."""

from functools import partial

import pytest
import torch
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling.pathwise import draw_matheron_paths, gaussian_update
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, FixedNoiseGaussianLikelihood
from gpytorch.means import ZeroMean

from gpbridge import LinearizedGP, SampledGP
from gpbridge.checks import ShapeError
from gpbridge.models import NetworkKernelGP
from gpbridge.pathwise import (
    draw_path_model,
    draw_posterior_paths,
    iterative_update,
)
from gpbridge.solvers import ConjugateGradients

CLOSE = {"rtol": 1e-6, "atol": 1e-7}
SOLVER = ConjugateGradients(tolerance=1e-11)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(*shape, seed=1):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(seed))


def targets(X):
    return torch.sin(5 * X.sum(-1, keepdim=True))


def build(kind=SingleTaskGP, noise=0.05, **options):
    X = points(20)
    kernel = ScaleKernel(MaternKernel(2.5)).double()
    model = kind(X, targets(X), covar_module=kernel, **options)
    model.likelihood.noise = noise
    return model.eval()


@pytest.mark.parametrize("kind", [SingleTaskGP, NetworkKernelGP])
@pytest.mark.parametrize("transforms", [True, False])
def test_paths_by_a_solver_are_paths_by_a_factor(kind, transforms):
    options = {"outcome_transform": None}
    if transforms:
        options = {
            "input_transform": Normalize(2),
            "outcome_transform": Standardize(1),
        }
    model, Z = build(kind, **options), points(3, 4, seed=2)
    for shape in (torch.Size(), torch.Size([5]), torch.Size([2, 3])):
        expected, got = (
            draw_posterior_paths(model, shape, generator=seeded(), solver=solver)
            for solver in (None, SOLVER)
        )
        torch.testing.assert_close(got(Z[0]), expected(Z[0]), **CLOSE)
    one = draw_path_model(model, generator=seeded(), solver=SOLVER)
    assert one.posterior(Z).mean.shape == (3, 4, 1)


def test_upstreams_paths_take_the_update_and_see_the_data():
    # pytorch/botorch issue 2337: targets that the update did not get.
    model = build(noise=1e-4)
    update = partial(iterative_update, solver=SOLVER, generator=seeded())
    paths = draw_matheron_paths(model, torch.Size([8]), update_strategy=update)
    X = points(20)
    residual = paths(X) - targets(X).squeeze(-1)
    assert residual.abs().max() < 6 * 0.01 * model.outcome_transform.stdvs.max()


def test_fixed_noise_is_that_of_each_point():
    noise = torch.linspace(1e-4, 1.0, 20).double()
    model = build(likelihood=FixedNoiseGaussianLikelihood(noise), noise=noise)
    expected, got = (
        draw_posterior_paths(model, generator=seeded(), solver=solver)
        for solver in (None, SOLVER)
    )
    Z = points(4, seed=2)
    torch.testing.assert_close(got(Z), expected(Z), **CLOSE)


def test_lists_of_models_are_solved_one_by_one():
    models = ModelListGP(build(), build(noise=0.2))
    paths = draw_posterior_paths(models, generator=seeded(), solver=SOLVER)
    assert [path(points(4)).shape for path in paths] == [(4,), (4,)]


def test_a_sampled_gp_updates_by_its_own_solver():
    X, Z = points(20), points(4, seed=2)
    kernel = ScaleKernel(MaternKernel(2.5)).double()
    model = SampledGP(X, targets(X), kernel, solver=SOLVER, mean_module=ZeroMean())
    model.likelihood.noise = 1e-6
    path = gaussian_update(model, sample_values=torch.zeros(3, 20).double())
    expected = model.posterior(Z).mean.squeeze(-1)
    torch.testing.assert_close(path(Z), expected.expand(3, 4), rtol=0, atol=0.05)
    assert not torch.equal(path(Z)[0], path(Z)[1])  # noise of their own


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("sample", [(), (5,), (2, 3)])
def test_common_inputs_are_evaluated_once_and_equal_copies(m, sample, monkeypatch):
    X = points(20)
    Y = torch.cat([targets(X + o) for o in range(m)], -1)
    model = SampledGP(X, Y, ScaleKernel(MaternKernel(2.5)), num_samples=6)
    path = draw_posterior_paths(model, torch.Size(sample), generator=seeded())
    lead = (1,) if m > 1 else ()  # as botorch evaluates independent outputs
    for shape in ((4,), (3, *(1 for _ in sample), 4)):
        Z = points(*shape, seed=2).reshape(*shape[:-1], *lead, 4, 2)
        ones = len(shape) - 1
        copies = Z.expand(*shape[: ones - len(sample)], *sample, *lead, 4, 2)
        own = points(*sample, *lead, 1, seed=3)
        each = torch.cat([copies, own.expand(*copies.shape[:-2], 1, 2)], -2)
        expected = path(each)[..., :-1]  # each draw at inputs of its own
        with monkeypatch.context() as patched:
            if sample:
                patched.setattr(path.draws, "each", None)
            got = path(Z)
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_number_of_paths_is_a_sample_shape():
    models = [build(), SampledGP(points(20), targets(points(20)), MaternKernel(2.5))]
    for model in models:
        assert draw_posterior_paths(model, 5)(points(3)).shape == (5, 3)
        with pytest.raises(TypeError, match="the number of paths, but is str. Try"):
            draw_posterior_paths(model, "five")
        with pytest.raises(ValueError, match="sample_shape must be positive"):
            draw_posterior_paths(model, 0)


class TestRefusals:
    @pytest.mark.parametrize("option", ["num_features", "solver"])
    @pytest.mark.parametrize("kind", [SampledGP, LinearizedGP])
    def test_options_that_a_models_own_draws_cannot_obey(self, kind, option):
        X = points(20)
        if kind is SampledGP:
            model = SampledGP(X, targets(X), MaternKernel(2.5))
        else:
            model = LinearizedGP(torch.nn.Linear(2, 1).double(), X, targets(X))
        value = {"num_features": 64, "solver": SOLVER}[option]
        with pytest.raises(ValueError, match=f"{option} has no effect .* model.draw"):
            draw_posterior_paths(model, 3, **{option: value})

    def test_batches_of_gps(self):
        X = points(20)
        model = SingleTaskGP(X, targets(X).expand(20, 2)).eval()
        with pytest.raises(ShapeError, match="one data set and one output, but the tr"):
            draw_posterior_paths(model, solver=SOLVER)

    def test_labels(self):
        model = build()
        model.likelihood = BernoulliLikelihood()
        with pytest.raises(NotImplementedError, match="with BernoulliLikelihood"):
            draw_posterior_paths(model, solver=SOLVER)
