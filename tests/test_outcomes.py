"""Predictive distributions: noise, chunks, units, and the caller's precision."""

import pytest
import torch
from botorch.models.transforms import Normalize, Standardize
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultivariateNormal

from gpbridge import Exact, LinearizedGP
from gpbridge.targets import default_likelihood
from tests.linearized.problems import (
    PROBLEMS,
    both_spaces,
    build,
    every_likelihood,
    gaussian_likelihoods,
    inputs,
    network,
    point_noise,
    targets,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@both_spaces
@gaussian_likelihoods
def test_predicted_targets_are_latent_values_with_noise(name, space):
    model, X = build(name, space), inputs(6, seed=7).reshape(2, 3, 2)
    law, latent = model.predict(X), model.posterior(X)
    if name == "fixed_noise":  # new points have the average noise
        noise = point_noise().mean()
    else:
        noise = PROBLEMS[name].noise(1).diagonal()
    torch.testing.assert_close(law.mean, latent.mean, **EXACT)
    torch.testing.assert_close(law.variance, latent.variance + noise, **EXACT)
    m = PROBLEMS[name].m
    assert law.batch_shape == ((2, 3, 1) if m == 1 else (2, 3))
    assert law.log_prob(latent.mean).shape == law.batch_shape
    noisy = model.posterior(X, observation_noise=True)
    torch.testing.assert_close(noisy.variance, law.variance, **EXACT)


@both_spaces
@every_likelihood
def test_predictions_in_chunks_are_those_at_once(name, space, monkeypatch):
    model, X = build(name, space), inputs(50, seed=7)
    once = model.predict(X)
    monkeypatch.setattr("gpbridge.linearized.posterior._CHUNK_BYTES", 1)
    in_chunks = model.predict(X)
    for name in ("probs",) if hasattr(once, "probs") else ("mean", "variance"):
        torch.testing.assert_close(
            getattr(in_chunks, name), getattr(once, name), **EXACT
        )


@pytest.mark.parametrize("name", ["gaussian", "multitask"])
def test_transforms_return_predictions_in_the_users_units(name):
    m, X_test = PROBLEMS[name].m, inputs(5, seed=7)
    X = inputs()
    Y = 50 + 20 * targets(name, X)
    bounds = torch.tensor([[-1.0, -1.0], [2.0, 3.0]], dtype=torch.float64)
    model = build(
        name,
        X=X,
        Y=Y,
        input_transform=Normalize(2, bounds=bounds),
        outcome_transform=Standardize(m),
    )
    scale, center = Y.std(0), Y.mean(0)
    plain = build(
        name, X=(X - bounds[0]) / (bounds[1] - bounds[0]), Y=(Y - center) / scale
    )
    Z = (X_test - bounds[0]) / (bounds[1] - bounds[0])
    got, expected = model.predict(X_test), plain.predict(Z)
    torch.testing.assert_close(got.mean, center + scale * expected.mean, **EXACT)
    torch.testing.assert_close(got.stddev, scale * expected.stddev, **EXACT)
    got, expected = model.posterior(X_test), plain.posterior(Z)
    torch.testing.assert_close(got.mean, center + scale * expected.mean, **EXACT)
    torch.testing.assert_close(got.variance, scale**2 * expected.variance, **EXACT)
    torch.testing.assert_close(model.log_evidence(), plain.log_evidence(), **EXACT)
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    draws, plain_draws = (
        m.draw(3, g) for m, g in zip((model, plain), seeds, strict=True)
    )
    torch.testing.assert_close(draws(X_test), center + scale * plain_draws(Z), **EXACT)


class Tilt(OutcomeTransform):
    """Adds the first column of the inputs that it is given."""

    def forward(self, Y, Yvar=None, X=None):
        return Y + X[..., :1], Yvar

    def untransform(self, Y, Yvar=None, X=None):
        return Y - X[..., :1], Yvar

    def untransform_posterior(self, posterior, X=None):
        law = posterior.distribution
        law = MultivariateNormal(law.mean - X[..., 0], law.lazy_covariance_matrix)
        return GPyTorchPosterior(law)


def test_an_outcome_transform_sees_the_inputs_of_the_network_everywhere():
    X, X_test, bounds = inputs(), inputs(3, seed=7), torch.tensor([[-1.0], [3.0]])
    Y, bounds = targets("gaussian", X), bounds.expand(2, 2).double()
    normalize, options = Normalize(2, bounds=bounds), {"noise": 0.1}
    Z, Z_test = normalize(X), normalize(X_test)
    plain = LinearizedGP(network(), Z, Y + Z[:, :1], **options)
    options |= {"input_transform": normalize, "outcome_transform": Tilt()}
    model = LinearizedGP(network(), X, Y, **options)
    Y_test = torch.ones(3, 1, dtype=torch.float64)
    pairs = [
        (model, plain),
        (
            model.condition_on_observations(X_test, Y_test),
            plain.condition_on_observations(Z_test, Y_test + Z_test[:, :1]),
        ),
    ]
    for tilted, level in pairs:
        expected = level.posterior(Z_test).mean - Z_test[:, :1]
        torch.testing.assert_close(tilted.posterior(X_test).mean, expected, **EXACT)
        torch.testing.assert_close(tilted.predict(X_test).mean, expected, **EXACT)
        draws = [
            m.draw(2, torch.Generator().manual_seed(1))(x)
            for m, x in ((tilted, X_test), (level, Z_test))
        ]
        torch.testing.assert_close(draws[0], draws[1] - Z_test[:, :1], **EXACT)


def test_a_link_makes_no_sense_in_regression():
    with pytest.raises(ValueError, match="link is for classification"):
        build("gaussian").predict(inputs(), link="pairwise")


# -- precision ------------------------------------------------------------------------


@both_spaces
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("m", [1, 2])
def test_float32_callers_get_three_digits_whatever_the_noise(m, noise, space):
    # Enough test points that products in float32 are tried; where they fail, and the
    # noise decides that, float64 takes over.
    X, X_test = inputs(60), inputs(200, seed=7)
    Y, net = targets("multitask", X)[:, :m], network(m)
    options = {"noise": noise, "inference": Exact(space=space)}

    def made(dtype):
        likelihood = default_likelihood(Y, m)
        return LinearizedGP(
            net, X.to(dtype), Y.to(dtype), likelihood.to(dtype), **options
        )

    got = made(torch.float32).predict(X_test.float())
    rounded = LinearizedGP(
        net, X.float().double(), Y.float().double(), default_likelihood(Y, m), **options
    )
    expected = rounded.predict(X_test.float().double())
    assert got.mean.dtype == torch.float32
    torch.testing.assert_close(got.mean.double(), expected.mean, rtol=1e-3, atol=1e-4)
    latent = rounded.posterior(X_test.float().double()).variance
    error = (got.variance.double() - expected.variance).abs()
    assert (error / expected.variance).max() < 1e-3
    assert (error / latent).max() < 1e-1 or noise < 1e-2


@both_spaces
@every_likelihood
def test_a_float32_model_is_close_to_its_float64_twin(name, space):
    X, net = inputs(), network(PROBLEMS[name].m)
    Y = targets(name, X)
    Y = Y.float() if Y.is_floating_point() else Y
    likelihood = PROBLEMS[name].make().float()
    model = build(name, space, X=X.float(), Y=Y, net=net.float(), likelihood=likelihood)
    twin = build(name, space)
    X_test = inputs(5, seed=7)
    got, expected = model.posterior(X_test.float()), twin.posterior(X_test)
    assert got.mean.dtype == got.variance.dtype == torch.float32
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(got.mean.double(), expected.mean, **close)
    torch.testing.assert_close(got.variance.double(), expected.variance, **close)
    evidence = model.log_evidence()
    torch.testing.assert_close(
        evidence.double(), twin.log_evidence(), rtol=1e-3, atol=1e-3
    )


def test_results_do_not_depend_on_the_default_dtype():
    # Builders above use Python floats, so the model is made before the change.
    X = inputs()
    values = []
    for dtype in (torch.float32, torch.float64):
        model = build("softmax")
        torch.set_default_dtype(dtype)
        try:
            values.append(
                torch.cat([model.posterior(X).variance, model.predict(X).probs], -1)
            )
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*values)
