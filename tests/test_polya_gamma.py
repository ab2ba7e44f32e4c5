"""Bounds of the logistic log likelihood: below, tight, quadratic, and their limits."""

import copy
import math
import pickle

import pytest
import torch
from botorch.exceptions.errors import InputDataError
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    MultitaskGaussianLikelihood,
)
from torch.nn.functional import logsigmoid

from gpbridge.checks import ShapeError
from gpbridge.likelihoods import LogisticLikelihood, log_prob
from gpbridge.polya_gamma import (
    PolyaGammaBernoulliLikelihood,
    expected_quadratic,
    is_quadratic,
    quadratic_coefficient,
)
from tests import oracles_architecture as dense

DOUBLE = torch.float64
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=DOUBLE)


def gaussian(mean, variance):
    mean = torch.as_tensor(mean, dtype=DOUBLE)
    variance = torch.as_tensor(variance, dtype=DOUBLE).expand(mean.shape)
    return MultivariateNormal(mean, torch.diag(variance))


def exact(labels, distribution):
    """The expected log likelihood by a dense grid."""
    nodes = torch.linspace(-12, 12, 20001, dtype=DOUBLE)
    weights = torch.exp(-0.5 * nodes.square()) / math.sqrt(2 * math.pi)
    f = distribution.mean[:, None] + distribution.stddev[:, None] * nodes
    values = logsigmoid((2 * labels[:, None] - 1) * f)
    return (values * weights).sum(-1) * (nodes[1] - nodes[0])


@pytest.mark.parametrize("variance", [1e-8, 0.1, 1.0, 30.0])
def test_the_bound_is_below_the_expected_log_likelihood(variance):
    f = gaussian([-3.0, 0.0, 1.5, 20.0], variance)
    gap = exact(LABELS, f) - PolyaGammaBernoulliLikelihood().expected_log_prob(
        LABELS, f
    )
    assert (gap > -1e-10).all()
    if variance == 1e-8:  # f is known, and c is |f|
        assert gap.abs().max() < 1e-7
    if variance == 30.0:
        assert gap.max() > 0.1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("c", [0.3, 2.0, 25.0])
def test_the_bound_is_the_formula_of_jaakkola_and_jordan(sign, c):
    f = torch.linspace(-6, 6, 25, dtype=DOUBLE)
    labels = torch.full_like(f, (1 + sign) / 2)
    found = expected_quadratic(
        PolyaGammaBernoulliLikelihood(), labels, f, f.square(), torch.full_like(f, c)
    )
    expected = [dense.polya_gamma_bound(v, sign, c) for v in f.tolist()]
    assert torch.allclose(found, torch.tensor(expected, dtype=DOUBLE), atol=1e-12)
    assert (found <= logsigmoid(sign * f) + 1e-12).all()
    touch = torch.tensor([-c, c], dtype=DOUBLE)
    at_c = expected_quadratic(
        PolyaGammaBernoulliLikelihood(),
        labels[:2],
        touch,
        touch.square(),
        touch.abs(),
    )
    assert (at_c - logsigmoid(sign * touch)).abs().max() < 1e-12


def test_the_best_c_is_the_root_of_the_second_moment():
    likelihood, f = (
        PolyaGammaBernoulliLikelihood(),
        gaussian([0.5, 1.0, -2.0, 0.0], 0.7),
    )
    second = f.mean.square() + f.variance
    best = expected_quadratic(likelihood, LABELS, f.mean, second)
    for factor in (0.8, 0.97, 1.03, 1.3):
        c = factor * second.sqrt()
        assert (expected_quadratic(likelihood, LABELS, f.mean, second, c) < best).all()


def test_the_derivative_through_c_is_zero_at_the_best_c():
    """Detaching c changes no gradient: finite differences of the undetached bound."""
    likelihood = PolyaGammaBernoulliLikelihood()
    mean = torch.tensor([0.5, 1.0, -2.0, 0.1], dtype=DOUBLE, requires_grad=True)
    second = torch.tensor([1.5, 1.0, 6.0, 0.5], dtype=DOUBLE, requires_grad=True)
    value = lambda m, s: expected_quadratic(likelihood, LABELS, m, s).sum()  # noqa: E731
    assert torch.autograd.gradcheck(value, (mean, second))


def test_c_near_zero_has_no_nan_and_no_jump():
    c = torch.tensor([0.0, 1e-300, 1e-12, 1e-4, 0.0099999, 0.0100001], dtype=DOUBLE)
    found = quadratic_coefficient(c)
    assert found[0] == 0.125
    exact_values = [0.125 - v**2 / 96 + v**4 / 960 for v in c.tolist()]
    assert torch.allclose(found, torch.tensor(exact_values, dtype=DOUBLE), rtol=1e-9)
    zero = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    likelihood = PolyaGammaBernoulliLikelihood()
    value = expected_quadratic(likelihood, LABELS[:2], zero, zero.square())
    assert torch.allclose(value, torch.full((2,), -math.log(2), dtype=DOUBLE))
    value.sum().backward()
    assert torch.equal(zero.grad, LABELS[:2] - 0.5)


def test_large_values_of_f_stay_finite():
    f = gaussian([1e4, -1e4, 700.0, -700.0], 1.0)
    value = PolyaGammaBernoulliLikelihood().expected_log_prob(LABELS, f)
    assert value.isfinite().all() and (value <= 0).all()
    single = PolyaGammaBernoulliLikelihood().expected_log_prob(
        LABELS.float(), MultivariateNormal(f.mean.float(), torch.eye(4))
    )
    assert single.dtype == torch.float32 and single.isfinite().all()


@pytest.mark.parametrize("name", ["gaussian", "fixed", "multitask", "task noise only"])
def test_gaussian_noise_is_exact(name):
    mean = torch.tensor([[0.3, 1.0], [-1.0, 0.2], [2.0, 0.5]], dtype=DOUBLE)
    y = torch.tensor([[0.0, 1.5], [1.0, 0.0], [1.0, 1.0]], dtype=DOUBLE)
    variance = torch.tensor([[0.3, 0.1], [1.0, 0.2], [2.0, 0.5]], dtype=DOUBLE)
    if name in ("multitask", "task noise only"):
        likelihood = MultitaskGaussianLikelihood(
            num_tasks=2, rank=0, has_global_noise=name == "multitask"
        ).double()
        likelihood.task_noises = torch.tensor([0.3, 0.8], dtype=DOUBLE)
        noise = likelihood.task_noises
        if name == "multitask":
            noise = noise + likelihood.noise
    else:
        mean, y, variance = mean[:, 0], y[:, 0], variance[:, 0]
        noise = torch.tensor([0.3, 0.3, 0.3], dtype=DOUBLE)
        likelihood = GaussianLikelihood().double()
        likelihood.noise = noise[:1]
        if name == "fixed":
            noise = torch.tensor([0.3, 0.1, 0.9], dtype=DOUBLE)
            likelihood = FixedNoiseGaussianLikelihood(noise)
    found = expected_quadratic(likelihood, y, mean, mean.square() + variance)
    normal = torch.distributions.Normal(mean, noise.sqrt().expand(mean.shape))
    expected = normal.log_prob(y) - variance / (2 * noise)
    expected = expected if y.dim() == 1 else expected.sum(-1)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_noise_of_a_batch_replaces_fixed_noise():
    likelihood = FixedNoiseGaussianLikelihood(torch.full((10,), 0.5, dtype=DOUBLE))
    zero = torch.zeros(4, dtype=DOUBLE)
    noise = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE)
    found = expected_quadratic(likelihood, LABELS, zero, zero + 1, noise=noise)
    own = FixedNoiseGaussianLikelihood(noise)
    assert torch.equal(found, expected_quadratic(own, LABELS, zero, zero + 1))
    with pytest.raises(ShapeError, match="10 fixed noise variances.*4 targets"):
        expected_quadratic(likelihood, LABELS, zero, zero)


def test_predictions_and_densities_are_those_of_the_logistic_link():
    f = gaussian([0.3, 1.0, -2.0, 0.0], 0.5)
    likelihood, peer = PolyaGammaBernoulliLikelihood(), LogisticLikelihood()
    assert torch.equal(likelihood(f).probs, peer(f).probs)
    values = f.mean[:, None], LABELS[:, None]
    assert torch.equal(log_prob(likelihood, *values), log_prob(peer, *values))


def test_copies_work():
    likelihood = PolyaGammaBernoulliLikelihood()
    f = gaussian([0.3, 1.0, -2.0, 0.0], 0.5)
    for twin in (copy.deepcopy(likelihood), pickle.loads(pickle.dumps(likelihood))):
        assert torch.equal(
            twin.expected_log_prob(LABELS, f), likelihood.expected_log_prob(LABELS, f)
        )


def test_labels_of_another_coding_are_refused():
    f = gaussian([0.0, 0.0], 1.0)
    with pytest.raises(InputDataError, match="must hold 0 and 1.*contains -1"):
        PolyaGammaBernoulliLikelihood().expected_log_prob(torch.tensor([-1.0, 1.0]), f)


def test_a_likelihood_that_is_not_quadratic_is_refused():
    zero = torch.zeros(2)
    assert not is_quadratic(BernoulliLikelihood())
    assert is_quadratic(PolyaGammaBernoulliLikelihood())
    with pytest.raises(TypeError, match="BernoulliLikelihood is not quadratic.*jensen"):
        expected_quadratic(BernoulliLikelihood(), zero, zero, zero)


def test_correlated_noise_is_refused():
    zero = torch.zeros(3, 2)
    likelihood = MultitaskGaussianLikelihood(num_tasks=2, rank=1)
    with pytest.raises(TypeError, match="rank=0"):
        expected_quadratic(likelihood, zero, zero, zero)


def test_labels_of_several_outputs_are_refused():
    """Upstream would return a bound for each output, and no sum over them."""
    one = gaussian([0.3, 1.0], 0.5)
    f = MultitaskMultivariateNormal.from_independent_mvns([one, one, one])
    labels = torch.zeros(2, 3, dtype=DOUBLE)
    with pytest.raises(ShapeError, match="of 1 latent output, but there are 3"):
        PolyaGammaBernoulliLikelihood().expected_log_prob(labels, f)
