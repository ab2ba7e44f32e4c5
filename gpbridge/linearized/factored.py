r"""Curvature that is diagonal in a Kronecker-factored basis, one block of weights each.

.. math::
    M \approx \bigoplus_b (Q_b \otimes P_b) \, \mathrm{diag}(\lambda_b) \,
              (Q_b \otimes P_b)^\top

With Q and P the eigenvectors of Kronecker factors this is KFAC, or EKFAC if the
eigenvalues are corrected; with identities it is the diagonal. A prior that is one
variance per group shifts the eigenvalues only: the log determinant, its gradient, the
effective dimension and a covariance cost O(p) after one eigendecomposition.

In: bases and eigenvalues of each block. Out: :class:`FactoredCurvature`, and the
posterior that it gives at a prior, :class:`FactoredStrategy`. Next:
``data_curvature`` makes them from data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.features import TangentFeatures
from gpbridge.linearized.weight_blocks import (
    BlockJacobian,
    WeightBlock,
    block_jacobian,
)
from gpbridge.randomness import standard_normal


class Basis(NamedTuple):
    """Orthogonal bases of rows and columns of a block; None is the identity."""

    left: Tensor | None  # o x o
    right: Tensor | None  # i x i


class FactoredCurvature:
    r"""A curvature M, diagonal in a basis per block.

    Eigenvalues are kept for each of c channels and combined with weights: one channel
    with the weight one, or one for each output with the weights :math:`1 / \sigma_j^2`
    of a Gaussian noise that is learnt.

    Args:
        sizes: Shape of each random weight, in the order of the features.
        blocks: The blocks.
        bases: The basis of each.
        eigenvalues: Non-negative, ``c x o x i`` for each block, at unit prior scale.
        is_lower_bound: Whether ``log det(I + M)`` is at least that of the full matrix.
    """

    def __init__(
        self,
        sizes: Mapping[str, torch.Size],
        blocks: Sequence[WeightBlock],
        bases: Sequence[Basis],
        eigenvalues: Sequence[Tensor],
        is_lower_bound: bool,
    ) -> None:
        self.sizes, self.blocks, self.bases = dict(sizes), list(blocks), list(bases)
        self.eigenvalues = [values.double() for values in eigenvalues]
        self.is_lower_bound = is_lower_bound

    @property
    def num_params(self) -> int:
        """The number p of weights."""
        return sum(size.numel() for size in self.sizes.values())

    @property
    def trace(self) -> Tensor:
        """Trace of M with every channel weight one."""
        return torch.stack([values.sum() for values in self.eigenvalues]).sum()

    def scaled_eigenvalues(
        self, prior_variance: Tensor, weights: Tensor
    ) -> list[Tensor]:
        r"""Eigenvalues of :math:`S^{1/2} M S^{1/2}`, ``o x i`` for each block.

        Args:
            prior_variance: One variance per group.
            weights: Of the channels, ``c``.

        Returns:
            Differentiable in both.
        """
        return [
            prior_variance[block.group] * torch.tensordot(weights, values, dims=1)
            for block, values in zip(self.blocks, self.eigenvalues, strict=True)
        ]

    def logdet(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        r""":math:`\log\det(I + S^{1/2} M S^{1/2})`, O(p), differentiable."""
        scaled = self.scaled_eigenvalues(prior_variance, weights)
        return torch.stack([values.log1p().sum() for values in scaled]).sum()

    def effective_dimension(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Number of directions that the data determine, O(p)."""
        scaled = self.scaled_eigenvalues(prior_variance, weights)
        return torch.stack([(v / (1 + v)).sum() for v in scaled]).sum()

    def condition(self, prior_variance: Tensor, weights: Tensor) -> FactoredStrategy:
        """The posterior at a prior; nothing is factorised again."""
        scaled = self.scaled_eigenvalues(prior_variance, weights)
        return FactoredStrategy(self, [(1 + values).reciprocal() for values in scaled])

    def dense(self, weights: Tensor) -> Tensor:
        """The matrix M, ``p x p``, for tests and small networks."""
        M = weights.new_zeros(self.num_params, self.num_params, dtype=torch.float64)
        zipped = zip(self.blocks, self.bases, self.eigenvalues, strict=True)
        index = torch.arange(self.num_params, device=weights.device)
        for block, basis, values in zipped:
            Q = _or_identity(basis.left, block.o, values)
            P = _or_identity(basis.right, block.i, values)
            basis_vectors = torch.kron(Q, P)
            combined = torch.tensordot(weights, values, dims=1).reshape(-1)
            rows = block.take(index).reshape(-1)
            M[rows[:, None], rows] = basis_vectors * combined @ basis_vectors.mT
        return M


class FactoredProjection:
    """Test points in the basis of the posterior; roots are formed when asked for."""

    is_root = True

    def __init__(self, features: TangentFeatures, strategy: FactoredStrategy) -> None:
        self.features, self.strategy = features, strategy

    @cached_property
    def blocks(self) -> Tensor:
        """Posterior covariance of each point's outputs, ``batch x n x m x m``."""
        return self.strategy.point_blocks(self.features)

    @cached_property
    def factor(self) -> Tensor:
        """Root of the posterior covariance, ``batch x (n m) x p``."""
        return torch.cat(list(self.strategy.roots(self.features)), -1)


class FactoredStrategy:
    r"""The posterior covariance :math:`H^{-1}` in the basis of a curvature.

    Works in the scaled weights :math:`\omega = S^{-1/2} w`, as all strategies.

    Args:
        curvature: The curvature.
        variances: Posterior over prior variance along the basis, ``o x i`` per block.
    """

    def __init__(self, curvature: FactoredCurvature, variances: list[Tensor]) -> None:
        self.curvature, self.variances = curvature, variances

    def rotated(self, features: TangentFeatures) -> list[tuple[BlockJacobian, Tensor]]:
        """Derivatives in the basis of each block, with roots of its variances."""
        curvature, like = self.curvature, features.value
        found = []
        for block, basis, variances in zip(
            curvature.blocks, curvature.bases, self.variances, strict=True
        ):
            J = block_jacobian(features, block, curvature.sizes)
            left, right = (None if q is None else q.to(like) for q in basis)
            found.append((J.rotated(left, right), variances.sqrt().to(like)))
        return found

    def point_blocks(self, features: TangentFeatures) -> Tensor:
        """Posterior covariance of each point's outputs, float64.

        A layer of width h costs n h^2, without its n m h^2 derivatives.
        """
        total = 0.0
        for J, root in self.rotated(features):
            if J.is_rank_one:
                signal = J.signal[..., 0, :]  # batch x n x m x o
                spread = J.inputs[..., 0, :].square() @ root.square().mT
                part = (signal * spread[..., None, :]) @ signal.mT
            else:
                F = (J.dense() * root).flatten(-2)
                part = F @ F.mT
            total = total + part.double()
        return total

    def unit_blocks(self, features: TangentFeatures, prior_variance: Tensor) -> Tensor:
        """The same by features at unit prior scale, for one prior variance."""
        return prior_variance * self.point_blocks(features)

    def project(self, features: TangentFeatures) -> FactoredProjection:
        """See test points through the data."""
        return FactoredProjection(features, self)

    def covariance(
        self, left: FactoredProjection, right: FactoredProjection | None = None
    ) -> Tensor:
        """Posterior covariance between the outputs of two sets of points.

        One block of weights at a time: no root of all p columns is held.
        """
        total = 0.0
        others = self.roots((left if right is None else right).features)
        for own, other in zip(self.roots(left.features), others, strict=True):
            total = total + own @ other.mT
        return total

    def roots(self, features: TangentFeatures) -> Iterator[Tensor]:
        """Roots of the covariance block by block, ``batch x (n m) x (o i)``."""
        for J, root in self.rotated(features):
            yield (J.dense() * root).flatten(-2).flatten(-3, -2).double()

    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """The same as ``point_blocks``: sums of squares lose no digits."""
        return self.point_blocks(features)

    def cross_weights(self, projection: FactoredProjection) -> Tensor:
        """Posterior covariance of outputs and weights."""
        batch = projection.factor.shape[:-1]
        result = projection.factor.new_empty(*batch, self.curvature.num_params)
        first = 0
        for k, block in enumerate(self.curvature.blocks):
            size = block.o * block.i
            part = projection.factor[..., first : first + size]
            self._put(result, k, part.unflatten(-1, (block.o, block.i)))
            first += size
        return result

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Standard normals in the basis, ``s x p``."""
        like = self.variances[0]
        result = like.new_empty(num_samples, self.curvature.num_params)
        for k, block in enumerate(self.curvature.blocks):
            shape = (num_samples, block.o, block.i)
            self._put(result, k, standard_normal(shape, generator, like))
        return result

    def _put(self, flat: Tensor, k: int, whitened: Tensor) -> None:
        """Scale by the root of the variances, rotate back, write in place."""
        left, right = self.curvature.bases[k]
        part = whitened * self.variances[k].sqrt()
        part = part if right is None else part @ right.mT
        self.curvature.blocks[k].put(flat, part if left is None else left @ part)


def _or_identity(basis: Tensor | None, size: int, like: Tensor) -> Tensor:
    return torch.eye(size).to(like) if basis is None else basis.double()
