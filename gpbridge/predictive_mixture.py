r"""Predictions of y from draws of a function, and where their uncertainty comes from.

In: a likelihood and the outputs of s draws, ``s x ... x n x m``. Out: the predictive
distribution, an equal mixture over the draws with its exact density; and the moments or
entropies that tell the spread of the draws (epistemic, more data lessen it) from the
noise of each (aleatoric).
Next: ``surrogates`` returns both from any posterior over weights.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import NamedTuple

import torch
from gpytorch.distributions import MultivariateNormal as LatentNormal
from gpytorch.likelihoods import BernoulliLikelihood, Likelihood, SoftmaxLikelihood
from linear_operator.operators import DiagLinearOperator
from torch import Generator, Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

from gpbridge.checks import ShapeError, check_tensor
from gpbridge.heteroscedastic import HeteroscedasticGaussianLikelihood
from gpbridge.likelihoods import (
    GAUSSIAN,
    LogisticLikelihood,
    check_label_model,
    log_prob,
    noise_covariance,
    noise_variances,
    refuse,
)
from gpbridge.randomness import standard_normal


class Moments(NamedTuple):
    """Mean and variances of a real target at each point, ``... x n x m`` each.

    ``epistemic_variance`` is the variance of the draws' means, divided by s;
    ``aleatoric_variance`` is the mean of their noise variances.
    """

    mean: Tensor
    epistemic_variance: Tensor
    aleatoric_variance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture, the sum of the two."""
        return self.epistemic_variance + self.aleatoric_variance


class Entropies(NamedTuple):
    """Entropies of a label at each point, in nats, ``... x n`` each.

    ``total`` is that of the averaged probabilities, ``expected`` the average of those
    of the draws (aleatoric), ``mutual_information`` their difference (epistemic): what
    the label would tell about which draw is right.
    """

    total: Tensor
    expected: Tensor
    mutual_information: Tensor


@singledispatch
def predictive(
    likelihood: Likelihood, outputs: Tensor, noise: Tensor | None = None
) -> Distribution:
    r"""Distribution of y at each point, averaged over draws.

    .. math:: p(y \mid x) = \tfrac1s \sum_i p(y \mid f_i(x))

    ===================  ===========================================================
    Gaussian, m = 1      a mixture of normals, ``... x n x 1``
    Gaussian, m > 1      a mixture of normals over m outputs, ``... x n``
    softmax              ``Categorical``, ``... x n``
    logistic, probit     ``Bernoulli``, ``... x n x 1``
    ===================  ===========================================================

    Densities are those of the mixture, not of a normal with its moments. Sampling from
    torch's distributions uses the global random state.

    Args:
        likelihood: Gaussian with any noise, or a model of labels.
        outputs: ``s x ... x n x m`` (``2m`` if the network predicts its noise).
        noise: Noise variances of these points, as in
            :func:`gpbridge.likelihoods.log_prob`; for fixed noise at new points.

    Returns:
        The distribution, differentiable in the outputs.

    Raises:
        ShapeError: If there is no draw.
        NotImplementedError: If the class of the likelihood has no rule.

    Example:
        >>> from gpytorch.likelihoods import GaussianLikelihood
        >>> outputs = torch.tensor([-1.0, 1.0])[:, None, None]  # 2 draws, 1 point
        >>> predictive(GaussianLikelihood(), outputs).batch_shape
        torch.Size([1, 1])
    """
    return refuse(likelihood, predictive)


@singledispatch
def decompose(
    likelihood: Likelihood, outputs: Tensor, noise: Tensor | None = None
) -> Moments | Entropies:
    r"""Tell what the draws disagree about from the noise that each of them has.

    .. math::
        \operatorname{Var} y = \operatorname{Var}_i \mu_i + \tfrac1s \sum_i \sigma_i^2,
        \qquad
        H\bigl[\tfrac1s \sum_i p_i\bigr] = I + \tfrac1s \sum_i H[p_i]

    Args:
        likelihood: Gaussian with any noise, or a model of labels.
        outputs: ``s x ... x n x m`` (``2m`` if the network predicts its noise).
        noise: As for :func:`predictive`.

    Returns:
        Moments for real targets, entropies for labels.

    Raises:
        ShapeError: If there is no draw.
        NotImplementedError: If the class of the likelihood has no rule.

    Example:
        >>> logits = torch.tensor([-9.0, 9.0])[:, None, None]  # draws that disagree
        >>> decompose(LogisticLikelihood(), logits).mutual_information
        tensor([0.6919])

    References:
        Depeweg, Hernández-Lobato, Doshi-Velez, Udluft, Decomposition of uncertainty in
        Bayesian deep learning, ICML 2018, eqs. (3) and (5).
    """
    return refuse(likelihood, decompose)


def target_moments(
    likelihood: Likelihood, outputs: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means and noise variances of real targets given each draw.

    Args:
        likelihood: Gaussian with any noise.
        outputs: As for :func:`predictive`.
        noise: Likewise.

    Returns:
        Both ``s x ... x n x m``.
    """
    _check_draws(outputs)
    mean = _means(likelihood, outputs)
    variances = noise_variances(likelihood, outputs, noise)
    if variances is None:
        covariance = noise_covariance(likelihood, outputs, noise)
        variances = covariance.diagonal(dim1=-2, dim2=-1)
    return mean, variances.expand_as(mean)


def mixture_moments(means: Tensor, variances: Tensor) -> Moments:
    """Moments of an equal mixture, ``s x ... x n x m`` means and noise variances."""
    return Moments(means.mean(0), means.var(0, correction=0), variances.mean(0))


def _mixture(likelihood, outputs, noise=None):
    _check_draws(outputs)
    mean = _means(likelihood, outputs)
    variances = noise_variances(likelihood, outputs, noise)
    if variances is not None:
        return normal_mixture(mean, variances)
    covariance = noise_covariance(likelihood, outputs, noise)
    parts = MultivariateNormal(mean.movedim(0, -2), covariance.movedim(0, -3))
    return MixtureSameFamily(Categorical(mean.new_ones(parts.batch_shape)), parts)


def normal_mixture(means: Tensor, variances: Tensor) -> MixtureSameFamily:
    """An equal mixture of normals, ``s x ... x n x m`` means and variances.

    Its batch is ``... x n x 1`` for one output, ``... x n`` for several.
    """
    variances = variances.expand_as(means)
    if means.shape[-1] == 1:
        parts = Normal(means.movedim(0, -1), variances.movedim(0, -1).sqrt())
    else:
        std = variances.movedim(0, -2).sqrt()
        parts = Independent(Normal(means.movedim(0, -2), std), 1)
    return MixtureSameFamily(Categorical(means.new_ones(parts.batch_shape)), parts)


def marginal_labels(
    likelihood: Likelihood,
    mean: Tensor,
    variance: Tensor,
    shape: tuple[int, ...],
    generator: Generator,
) -> Distribution:
    """Distribution of labels with Gaussian outputs integrated out, mixed over draws.

    In closed form for the probit link, by quadrature for the logistic one, by draws for
    a softmax.

    Args:
        likelihood: Of labels.
        mean: Of independent outputs, ``s x ... x n x m``.
        variance: Likewise.
        shape: Of the standard normals of a softmax, which broadcasts with the mean.
        generator: Their source.

    Returns:
        As :func:`predictive`.
    """
    if isinstance(likelihood, BernoulliLikelihood):
        return predictive(likelihood, mean / (1 + variance).sqrt())
    if isinstance(likelihood, LogisticLikelihood):
        f = LatentNormal(mean[..., 0], DiagLinearOperator(variance[..., 0]))
        return predictive(likelihood, likelihood.marginal(f).logits[..., None])
    normal = standard_normal(shape, generator, mean)
    return predictive(likelihood, mean + variance.sqrt() * normal)


def _moments(likelihood, outputs, noise=None):
    return mixture_moments(*target_moments(likelihood, outputs, noise))


def _labels(likelihood, outputs, noise=None):
    logs = _average(_class_log_probs(likelihood, outputs, noise))
    if isinstance(likelihood, SoftmaxLikelihood):
        return Categorical(logits=logs)
    return Bernoulli(logits=logs[..., 1:] - logs[..., :1])


def _entropies(likelihood, outputs, noise=None):
    logs = _class_log_probs(likelihood, outputs, noise)
    average, p = _average(logs), logs.exp()
    # A mean of divergences: no difference of entropies, which rounding makes negative.
    # A probability that underflows contributes nothing, also to the gradient.
    divergence = torch.where(p > 0, p * (logs - average), 0.0).sum(-1)
    return Entropies(
        total=-(average.exp() * average).sum(-1),
        expected=-(p * logs).sum(-1).mean(0),
        mutual_information=divergence.mean(0).clamp_min(0),
    )


for _kind in (*GAUSSIAN, HeteroscedasticGaussianLikelihood):
    predictive.register(_kind, _mixture)
    decompose.register(_kind, _moments)
for _kind in (SoftmaxLikelihood, LogisticLikelihood, BernoulliLikelihood):
    predictive.register(_kind, _labels)
    decompose.register(_kind, _entropies)


def _means(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    if isinstance(likelihood, HeteroscedasticGaussianLikelihood):
        return likelihood.moments(outputs)[0]
    return outputs


def _class_log_probs(
    likelihood: Likelihood, outputs: Tensor, noise: Tensor | None
) -> Tensor:
    """Log probabilities of each draw, ``s x ... x n x C``, of 0 and 1 if binary."""
    _check_draws(outputs)
    check_label_model(likelihood, noise)
    if isinstance(likelihood, SoftmaxLikelihood):
        return torch.log_softmax(outputs, -1)
    if outputs.shape[-1] != 1:
        raise ShapeError(
            f"{type(likelihood).__name__} needs ``s x ... x n x 1`` outputs, but they "
            f"have shape {tuple(outputs.shape)}. For several classes try "
            "SoftmaxLikelihood."
        )
    labels = torch.zeros_like(outputs), torch.ones_like(outputs)
    return torch.stack([log_prob(likelihood, outputs, y) for y in labels], -1)


def _average(logs: Tensor) -> Tensor:
    return torch.logsumexp(logs, 0) - math.log(len(logs))


def _check_draws(outputs: Tensor) -> None:
    check_tensor(outputs=outputs)
    if outputs.dim() < 3 or not len(outputs):
        raise ShapeError(
            "outputs must be ``s x ... x n x m`` with at least one draw, but has shape "
            f"{tuple(outputs.shape)}. For one function pass outputs[None]."
        )
