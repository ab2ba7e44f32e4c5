r"""Sparse Gaussian process posteriors in closed form, given pseudo-observations.

A pseudo-observation is a Gaussian factor
:math:`N(\tilde y_i \mid z(x_i), \tilde s_i^2)` with a noise variance of its own. In:
kernel matrices and such factors. Out: an :class:`InducingPosterior` of whitened
inducing values, batched over latent dimensions.
Next: ``gp_vae``, whose encoder makes the factors.

References:
    Titsias, Variational learning of inducing variables in sparse Gaussian processes,
    AISTATS 2009, eq. (10). Hensman, Fusi, Lawrence, Gaussian processes for big data,
    UAI 2013, eq. (4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

_JITTER = {torch.float64: 1e-8, torch.float32: 1e-5}  # of the mean prior variance


class InducingPosterior(NamedTuple):
    r"""Gaussian posteriors :math:`q(v) = N(\mu, B^{-1})` of whitened inducing values.

    The inducing values are u = C v with :math:`C C^\top = K_{mm}`, so that the prior of
    v is standard normal. ``mean`` is ``l x m``, ``factor`` the lower Cholesky factor of
    the precision B, ``l x m x m``.
    """

    mean: Tensor
    factor: Tensor

    def divergence(self) -> Tensor:
        """KL divergence from the prior, nats, ``l``."""
        root = self._inverse_root()
        log_det = 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        trace = root.square().sum((-2, -1))
        return 0.5 * (trace + self.mean.square().sum(-1) - root.shape[-1] + log_det)

    def marginal(self, cross: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances at each point alone, both ``l x t``.

        Args:
            cross: Whitened cross covariances of :func:`whiten`, ``... x m x t``.
            variance: Prior variances, ``... x t``.
        """
        seen = self._solved(cross)
        explained = cross.square().sum(-2) - seen.square().sum(-2)
        # A difference: rounding may leave it below zero where data are dense.
        floor = 1e-12 * variance.abs() + torch.finfo(variance.dtype).tiny
        return self._at(cross), torch.maximum(variance - explained, floor)

    def joint(self, cross: Tensor, covariance: Tensor) -> MultivariateNormal:
        """Normals over all points, batch ``l``, given prior covariances ``t x t``."""
        seen = self._solved(cross)
        posterior = covariance - cross.mT @ cross + seen.mT @ seen
        # Lazy: a dense matrix would be factorised at once, and it may be singular.
        return MultivariateNormal(self._at(cross), to_linear_operator(posterior))

    def _at(self, cross: Tensor) -> Tensor:
        return (cross.mT @ self.mean[..., None])[..., 0]

    def _solved(self, cross: Tensor) -> Tensor:
        cross = cross.expand(*self.mean.shape[:-1], *cross.shape[-2:])
        return torch.linalg.solve_triangular(self.factor, cross, upper=False)

    def _inverse_root(self) -> Tensor:
        identity = torch.eye(self.mean.shape[-1]).to(self.factor)
        return self._solved(identity)


def whiten(inducing: Tensor, cross: Tensor) -> Tensor:
    r"""Cross covariances of whitened inducing values, :math:`C^{-1} K_{mx}`.

    A jitter of 1e-8 of the mean prior variance (1e-5 in float32) is part of the prior
    of u, so that bounds stay bounds.

    Args:
        inducing: :math:`K_{mm}`, ``... x m x m``.
        cross: :math:`K_{mx}`, ``... x m x t``.

    Returns:
        ``... x m x t``.
    """
    scale = inducing.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(inducing.shape[-1]).to(inducing)
    factor = psd_safe_cholesky(inducing + _JITTER[inducing.dtype] * scale * identity)
    return torch.linalg.solve_triangular(factor, cross, upper=False)


def evidence_of(
    cross: Tensor, targets: Tensor, noise_variance: Tensor, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""What pseudo-observations say about whitened inducing values; sums over data.

    .. math:: w A S^{-1} A^\top, \qquad w A S^{-1} \tilde y, \qquad
              A = C^{-1} K_{mb}, \; S = \mathrm{diag}\, \tilde s^2

    Args:
        cross: A, ``m x b`` or ``l x m x b``, of :func:`whiten`.
        targets: Pseudo-observations, ``l x b``.
        noise_variance: Theirs, ``l x b``.
        weight: How often each counts: N / b, for a batch that stands for N data.

    Returns:
        Precision added to that of the prior ``l x m x m``, and shift ``l x m``.
    """
    scaled = cross * (weight / noise_variance)[:, None]  # l x m x b
    return scaled @ cross.mT, (scaled @ targets[..., None])[..., 0]


def posterior_of(precision: Tensor, shift: Tensor) -> InducingPosterior:
    r"""The optimal q(u) given the sums of :func:`evidence_of` over all data.

    With them, :math:`B = I + w A S^{-1} A^\top` and
    :math:`\mu = w B^{-1} A S^{-1} \tilde y`. For u this is, with
    :math:`\Sigma = K_{mm} + w K_{mb} S^{-1} K_{bm}`, the Gaussian
    :math:`N(K_{mm} \Sigma^{-1} w K_{mb} S^{-1} \tilde y, K_{mm} \Sigma^{-1} K_{mm})`.
    Both cost l (b m^2 + m^3).

    Args:
        precision: ``l x m x m``.
        shift: ``l x m``.

    Returns:
        The posterior.

    References:
        Jazbec, Ashman, Fortuin, Pearce, Mandt, Rätsch, Scalable Gaussian process
        variational autoencoders, AISTATS 2021, the estimates from a minibatch.
        Titsias 2009, eq. (10), for w = 1.
    """
    identity = torch.eye(precision.shape[-1]).to(precision)
    factor = torch.linalg.cholesky(identity + precision)
    mean = torch.cholesky_solve(shift[..., None], factor)[..., 0]
    return InducingPosterior(mean, factor)


def refine(
    mean: Tensor,
    variance: Tensor,
    targets: Tensor,
    noise_variance: Tensor,
    latent_noise: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The posterior of noisy values z = f + e of each point, from its own observation.

    With :math:`e \sim N(0, \alpha)`,

    .. math:: q(z \mid f) = N(\rho f + (1 - \rho) \tilde y, \; \rho \alpha), \qquad
              \rho = \tilde s^2 / (\alpha + \tilde s^2) .

    Args:
        mean: Of f, ``l x n``.
        variance: Of f, ``l x n``.
        targets: Pseudo-observations of z, ``l x n``.
        noise_variance: Theirs, ``l x n``.
        latent_noise: The variance alpha, which may be zero.

    Returns:
        Means and variances of z, and the expected divergence of q(z | f) from p(z | f).
    """
    total = latent_noise + noise_variance
    share = noise_variance / total  # rho
    error = (targets - mean).square() + variance
    distance = latent_noise / total.square() * error
    divergence = 0.5 * (share - 1 - share.log() + distance)
    refined = share.square() * variance + share * latent_noise
    return targets + share * (mean - targets), refined, divergence
