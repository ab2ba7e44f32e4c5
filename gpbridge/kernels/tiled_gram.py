r"""Matrices of a pairwise function, computed tile by tile, gradients included.

In: a function from blocks of two sets of rows, and from hyperparameters, to a block of
a matrix, through many elementwise steps. Out: the matrix. The steps of a tile stay in
the cache, the gradient repeats the tile instead of keeping its steps, and of a
symmetric matrix one half is computed. Next: ``infinite_width``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Block = Callable[..., Tensor]

CACHED = 2**17  # numbers of one intermediate result: 1 MiB in float64
LARGEST = 2**22  # where a single pair of inputs takes many


def tile_rows(numbers_per_pair: int) -> int:
    """Rows and columns of a tile.

    Large images would leave a pair or two to a cache-sized tile, and what belongs to a
    single input would be repeated with each; their tiles grow beyond the cache.
    """
    if numbers_per_pair * 64 <= CACHED:
        return max(1, math.isqrt(CACHED // numbers_per_pair))
    return max(1, min(8, math.isqrt(LARGEST // numbers_per_pair)))


def tiled_gram(
    block: Block,
    rows1: Sequence[Tensor],
    rows2: Sequence[Tensor],
    values: Sequence[Tensor | None],
    diagonal: Tensor | None,
    rows: int,
) -> Tensor:
    """The matrix of all pairs.

    Args:
        block: Called as ``block(rows1, rows2, values)`` with some rows of each set.
        rows1: Tensors of the first set, each ``... x n1 x (any)``.
        rows2: Tensors of the second set, each ``... x n2 x (any)``.
        values: Hyperparameters of the function.
        diagonal: None, or the diagonal ``... x n`` of a matrix whose two sets are one;
            it is symmetric then, and half of it is computed.
        rows: Rows and columns of a tile. Second derivatives keep the steps of the
            whole matrix.

    Returns:
        ``... x n1 x n2``.
    """
    if max(rows1[0].shape[-2], rows2[0].shape[-2]) <= rows:
        total = block(rows1, rows2, values)
        if diagonal is None:
            return total
        diagonal = diagonal.expand(total.shape[:-1])
        return torch.diagonal_scatter(total, diagonal, dim1=-2, dim2=-1)
    if diagonal is not None:
        rows2 = ()
    return _TiledGram.apply(
        block, rows, len(rows1), len(rows2), diagonal, *rows1, *rows2, *values
    )


class _TiledGram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, rows, count1, count2, diagonal, *tensors):
        ctx.block, ctx.rows, ctx.counts = block, rows, (count1, count2)
        ctx.own_shape = None if diagonal is None else diagonal.shape
        ctx.save_for_backward(*tensors)
        rows1, rows2, values = _parts(tensors, ctx.counts)
        total = None
        for i, j in _tiles(rows1, rows2, rows):
            second = rows2 or rows1
            tile = block(_some(rows1, i), _some(second, j), values)
            if total is None:
                n1, n2 = rows1[0].shape[-2], second[0].shape[-2]
                total = tile.new_empty((*tile.shape[:-2], n1, n2))
            total[..., i, j] = tile
            if not rows2 and i != j:
                total[..., j, i] = tile.mT
        if diagonal is not None:
            total.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        return total

    @staticmethod
    def backward(ctx, grad):
        own = None
        if ctx.needs_input_grad[4]:
            own = grad.diagonal(dim1=-2, dim2=-1).sum_to_size(ctx.own_shape)
        rows1, rows2, values = _parts(ctx.saved_tensors, ctx.counts)
        needs1, needs2, needs3 = _parts(ctx.needs_input_grad[5:], ctx.counts)
        if torch.is_grad_enabled():  # for second derivatives, at once
            if not rows2:
                zero = torch.zeros_like(grad[..., 0])
                grad = torch.diagonal_scatter(grad, zero, dim1=-2, dim2=-1)
            needs = needs1, needs2 or needs1, needs3
            parts = _pulled(ctx.block, (rows1, rows2 or rows1, values), needs, grad)
            if not rows2:
                both = zip(parts[0], parts[1], strict=True)
                parts = [_sum(*pair) for pair in both], [], parts[2]
            return None, None, None, None, own, *parts[0], *parts[1], *parts[2]
        totals1, totals2, totals3 = (
            [
                torch.zeros_like(t) if need else None
                for t, need in zip(some, needs, strict=True)
            ]
            for some, needs in ((rows1, needs1), (rows2, needs2), (values, needs3))
        )
        for i, j in _tiles(rows1, rows2, ctx.rows):
            tile_grad = grad[..., i, j]
            if not rows2 and i != j:
                tile_grad = tile_grad + grad[..., j, i].mT
            elif not rows2:
                tile_grad = tile_grad.clone()
                tile_grad.diagonal(dim1=-2, dim2=-1).zero_()
            parts = _some(rows1, i), _some(rows2 or rows1, j), values
            needs = needs1, needs2 or needs1, needs3
            found = _pulled(ctx.block, parts, needs, tile_grad)
            for total, value in zip(totals1, found[0], strict=True):
                _add(total, value, i)
            for total, value in zip(totals2 or totals1, found[1], strict=True):
                _add(total, value, j)
            for total, value in zip(totals3, found[2], strict=True):
                _add(total, value)
        return None, None, None, None, own, *totals1, *totals2, *totals3


def _pulled(block, parts, needs, grad) -> list[list[Tensor | None]]:
    """Derivatives of a block, which is computed again, in each of its arguments."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: variances of points are functions of the points, but are given here.
        leaves = [
            [
                None
                if t is None
                else t.view_as(t)
                if create
                else t.detach().requires_grad_(need)
                for t, need in zip(some, some_need, strict=True)
            ]
            for some, some_need in zip(parts, needs, strict=True)
        ]
        tile = block(*leaves)
    wanted = [
        (a, b)
        for a, some_need in enumerate(needs)
        for b, need in enumerate(some_need)
        if need
    ]
    found = torch.autograd.grad(
        tile,
        [leaves[a][b] for a, b in wanted],
        grad,
        allow_unused=True,
        create_graph=create,
    )
    pulled = [[None] * len(some) for some in parts]
    for (a, b), value in zip(wanted, found, strict=True):
        pulled[a][b] = value
    return pulled


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _add(total: Tensor | None, value: Tensor | None, part: slice | None = None) -> None:
    if total is not None and value is not None:
        (total if part is None else total[..., part, :]).add_(value)


def _parts(tensors: Sequence, counts: tuple[int, int]) -> tuple[tuple, tuple, tuple]:
    a, b = counts[0], counts[0] + counts[1]
    return tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b:])


def _some(tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [t[..., part, :] for t in tensors]


def _tiles(
    rows1: Sequence[Tensor], rows2: Sequence[Tensor], rows: int
) -> Iterator[tuple[slice, slice]]:
    first, second = (
        [slice(a, min(a + rows, n)) for a in range(0, n, rows)]
        for n in (some[0].shape[-2] if some else 0 for some in (rows1, rows2))
    )
    if not rows2:
        return itertools.combinations_with_replacement(first, 2)
    return itertools.product(first, second)
