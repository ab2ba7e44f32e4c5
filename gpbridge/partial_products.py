r"""Rows, columns and blocks of a symmetric matrix that is never formed.

What a block-coordinate solver asks of a matrix H: products with the rows or columns of
an index set, and the small block between them. The rules here work for every linear
operator by products, those of a kernel matrix register themselves beside it.

In: an operator and an index set. Out: products. Next: ``solvers``.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from linear_operator import LinearOperator
from linear_operator.operators import DenseLinearOperator
from torch import Tensor

from gpbridge.operators import WhitenedKernelOperator

Index = Tensor | slice
"""Row numbers, distinct, or a range of them with step one."""


@singledispatch
def row_products(operator: LinearOperator | Tensor, index: Index, V: Tensor) -> Tensor:
    r"""Product :math:`H_{I\cdot} V` with the rows of an index set.

    Args:
        operator: H, symmetric, ``n x n``.
        index: The b rows.
        V: Columns ``n x k``.

    Returns:
        The product ``b x k``.
    """
    V = V.to(operator.dtype)
    n = operator.shape[-1]
    if V.shape[-1] <= size(index, n):
        return operator._matmul(V)[index]
    return operator._matmul(_unit_columns(operator, index)).mT @ V


@singledispatch
def column_products(
    operator: LinearOperator | Tensor, index: Index, U: Tensor
) -> Tensor:
    r"""Product :math:`H_{\cdot I} U` with the columns of an index set.

    Args:
        operator: H, symmetric, ``n x n``.
        index: The b columns.
        U: Coefficients ``b x k``.

    Returns:
        The product ``n x k``.
    """
    U = U.to(operator.dtype)
    n = operator.shape[-1]
    if U.shape[-1] <= size(index, n):
        return operator._matmul(_scatter(U, index, n))
    return operator._matmul(_unit_columns(operator, index)) @ U


@singledispatch
def principal_block(operator: LinearOperator | Tensor, index: Index) -> Tensor:
    r"""The dense block :math:`H_{II}`.

    Args:
        operator: H, symmetric, ``n x n``.
        index: The b rows and columns.

    Returns:
        The block ``b x b``.
    """
    return operator._matmul(_unit_columns(operator, index))[index]


@singledispatch
def dense_columns(operator: LinearOperator | Tensor, index: Index) -> Tensor:
    r"""The dense columns :math:`H_{\cdot I}`, ``n x b``."""
    return operator._matmul(_unit_columns(operator, index))


@singledispatch
def has_cheap_columns(operator: LinearOperator | Tensor) -> bool:
    """Whether b columns cost about b / n of the matrix, and not b products."""
    return isinstance(operator, DenseLinearOperator)


@singledispatch
def smallest_eigenvalue(operator: LinearOperator | Tensor) -> float:
    """A lower bound of the eigenvalues that is known without work, else zero."""
    return 0.0


@singledispatch
def diagonal(operator: LinearOperator | Tensor) -> Tensor:
    """The diagonal ``n``."""
    return operator.diagonal(dim1=-2, dim2=-1)


@singledispatch
def exact_products(operator: LinearOperator | Tensor, V: Tensor) -> Tensor:
    """Product H V in the dtype of V, where an operator can also be had in a lower."""
    return operator._matmul(V.to(operator.dtype)).to(V)


@singledispatch
def precision(operator: LinearOperator | Tensor) -> float:
    """The rounding unit of products, which a recursive residual cannot go below."""
    return torch.finfo(operator.dtype).eps


@singledispatch
def full_precision(operator: LinearOperator | Tensor) -> LinearOperator | Tensor:
    """The same matrix without roundings that speed was bought with; often itself."""
    return operator


def size(index: Index, n: int) -> int:
    """The number of rows that an index set names."""
    return len(range(n)[index]) if isinstance(index, slice) else len(index)


# --- dense tensors


@row_products.register
def _(operator: Tensor, index: Index, V: Tensor) -> Tensor:
    return operator[index] @ V.to(operator)


@column_products.register
def _(operator: Tensor, index: Index, U: Tensor) -> Tensor:
    return operator[index].mT @ U.to(operator)


@principal_block.register
def _(operator: Tensor, index: Index) -> Tensor:
    return operator[index][:, index]


@dense_columns.register
def _(operator: Tensor, index: Index) -> Tensor:
    return operator[:, index]


@has_cheap_columns.register
def _(operator: Tensor) -> bool:
    return True


@exact_products.register
def _(operator: Tensor, V: Tensor) -> Tensor:
    return (operator @ V.to(operator)).to(V)


@row_products.register
def _(operator: DenseLinearOperator, index: Index, V: Tensor) -> Tensor:
    return row_products(operator.tensor, index, V)


@column_products.register
def _(operator: DenseLinearOperator, index: Index, U: Tensor) -> Tensor:
    return column_products(operator.tensor, index, U)


@principal_block.register
def _(operator: DenseLinearOperator, index: Index) -> Tensor:
    return principal_block(operator.tensor, index)


@dense_columns.register
def _(operator: DenseLinearOperator, index: Index) -> Tensor:
    return operator.tensor[:, index]


# --- I + R' K R: the roots of a point couple its outputs, so points are taken whole


@row_products.register
def _(operator: WhitenedKernelOperator, index: Index, V: Tensor) -> Tensor:
    V = V.to(operator.dtype)
    points, places = _points(operator, index)
    return V[index] + points.to_outputs(operator.to_weights(V))[places]


@column_products.register
def _(operator: WhitenedKernelOperator, index: Index, U: Tensor) -> Tensor:
    U = U.to(operator.dtype)
    points, places = _points(operator, index)
    spread = _scatter(U, places, points.shape[-1])
    product = operator.to_outputs(points.to_weights(spread))
    return product.index_add(0, _numbers(operator, index), U)


@principal_block.register
def _(operator: WhitenedKernelOperator, index: Index) -> Tensor:
    points, places = _points(operator, index)
    rows = torch.cat([rows.flatten(0, 1) for rows in points._whitened_rows()])[places]
    return rows @ rows.mT + torch.eye(len(rows)).to(rows)


@smallest_eigenvalue.register
def _(operator: WhitenedKernelOperator) -> float:
    return 1.0


def _points(
    operator: WhitenedKernelOperator, index: Index
) -> tuple[WhitenedKernelOperator, Tensor]:
    """The operator of the points that an index set touches, and the set within it."""
    c = operator.root.shape[-1]
    rows = _numbers(operator, index)
    touched, inverse = torch.unique(rows // c, return_inverse=True)
    chosen = WhitenedKernelOperator(
        operator.features.X[touched],
        operator.root[touched],
        operator.features.theta,
        operator.features.std,
        net=operator.features.net,
    )
    return chosen, inverse * c + rows % c


def _numbers(operator: LinearOperator | Tensor, index: Index) -> Tensor:
    if isinstance(index, Tensor):
        return index
    rows = range(operator.shape[-1])[index]
    return torch.arange(rows.start, rows.stop, device=operator.device)


def _scatter(U: Tensor, index: Index, n: int) -> Tensor:
    spread = U.new_zeros(n, U.shape[-1])
    spread[index] = U
    return spread


def _unit_columns(operator: LinearOperator, index: Index) -> Tensor:
    rows = _numbers(operator, index)
    options = {"dtype": operator.dtype, "device": operator.device}
    return _scatter(torch.eye(len(rows), **options), rows, operator.shape[-1])
