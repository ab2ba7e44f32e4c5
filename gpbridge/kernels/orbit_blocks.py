r"""Averages over orbits, in blocks of points, so that memory stays bounded.

In: a kernel and the orbits of two sets of points. Out: the weighted mean of all entries
that belong to a pair of points. Next: ``orbit_sums`` says which orbits, which weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Kernel entries formed at a time. A processor is faster with blocks that its allocator
# keeps, but blocks beyond this are computed twice where gradients are asked for.
CPU_ENTRIES = 2**22
ENTRIES = 2**26


def orbit_mean(
    kernel: Kernel,
    rows: Tensor,
    columns: Tensor,
    row_weights: Tensor,
    column_weights: Tensor,
    num_outputs: int = 1,
    aligned: bool = False,
) -> Tensor:
    r"""The matrix :math:`\sum_{a, a'} v_a w_{a'}\, k(T_a x, T_{a'} x')`.

    Args:
        kernel: The kernel k, with m outputs per point.
        rows: Orbits ``... x n x s x d``.
        columns: Orbits ``... x n' x s' x d``.
        row_weights: Weights v, ``s``.
        column_weights: Weights w, ``s'``.
        num_outputs: The number m.
        aligned: Whether the columns start with the rows.

    Returns:
        The matrix, ``... x (n m) x (n' m)``.
    """
    (n1, s1), (n2, s2) = rows.shape[-3:-1], columns.shape[-3:-1]
    flat = rows.flatten(-3, -2)
    others = flat if rows is columns else columns.flatten(-3, -2)
    K = kernel_values(kernel, flat, others, aligned)
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


def kernel_values(
    kernel: Kernel, x1: Tensor, x2: Tensor, aligned: bool = False
) -> Tensor:
    """The matrix of a kernel, with fewer passes over it for a squared exponential.

    Upstream makes some six matrices on the way, of distances and their parts.

    Args:
        kernel: The kernel.
        x1: Rows ``... x n x d``.
        x2: Columns ``... x n' x d``.
        aligned: Whether the columns start with the rows, as they do where both are one.

    Returns:
        The matrix ``... x n x n'``.
    """
    if type(kernel) is not RBFKernel or kernel.active_dims is not None:
        return kernel(x1, x2).to_dense()
    scale = kernel.lengthscale.reciprocal()  # batch x 1 x (1 or d)
    # Distances do not change with a common shift, their rounding errors do.
    shift = x1.detach().mean(-2, keepdim=True)
    left = (x1 - shift) * scale
    right = left if x2 is x1 else (x2 - shift) * scale
    K = distance_exponents(left, right.mT)
    if aligned or x2 is x1:
        with torch.no_grad():
            K.diagonal(dim1=-2, dim2=-1).zero_()
    return exponentials(K)


def distance_exponents(left: Tensor, right: Tensor) -> Tensor:
    r"""The matrix :math:`-|z - x|^2 / 2` of rows z and columns x.

    One product, in which the norms are two more columns.

    Args:
        left: Rows ``... x n x d``, centred.
        right: Columns ``... x d x n'``, with the same centre.

    Returns:
        The matrix ``... x n x n'``.
    """
    return with_norms(left, row=True) @ with_norms(right, row=False, dim=-2)


def with_norms(points: Tensor, row: bool, dim: int = -1) -> Tensor:
    """One side of :func:`distance_exponents`, two entries longer along an axis.

    Args:
        points: Points, centred, with their d entries along ``dim``.
        row: Whether they are the left side of the product.
        dim: The axis.

    Returns:
        The points with ``d + 2`` entries.
    """
    norms = -0.5 * points.square().sum(dim, keepdim=True)
    ones = torch.ones_like(norms)
    return torch.cat([points, norms, ones] if row else [points, ones, norms], dim)


def exponentials(exponents: Tensor) -> Tensor:
    """The exponential of a product, in its place; what is above zero is rounding.

    Rounding may leave a distance below zero, and a correlation above one. Its gradient
    is that of the product, as if nothing was cut.
    """
    with torch.no_grad():
        exponents.clamp_max_(0)
    return exponents.exp_()


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


def symmetric_in_blocks(
    function: Callable[[int, int], Tensor], num_points: int, block_size: int, m: int
) -> Tensor:
    """A symmetric matrix from its blocks on and right of the diagonal.

    Args:
        function: From the first point of a block and the first after it to the rows of
            these points, in the columns of the first and all later points.
        num_points: The number n of points.
        block_size: Points of each block; at most an eighth of all is taken, so that
            little is computed twice.
        m: Outputs of each point.

    Returns:
        The matrix ``... x (n m) x (n m)``.
    """
    block_size = min(block_size, -(-num_points // 8))
    rows = []
    stored = 8 * block_size >= num_points  # all blocks together are no larger than one
    for start in range(0, num_points, block_size):
        stop = min(start + block_size, num_points)
        if torch.is_grad_enabled() and not stored:
            options = {"use_reentrant": False, "preserve_rng_state": False}
            block = checkpoint(function, start, stop, **options)
        else:
            block = function(start, stop)
        rows.append(functional.pad(block, (start * m, 0)))
    upper = torch.cat(rows, -2)
    del rows, block
    # In place: at no time are there more than two matrices.
    return upper.triu_().add_(upper.triu(1).mT)


def block_sizes(
    entries_per_pair: int,
    num_columns: int,
    chosen: int | None,
    device: torch.device,
    entries_per_row: int = 0,
) -> tuple[int, int]:
    """Points of the rows and of the columns of a block.

    Args:
        entries_per_pair: Entries of the base kernel for one pair of points.
        num_columns: The number n' of points along the columns.
        chosen: Points along the rows, None for what suits the device.
        device: Where the block is formed.
        entries_per_row: Numbers that one point of the rows takes, as its orbit does.

    Returns:
        Both, at least one.
    """
    entries = CPU_ENTRIES if device.type == "cpu" else ENTRIES
    if chosen is None:
        row = max(entries_per_pair * max(1, num_columns), entries_per_row, 1)
        chosen = max(1, entries // row)
    room = entries // max(1, entries_per_pair * chosen)
    return chosen, min(max(1, num_columns), max(1, room))
