"""Deep GPs as they are before training."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import (
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.likelihoods.likelihood import Likelihood
from torch import nn

from gpbridge.augmentation import FiniteOrbit
from gpbridge.checks import ReliabilityWarning, ShapeError
from gpbridge.dnn import build_deep_gp, fit_deep_gp
from gpbridge.dnn.deep_gp_build import linear_map
from gpbridge.inducing_covariances import inducing_covariance, inducing_cross_covariance
from gpbridge.kernels import ConvolutionalKernel, DeepKernel, InvariantKernel
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.surrogates import WeightSpaceModel
from gpbridge.testing import assert_module_unchanged
from tests.dnn.deep_gp_problems import normal, seeded


def correlated(n=80, d=3):
    X = normal(n, d) @ torch.diag(torch.tensor([2.0, 1.0, 0.3]).double())[:d, :d]
    return X @ torch.linalg.qr(normal(d, d, seed=1))[0]


def test_the_initial_values_are_those_of_the_table():
    model = build_deep_gp(normal(60, 3), depth=3, num_inducing=20)
    assert model.likelihood.noise.item() == pytest.approx(1e-2)
    for layer, variance, std in zip(
        model.layers, [1e-6, 1e-6, 1.0], [1e-5, 1e-5, 1.0], strict=True
    ):
        q, kernel = layer.variational_strategy, layer.covar_module
        assert kernel.outputscale.item() == pytest.approx(variance)
        assert kernel.base_kernel.lengthscale.tolist() == [pytest.approx([2.0] * 3)]
        assert torch.equal(q.mean, torch.zeros_like(q.mean))
        eye = torch.eye(20).double().expand_as(q.factor)
        torch.testing.assert_close(q.factor, std * eye)
    assert not model.layers[0].mean_module.weight.requires_grad
    assert [p for p in model.layers[0].mean_module.parameters()] == []


def test_a_factor_in_another_state_has_the_divergence_of_two_normals():
    model = build_deep_gp(normal(60, 3), num_inducing=5, num_outputs=2)
    for layer in model.layers:
        q = layer.variational_strategy
        dense = torch.distributions.MultivariateNormal(q.mean, q.factor @ q.factor.mT)
        prior = torch.distributions.MultivariateNormal(
            torch.zeros_like(q.mean), torch.eye(5).double()
        )
        expected = torch.distributions.kl_divergence(dense, prior)
        torch.testing.assert_close(q.kl_divergence(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [2, 3, 5])
def test_at_the_start_the_signal_passes_through_five_layers(width):
    X = correlated()
    model = build_deep_gp(X, depth=5, width=width, num_inducing=20)
    noise = model.draw_noise([80], 10, seeded(0))
    values = X.unsqueeze(0)
    for layer, normals in zip(model.layers[:-1], noise, strict=True):
        mean, variance = layer.marginals(values)
        assert variance.max() < 1.01e-6
        values = mean + variance.sqrt() * normals
    fixed = X @ linear_map(X, width).mT
    assert (values - fixed).abs().max() < 5 * 4**0.5 * 1e-3
    # Where all layers have the variance of the last, nothing is left of the inputs.
    drowned = build_deep_gp(
        X, depth=5, width=width, num_inducing=20, hidden_variance=1.0, hidden_std=1.0
    )
    values = X.unsqueeze(0)
    for layer, normals in zip(drowned.layers[:-1], noise, strict=True):
        mean, variance = layer.marginals(values)
        values = mean + variance.sqrt() * normals
    assert (values - fixed).square().mean() > 1.0


def test_fewer_outputs_keep_the_principal_components_and_more_are_zeros():
    X = correlated()
    W = linear_map(X, 2)
    torch.testing.assert_close(W @ W.mT, torch.eye(2).double())
    _, _, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    torch.testing.assert_close((W @ V[:2].mT).abs(), torch.eye(2).double())
    assert (W.gather(1, W.abs().argmax(1, keepdim=True)) > 0).all()
    padded = linear_map(X, 5)
    assert torch.equal(padded @ X.T, torch.cat([X.T, torch.zeros(2, 80).double()]))


def test_inducing_points_are_pushed_through_the_fixed_means():
    X = correlated()
    model = build_deep_gp(X, depth=3, width=[2, 4], num_inducing=7)
    first, second, third = (
        layer.variational_strategy.inducing_points for layer in model.layers
    )
    assert (first.shape, second.shape, third.shape) == ((7, 3), (7, 2), (7, 4))
    torch.testing.assert_close(second, first @ linear_map(X, 2).mT)
    torch.testing.assert_close(third[:, :2], second)
    own = normal(5, 2)
    model = build_deep_gp(
        X, depth=2, width=2, num_inducing=7, inducing_points=[None, own]
    )
    assert torch.equal(model.layers[1].variational_strategy.inducing_points, own)


def test_any_kernel_starts_with_the_variance_of_its_layer_and_is_copied():
    X = correlated()
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    given = [lambda _: DeepKernel(network, RBFKernel()), lambda d: LinearKernel(), None]
    with assert_module_unchanged(network):
        model = build_deep_gp(X, depth=3, num_inducing=10, kernels=given)
        model.elbo(X, X[:, :1]).backward()
    for layer, variance in zip(model.layers, [1e-6, 1e-6, 1.0], strict=True):
        K = layer.inducing_covariance()
        assert K.diagonal().mean().item() == pytest.approx(variance)
    shared = MaternKernel(ard_num_dims=3).double()
    model = build_deep_gp(X, depth=2, num_inducing=10, kernels=lambda _: shared)
    bases = [layer.covar_module.base_kernel for layer in model.layers]
    assert len({id(one) for one in [*bases, shared]}) == 3


def test_likelihoods_say_how_many_outputs_there_are():
    X = normal(20, 2)
    softmax = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    for likelihood, m in [
        (None, 1),
        (GaussianLikelihood(), 1),
        (MultitaskGaussianLikelihood(4, rank=0), 4),
        (softmax, 3),
        (LogisticLikelihood(), 1),
    ]:
        assert build_deep_gp(X, likelihood, num_inducing=5).num_outputs == m
    model = build_deep_gp(X, num_outputs=2, num_inducing=5, noise_variance=0.05)
    assert model.likelihood.task_noises.tolist() == pytest.approx([0.05, 0.05])
    shown = "2 -> 2 -> 2, inducing points 5, 5, MultitaskGaussianLikelihood"
    assert repr(model) == f"DeepGaussianProcess({shown})"
    seen = repr(WeightSpaceModel(model, X, num_samples=3, likelihood=model.likelihood))
    shown = "mode='ensemble', num_outputs=2; DeepDraw(num_draws=3)"
    assert seen == f"WeightSpaceModel({shown})"


def test_one_input_one_datum_and_many_inputs_have_a_model():
    for shape in [(1, 1), (4, 1), (50, 40)]:
        X = normal(*shape)
        model = build_deep_gp(X, num_inducing=10)
        assert torch.isfinite(model.elbo(X, X[:, :1]))
    assert model.layers[0].output_dims == 30


class Unknown(Likelihood):
    def forward(self, function_samples):
        raise NotImplementedError


def test_bad_options_are_named():
    X = normal(20, 2)

    def refused(error, message, *args, **options):
        with pytest.raises(error, match=message):
            build_deep_gp(*(args or (X,)), **options)

    refused(InputDataError, "NaN or Inf", X / 0)
    refused(InputDataError, "no rows", X[:0])
    refused(ShapeError, "must be ``n x d``.*flatten", X.reshape(2, 10, 2))
    refused(ValueError, "depth must be a whole number", depth=0)
    refused(ValueError, "num_inducing must be", num_inducing=2.5)
    refused(ValueError, "hidden_variance must be positive", hidden_variance=0.0)
    refused(ValueError, "width must be a whole number", width=0)
    refused(ShapeError, "one for each of 2 hidden layers", depth=3, width=[2])
    refused(ShapeError, "kernels must have one entry for each of 2", kernels=[None])
    refused(TypeError, "return a gpytorch Kernel.*float", kernels=lambda d: 1.0)
    wide = torch.Size([3])
    refused(
        ShapeError,
        "layer with 2 outputs",
        kernels=lambda d: RBFKernel(batch_shape=wide),
    )
    refused(
        ShapeError,
        "inducing_points must have 2 columns",
        inducing_points=[X[:, :1], None],
    )
    refused(ValueError, "Pass num_outputs", X, Unknown())
    refused(ShapeError, "is of 1 outputs", X, GaussianLikelihood(), num_outputs=2)

    class Zero(LinearKernel):
        def forward(self, *args, **params):
            return 0 * super().forward(*args, **params)

    refused(
        ValueError, "variance zero at its inducing points", kernels=lambda d: Zero()
    )


def test_inputs_that_are_not_standardised_are_warned_of():
    with pytest.warns(ReliabilityWarning, match="standardize"):
        build_deep_gp(1000 * normal(20, 2), num_inducing=5)
    build_deep_gp(1000 * normal(20, 2), num_inducing=5, kernels=lambda d: RBFKernel())


ORBITS = {
    "patches": lambda d: ConvolutionalKernel(RBFKernel(), (4, 4), (2, 2)),
    "turns": lambda d: InvariantKernel(RBFKernel(), FiniteOrbit.quarter_turns((4, 4))),
    "scaled sum": lambda d: ScaleKernel(ORBITS["turns"](d)) + RBFKernel(),
}


@pytest.mark.parametrize("name, e", [("patches", 4), ("turns", 16), ("scaled sum", 16)])
def test_a_layer_with_orbits_has_inducing_points_below_the_average(name, e):
    """Patches, not whole images: K_uu is the base kernel's, K_uf one average."""
    X = normal(30, 16)
    model = build_deep_gp(X, width=3, num_inducing=8, kernels=[ORBITS[name], None])
    layer = model.layers[0]
    Z, outer = layer.variational_strategy.inducing_points, layer.covar_module
    assert Z.shape == (8, e)
    kernel, factor = outer.base_kernel, outer.outputscale
    own = inducing_covariance(kernel, Z)
    assert torch.allclose(layer.inducing_covariance(), factor * own)
    C, rows = layer.prior_factor(), X[:5]
    expected = torch.linalg.solve(
        C, factor * inducing_cross_covariance(kernel, Z, rows)
    )
    assert torch.allclose(layer._whitened(rows), expected, atol=1e-8)
    # The layer's variance is that of the function, an average, at its inputs.
    assert outer(X, diag=True).mean().item() == pytest.approx(1e-6, rel=1e-5)
    _, variance = layer.marginals(X)
    assert (variance <= outer(X, diag=True)[:, None] * (1 + 1e-9)).all()
    assert layer.mean_module(X).shape == (3, 30)


def test_a_deep_gp_of_patches_trains_and_predicts():
    X = normal(24, 16)
    Y = X[:, :8].sum(-1, keepdim=True).sign()
    model = build_deep_gp(X, width=2, num_inducing=6, kernels=[ORBITS["patches"], None])
    fit = fit_deep_gp(model, X, Y, epochs=8, learning_rate=0.05, progress=False)
    assert fit.history["elbo"][-1] > fit.history["elbo"][0]
    with torch.no_grad():
        f = fit.model.posterior(X[:5], 20)
        assert f.mean.shape == (5,) and (f.variance > 0).all()
        assert fit.model.sample_joint(X[:5], 3, seeded(0)).shape == (3, 5, 1)
    with pytest.raises(NotImplementedError, match="Try sample_joint"):
        fit.model.draw(2)


def test_inducing_points_of_another_width_than_patches_are_refused():
    X = normal(20, 16)
    with pytest.raises(ShapeError, match="layer 0 must have 4 columns.*have 16"):
        build_deep_gp(
            X, depth=1, kernels=ORBITS["patches"], inducing_points=[X[:5].clone()]
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 0.5}, "width must be a whole number"),
        ({"kernels": 0.5}, "kernels must be a sequence"),
        ({"kernels": [None, "a"]}, "kernels must be functions.*one is 'a'"),
        ({"inducing_points": 3}, "inducing_points must be a sequence"),
        ({"hidden_variance": (1.0,)}, "hidden_variance must be one number"),
        ({"hidden_std": torch.ones(2)}, "hidden_std must be one number"),
        ({"noise_variance": "a"}, "noise_variance must be one number"),
        ({"generator": 0}, "generator must be a torch Generator"),
    ],
)
def test_other_things_than_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build_deep_gp(normal(8, 2), **{"num_inducing": 3, **options})


def test_draws_of_a_deep_gp_refuse_what_is_no_source_of_them():
    X = normal(8, 2)
    model = build_deep_gp(X, num_inducing=3)
    for call in (model.predict, model.posterior, model.sample_joint, model.marginals):
        with pytest.raises(TypeError, match="generator must be a torch Generator"):
            call(X, 2, generator=0)
    with pytest.raises(ValueError, match="num_features must be a whole number"):
        model.draw(2, num_features=(8,))
    with pytest.raises(
        ShapeError, match="noise must have one tensor for each of 1 hid"
    ):
        model.marginals(X, noise=[])
    with pytest.raises(TypeError, match="noise must be a sequence, but is 0.5"):
        model.marginals(X, noise=0.5)
