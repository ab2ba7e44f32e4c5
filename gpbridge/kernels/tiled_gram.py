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

CACHED = 2**16  # numbers of one intermediate result: 512 KiB in float64
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
        rows: Rows and columns of a tile. Within a single tile autograd takes over, and
            second derivatives exist.

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
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows1, rows2, values = _parts(ctx.saved_tensors, ctx.counts)
        needs1, needs2, needs3 = _parts(ctx.needs_input_grad[5:], ctx.counts)
        totals1, totals2, totals3 = (
            [
                torch.zeros_like(t) if need else None
                for t, need in zip(some, needs, strict=True)
            ]
            for some, needs in (
                (rows1, needs1),
                (rows2, needs2),
                (values, needs3),
            )
        )
        for i, j in _tiles(rows1, rows2, ctx.rows):
            tile_grad = grad[..., i, j]
            if not rows2 and i != j:
                tile_grad = tile_grad + grad[..., j, i].mT
            elif not rows2:
                tile_grad = tile_grad.clone()
                tile_grad.diagonal(dim1=-2, dim2=-1).zero_()
            first = _leaves(_some(rows1, i), needs1)
            second = _leaves(_some(rows2 or rows1, j), needs2 or needs1)
            held = _leaves(values, needs3)
            with torch.enable_grad():
                tile = ctx.block(first, second, held)
            sums = [None if t is None else t[..., i, :] for t in totals1]
            sums += [None if t is None else t[..., j, :] for t in totals2 or totals1]
            sums += totals3
            into = [
                pair
                for pair in zip(sums, [*first, *second, *held], strict=True)
                if pair[0] is not None
            ]
            found = torch.autograd.grad(
                tile, [leaf for _, leaf in into], tile_grad, allow_unused=True
            )
            for (total, _), value in zip(into, found, strict=True):
                if value is not None:
                    total.add_(value)
        own = None
        if ctx.needs_input_grad[4]:
            own = grad.diagonal(dim1=-2, dim2=-1).sum_to_size(ctx.own_shape)
        return None, None, None, None, own, *totals1, *totals2, *totals3


def _parts(tensors: Sequence, counts: tuple[int, int]) -> tuple[tuple, tuple, tuple]:
    a, b = counts[0], counts[0] + counts[1]
    return tuple(tensors[:a]), tuple(tensors[a:b]), tuple(tensors[b:])


def _some(tensors: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [t[..., part, :] for t in tensors]


def _leaves(
    tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


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
