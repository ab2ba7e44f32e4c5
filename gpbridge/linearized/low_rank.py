r"""Curvature of low rank: the leading eigenvectors of the Gauss-Newton matrix.

.. math::
    M \approx U \, \mathrm{diag}(\lambda) \, U^\top, \qquad U: p \times r,

found by products with M only: randomised subspace iteration, or Lanczos. For
covariances what is left out is treated as if the data said nothing about it: variances
are too large, never too small. In the log determinant it counts at most what its trace
:math:`\tau` allows, so that no hyperparameter is chosen for what it does in directions
that are not seen:

.. math::
    \log\det(I + M) \le \sum_{i \le r} \log(1 + \lambda_i) + k \log(1 + \tau / k),

by Fischer's and Jensen's inequalities, with k the rank that the rest can have.

In: products with M, or eigenvectors. Out: :class:`LowRankCurvature`, and the posterior
that it gives at a prior. Next: ``structured_problem`` makes them from data.

References:
    Halko, Martinsson, Tropp, Finding structure with randomness: probabilistic
    algorithms for constructing approximate matrix decompositions, SIAM Review 2011,
    algorithms 4.4 and 5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from linear_operator.utils.lanczos import lanczos_tridiag
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.prediction import Projection, nothing_cancels
from gpbridge.randomness import standard_normal

_OVERSAMPLING = 10  # columns beyond the rank that is asked for


class Eigenpairs(NamedTuple):
    """Leading eigenpairs of a positive semi-definite matrix."""

    values: Tensor  # r
    vectors: Tensor  # p x r


def randomised_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    num_iterations: int,
    generator: torch.Generator,
    like: Tensor,
) -> Eigenpairs:
    r"""Leading eigenpairs by subspace iteration from random columns.

    Costs ``num_iterations + 2`` products with ``rank + 10`` columns.

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
    return Eigenpairs(values[keep].clamp_min(0.0), Q @ vectors[:, keep])


def lanczos_eigenpairs(
    product: Callable[[Tensor], Tensor],
    size: int,
    rank: int,
    num_steps: int,
    generator: torch.Generator,
    like: Tensor,
) -> Eigenpairs:
    """Leading eigenpairs by Lanczos with full reorthogonalisation.

    Costs ``num_steps + 1`` products with one column. Of an eigenvalue that is repeated,
    one start vector finds one eigenvector only.

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
    # The iteration ends below an absolute threshold: it sees a matrix of size one.
    unit = product(start).norm() / start.norm()
    unit = torch.where(unit > 0, unit, 1.0)
    Q, T = lanczos_tridiag(
        lambda columns: product(columns) / unit, min(num_steps, size), like.dtype,
        like.device, (size, size), init_vecs=start,
    )  # fmt: skip
    values, vectors = torch.linalg.eigh(T.double())
    values = unit * values
    keep = torch.arange(len(values) - 1, max(len(values) - 1 - rank, -1), -1)
    return Eigenpairs(values[keep].clamp_min(0.0), Q @ vectors[:, keep])


class LowRankCurvature:
    r"""A curvature M of rank r, :math:`M \approx U C U^\top`.

    Args:
        vectors: Orthonormal U, ``p x r``, in units of the unit prior scale.
        core: C for each channel, ``c x r x r``; diagonal where there is one.
        traces: Those of the full matrix, ``c x groups``: of each channel and of the
            weights of each group.
        groups: Number of the prior variance of each weight, ``p`` integers.
        rank_bound: The rank that the full matrix has at most.
    """

    def __init__(
        self,
        vectors: Tensor,
        core: Tensor,
        traces: Tensor,
        groups: Tensor,
        rank_bound: int,
    ) -> None:
        self.vectors, self.core = vectors.double(), core.double()
        self.traces, self.groups, self.rank_bound = traces, groups, rank_bound

    @property
    def num_params(self) -> int:
        """The number p of weights."""
        return len(self.vectors)

    @property
    def is_lower_bound(self) -> bool:
        """Whether ``log det(I + M)`` is at least that of the full matrix."""
        return self.traces.shape[1] == 1

    @property
    def trace(self) -> Tensor:
        """That of the full matrix, with every channel weight one."""
        return self.traces.sum()

    @property
    def captured(self) -> float:
        """Share of the trace that the eigenvectors hold, in [0, 1]."""
        trace = float(self.trace)
        held = float(self.core.diagonal(dim1=-2, dim2=-1).sum())
        return min(held / trace, 1.0) if trace > 0 else 1.0

    @property
    def rest(self) -> int:
        """The number k of directions beyond the eigenvectors that M can have."""
        return min(self.rank_bound, self.num_params - self.vectors.shape[1])

    @cached_property
    def _grams(self) -> Tensor:
        """U'U over the weights of each group, ``groups x r x r``."""
        count = self.traces.shape[1]
        members = [self.vectors[self.groups == g] for g in range(count)]
        return torch.stack([rows.mT @ rows for rows in members])

    def _inner(self, prior_variance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """T = L'CL with LL' = U'SU, which has the eigenvalues of S^1/2 M S^1/2."""
        L = torch.linalg.cholesky(torch.tensordot(prior_variance, self._grams, dims=1))
        return L.mT @ torch.tensordot(weights, self.core, dims=1) @ L, L

    def logdet(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        r""":math:`\log\det(I + S^{1/2} M S^{1/2})`, O(r^3), differentiable."""
        T, _ = self._inner(prior_variance, weights)
        shifted = T + torch.eye(len(T)).to(T)
        return 2 * torch.linalg.cholesky(shifted).diagonal().log().sum()

    def logdet_bound(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """That of the full matrix at most, by the trace of what is left out."""
        T, _ = self._inner(prior_variance, weights)
        unseen = (weights @ self.traces @ prior_variance - T.trace()).clamp_min(0.0)
        seen = self.logdet(prior_variance, weights)
        return seen + self.rest * (unseen / max(self.rest, 1)).log1p()

    def effective_dimension(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Number of directions that the data determine, of those that are kept."""
        T, _ = self._inner(prior_variance, weights)
        values = torch.linalg.eigvalsh(T).clamp_min(0.0)
        return (values / (1 + values)).sum()

    def condition(self, prior_variance: Tensor, weights: Tensor) -> LowRankStrategy:
        """The posterior at a prior."""
        T, L = self._inner(prior_variance, weights)
        values, vectors = torch.linalg.eigh(T)
        std = prior_variance.sqrt()[self.groups]
        # Orthonormal, since U'SU = LL'.
        Q = torch.linalg.solve_triangular(
            L, (std[:, None] * self.vectors).mT, upper=False
        )
        return LowRankStrategy(Q.mT @ vectors, values.clamp_min(0.0))

    def dense(self, weights: Tensor) -> Tensor:
        """The matrix M, ``p x p``, for tests and small networks."""
        return self.vectors @ torch.tensordot(weights, self.core, 1) @ self.vectors.mT


class LowRankStrategy:
    r"""The posterior precision :math:`H = I + Q \, \mathrm{diag}(t) \, Q^\top`.

    Works in the scaled weights, as all strategies.

    Args:
        vectors: Orthonormal Q, ``p x r``.
        eigenvalues: t, ``r``.
    """

    def __init__(self, vectors: Tensor, eigenvalues: Tensor) -> None:
        self.vectors, self.eigenvalues = vectors, eigenvalues
        self.root = vectors * (eigenvalues / (1 + eigenvalues)).sqrt()  # H^-1 = I - VV'

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the data; in float64 where float32 would cancel."""
        projection = self._difference(features)
        dtype, prior = features.value.dtype, features.blocks()
        if dtype == torch.float64 or nothing_cancels(
            projection.blocks.detach(), prior.detach(), dtype
        ):
            return projection
        return self._difference(features.to(torch.float64))

    def _difference(self, features: TangentFeatures) -> Projection:
        V = features.matmul(self.root.to(features.value)).double()
        blocks = features.blocks().double() - V @ V.mT
        return Projection(features, V.flatten(-3, -2), False, blocks)

    def unit_blocks(self, features: TangentFeatures, prior_variance: Tensor) -> Tensor:
        """Per-point covariance by features at unit scale, for one prior variance."""
        return prior_variance * self.project(features).blocks

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        both = [left] if right is None else [left, right]
        if any(side.features.value.dtype == torch.float64 for side in both):
            both = [self._in_double(side) for side in both]
        left, other = both[0], both[-1]
        gram = left.features.gram(None if right is None else other.features)
        return gram.double() - left.factor @ other.factor.mT

    def _in_double(self, side: Projection) -> Projection:
        if side.features.value.dtype == torch.float64:
            return side
        return self._difference(side.features.to(torch.float64))

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
        Q, shrunk = self.vectors, (1 + self.eigenvalues).rsqrt() - 1
        normal = standard_normal((num_samples, len(Q)), generator, Q)
        return normal + (normal @ Q) * shrunk @ Q.mT
