r"""Quadratic bounds of log likelihoods, whose expectations need two moments only.

.. math:: \log \sigma(t f) \ge \tfrac{t f}{2} - \tfrac{\tanh(c/2)}{4c}\,(f^2 - c^2)
    + \log\sigma(c) - \tfrac c2, \qquad t = \pm 1, \text{ any } c \ge 0.

Equality holds at :math:`f = \pm c`. It is the bound of Jaakkola and Jordan, and what
mean-field inference with Pólya-Gamma variables optimises.

In: labels and moments of f. Out: a lower bound of the expected log likelihood, which
for Gaussian noise is exact. Next: ``selection.elbo`` puts unbiased estimates of the
moments in, which other likelihoods do not allow.

References:
    Jaakkola and Jordan, Bayesian parameter estimation via variational methods,
    Statistics and Computing 2000. Wenzel et al., Efficient Gaussian process
    classification using Pólya-Gamma data augmentation, AAAI 2019.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any, NoReturn

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import (
    FixedNoiseGaussianLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
)
from torch import Tensor
from torch.nn.functional import logsigmoid

from gpbridge.checks import ShapeError, check_binary
from gpbridge.likelihoods import LogisticLikelihood, check_outputs

_SMALL = 1e-2  # below it a series has less rounding than tanh(c/2) / c


class PolyaGammaBernoulliLikelihood(LogisticLikelihood):
    r"""A 0/1 label whose log odds are f, trained on a quadratic bound.

    Predictions are those of the logistic link. The expected log likelihood is replaced
    by the bound above at its best c, :math:`c^2 = E f^2`:

    .. math:: E \log p(y \mid f) \ge \tfrac{t}{2} E f + \log\sigma(c) - \tfrac c2.

    It is exact where f is known, and never above. Since it is quadratic in f, a
    stochastic bound over parts of an orbit has no bias.

    Example:
        >>> f = MultivariateNormal(torch.zeros(2), torch.eye(2))
        >>> labels = torch.tensor([0.0, 1.0])
        >>> bound = PolyaGammaBernoulliLikelihood().expected_log_prob(labels, f)
        >>> exact = LogisticLikelihood().expected_log_prob(labels, f)
        >>> bool((bound < exact).all())
        True
    """

    def expected_log_prob(
        self,
        observations: Tensor,
        function_dist: MultivariateNormal,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The bound for each label, ``... x n``.

        Args:
            observations: Labels 0 and 1, ``... x n``.
            function_dist: Distribution of f.
            *args: Ignored.
            **kwargs: Ignored.

        Raises:
            InputDataError: If a label is another number.
            ShapeError: If f has several outputs.
        """
        if isinstance(function_dist, MultitaskMultivariateNormal):
            check_outputs(self, function_dist.num_tasks)
        mean, variance = function_dist.mean, function_dist.variance
        second = mean.square() + variance
        return expected_quadratic(self, observations, mean, second)


def quadratic_coefficient(c: Tensor) -> Tensor:
    r"""The curvature :math:`\tanh(c/2) / (4c)`, 1/8 at zero."""
    safe = c.clamp_min(_SMALL)
    series = (1 - c.square() / 12) / 8
    return torch.where(c > _SMALL, (safe / 2).tanh() / (4 * safe), series)


@singledispatch
def expected_quadratic(
    likelihood: Likelihood,
    observations: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    expansion: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Expected log likelihood of a quadratic likelihood or bound, from two moments.

    It is affine in both moments, so that unbiased estimates of them give an unbiased
    estimate. They may therefore be estimates that no distribution has.

    Args:
        likelihood: Gaussian noise, or :class:`PolyaGammaBernoulliLikelihood`.
        observations: Targets ``n``, or ``n x m`` for a likelihood of m outputs.
        mean: Of f, shaped as the targets.
        second_moment: Of f, :math:`E f^2`.
        expansion: Where a bound touches, the points c; default
            :math:`\sqrt{E f^2}`, the best. Only a c that does not depend on the
            estimates leaves them unbiased.
        noise: Fixed noise variances of these targets.

    Returns:
        Nats per point, summed over the outputs of the likelihood, ``n``.

    Raises:
        TypeError: If the likelihood is not quadratic.
    """
    return _refuse(likelihood)


def _refuse(likelihood: Likelihood) -> NoReturn:
    raise TypeError(
        f"{type(likelihood).__name__} is not quadratic in f, so that two moments do "
        "not give its expectation, and an estimate of them would be biased. For labels "
        "0 and 1 take PolyaGammaBernoulliLikelihood; for others the bound of Jensen, "
        "jensen=True."
    )


def is_quadratic(likelihood: Likelihood) -> bool:
    """Whether :func:`expected_quadratic` has a rule for a likelihood."""
    rules = expected_quadratic
    return rules.dispatch(type(likelihood)) is not rules.dispatch(object)


@expected_quadratic.register
def _(
    likelihood: PolyaGammaBernoulliLikelihood,
    observations: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    expansion: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    if observations.device.type == "cpu":  # elsewhere a look would stop the device
        check_binary(observations, "observations")
    if expansion is None:
        expansion = second_moment.clamp_min(0).sqrt()
    # Detached: at the best c the derivative in c is zero.
    c = expansion.detach()
    curvature = quadratic_coefficient(c)
    linear = (observations.to(mean) - 0.5) * mean
    return linear - curvature * (second_moment - c.square()) + logsigmoid(c) - c / 2


@expected_quadratic.register
def _(
    likelihood: GaussianLikelihood,
    observations: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    expansion: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    return _gaussian(observations, mean, second_moment, likelihood.noise)


@expected_quadratic.register
def _(
    likelihood: FixedNoiseGaussianLikelihood,
    observations: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    expansion: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    variance = likelihood.noise if noise is None else noise
    if variance.shape[-1] != observations.shape[-1]:
        raise ShapeError(
            f"The likelihood has {variance.shape[-1]} fixed noise variances, but there "
            f"are {observations.shape[-1]} targets. Pass noise=, those of this batch."
        )
    return _gaussian(observations, mean, second_moment, variance)


@expected_quadratic.register
def _(
    likelihood: MultitaskGaussianLikelihood,
    observations: Tensor,
    mean: Tensor,
    second_moment: Tensor,
    expansion: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    if likelihood.rank > 0:
        raise TypeError(
            "The noise of the outputs is correlated, and their moments alone do not "
            "give the expectation. Try MultitaskGaussianLikelihood(rank=0)."
        )
    variance = likelihood.task_noises if likelihood.has_task_noise else 0
    if likelihood.has_global_noise:
        variance = variance + likelihood.noise
    return _gaussian(observations, mean, second_moment, variance).sum(-1)


def _gaussian(y: Tensor, mean: Tensor, second_moment: Tensor, noise: Tensor) -> Tensor:
    squares = y.square() - 2 * y * mean + second_moment
    return -0.5 * (squares / noise + noise.log() + math.log(2 * math.pi))
