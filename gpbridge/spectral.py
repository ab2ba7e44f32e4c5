r"""Evidence and posterior of a linear model from one eigendecomposition.

With one prior variance s, the whitened prior covariance is :math:`s R^\top K R` for a
fixed K; its eigenvalues make every further evaluation linear in the number of data. In
weight space the spectrum of :math:`J^\top R R^\top J` is the same, up to zeros.

In: a unit Gram or precision matrix. Out: a :class:`Spectrum`, and for Gaussian noise
the evidence as a function of (s, noise). Next: ``linearized/evidence`` optimises it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Spectrum(NamedTuple):
    r"""Eigenvalues :math:`\lambda_i` of :math:`R^\top K R` at prior variance one."""

    eigenvalues: Tensor  # k, non-negative
    vectors: Tensor  # of the matrix that was decomposed, one per column

    def logdet(self, prior_variance: Tensor) -> Tensor:
        r""":math:`\log\det(I + s R^\top K R)`, differentiable in s."""
        return torch.log1p(prior_variance * self.eigenvalues).sum()

    def effective_dimension(self, prior_variance: Tensor) -> Tensor:
        r""":math:`\sum_i s \lambda_i / (1 + s \lambda_i)`, between 0 and k."""
        scaled = prior_variance * self.eigenvalues
        return (scaled / (1 + scaled)).sum()


class GaussianSpectrum(NamedTuple):
    r"""What the evidence of targets under :math:`N(0, s K + \sigma^2 I)` depends on.

    ``rest`` is the squared norm of the targets outside of the range of K and ``count``
    the number of targets, so that K may be given by fewer eigenvalues than it has rows.
    """

    eigenvalues: Tensor  # k
    squares: Tensor  # k, squared coordinates of the targets
    rest: Tensor
    count: int

    def log_evidence(self, prior_variance: Tensor, noise_variance: Tensor) -> Tensor:
        """Log density of the targets in total nats; differentiable, linear in n.

        Rasmussen and Williams (2006), eq. (2.30), in the eigenbasis of K.
        """
        variances = prior_variance * self.eigenvalues + noise_variance
        zeros = self.count - len(self.eigenvalues)
        return -0.5 * (
            (self.squares / variances).sum()
            + self.rest / noise_variance
            + variances.log().sum()
            + zeros * torch.log(noise_variance)
            + self.count * math.log(2 * math.pi)
        )

    def effective_dimension(
        self, prior_variance: Tensor, noise_variance: Tensor
    ) -> Tensor:
        """The number of directions that the data determine."""
        signal = prior_variance * self.eigenvalues
        return (signal / (signal + noise_variance)).sum()


def decompose(matrix: Tensor) -> Spectrum:
    """Eigendecomposition of a positive semi-definite matrix, in float64.

    Round-off leaves tiny negative eigenvalues, which are set to zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    return Spectrum(eigenvalues.clamp_min(0.0), vectors)


def gaussian_spectrum(gram: Tensor, targets: Tensor) -> GaussianSpectrum:
    """From the unit Gram matrix, ``n x n``, and targets ``n``."""
    spectrum = decompose(gram)
    squares = (spectrum.vectors.mT @ targets).square()
    return GaussianSpectrum(
        spectrum.eigenvalues, squares, targets.new_zeros(()), len(targets)
    )


def gaussian_spectrum_of_rows(rows: Tensor, targets: Tensor) -> GaussianSpectrum:
    """From the features J themselves, ``n x p``, and targets ``n``.

    Orthogonal factors of J, whose singular values are accurate where the eigenvalues of
    its square are not: those lose half the digits.
    """
    if rows.shape[0] < rows.shape[1]:
        left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
        nothing = targets.new_zeros(())
        squares = (left.mT @ targets).square()
        return GaussianSpectrum(singular.square(), squares, nothing, len(targets))
    basis, triangle = torch.linalg.qr(rows)
    left, singular, _ = torch.linalg.svd(triangle)
    inside = basis.mT @ targets
    rest = (targets - basis @ inside).square().sum()
    squares = (left.mT @ inside).square()
    return GaussianSpectrum(singular.square(), squares, rest, len(targets))


def gaussian_spectrum_of_weights(
    scatter: Tensor,
    matmul: Callable[[Tensor], Tensor],
    t_matmul: Callable[[Tensor], Tensor],
    targets: Tensor,
) -> GaussianSpectrum:
    r"""From :math:`J^\top J`, ``p x p``, the products with J, and targets ``n``.

    For a J that does not fit into memory; small eigenvalues lose half their digits.

    The rest is the norm of a residual, not a difference of norms, which would lose all
    digits where the linear model fits well.
    """
    spectrum = decompose(scatter)
    kept = spectrum.eigenvalues > 1e-14 * spectrum.eigenvalues.max()
    eigenvalues, vectors = spectrum.eigenvalues[kept], spectrum.vectors[:, kept]
    pulled = t_matmul(targets[:, None])  # one output
    coordinates = (vectors.mT @ pulled) / eigenvalues.sqrt()
    fitted = matmul(vectors @ (coordinates / eigenvalues.sqrt())).reshape(-1)
    return GaussianSpectrum(
        eigenvalues,
        coordinates.square(),
        (targets - fitted).square().sum(),
        len(targets),
    )
