r"""Averages of a base kernel over orbits: matrix, diagonal and cross covariance.

In: a base kernel, an augmentation, and how much may be formed at a time. Out: the
covariances of the averaged function, in blocks whose memory is counted before any of
it is taken. Next: ``patch_sums`` does the same faster for patches of images;
``orbit_kernel`` makes a kernel of either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor

from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.checks import check_memory
from gpbridge.kernels.orbit_blocks import (
    block_sizes,
    in_blocks,
    orbit_diagonal,
    orbit_mean,
    symmetric_in_blocks,
)

MATRIX_REMEDY = (
    "Take fewer samples, inducing variables (base_cross), a base kernel with features, "
    "or a larger memory_budget."
)
DIAGONAL_REMEDY = (
    "Take fewer samples, a smaller chunk_size, fewer points at a time, or a larger "
    "memory_budget."
)
CROSS_REMEDY = (
    "Take fewer samples, fewer inducing variables, a smaller chunk_size, fewer points "
    "at a time, or a larger memory_budget."
)


class OrbitAverage(NamedTuple):
    """What is averaged over orbits, and how.

    Attributes:
        base: The base kernel.
        augmentation: The distribution over transformations.
        law: That of differences, which takes one orbit of the two; None for both.
        num_outputs: Outputs m of the base kernel per point.
        chunk_size: Points whose orbits are compared at a time, None for what suits the
            device.
        memory_budget: Bytes that one result may take, orbits and blocks included.
    """

    base: Kernel
    augmentation: Augmentation
    law: DifferenceLaw | None
    num_outputs: int
    chunk_size: int | None
    memory_budget: float


class Held(NamedTuple):
    """Measured: numbers held for each value of a base kernel and each of an orbit.

    Attributes:
        alone: For each value without gradients.
        kept: For each value, kept for its gradient.
        passing: For each value, besides, while the gradient is computed.
        points: For each number of an orbit, without gradients.
    """

    alone: float
    kept: float
    passing: float
    points: float


DIRECT = Held(1.25, 1.25, 1.75, 4)  # one product and one exponential
OTHER = Held(3, 4, 4, 4)  # what gpytorch's kernels take


class Sums(NamedTuple):
    """The three covariances of an averaged function, as functions."""

    matrix: Callable[[OrbitAverage, Tensor, Tensor, bool], Tensor]
    diagonal: Callable[[OrbitAverage, Tensor, Tensor, bool], Tensor]
    cross: Callable[[OrbitAverage, Tensor, Tensor], Tensor]


def average_matrix(average: OrbitAverage, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
    """The average over both orbits, or over differences, of all pairs.

    Args:
        average: What is averaged.
        x1: Points ``... x n x d``.
        x2: Points ``... x n' x d``.
        same: Whether they are the same points.

    Returns:
        The matrix, ``... x (n m) x (n' m)``.

    Raises:
        MemoryError: If it needs more than the budget.
    """
    m, base = average.num_outputs, average.base
    n1, n2 = x1.shape[-2], x2.shape[-2]
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], base.batch_shape)
    rows, columns, v, w = _sides(average, x2)
    s1, s2 = len(v), len(w)
    width = average.augmentation.output_width(x2.shape[-1])
    pair, own = (k * batch.numel() for k in (s1 * s2 * m**2, s1 * (width + 1)))
    size, across = block_sizes(pair, n2, average.chunk_size, x1.device, own)
    symmetric = same and average.law is None and across >= n2 > 0
    height = min(size, n1)
    if symmetric:
        height = min(height, -(-n1 // 8))
    orbits = min(across, n2) * s2 + (0 if symmetric else height * s1)
    check_average(
        average,
        x1,
        (n1, n2),
        (s1, s2),
        numbers_held(
            average,
            n1 * n2 * m**2 * batch.numel(),
            height * min(across, n2) * pair,
            orbits * (width + 1) * batch.numel(),
            stored=symmetric and 8 * height >= n1,
        ),
        MATRIX_REMEDY,
    )
    if symmetric:
        orbits = columns(x2)

        def upper(start: int, stop: int) -> Tensor:
            left, right = orbits[..., start:stop, :, :], orbits[..., start:, :, :]
            return orbit_mean(base, left, right, v, w, m, aligned=True)

        return symmetric_in_blocks(upper, n1, size, m)

    def against(part: Tensor) -> Tensor:
        others = columns(part)

        def block(points: Tensor) -> Tensor:
            return orbit_mean(base, rows(points), others, v, w, m)

        return in_blocks(block, (x1,), size, dim=-2)

    if across >= n2:
        return against(x2)
    return torch.cat([against(part) for part in x2.split(across, -2)], -1)


def average_diagonal(
    average: OrbitAverage, x1: Tensor, x2: Tensor, same: bool
) -> Tensor:
    """The average of each point with that of the same row.

    Args:
        average: What is averaged.
        x1: Points ``... x n x d``.
        x2: As many points.
        same: Whether they are the same points.

    Returns:
        The diagonal, ``... x (n m)``.

    Raises:
        MemoryError: If it needs more than the budget.
    """
    m, base = average.num_outputs, average.base
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], base.batch_shape)
    rows, columns, v, w = _sides(average, x1)
    s1, s2 = len(v), len(w)
    width = average.augmentation.output_width(x1.shape[-1])
    alike = same and average.law is None
    pair = s1 * s2 * m**2 * batch.numel()
    orbits = (s2 if alike else s1 + s2) * (width + 1) * batch.numel()
    n = x1.shape[-2]
    size, _ = block_sizes(pair, 1, average.chunk_size, x1.device, orbits)
    check_average(
        average,
        x1,
        (n,),
        (s1, s2),
        numbers_held(
            average,
            n * m * batch.numel(),
            min(size, n) * pair,
            # gpytorch copies a batch of single points more often than rows.
            (1 if type(base) is RBFKernel else 1.5) * min(size, n) * orbits,
        ),
        DIAGONAL_REMEDY,
    )

    def block(points: Tensor, others: Tensor) -> Tensor:
        right = columns(others)
        left = right if alike else rows(points)
        return orbit_diagonal(base, left, right, v, w, m)

    return in_blocks(block, (x1, x2), size, dim=-1)


def average_cross(average: OrbitAverage, Z: Tensor, x: Tensor) -> Tensor:
    """The average over the orbits of one side, with single points on the other.

    Args:
        average: What is averaged.
        Z: Transformed inputs ``... x u x d'``.
        x: Points ``... x n x d``.

    Returns:
        The cross covariance, ``... x (u m) x (n m)``.

    Raises:
        MemoryError: If it needs more than the budget.
    """
    m, base, augmentation = average.num_outputs, average.base, average.augmentation
    u, n, s = Z.shape[-2], x.shape[-2], augmentation.num_samples
    batch = torch.broadcast_shapes(Z.shape[:-2], x.shape[:-2], base.batch_shape)
    orbits = s * (Z.shape[-1] + 1) * batch.numel()
    pair = s * m**2 * batch.numel()
    size, _ = block_sizes(pair, u, average.chunk_size, x.device, orbits)
    check_average(
        average,
        x,
        (u, n),
        (1, s),
        numbers_held(
            average,
            u * n * m**2 * batch.numel(),
            u * min(size, n) * pair,
            min(size, n) * orbits + u * Z.shape[-1],
        ),
        CROSS_REMEDY,
    )
    weights = augmentation.coefficients(x)
    one = weights.new_ones(1)

    def block(points: Tensor) -> Tensor:
        orbits = augmentation(points)
        return orbit_mean(base, Z[..., None, :], orbits, one, weights, m)

    return in_blocks(block, (x,), size, dim=-1)


SUMS = Sums(average_matrix, average_diagonal, average_cross)


def _sides(average: OrbitAverage, like: Tensor):
    """Orbits of rows and of columns as functions, and their weights."""
    law, augmentation = average.law, average.augmentation
    if law is None:
        weights = augmentation.coefficients(like)
        return augmentation, augmentation, weights, weights
    return lambda x: x[..., None, :], law.orbit, like.new_ones(1), law.weights


def numbers_held(
    average: OrbitAverage,
    result: int,
    block: int,
    points: float,
    stored: bool = False,
    held: Held | None = None,
) -> float:
    """Numbers that are held at once, in the forward pass or in both.

    Args:
        average: What is averaged.
        result: Entries of the result.
        block: Values of the base kernel in the largest block.
        points: Numbers of the orbits that are compared in it.
        stored: Whether all blocks of a symmetric matrix are kept for its gradient, as
            those of eight rows of blocks are.
        held: What is held for each value; default by the base kernel.
    """
    direct = type(average.base) is RBFKernel
    if held is None:
        held = DIRECT if direct else OTHER
    if not torch.is_grad_enabled():
        return result + max(result, held.alone * block + held.points * points)
    # The blocks of the upper half have 1 + ... + 8 columns of 8, and so their points.
    blocks = 4.5 if stored else 1
    parameters, weights = (
        average.augmentation.parameters(),
        average.augmentation.weights,
    )
    learnt = direct or any(p.requires_grad and p is not weights for p in parameters)
    kept = held.kept * blocks * block + (3 * blocks * points if learnt else points)
    passing = held.passing * block if learnt else block
    return 2 * result + kept + passing + 3 * points


def check_average(
    average: OrbitAverage,
    x: Tensor,
    points: tuple[int, ...],
    orbits: tuple[int, int],
    numbers: float,
    remedy: str,
) -> None:
    """Refuse what is beyond the budget, before any of it is formed.

    Args:
        average: What is averaged.
        x: Points, whose dtype the result has.
        points: How many there are on each side.
        orbits: How many elements the orbits have.
        numbers: How many are held at once.
        remedy: What to try.
    """
    check_memory(
        f"The average over orbits of {orbits[0]} and {orbits[1]} elements, for "
        f"{' and '.join(map(str, points))} points,",
        x.dtype.itemsize * numbers,
        average.memory_budget,
        remedy,
    )
