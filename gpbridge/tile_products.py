r"""Products of kernel matrices and dense parts of them, tile by tile.

In: a kernel prepared by ``kernel_tiles``. Out: products with all rows, some rows or
some columns, accumulated in float64, and dense rows and blocks, all without gradients.
Next: ``kernel_gradients`` has derivatives, ``kernel_operator`` adds the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gpbridge.kernel_tiles import TILE_BYTES, Tiles, feature_rows

_WIDEST = {"cpu": 1024, "cuda": 8192}  # rows of a tile: longer ones gain nothing


def shape(tiles: Tiles, rows: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    kind = tiles.left.device.type
    numbers = _by_device(TILE_BYTES, kind) // tiles.left.element_size()
    height = min(max(rows, 1), _by_device(_WIDEST, kind), max(1, math.isqrt(numbers)))
    return height, max(1, numbers // height)


def points_per_tile(X: Tensor) -> int:
    """Rows and columns of a square tile of a kernel that is called as it is."""
    return max(1, math.isqrt(_by_device(TILE_BYTES, X.device.type) // X.element_size()))


def _by_device(sizes: dict[str, int], kind: str) -> int:
    return sizes.get(kind, sizes["cuda"])


def spans(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of n rows in parts of a width."""
    return ((start, min(start + width, n)) for start in range(0, n, width))


def _meetings(
    rows: Tensor | slice, n: int, height: int, width: int, device: torch.device
) -> list[list[tuple[Tensor, Tensor] | None]]:
    """Where the row of a point meets the column of the same point, by tile.

    Row numbers on a device are looked at once, and a range of them never.
    """
    if isinstance(rows, slice):
        named = range(n)[rows]
        numbers = torch.arange(named.start, named.stop, device=device)
        starts = range(0, n + width, width)
        bounds = [
            [min(max(start - named.start - top, 0), bottom - top) for start in starts]
            for top, bottom in spans(len(named), height)
        ]
    else:
        numbers = rows
        starts = torch.arange(0, n + width, width, device=rows.device)
    orders, columns = [], []
    for part in numbers.split(height) if len(numbers) else ():
        order = part.argsort()
        orders.append(order)
        columns.append(part[order])
    if not isinstance(rows, slice):
        found = [torch.searchsorted(part, starts) for part in columns]
        bounds = torch.stack(found).tolist() if found else []
    return [
        [
            (order[lo:hi], part[lo:hi] - i * width) if hi > lo else None
            for i, (lo, hi) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        ]
        for order, part, edges in zip(orders, columns, bounds, strict=True)
    ]


def _columns_first(V: Tensor, tiles: Tiles) -> Tensor:
    """``n x k`` as ``k x n`` in the dtype of the tiles, in one copy."""
    return V.mT.to(tiles.dtype, memory_format=torch.contiguous_format)


def _through_features(tiles: Tiles, left: Tensor, right: Tensor, V: Tensor) -> Tensor:
    """Features of the left points times those of the right times V, in float64."""
    step, V = feature_rows(tiles.num_features), V.to(tiles.dtype)
    inner = V.new_zeros(tiles.num_features, V.shape[-1], dtype=torch.float64)
    for x, v in zip(right.split(step), V.split(step), strict=True):
        inner += tiles.features(x).mT @ v
    inner = inner.mul_(tiles.amplitude).to(tiles.dtype)
    product = V.new_empty(len(left), V.shape[-1], dtype=torch.float64)
    for top, bottom in spans(len(left), step):
        product[top:bottom] = tiles.features(left[top:bottom]) @ inner
    return product


@torch.no_grad()
def multiply_rows(tiles: Tiles, V: Tensor, rows: Tensor | slice | None = None):
    """Product of some rows of the kernel matrix with ``t x k``, in float64.

    Args:
        tiles: The prepared kernel.
        V: Columns ``t x k``.
        rows: Which rows, if rows and columns are the same points; default all rows of
            a rectangular matrix.

    Returns:
        The product ``b x k``, float64, accumulated tile by tile.
    """
    n = len(tiles.right)
    left = tiles.left if rows is None else tiles.left[rows]
    if tiles.features is not None:
        return _through_features(tiles, left, tiles.right, V)
    Vt = _columns_first(V, tiles)  # k x t
    total = Vt.new_zeros(len(Vt), len(left), dtype=torch.float64)
    height, width = shape(tiles, len(left))
    meets = None if rows is None else _meetings(rows, n, height, width, V.device)
    for j, (top, bottom) in enumerate(spans(len(left), height)):
        some, part = left[top:bottom], total[:, top:bottom]
        for i, (start, stop) in enumerate(spans(n, width)):
            equal = None if meets is None else meets[j][i]
            tile = tiles.evaluate(some, tiles.right[start:stop], equal)
            _accumulate(part, Vt[:, start:stop], tile.mT)
    return total.mul_(tiles.amplitude).mT


@torch.no_grad()
def multiply_columns(tiles: Tiles, U: Tensor, columns: Tensor | slice) -> Tensor:
    """Product of some columns of a symmetric kernel matrix with ``b x k``, float64."""
    n = len(tiles.right)
    left = tiles.left[columns]
    if tiles.features is not None:
        return _through_features(tiles, tiles.right, left, U)
    Ut = _columns_first(U, tiles)  # k x b
    total = Ut.new_zeros(len(Ut), n, dtype=torch.float64)
    height, width = shape(tiles, len(left))
    meets = _meetings(columns, n, height, width, U.device)
    for j, (top, bottom) in enumerate(spans(len(left), height)):
        some = left[top:bottom]
        for i, (start, stop) in enumerate(spans(n, width)):
            tile = tiles.evaluate(some, tiles.right[start:stop], meets[j][i])
            _accumulate(total[:, start:stop], Ut[:, top:bottom], tile)
    return total.mul_(tiles.amplitude).mT


@torch.no_grad()
def multiply_all(tiles: Tiles, V: Tensor) -> Tensor:
    """Product of a symmetric kernel matrix with ``n x k``: each tile is used twice."""
    n = len(tiles.left)
    if tiles.features is not None:
        return _through_features(tiles, tiles.left, tiles.right, V)
    Vt = _columns_first(V, tiles)
    total = Vt.new_zeros(len(Vt), n, dtype=torch.float64)
    width = min(shape(tiles, n))
    for top, bottom in spans(n, width):
        own = torch.arange(bottom - top, device=V.device)
        for start, stop in spans(bottom, width):
            equal = (own, own) if start == top else None
            tile = tiles.evaluate(
                tiles.left[top:bottom], tiles.right[start:stop], equal
            )
            _accumulate(total[:, top:bottom], Vt[:, start:stop], tile.mT)
            if start != top:
                _accumulate(total[:, start:stop], Vt[:, top:bottom], tile)
    return total.mul_(tiles.amplitude).mT


def _accumulate(total: Tensor, some: Tensor, tile: Tensor) -> None:
    if tile.dtype == total.dtype:
        total.addmm_(some, tile)
    else:
        total += some @ tile


@torch.no_grad()
def dense_rows(tiles: Tiles, rows: Tensor | slice) -> Tensor:
    """Some rows of a symmetric kernel matrix, ``b x n``."""
    n, left = len(tiles.right), tiles.left[rows]
    result = left.new_empty(len(left), n, dtype=tiles.dtype)
    height, width = shape(tiles, len(left))
    meets = _meetings(rows, n, height, width, left.device)
    for j, (top, bottom) in enumerate(spans(len(left), height)):
        some = left[top:bottom]
        for i, (start, stop) in enumerate(spans(n, width)):
            tile = tiles.evaluate(some, tiles.right[start:stop], meets[j][i])
            torch.mul(tile, tiles.amplitude, out=result[top:bottom, start:stop])
    return result


@torch.no_grad()
def dense_block(tiles: Tiles, rows: Tensor | slice) -> Tensor:
    """The kernel matrix of some points, ``b x b``."""
    left, right = tiles.left[rows], tiles.right[rows]
    own = torch.arange(len(left), device=left.device)
    return tiles.amplitude * tiles.evaluate(left, right, (own, own))
