r"""Predictions of deep Gaussian processes: mixtures, joint moments, joint values.

A deep GP is a mixture of Gaussians over draws of its hidden layers: at one point of
independent draws, over several points of joint ones. In: moments of the last layer, or
layers and inputs. Out: distributions of y or f, or values of f. Next: ``deep_gp``.

References:
    Salimbeni, Deisenroth, Doubly stochastic variational inference for deep Gaussian
    processes, NeurIPS 2017, eqs. (16) to (18).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import Likelihood
from linear_operator.operators import DiagLinearOperator
from torch import Generator, Tensor
from torch.distributions import Distribution

from gpbridge.checks import check_memory
from gpbridge.dnn.deep_gp_layer import InducingLayer
from gpbridge.likelihoods import is_gaussian, noise_variances
from gpbridge.outcomes import latent_distribution
from gpbridge.predictive_mixture import marginal_labels, normal_mixture
from gpbridge.randomness import standard_normal

MEMORY_BUDGET = 2**32  # bytes of joint covariances


def independent_normal(mean: Tensor, variance: Tensor) -> MultivariateNormal:
    """A distribution of independent values ``... x n``, or ``... x n x m`` for m > 1.

    Args:
        mean: ``... x n x m``.
        variance: The same.
    """
    if mean.shape[-1] == 1:
        return MultivariateNormal(mean[..., 0], DiagLinearOperator(variance[..., 0]))
    covariance = DiagLinearOperator(variance.flatten(-2))
    return MultitaskMultivariateNormal(mean, covariance)


def marginal_mixture(
    likelihood: Likelihood,
    mean: Tensor,
    variance: Tensor,
    num_samples: int,
    generator: Generator,
) -> Distribution:
    """Distribution of y at each point, a mixture over s draws of the hidden layers.

    Args:
        likelihood: Of y given f.
        mean: Of the last layer given each draw, ``s x ... x n x m``; without hidden
            layers ``1 x ... x n x m``.
        variance: The same.
        num_samples: The number s.
        generator: Source of draws of the last layer, which a softmax needs.

    Returns:
        The mixture, noise included.
    """
    if is_gaussian(likelihood):
        return normal_mixture(mean, variance + noise_variances(likelihood, mean))
    shape = num_samples, *mean.shape[1:]
    return marginal_labels(likelihood, mean, variance, shape, generator)


def joint_moments(
    layers: Sequence[InducingLayer], X: Tensor, num_samples: int, generator: Generator
) -> MultivariateNormal:
    """Moments of f over points ``n x d`` and m outputs, from s draws of hidden layers.

    Raises:
        MemoryError: If the covariances of all draws do not fit.
    """  # noqa: DOC502
    values = _hidden_values(layers, X, num_samples, generator)
    means, covariances = layers[-1].joint(values)  # s x n x m, s x m x n x n
    mean, covariance = means.mean(0), covariances.mean(0)
    off = (means - mean).flatten(-2)
    blocks = torch.diag_embed(covariance.movedim(-3, -1))  # n x n x m x m
    joint = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
    joint = joint + off.mT @ off / len(off)
    return latent_distribution(mean, joint, X.dtype)


def joint_values(
    layers: Sequence[InducingLayer], X: Tensor, num_samples: int, generator: Generator
) -> Tensor:
    """Values of s functions at points ``n x d``, joint over them, ``s x n x m``.

    Raises:
        MemoryError: If the covariances of all draws do not fit.
    """  # noqa: DOC502
    values = _hidden_values(layers, X, num_samples, generator)
    shape = num_samples, len(X), layers[-1].output_dims
    return layers[-1].sample_joint(values, standard_normal(shape, generator, X))


def _hidden_values(
    layers: Sequence[InducingLayer], X: Tensor, num_samples: int, generator: Generator
) -> Tensor:
    """Inputs of the last layer, ``s x n x h``; ``1 x n x d`` if it is the only one."""
    widest = max(layer.output_dims for layer in layers)
    samples = num_samples if len(layers) > 1 else 1
    bytes_each = torch.finfo(X.dtype).bits // 8
    check_memory(
        f"The joint posterior of {len(X)} points",
        3 * bytes_each * (samples * widest + layers[-1].output_dims ** 2) * len(X) ** 2,
        MEMORY_BUDGET,
        "Pass fewer points or a smaller num_samples; predict(X) needs no covariances, "
        "and draw(num_samples) gives functions without them.",
    )
    values = X.unsqueeze(0)
    for layer in layers[:-1]:
        shape = num_samples, len(X), layer.output_dims
        values = layer.sample_joint(values, standard_normal(shape, generator, X))
    return values
