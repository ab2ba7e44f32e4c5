r"""Kernel matrices a tile at a time, sized so that a tile stays in the cache.

A product :math:`K V` visits every entry of K once and forgets it. What it costs is the
entries: for the common stationary kernels the inputs are scaled and centred once,
squared distances are one matrix product of augmented inputs,

.. math::
    \|a - b\|^2 = (-2 a, \|a\|^2, 1) \cdot (b, 1, \|b\|^2),

and the profile is applied in place. All other kernels are called as they are.

In: a kernel and two sets of points. Out: products and dense tiles, without gradients.
Next: ``kernel_operator`` adds the noise.

References:
    Wang, Pleiss, Gardner, Tyree, Weinberger, Wilson, Exact Gaussian processes on a
    million data points, NeurIPS 2019, section 3 (partitioned kernel products).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from torch import Tensor

TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Size of a tile by type of device: a share of the cache, or what fills a GPU."""

ACCURACY = 5e-5
"""Of squared distances, where nothing is known about the noise."""

_WIDEST = 1024  # rows of a tile: longer ones gain nothing


class Tiles(NamedTuple):
    """A kernel between two prepared sets of points: ``amplitude * profile(tile)``.

    ``left`` and ``right`` hold one row per point; ``evaluate`` maps some rows of each,
    with the places ``(rows, columns)`` of equal points, to a new dense tile.
    """

    left: Tensor
    right: Tensor
    evaluate: Callable[[Tensor, Tensor, tuple[Tensor, Tensor] | None], Tensor]
    amplitude: float
    dtype: torch.dtype


@torch.no_grad()
def prepare(
    kernel: Kernel,
    left: Tensor,
    right: Tensor | None = None,
    dtype: torch.dtype | None = None,
    accuracy: float = ACCURACY,
) -> Tiles:
    """Do once what all tiles of a kernel matrix share.

    Args:
        kernel: Any kernel with one output per input and without batch shape.
        left: Points of the rows, ``n x d``.
        right: Points of the columns, ``t x d``; default those of the rows.
        dtype: Of the tiles; default that of the points.
        accuracy: Of squared distances in units of the lengthscale; where those of the
            dtype are rougher, they alone are computed in float64.

    Returns:
        The prepared kernel; hyperparameters are copied where there is a fast form.
    """
    dtype = left.dtype if dtype is None else dtype
    found = stationary_part(kernel)
    if found is None:
        right = left if right is None else right
        return Tiles(left, right, _upstream(kernel, dtype), 1.0, dtype)
    base, amplitude = found
    if kernel.active_dims is not None:
        left = left.index_select(-1, kernel.active_dims)
        right = None if right is None else right.index_select(-1, kernel.active_dims)
    stretch, profile = _PROFILES[getattr(base, "nu", math.inf)]
    scale = stretch / base.lengthscale.detach().double()
    # Centred: the smaller the norms, the less cancels in the squared distance.
    middle = left.double().mean(0)
    a = (left.double() - middle) * scale
    b = a if right is None else (right.double() - middle) * scale
    norms_a, norms_b = a.square().sum(-1, True), b.square().sum(-1, True)
    largest = 0.0 if 0 in (len(a), len(b)) else max(norms_a.max(), norms_b.max())
    # A rounded squared distance matters by its root where the kernel has a kink.
    wanted = accuracy if getattr(base, "nu", 2) > 1 else 0.0
    own = dtype
    if torch.finfo(dtype).eps * largest > wanted:
        own = torch.float64
    a = torch.cat([-2 * a, norms_a, torch.ones_like(norms_a)], -1).to(own)
    b = torch.cat([b, torch.ones_like(norms_b), norms_b], -1).to(own)

    def evaluate(rows, columns, equal=None):
        tile = torch.mm(rows, columns.mT).to(dtype)
        tile.clamp_(min=0.0)
        if equal is not None:
            tile[equal] = 0.0
        return profile(tile)

    return Tiles(a, b, evaluate, float(amplitude), dtype)


def stationary_part(kernel: Kernel) -> tuple[Kernel, Tensor | float] | None:
    """The base kernel and its amplitude, where there is a fast form."""
    amplitude = 1.0
    while type(kernel) is ScaleKernel and not kernel.batch_shape:
        amplitude = kernel.outputscale * amplitude
        kernel = kernel.base_kernel
    fast = type(kernel) in (RBFKernel, MaternKernel) and not kernel.batch_shape
    return (kernel, amplitude) if fast else None


@torch.no_grad()
def hyperparameters(kernel: Kernel) -> tuple[float, ...]:
    """The numbers that :func:`prepare` copies; none where it calls the kernel."""
    found = stationary_part(kernel)
    if found is None:
        return ()
    base, amplitude = found
    return float(amplitude), *base.lengthscale.reshape(-1).tolist()


def _gaussian(squared: Tensor) -> Tensor:
    return squared.neg_().exp_()


def _matern12(squared: Tensor) -> Tensor:
    return squared.sqrt_().neg_().exp_()


def _matern32(squared: Tensor) -> Tensor:
    decay = squared.sqrt_().neg().exp_()
    return torch.addcmul(decay, squared, decay, out=squared)


def _matern52(squared: Tensor) -> Tensor:
    decay = squared.sqrt()
    squared.mul_(1 / 3).add_(decay).add_(1.0)
    return squared.mul_(decay.neg_().exp_())


def _with_slope(squared: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    """The kernel as a function of the squared scaled distance, and its derivative."""
    if nu == math.inf:
        value = torch.exp(-squared)
        return value, -value
    r = squared.sqrt()
    decay = torch.exp(-r)
    if nu == 0.5:  # the slope will meet a squared distance: zero at zero
        return decay, torch.where(r > 0, -0.5 * decay / r, 0.0)
    if nu == 1.5:
        return decay * (1 + r), -0.5 * decay
    return decay * (1 + r + squared / 3), decay * (1 + r) / -6


# By smoothness: the factor of the inputs, and the kernel of the squared distance.
# Rasmussen and Williams (2006), eqs. (4.9) and (4.17).
_PROFILES = {
    math.inf: (math.sqrt(0.5), _gaussian),
    0.5: (1.0, _matern12),
    1.5: (math.sqrt(3.0), _matern32),
    2.5: (math.sqrt(5.0), _matern52),
}


def _upstream(kernel: Kernel, dtype: torch.dtype) -> Callable:
    own = next((p.dtype for p in kernel.parameters() if p.is_floating_point()), None)

    def evaluate(rows, columns, equal=None):
        if own is not None:
            rows, columns = rows.to(own), columns.to(own)
        tile = kernel(rows, columns).to_dense().to(dtype)
        if equal is not None:  # upstream's distance of a point to itself is rounded
            tile[equal] = kernel(rows[equal[0]], diag=True).to(dtype)
        return tile

    return evaluate


# --- products


def _shape(tiles: Tiles, rows: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    budget = TILE_BYTES.get(tiles.left.device.type, TILE_BYTES["cuda"])
    numbers = budget // tiles.left.element_size()
    height = min(max(rows, 1), _WIDEST, max(1, math.isqrt(numbers)))
    return height, max(1, numbers // height)


def _spans(n: int, width: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + width, n)) for start in range(0, n, width))


def _meetings(rows: Tensor, width: int, n: int) -> list[tuple[Tensor, Tensor] | None]:
    """Where the row of a point meets the column of the same point, by tile."""
    order = rows.argsort()
    columns = rows[order]
    starts = torch.arange(0, n + width, width, device=rows.device)
    bounds = torch.searchsorted(columns, starts).tolist()
    found = []
    for i, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        found.append((order[lo:hi], columns[lo:hi] - i * width) if hi > lo else None)
    return found


def _columns_first(V: Tensor, tiles: Tiles) -> Tensor:
    """``n x k`` as ``k x n`` in the dtype of the tiles, in one copy."""
    return V.mT.to(tiles.dtype, memory_format=torch.contiguous_format)


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
    Vt = _columns_first(V, tiles)  # k x t
    total = Vt.new_zeros(len(Vt), len(left), dtype=torch.float64)
    height, width = _shape(tiles, len(left))
    if isinstance(rows, slice):
        rows = torch.arange(n, device=V.device)[rows]
    for top, bottom in _spans(len(left), height):
        some = left[top:bottom]
        part = total[:, top:bottom]
        equal = None if rows is None else _meetings(rows[top:bottom], width, n)
        for i, (start, stop) in enumerate(_spans(n, width)):
            meets = None if equal is None else equal[i]
            tile = tiles.evaluate(some, tiles.right[start:stop], meets)
            _accumulate(part, Vt[:, start:stop], tile.mT)
    return total.mul_(tiles.amplitude).mT


@torch.no_grad()
def multiply_columns(tiles: Tiles, U: Tensor, columns: Tensor | slice) -> Tensor:
    """Product of some columns of a symmetric kernel matrix with ``b x k``, float64."""
    n = len(tiles.right)
    left = tiles.left[columns]
    if isinstance(columns, slice):
        columns = torch.arange(n, device=U.device)[columns]
    Ut = _columns_first(U, tiles)  # k x b
    total = Ut.new_zeros(len(Ut), n, dtype=torch.float64)
    height, width = _shape(tiles, len(left))
    for top, bottom in _spans(len(left), height):
        equal = _meetings(columns[top:bottom], width, n)
        for i, (start, stop) in enumerate(_spans(n, width)):
            tile = tiles.evaluate(left[top:bottom], tiles.right[start:stop], equal[i])
            _accumulate(total[:, start:stop], Ut[:, top:bottom], tile)
    return total.mul_(tiles.amplitude).mT


@torch.no_grad()
def multiply_all(tiles: Tiles, V: Tensor) -> Tensor:
    """Product of a symmetric kernel matrix with ``n x k``: each tile is used twice."""
    n = len(tiles.left)
    Vt = _columns_first(V, tiles)
    total = Vt.new_zeros(len(Vt), n, dtype=torch.float64)
    width = min(_shape(tiles, n))
    for top, bottom in _spans(n, width):
        own = torch.arange(bottom - top, device=V.device)
        for start, stop in _spans(bottom, width):
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
    numbers = torch.arange(n, device=left.device)[rows]
    result = left.new_empty(len(left), n, dtype=tiles.dtype)
    height, width = _shape(tiles, len(left))
    for top, bottom in _spans(len(left), height):
        equal = _meetings(numbers[top:bottom], width, n)
        for i, (start, stop) in enumerate(_spans(n, width)):
            tile = tiles.evaluate(left[top:bottom], tiles.right[start:stop], equal[i])
            torch.mul(tile, tiles.amplitude, out=result[top:bottom, start:stop])
    return result


@torch.no_grad()
def dense_block(tiles: Tiles, rows: Tensor | slice) -> Tensor:
    """The kernel matrix of some points, ``b x b``."""
    left, right = tiles.left[rows], tiles.right[rows]
    own = torch.arange(len(left), device=left.device)
    return tiles.amplitude * tiles.evaluate(left, right, (own, own))


@torch.no_grad()
def weighted_sum(
    kernel: Kernel,
    X: Tensor,
    L: Tensor,
    R: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The sum of :math:`G \circ K` with :math:`G = L R^\top`, and its derivatives.

    For kernels with a fast form, at unit amplitude; each tile serves twice.

    Args:
        kernel: Of which :func:`stationary_part` is known.
        X: Points ``n x d``.
        L: Left factor ``n x k``.
        R: Right factor ``n x k``.
        dtype: Of the tiles, whose sums are added in the dtype of X; default that.

    Returns:
        The sum, and its derivative in the logarithm of each lengthscale, ``d``.
    """
    base, _ = stationary_part(kernel)
    dtype = X.dtype if dtype is None else dtype
    tiles = prepare(kernel, X, dtype=dtype)
    points = tiles.right[:, :-2].to(dtype)  # scaled and centred
    L, R = L.to(dtype), R.to(dtype)
    squares = points.square()
    nu = getattr(base, "nu", math.inf)
    total, slopes = X.new_zeros(()), X.new_zeros(points.shape[-1])
    width = min(_shape(tiles, len(X)))
    for top, bottom in _spans(len(X), width):
        for start, stop in _spans(bottom, width):
            G = L[top:bottom] @ R[start:stop].mT
            squared = torch.mm(tiles.left[top:bottom], tiles.right[start:stop].mT)
            squared = squared.to(dtype).clamp_(min=0.0)
            if start == top:
                squared.fill_diagonal_(0.0)
            else:
                G.addmm_(R[top:bottom], L[start:stop].mT)
            value, slope = _with_slope(squared, nu)
            total += (G * value).sum()
            # sum_ij E_ij (a_id - b_jd)^2, by three products
            E = G.mul_(slope)
            a, b = points[top:bottom], points[start:stop]
            slopes += E.sum(1) @ squares[top:bottom] + E.sum(0) @ squares[start:stop]
            slopes -= 2 * (a * (E @ b)).sum(0)
    return total, -2 * slopes
