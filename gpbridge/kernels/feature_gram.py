r"""The Gram matrix of features, :math:`\Phi \Phi^\top`, which stays cheap in sums.

In: features ``batch_shape x n x f``. Out: a linear operator that keeps the factor, also
where gpytorch adds and multiplies kernels. Next: ``feature`` returns it.
"""

from __future__ import annotations

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    ZeroLinearOperator,
)
from torch import Size, Tensor


class FeatureGramOperator(LinearOperator):
    r"""The matrix :math:`\Phi \Phi^\top`, held as :math:`\Phi`.

    Upstream's ``RootLinearOperator`` is the same matrix, but adding one to anything
    (``A + root``) decomposes A: a Cholesky factor, with jitter if A is singular, and a
    full singular value decomposition, at each step of a fit. Here a sum is a sum. With
    more rows than features, adding noise gives upstream's low-rank form, whose solves
    cost n f². Sums of such matrices join their features; products cross them while
    that is cheaper than the dense matrix.

    Args:
        root: Features ``batch_shape x n x f``, a tensor or a linear operator.
    """

    def __init__(self, root: Tensor | LinearOperator) -> None:
        root = to_linear_operator(root)
        super().__init__(root)
        self.root = root

    def __add__(self, other):
        if isinstance(other, ZeroLinearOperator):
            return self
        if isinstance(other, DiagLinearOperator):
            if self.root.shape[-1] >= self.root.shape[-2]:
                return AddedDiagLinearOperator(self, other)
            return LowRankRootAddedDiagLinearOperator(
                LowRankRootLinearOperator(self.root), other
            )
        if not isinstance(other, FeatureGramOperator | RootLinearOperator):
            return super().__add__(other)
        roots = self.root, other.root
        if not all(isinstance(root, DenseLinearOperator) for root in roots):
            return SumLinearOperator(self, FeatureGramOperator(other.root))
        batch = torch.broadcast_shapes(*(root.batch_shape for root in roots))
        parts = [root.tensor.expand(*batch, *root.shape[-2:]) for root in roots]
        return FeatureGramOperator(torch.cat(parts, dim=-1))

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        """Add a scalar, a constant per batch ``... x 1``, or a diagonal ``... x n``."""
        if diag.dim() == 0 or diag.shape[-1] == 1:
            constant = diag.reshape(*diag.shape[:-1], 1)
            return self + ConstantDiagLinearOperator(constant, self.shape[-1])
        return self + DiagLinearOperator(diag.expand(self.shape[:-1]))

    def root_decomposition(self, method: str | None = None) -> RootLinearOperator:
        """The factor at hand."""
        return RootLinearOperator(self.root)

    def to_dense(self) -> Tensor:
        """The matrix, ``batch_shape x n x n``."""
        root = self.root.to_dense()
        return root @ root.mT

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.root._matmul(self.root._t_matmul(rhs))

    def _size(self) -> Size:
        return Size((*self.root.batch_shape, self.root.shape[-2], self.root.shape[-2]))

    def _transpose_nonbatch(self) -> FeatureGramOperator:
        return self

    def _diagonal(self) -> Tensor:
        return RootLinearOperator(self.root)._diagonal()

    def _expand_batch(self, batch_shape: Size) -> FeatureGramOperator:
        return FeatureGramOperator(self.root._expand_batch(batch_shape))

    def _get_indices(self, row_index, col_index, *batch_indices) -> Tensor:
        return RootLinearOperator(self.root)._get_indices(
            row_index, col_index, *batch_indices
        )

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        chosen = RootLinearOperator(self.root)._getitem(
            row_index, col_index, *batch_indices
        )
        if isinstance(chosen, RootLinearOperator):
            return FeatureGramOperator(chosen.root)
        return chosen

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        scaled = RootLinearOperator(self.root)._mul_constant(torch.as_tensor(other))
        if isinstance(scaled, RootLinearOperator):
            return FeatureGramOperator(scaled.root)
        return scaled

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        if isinstance(other, FeatureGramOperator | RootLinearOperator):
            roots = self.root, other.root
            columns = roots[0].shape[-1] * roots[1].shape[-1]
            if columns < self.shape[-1]:
                left, right = (root.to_dense() for root in roots)
                crossed = left[..., :, None] * right[..., None, :]
                return FeatureGramOperator(crossed.flatten(-2))
        dense = to_linear_operator(other).to_dense()
        return DenseLinearOperator(self.to_dense() * dense)

    def _prod_batch(self, dim: int) -> LinearOperator:
        # Upstream pads an odd batch with the wrong constant unless roots are square.
        return DenseLinearOperator(self.to_dense().prod(dim))


def feature_gram(left: Tensor, right: Tensor | None = None) -> LinearOperator:
    r"""Lazy :math:`\Phi \Phi^\top`, or :math:`\Phi \Phi'^\top` of two sets of points.

    Args:
        left: Features ``batch_shape x n x f``.
        right: Features of other points; default the same.

    Returns:
        A matrix that keeps its factors.
    """
    if right is None:
        return FeatureGramOperator(left)
    return MatmulLinearOperator(left, right.mT)
