"""Predictions of the ready sparse GP: y at each point, noise included."""

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)

from gpbridge.checks import ShapeError
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.polya_gamma import PolyaGammaBernoulliLikelihood
from tests.inducing_problems import DOUBLE, N, kernels, normal, sparse


def trained(likelihood=None, num_outputs=1):
    kernel, d, width = kernels("turns")
    model = sparse(kernel, width, likelihood, num_outputs=num_outputs).double().eval()
    return model, normal(N, d, seed=2)


def test_a_prediction_has_the_noise_of_the_model():
    model, x = trained()
    model.likelihood.noise = torch.tensor(0.3, dtype=DOUBLE)
    found, f = model.predict(x), model(x)
    assert isinstance(found, torch.distributions.Normal)
    assert found.batch_shape == (N, 1)
    assert torch.allclose(found.mean[:, 0], f.mean)
    assert torch.allclose(found.variance[:, 0], f.variance + 0.3)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_prediction_of_several_outputs_is_a_distribution_over_them(rank):
    noise = MultitaskGaussianLikelihood(num_tasks=3, rank=rank).double()
    noise.noise = torch.tensor(0.3, dtype=DOUBLE)
    model, x = trained(noise, 3)
    found, upstream = model.predict(x), noise(model(x))
    assert found.batch_shape == (N,) and found.event_shape == (3,)
    assert torch.allclose(found.mean, upstream.mean)
    assert torch.allclose(found.variance, upstream.variance)
    y = normal(N, 3, seed=8)
    normals = torch.distributions.Normal(upstream.mean, upstream.variance.sqrt())
    assert torch.allclose(found.log_prob(y), normals.log_prob(y).sum(-1))


def test_fixed_noise_is_given_for_new_points():
    fixed = FixedNoiseGaussianLikelihood(torch.ones(9, dtype=DOUBLE))
    model, x = trained(fixed)
    noise = torch.rand(N, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    found = model.predict(x, noise=noise).variance[:, 0]
    assert torch.allclose(found, model(x).variance + noise)
    with pytest.raises(ShapeError, match="holds the noise of 9 points.*Pass noise="):
        model.predict(x)


LINKS = {
    "probit": (BernoulliLikelihood, torch.special.ndtr),
    "logistic": (LogisticLikelihood, torch.sigmoid),
    "polya-gamma": (PolyaGammaBernoulliLikelihood, torch.sigmoid),
}


@pytest.mark.parametrize("name", list(LINKS))
def test_a_label_has_its_integrated_probability(name):
    kind, link = LINKS[name]
    model, x = trained(kind())
    f, grid = model.marginals(x), torch.linspace(-9, 9, 4001, dtype=DOUBLE)[:, None]
    weight = torch.exp(-grid.square() / 2)
    expected = (link(f.mean + f.stddev * grid) * weight).sum(0) / weight.sum()
    found = model.predict(x)
    assert found.batch_shape == (N, 1)
    assert (found.probs[:, 0] - expected).abs().max() < 1e-4


def softmax_of(num_classes):
    return SoftmaxLikelihood(num_classes=num_classes, mixing_weights=False)


def test_two_classes_are_a_logistic_link_of_their_difference():
    model, x = trained(softmax_of(2), 2)
    f, grid = model.marginals(x), torch.linspace(-9, 9, 4001, dtype=DOUBLE)[:, None]
    weight = torch.exp(-grid.square() / 2)
    mean, std = f.mean[:, 1] - f.mean[:, 0], f.variance.sum(-1).sqrt()
    expected = (torch.sigmoid(mean + std * grid) * weight).sum(0) / weight.sum()
    for count in (256, 20_000):
        found = model.predict(x, num_samples=count).probs[:, 1]
        error = (expected * (1 - expected) / count).sqrt()
        assert ((found - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("likelihood", [softmax_of(3), None])
def test_predictions_are_deterministic_and_of_each_point_by_itself(likelihood):
    model, x = trained(likelihood, 3)
    values = (lambda y: y.probs) if likelihood else (lambda y: y.mean)
    state = torch.get_rng_state()
    whole = values(model.predict(x))
    assert torch.equal(values(model.predict(x)), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(values(model.predict(x[2:3])), whole[2:3])
    batches = values(model.predict(torch.stack([x, x.flip(0)])))
    assert batches.shape == (2, N, 3)
    assert torch.allclose(batches[0], whole)
    assert torch.allclose(batches[1], whole.flip(0))
    if likelihood:
        other = model.predict(x, generator=torch.Generator().manual_seed(1)).probs
        assert 0 < (other - whole).abs().max() < 0.2


def test_inputs_of_predictions_are_checked():
    model, x = trained(softmax_of(3), 3)
    for X, options, error, message in (
        (x[0], {}, ShapeError, "X must be ``... x n x d``"),
        (x * torch.nan, {}, InputDataError, "X contains NaN"),
        (x[:0], {}, InputDataError, "X has no rows"),
        (x, {"num_samples": 0}, ValueError, "num_samples must be a whole number"),
        (x, {"noise": x[:, 0]}, ValueError, "noise must be None for Softmax"),
    ):
        with pytest.raises(error, match=message):
            model.predict(X, **options)
    mixed, x = trained(SoftmaxLikelihood(num_classes=3, num_features=2), 2)
    with pytest.raises(ValueError, match="mixing_weights=False"):
        mixed.predict(x)
