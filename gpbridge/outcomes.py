"""Distributions of latent values and targets, in the caller's dtype and units.

In: float64 moments. Out: gpytorch and torch distributions. Next: ``sampled`` and
``linearized`` return them.
"""

from __future__ import annotations

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    Normal,
)

from gpbridge.checks import ShapeError


def latent_distribution(
    mean: Tensor, covariance: Tensor | LinearOperator, dtype: torch.dtype
) -> MultivariateNormal:
    """Joint distribution of ``... x n x m`` values, multitask if m > 1.

    The covariance is wrapped: a dense one would be factorised by the distribution when
    it is built, which fails for a singular matrix.

    Raises:
        ShapeError: If there are several outputs and no points.
    """
    operator = to_linear_operator(covariance).to(dtype)
    mean = mean.to(dtype)
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean.squeeze(-1), operator)
    if mean.numel() == 0:
        raise ShapeError(
            "X must have at least one point, but the posterior mean has shape "
            f"{tuple(mean.shape)}: gpytorch has no joint distribution of several "
            "outputs at no points. Try predict(X), which takes none."
        )
    return MultitaskMultivariateNormal(mean, operator)


def target_distribution(
    mean: Tensor,
    variance: Tensor,
    transform: OutcomeTransform | None,
    Z: Tensor,
    dtype: torch.dtype,
) -> Distribution:
    """Distribution of the targets at each point, noise included.

    Args:
        mean: ``... x n x m`` in transformed units.
        variance: Likewise, noise included.
        transform: Of the targets.
        Z: The transformed inputs, for outcome transforms that depend on them.
        dtype: Of the result.

    Returns:
        Normal ``... x n x 1``, or independent Normals over m outputs.
    """
    if transform is not None:
        flat = DiagLinearOperator(variance.flatten(-2))
        latent = latent_distribution(mean, flat, torch.float64)
        posterior = transform.untransform_posterior(GPyTorchPosterior(latent), X=Z)
        mean, variance = posterior.mean, posterior.variance
    normal = Normal(mean.to(dtype), variance.sqrt().to(dtype))
    return normal if mean.shape[-1] == 1 else Independent(normal, 1)
