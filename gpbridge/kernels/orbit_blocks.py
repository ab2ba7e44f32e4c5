r"""Averages over orbits, in blocks of points, so that memory stays bounded.

In: a kernel and the orbits of two sets of points. Out: the weighted mean of all entries
that belong to a pair of points. Next: ``invariant`` says which orbits, which weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ENTRIES = 2**24  # kernel entries formed at a time; 128 MiB in float64


def orbit_mean(
    kernel: Kernel,
    rows: Tensor,
    columns: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    num_outputs: int = 1,
) -> Tensor:
    r"""The matrix :math:`\sum_{a, a'} v_a w_{a'}\, k(T_a x, T_{a'} x')`.

    Args:
        kernel: The kernel k, with m outputs per point.
        rows: Orbits ``... x n x s x d``.
        columns: Orbits ``... x n' x s' x d``.
        row_weights: Weights v, ``s``.
        column_weights: Weights w, ``s'``.
        num_outputs: The number m.

    Returns:
        The matrix, ``... x (n m) x (n' m)``.
    """
    (n1, s1), (n2, s2) = rows.shape[-3:-1], columns.shape[-3:-1]
    flat = rows.flatten(-3, -2)
    others = flat if rows is columns else columns.flatten(-3, -2)
    K = kernel(flat, others).to_dense()
    batch = K.shape[:-2]
    if num_outputs == 1:
        K = K.reshape(*batch, n1 * s1, n2, s2) @ column_weights.to(K)
        K = K.reshape(*batch, n1, s1, n2)
        return torch.einsum("...asb,s->...ab", K, row_weights.to(K))
    m = num_outputs
    K = K.reshape(*batch, n1, s1, m, n2, s2, m)
    weights = row_weights.to(K), column_weights.to(K)
    K = torch.einsum("...asibtj,s,t->...aibj", K, *weights)
    return K.reshape(*batch, n1 * m, n2 * m)


def orbit_diagonal(
    kernel: Kernel,
    rows: Tensor,
    columns: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    num_outputs: int = 1,
) -> Tensor:
    """The entries of :func:`orbit_mean` on its diagonal, ``... x (n m)``.

    Each point meets only itself: n matrices ``(s m) x (s' m)``.
    """
    batch = torch.broadcast_shapes(
        rows.shape[:-3], columns.shape[:-3], kernel.batch_shape
    )

    def points_first(orbits: Tensor) -> Tensor:
        # A kernel's batch is aligned from the right, where the points would stand.
        orbits = orbits.expand(*batch, *orbits.shape[-3:]).movedim(-3, 0)
        return orbits[..., None, :, :]

    left = points_first(rows)
    right = left if rows is columns else points_first(columns)
    K = orbit_mean(kernel, left, right, row_weights, column_weights, num_outputs)
    return K.diagonal(dim1=-2, dim2=-1).movedim(0, -2).flatten(-2)


def in_blocks(
    function: Callable[..., Tensor],
    points: tuple[Tensor, ...],
    block_size: int,
    dim: int,
) -> Tensor:
    """Evaluate a function on blocks of points and join the results.

    Where gradients are asked for, each block is computed again in the backward pass
    instead of being kept, so that both passes hold one block at a time.

    Args:
        function: From tensors ``... x b x d`` to a tensor that has the points, or their
            outputs, along ``dim``.
        points: Tensors ``... x n x d``.
        block_size: Points of each block.
        dim: The axis along which results are joined.

    Returns:
        The results for all points.
    """
    if points[0].shape[-2] <= block_size:
        return function(*points)
    results = []
    for block in zip(*(p.split(block_size, -2) for p in points), strict=True):
        if torch.is_grad_enabled():
            result = checkpoint(
                function, *block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            result = function(*block)
        results.append(result)
    return torch.cat(results, dim)


def block_sizes(
    entries_per_pair: int, num_columns: int, chosen: int | None
) -> tuple[int, int]:
    """Points of the rows and of the columns of a block.

    Args:
        entries_per_pair: Entries of the base kernel for one pair of points.
        num_columns: The number n' of points along the columns.
        chosen: Points along the rows, None for what fits into ``BLOCK_ENTRIES``.

    Returns:
        Both, at least one.
    """
    room = BLOCK_ENTRIES // max(1, entries_per_pair)
    if chosen is None:
        chosen = max(1, room // max(1, num_columns))
    return chosen, min(max(1, num_columns), max(1, room // chosen))


def entries_needed(
    points: tuple[int, int],
    orbits: tuple[int, int],
    num_outputs: int,
    width: int,
    chosen: int | None,
) -> int:
    """Numbers held at a time for one matrix: orbits, one block twice, the result.

    Args:
        points: n and n'.
        orbits: s and s'.
        num_outputs: The number m of outputs.
        width: Columns of an orbit.
        chosen: Points along the rows of a block, see :func:`block_sizes`.

    Returns:
        How many.
    """
    (n1, n2), (s1, s2), m = points, orbits, num_outputs
    pair = s1 * s2 * m**2
    rows, columns = block_sizes(pair, n2, chosen)
    block = min(rows, n1) * min(columns, n2) * pair
    return n2 * s2 * width + 2 * block + n1 * n2 * m**2
