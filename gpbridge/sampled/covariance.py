"""The Gaussian whose covariance is that of samples about their mean.

In: means and deviations. Out: a gpytorch distribution, over points and outputs. Next:
``gp`` answers with it.
"""

from __future__ import annotations

import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import RootLinearOperator
from torch import Tensor

from gpbridge.outcomes import latent_distribution


def sample_distribution(
    mean: Tensor,
    deviations: Tensor,
    dtype: torch.dtype,
    noise: Tensor | None = None,
) -> MultivariateNormal:
    """Joint distribution of values, of the rank of the samples where it can be.

    Args:
        mean: Means ``... x q x m``.
        deviations: Of the samples from it, ``s x ... x q x m``.
        dtype: Of the result.
        noise: Variances to add, ``... x q x m``.

    Returns:
        A distribution over points and independent outputs.
    """
    q, s = mean.shape[-2], len(deviations)
    root = deviations.movedim(0, -1).transpose(-3, -2) / s**0.5  # ... x m x q x s
    root = root.expand(*mean.shape[:-2], *root.shape[-3:])
    if noise is None and q > s:
        # Singular: its root has zeros, where a factorisation would need jitter.
        # It is square, since botorch's base samples are one per point.
        padding = root.new_zeros(*root.shape[:-1], q - s)
        root = torch.cat([root, padding], -1)
        factor = interleaved(root).to(dtype)
        return latent_distribution(mean, RootLinearOperator(factor), dtype)
    covariance = root @ root.mT
    if noise is not None:
        covariance = covariance + torch.diag_embed(noise.mT)
    return latent_distribution(mean, interleaved(covariance), dtype)


def interleaved(blocks: Tensor) -> Tensor:
    """Blocks ``... x m x q x r`` on the diagonal of ``... x (q m) x (r m)``."""
    if blocks.shape[-3] == 1:
        return blocks.squeeze(-3)
    full = torch.diag_embed(blocks.movedim(-3, -1))  # ... x q x r x m x m
    return full.transpose(-3, -2).flatten(-4, -3).flatten(-2)
