"""One covariance for a batch of outputs, evaluated once.

Upstream repeats the inputs of a lazy kernel for every member of a batch, and evaluates
all of them: ten latent functions that share a kernel cost ten kernels.

In: a covariance without the batch. Out: an operator that has it. Next:
``inducing_strategy``, whose outputs share the prior.
"""

from __future__ import annotations

from typing import Any

from linear_operator import LinearOperator, to_linear_operator
from torch import Size, Tensor, broadcast_shapes, empty


class SharedCovarianceOperator(LinearOperator):
    """The same matrix at every index of a batch.

    Args:
        base: The matrix ``... n x n'``.
        batch_shape: The batch shape to show; that of ``base`` broadcasts to it.

    Example:
        >>> import torch
        >>> from linear_operator import to_linear_operator
        >>> base = to_linear_operator(torch.eye(3))
        >>> SharedCovarianceOperator(base, Size([10])).shape
        torch.Size([10, 3, 3])
    """

    def __init__(self, base: LinearOperator, batch_shape: Size) -> None:
        super().__init__(base, batch_shape=batch_shape)
        self.base = base
        self._batch = batch_shape

    def _size(self) -> Size:
        return Size([*self._batch, *self.base.shape[-2:]])

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self.base.matmul(rhs).expand(*self._batch, self.shape[-2])
        batch = broadcast_shapes(self._batch, rhs.shape[:-2])
        product = self.base.to_dense() @ rhs
        return product.expand(*batch, *product.shape[-2:])

    def _transpose_nonbatch(self) -> SharedCovarianceOperator:
        return type(self)(self.base.mT, self._batch)

    def _diagonal(self) -> Tensor:
        diagonal = self.base.diagonal(dim1=-2, dim2=-1)
        return diagonal.expand(*self._batch, diagonal.shape[-1])

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> Any:
        rows_are_slices = isinstance(row_index, slice) and isinstance(col_index, slice)
        if not rows_are_slices or len(self.base.batch_shape):
            dense = self.to_dense()[(*batch_indices, row_index, col_index)]
            return to_linear_operator(dense)
        batch = empty(self._batch, device="meta")[batch_indices].shape
        return type(self)(self.base[row_index, col_index], batch)

    def _get_indices(
        self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor
    ) -> Tensor:
        return self.to_dense()[(*batch_indices, row_index, col_index)]

    def _expand_batch(self, batch_shape: Size | list[int]) -> SharedCovarianceOperator:
        return type(self)(self.base, Size(batch_shape))

    def to_dense(self) -> Tensor:
        """The matrices, one and the same in memory."""
        return self.base.to_dense().expand(self.shape)
