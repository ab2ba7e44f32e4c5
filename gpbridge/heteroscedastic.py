r"""Gaussian noise whose variance the network predicts.

In: a network with two outputs per target, means first and then raw variances,
``... x n x 2m``. Out: a likelihood with the rules that :mod:`gpbridge.likelihoods`
asks for. Next: ``targets`` checks its targets, ``dnn.fit_map`` trains it,
``predictive_mixture`` tells the noise from the spread of the means.

References:
    Nix, Weigend, Estimating the mean and variance of the target probability
    distribution, ICNN 1994, eq. (2). Maddox, Izmailov, Garipov, Vetrov, Wilson, A
    simple baseline for Bayesian uncertainty in deep learning, NeurIPS 2019,
    supplement, for the softplus.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.nn.functional import softplus

from gpbridge.checks import ShapeError, check_count, check_positive
from gpbridge.likelihoods import hessian_root, log_prob, noise_variances, residual


class HeteroscedasticGaussianLikelihood(Likelihood):
    r"""Targets with a mean and a noise variance that both depend on the input.

    .. math::
        y_j \mid f \sim N\bigl(f_j,\; \log(1 + e^{f_{m + j}}) + \epsilon\bigr),
        \qquad j = 1, \dots, m

    The first m outputs of the network are means, the last m are raw variances, which
    a softplus and a floor :math:`\epsilon` make positive. It has no parameters. A
    network can fit some targets exactly and give them the floor as noise, so watch a
    validation part while it trains.

    Args:
        num_outputs: The number m of targets; the network has 2m outputs.
        floor: The smallest noise variance, in squared units of the targets.

    Raises:
        ValueError: If one of them is not positive.

    Example:
        >>> likelihood = HeteroscedasticGaussianLikelihood()
        >>> likelihood(torch.zeros(3, 2)).base_dist.variance.flatten()
        tensor([0.6931, 0.6931, 0.6931])
    """

    def __init__(self, num_outputs: int = 1, floor: float = 1e-6) -> None:
        super().__init__()
        check_count(num_outputs=num_outputs)
        check_positive(floor=floor)
        self.num_outputs, self.floor = num_outputs, float(floor)

    def forward(
        self, function_samples: Tensor, *args: Any, **kwargs: Any
    ) -> Independent:
        """Distribution of the targets given outputs ``... x n x 2m``."""
        mean, variance = self.moments(function_samples)
        return Independent(Normal(mean, variance.sqrt()), 1)

    def moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Means and noise variances, ``... x n x m`` each.

        Args:
            f: Outputs of the network, ``... x n x 2m``.

        Returns:
            The means and the variances.

        Raises:
            ShapeError: If there are not 2m outputs.
        """
        m = self.num_outputs
        if f.shape[-1] != 2 * m:
            raise ShapeError(
                f"HeteroscedasticGaussianLikelihood(num_outputs={m}) needs "
                f"``... x {2 * m}`` outputs, {m} means and then {m} raw variances, but "
                f"the outputs have shape {tuple(f.shape)}. Give the network two "
                "outputs per target."
            )
        return f[..., :m], softplus(f[..., m:]) + self.floor


@noise_variances.register(HeteroscedasticGaussianLikelihood)
def _(likelihood, f, noise=None):
    _check_no_noise(noise)
    return likelihood.moments(f)[1]


@log_prob.register(HeteroscedasticGaussianLikelihood)
def _(likelihood, f, y, noise=None):
    _check_no_noise(noise)
    mean, variance = likelihood.moments(f)
    quadratic = (y - mean).square() / variance
    return -0.5 * (quadratic + variance.log() + math.log(2 * math.pi)).sum(-1)


@residual.register(HeteroscedasticGaussianLikelihood)
def _(likelihood, f, y, noise=None):
    _check_no_noise(noise)
    mean, variance = likelihood.moments(f)
    slope = torch.sigmoid(f[..., likelihood.num_outputs :])  # of the softplus
    scaled = (y - mean) / variance
    return torch.cat([scaled, 0.5 * slope * (scaled.square() - 1 / variance)], -1)


@hessian_root.register(HeteroscedasticGaussianLikelihood)
def _(likelihood, f, noise=None):
    # The Fisher information of a normal is diagonal in its mean and variance:
    # 1 / v and 1 / (2 v^2).
    _check_no_noise(noise)
    _, variance = likelihood.moments(f)
    slope = torch.sigmoid(f[..., likelihood.num_outputs :])
    roots = torch.cat([variance.rsqrt(), slope / (math.sqrt(2) * variance)], -1)
    return torch.diag_embed(roots)


def _check_no_noise(noise: Tensor | None) -> None:
    if noise is not None:
        raise ValueError(
            "noise must be None for HeteroscedasticGaussianLikelihood: the network "
            "predicts it. Leave it out."
        )
