"""Mixtures over draws against sums of the densities of each draw."""

import math

import pytest
import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
    PoissonLikelihood,
    SoftmaxLikelihood,
)
from torch.distributions import MultivariateNormal

from gpbridge.checks import ShapeError
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import LogisticLikelihood
from gpbridge.predictive_mixture import Entropies, Moments, decompose, predictive

S, N = 7, 4
BATCHES = [(), (2, 3)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gaussian(m):
    likelihood = GaussianLikelihood().double()
    likelihood.noise = 0.3
    return likelihood, 0.3 * torch.eye(m).double()


def fixed(m):
    noise = torch.linspace(0.1, 0.9, N).double()
    return FixedNoiseGaussianLikelihood(noise), noise[:, None, None] * torch.eye(m)


def multitask(m, rank=0):
    likelihood = MultitaskGaussianLikelihood(m, rank=rank).double()
    likelihood.noise = 0.1
    if rank == 0:
        likelihood.task_noises = torch.arange(1, m + 1).double()
        return likelihood, torch.diag(torch.arange(1, m + 1).double() + 0.1)
    factor = normal(m, rank, seed=9)
    likelihood.task_noise_covar_factor.data = factor
    return likelihood, factor @ factor.mT + 0.1 * torch.eye(m)


REAL = {
    "one noise": (1, gaussian),
    "one noise, two outputs": (2, gaussian),
    "noise per point": (1, fixed),
    "noise per output": (2, multitask),
    "correlated noise": (3, lambda m: multitask(m, rank=2)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", REAL)
def test_the_density_is_the_mean_of_those_of_the_draws(name, batch):
    m, build = REAL[name]
    likelihood, covariance = build(m)
    outputs, y = normal(S, *batch, N, m), normal(*batch, N, m, seed=1)
    each = MultivariateNormal(outputs, covariance).log_prob(y)  # s x ... x n
    expected = torch.logsumexp(each, 0) - math.log(S)
    distribution = predictive(likelihood, outputs)
    density = distribution.log_prob(y)
    assert density.shape == ((*batch, N, 1) if m == 1 else (*batch, N))
    torch.testing.assert_close(density.reshape(expected.shape), expected)
    moments = decompose(likelihood, outputs)
    assert isinstance(moments, Moments)
    torch.testing.assert_close(distribution.mean, moments.mean)
    torch.testing.assert_close(distribution.variance, moments.variance)


@pytest.mark.parametrize("name", REAL)
def test_the_variance_splits_into_spread_of_means_and_noise(name):
    m, build = REAL[name]
    likelihood, covariance = build(m)
    outputs = normal(S, N, m)
    mean, epistemic, aleatoric = decompose(likelihood, outputs)
    torch.testing.assert_close(mean, sum(outputs) / S)
    spread = sum((f - mean) ** 2 for f in outputs) / S
    torch.testing.assert_close(epistemic, spread)
    noise = covariance.diagonal(dim1=-2, dim2=-1).expand(N, m)
    torch.testing.assert_close(aleatoric, noise)


@pytest.mark.parametrize("m", [1, 2])
def test_predicted_noise_differs_between_draws_and_is_averaged(m):
    likelihood = HeteroscedasticGaussianLikelihood(m, floor=0.1)
    outputs, y = normal(S, N, 2 * m), normal(N, m, seed=1)
    mu, v = outputs[..., :m], torch.log1p(outputs[..., m:].exp()) + 0.1
    each = -0.5 * ((y - mu) ** 2 / v + (2 * math.pi * v).log()).sum(-1)
    density = predictive(likelihood, outputs).log_prob(y).reshape(N)
    torch.testing.assert_close(density, torch.logsumexp(each, 0) - math.log(S))
    moments = decompose(likelihood, outputs)
    torch.testing.assert_close(moments.aleatoric_variance, v.mean(0))
    torch.testing.assert_close(moments.epistemic_variance, mu.var(0, correction=0))
    second = (v + mu**2).mean(0) - mu.mean(0) ** 2
    torch.testing.assert_close(moments.variance, second)


def test_the_mixture_of_two_modes_is_no_normal():
    likelihood, _ = gaussian(1)
    outputs = torch.tensor([-3.0, 3.0], dtype=torch.float64)[:, None, None]
    distribution = predictive(likelihood, outputs)
    between, at_mode = distribution.log_prob(torch.tensor([[0.0], [3.0]])).detach()
    assert float(at_mode) > float(between) + 10


def test_noise_of_new_points_can_be_given():
    likelihood, _ = fixed(1)
    outputs, noise = normal(S, 2, 1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    with pytest.raises(ShapeError, match="Pass noise="):
        predictive(likelihood, outputs)
    given = decompose(likelihood, outputs, noise)
    torch.testing.assert_close(given.aleatoric_variance, noise[:, None])
    mixture = predictive(likelihood, outputs, noise)
    torch.testing.assert_close(mixture.variance, given.variance)


def binary_probabilities(likelihood, f):
    if isinstance(likelihood, LogisticLikelihood):
        return torch.sigmoid(f)
    return 0.5 * torch.erfc(-f / math.sqrt(2))  # exact also in the lower tail


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", [LogisticLikelihood, BernoulliLikelihood])
def test_the_probability_of_a_binary_label_is_averaged(kind, batch):
    likelihood, outputs = kind(), normal(S, *batch, N, 1)
    p = binary_probabilities(likelihood, outputs)
    distribution = predictive(likelihood, outputs)
    torch.testing.assert_close(distribution.probs, p.mean(0))
    _check_entropies(decompose(likelihood, outputs), torch.cat([1 - p, p], -1))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_probabilities_of_classes_are_averaged(batch):
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    outputs = 3 * normal(S, *batch, N, 3)
    p = torch.softmax(outputs, -1)
    torch.testing.assert_close(predictive(likelihood, outputs).probs, p.mean(0))
    _check_entropies(decompose(likelihood, outputs), p)


def _check_entropies(entropies, p):
    """Against sums of p log p, ``s x ... x n x C``."""
    assert isinstance(entropies, Entropies)
    average = p.mean(0)
    total = -(average * average.log()).sum(-1)
    expected = -(p * p.log()).sum(-1).mean(0)
    torch.testing.assert_close(entropies.total, total)
    torch.testing.assert_close(entropies.expected, expected)
    torch.testing.assert_close(entropies.mutual_information, total - expected)


def test_draws_that_agree_tell_nothing_about_each_other():
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
    outputs = normal(1, N, 3).float().expand(S, N, 3)
    entropies = decompose(likelihood, outputs)
    assert float(entropies.mutual_information.abs().max()) < 1e-6
    assert bool((entropies.mutual_information >= 0).all())
    real = decompose(gaussian(1)[0], outputs[..., :1].double())
    torch.testing.assert_close(
        real.epistemic_variance, torch.zeros(N, 1).double(), atol=1e-15, rtol=0
    )


def test_certain_draws_that_disagree_stay_finite():
    for likelihood in (LogisticLikelihood(), BernoulliLikelihood()):
        outputs = torch.tensor([-500.0, 500.0])[:, None, None].requires_grad_()
        entropies = decompose(likelihood, outputs)
        torch.testing.assert_close(
            entropies.mutual_information, torch.tensor([math.log(2)])
        )
        assert abs(float(entropies.expected.detach())) < 1e-6
        sum(entropies).sum().backward()
        assert bool(outputs.grad.isfinite().all())
        assert float(predictive(likelihood, outputs.detach()).probs) == 0.5
        # Far in a tail all draws agree on, the odds are still exact.
        tail = predictive(likelihood, torch.full((2, 1, 1), -9.0).double())
        label = torch.ones(1, 1).double()
        p = binary_probabilities(likelihood, torch.tensor(-9.0).double())
        torch.testing.assert_close(tail.log_prob(label).squeeze(), p.log())


def test_predictions_are_differentiable_and_keep_the_dtype():
    for dtype in (torch.float32, torch.float64):
        outputs = normal(S, N, 1).to(dtype).requires_grad_()
        likelihood = GaussianLikelihood().to(dtype)
        value = predictive(likelihood, outputs).log_prob(torch.zeros(N, 1, dtype=dtype))
        assert value.dtype == dtype
        value.sum().backward()
        assert bool((outputs.grad != 0).any())


def test_the_order_of_the_draws_does_not_matter():
    outputs, y = normal(S, N, 1), normal(N, 1, seed=1)
    likelihood = gaussian(1)[0]
    torch.testing.assert_close(
        predictive(likelihood, outputs.flip(0)).log_prob(y),
        predictive(likelihood, outputs).log_prob(y),
    )


def test_bad_input_says_what_to_try():
    likelihood = GaussianLikelihood()
    for rule in (predictive, decompose):
        with pytest.raises(ShapeError, match=r"outputs\[None\]"):
            rule(likelihood, torch.zeros(3, 1))
        with pytest.raises(ShapeError, match="at least one draw"):
            rule(likelihood, torch.zeros(0, 3, 1))
        with pytest.raises(NotImplementedError, match=f"{rule.__name__}.register"):
            rule(PoissonLikelihood(), torch.zeros(2, 3, 1))
        with pytest.raises(ShapeError, match="try SoftmaxLikelihood"):
            rule(LogisticLikelihood(), torch.zeros(2, 3, 2))
        with pytest.raises(ValueError, match="noise must be None"):
            rule(LogisticLikelihood(), torch.zeros(2, 3, 1), torch.ones(3))
        with pytest.raises(ValueError, match="mixing_weights=False"):
            rule(SoftmaxLikelihood(2, 2), torch.zeros(2, 3, 2))
        with pytest.raises(TypeError, match="outputs must be a torch.Tensor"):
            rule(likelihood, [0.0])
