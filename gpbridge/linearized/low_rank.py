r"""Curvature of low rank: the leading eigenvectors of the Gauss-Newton matrix.

.. math::
    M \approx U \, \mathrm{diag}(\lambda) \, U^\top, \qquad U: p \times r,

found by products with M only: randomised subspace iteration, or Lanczos. What is left
out is treated as if the data said nothing about it: variances are too large, never too
small, the log determinant too small. The captured share of the trace says by how much.

In: products with M, or eigenvectors. Out: :class:`LowRankCurvature`, and the posterior
that it gives at a prior. Next: ``structured`` makes them from data.

References:
    Halko, Martinsson, Tropp, Finding structure with randomness: probabilistic
    algorithms for constructing approximate matrix decompositions, SIAM Review 2011,
    algorithms 4.4 and 5.3. Meyer, Musco, Musco, Woodruff, Hutch++: optimal stochastic
    trace estimation, SOSA 2021 (the trace inside and outside of a subspace).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from linear_operator.utils.lanczos import lanczos_tridiag
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.prediction import Projection
from gpbridge.randomness import standard_normal

_OVERSAMPLING = 10  # columns beyond the rank that is asked for
_PROBES = 10  # of the trace


class Eigenpairs(NamedTuple):
    """Leading eigenpairs of a positive semi-definite matrix and its trace."""

    values: Tensor  # r
    vectors: Tensor  # p x r
    trace: Tensor  # an estimate


def randomised_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    num_iterations: int,
    generator: torch.Generator,
    like: Tensor,
) -> Eigenpairs:
    r"""Leading eigenpairs by subspace iteration from random columns.

    Costs ``num_iterations + 2`` products with ``rank + 10`` columns. The trace is exact
    within the subspace and estimated outside, by one product with ten columns.

    Args:
        product: Maps ``p x k`` to M times it.
        size: The number p.
        rank: The number r of pairs.
        num_iterations: Of the subspace; two suffice where the spectrum decays.
        generator: Source of randomness.
        like: Gives dtype and device.

    Returns:
        The pairs, largest first.
    """
    k = min(rank + _OVERSAMPLING, size)
    omega = standard_normal((size, k), generator, like)
    Q = torch.linalg.qr(product(omega)).Q
    for _ in range(num_iterations):
        Q = torch.linalg.qr(product(Q)).Q
    small = Q.mT @ product(Q)
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    keep = torch.arange(k - 1, max(k - 1 - rank, -1), -1, device=like.device)
    trace = small.trace() + _trace_outside(product, Q, generator)
    return Eigenpairs(values[keep].clamp_min(0.0), Q @ vectors[:, keep], trace)


def lanczos_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    num_steps: int,
    generator: torch.Generator,
    like: Tensor,
) -> Eigenpairs:
    """Leading eigenpairs by Lanczos with full reorthogonalisation.

    Costs ``num_steps`` products with one column; the trace one with ten more. Of an
    eigenvalue that is repeated, one start vector finds one eigenvector only.

    Args:
        product: Maps ``p x k`` to M times it.
        size: The number p.
        rank: The number r of pairs.
        num_steps: Of the iteration, at least the rank.
        generator: Source of randomness.
        like: Gives dtype and device.

    Returns:
        The pairs, largest first.
    """
    start = standard_normal((size, 1), generator, like)
    Q, T = lanczos_tridiag(
        product, min(num_steps, size), like.dtype, like.device, (size, size),
        init_vecs=start,
    )  # fmt: skip
    values, vectors = torch.linalg.eigh(T.double())
    keep = torch.arange(len(values) - 1, max(len(values) - 1 - rank, -1), -1)
    trace = T.double().trace() + _trace_outside(product, Q, generator)
    return Eigenpairs(values[keep].clamp_min(0.0), Q @ vectors[:, keep], trace)


def _trace_outside(
    product: Callable[[Tensor], Tensor], Q: Tensor, generator: torch.Generator
) -> Tensor:
    """Hutchinson's estimate of the trace of M outside of a subspace.

    Of the whole matrix it would be off by a third where few eigenvalues dominate.
    """
    probes = standard_normal((len(Q), _PROBES), generator, Q)
    probes = probes - Q @ (Q.mT @ probes)
    return (probes * product(probes)).sum().clamp_min(0.0) / _PROBES


class LowRankCurvature:
    r"""A curvature M of rank r.

    Args:
        vectors: Orthonormal U, ``p x r``, in units of the unit prior scale.
        eigenvalues: ``c x r``, one row per channel.
        trace: That of the full matrix, with every channel weight one.
        groups: Number of the prior variance of each weight, ``p`` integers.
    """

    is_lower_bound = False

    def __init__(
        self, vectors: Tensor, eigenvalues: Tensor, trace: Tensor, groups: Tensor
    ) -> None:
        self.vectors, self.eigenvalues = vectors.double(), eigenvalues.double()
        self.trace, self.groups = trace, groups

    @property
    def num_params(self) -> int:
        """The number p of weights."""
        return len(self.vectors)

    @property
    def captured(self) -> float:
        """Share of the trace that the eigenvectors hold, in [0, 1]."""
        trace = float(self.trace)
        return float(self.eigenvalues.sum()) / trace if trace > 0 else 1.0

    @cached_property
    def _grams(self) -> Tensor:
        """U'U over the weights of each group, ``groups x r x r``."""
        count = int(self.groups.max()) + 1
        members = [self.vectors[self.groups == g] for g in range(count)]
        return torch.stack([rows.mT @ rows for rows in members])

    def _inner(self, prior_variance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cholesky factor of I + C and the root of the eigenvalues, C = W'W."""
        root = (weights @ self.eigenvalues).clamp_min(0.0).sqrt()
        gram = torch.tensordot(prior_variance, self._grams, dims=1)
        C = root[:, None] * gram * root
        eye = torch.eye(len(C)).to(C)
        return torch.linalg.cholesky(eye + C), root

    def logdet(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        r""":math:`\log\det(I + S^{1/2} M S^{1/2})`, O(r^3), differentiable."""
        L, _ = self._inner(prior_variance, weights)
        return 2 * L.diagonal().log().sum()

    def effective_dimension(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Number of directions that the data determine."""
        L, _ = self._inner(prior_variance, weights)
        eye = torch.eye(len(L)).to(L)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        return len(L) - inverse.square().sum()

    def condition(self, prior_variance: Tensor, weights: Tensor) -> LowRankStrategy:
        """The posterior at a prior."""
        L, root = self._inner(prior_variance, weights)
        std = prior_variance.sqrt()[self.groups]
        W = std[:, None] * self.vectors * root
        return LowRankStrategy(torch.linalg.solve_triangular(L, W.mT, upper=False).mT)

    def dense(self, weights: Tensor) -> Tensor:
        """The matrix M, ``p x p``, for tests and small networks."""
        return self.vectors * (weights @ self.eigenvalues) @ self.vectors.mT


class LowRankStrategy:
    r"""The posterior covariance :math:`H^{-1} = I - V V^\top` in the scaled weights.

    Args:
        root: V, ``p x r``.
    """

    def __init__(self, root: Tensor) -> None:
        self.root = root

    @cached_property
    def _square_root(self) -> tuple[Tensor, Tensor]:
        """Orthonormal Q and d with H^-1/2 = I + Q diag(d) Q'."""
        Q, singular, _ = torch.linalg.svd(self.root, full_matrices=False)
        return Q, (1 - singular.square()).clamp_min(0.0).sqrt() - 1

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data."""
        V = features.matmul(self.root.to(features.value)).double()
        blocks = features.blocks().double() - V @ V.mT
        return Projection(features, V.flatten(-3, -2), False, blocks)

    def unit_blocks(self, features: TangentFeatures, prior_variance: Tensor) -> Tensor:
        """Per-point covariance by features at unit scale, for one prior variance."""
        return prior_variance * self.project(features).blocks

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        other = left if right is None else right
        gram = left.features.gram(None if right is None else right.features)
        return gram.double() - left.factor @ other.factor.mT

    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """None: a difference wants the precision that there is."""
        return None

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights."""
        rows = projection.features.rows().double()
        return rows - projection.factor @ self.root.mT

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Standard normals through the root of the covariance, ``s x p``."""
        Q, d = self._square_root
        normal = standard_normal((num_samples, len(Q)), generator, Q)
        return normal + (normal @ Q) * d @ Q.mT

    def inverse(self, columns: Tensor) -> Tensor:
        """Product of the posterior covariance with ``p x k``."""
        return columns - self.root @ (self.root.mT @ columns)
