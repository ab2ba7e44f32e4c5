r"""Kernel matrices a tile at a time, sized so that a tile stays in the cache.

A product :math:`K V` visits every entry of K once and forgets it. What it costs is the
entries: for the common stationary kernels the inputs are scaled and centred once,
squared distances are one matrix product of augmented inputs,

.. math::
    \|a - b\|^2 = (-2 a, \|a\|^2, 1) \cdot (b, 1, \|b\|^2),

and the profile is applied in place. Kernels with fewer features than points, as those
of networks, are multiplied through their features, :math:`\Phi (\Phi^\top V)`: no tile
is formed, and a network is evaluated once or twice per point, not once per tile. Sums
add their terms within a tile. All other kernels are called as they are.

In: a kernel and two sets of points. Out: what evaluates its tiles, without gradients.
Next: ``tile_products`` multiplies them.

References:
    Wang, Pleiss, Gardner, Tyree, Weinberger, Wilson, Exact Gaussian processes on a
    million data points, NeurIPS 2019, section 3 (partitioned kernel products).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    RBFKernel,
    ScaleKernel,
)
from linear_operator import to_dense
from torch import Tensor

TILE_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
"""Size of a tile by type of device: a share of the cache, or what fills a GPU."""

ACCURACY = 5e-5
"""Of squared distances, where nothing is known about the noise."""

FEATURE_BYTES = 256 * 2**20
"""Of the features of all points that are held, and of those that are formed at once."""

_ERROR = 0.02  # of squared distances, in noise variances over the amplitude


class Tiles(NamedTuple):
    """A kernel between two prepared sets of points: ``amplitude * profile(tile)``.

    ``left`` and ``right`` hold one row per point; ``evaluate`` maps some rows of each,
    with the places ``(rows, columns)`` of equal points, to a new dense tile.
    ``features`` maps some rows to their features, where products go through these.
    """

    left: Tensor
    right: Tensor
    evaluate: Callable[[Tensor, Tensor, tuple[Tensor, Tensor] | None], Tensor]
    amplitude: float
    dtype: torch.dtype
    features: Callable[[Tensor], Tensor] | None = None
    num_features: int = 0


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
        The prepared kernel; hyperparameters are copied where there is a fast form, and
        features are held up to ``FEATURE_BYTES``.
    """
    dtype = left.dtype if dtype is None else dtype
    base, amplitude = _without_scales(kernel)
    a, b = _selected(kernel, left), right
    if right is not None:
        b = _selected(kernel, right)
    if stationary_part(base) is not None:
        tiles = _stationary(base, a, b, dtype, accuracy)
    elif type(base) is AdditiveKernel and not base.batch_shape:
        terms = [prepare(term, a, b, dtype, accuracy) for term in base.kernels]
        tiles = _added(terms, dtype)
    else:
        tiles = _by_features(base, a, b, dtype)
    if tiles is None:
        right = left if right is None else right
        return Tiles(left, right, _upstream(kernel, dtype), 1.0, dtype)
    return tiles._replace(amplitude=float(amplitude) * tiles.amplitude)


def stationary_part(kernel: Kernel) -> tuple[Kernel, Tensor | float] | None:
    """The base kernel and its amplitude, where there is a formula for the tiles."""
    kernel, amplitude = _without_scales(kernel)
    fast = type(kernel) in (RBFKernel, MaternKernel) and not kernel.batch_shape
    return (kernel, amplitude) if fast else None


@torch.no_grad()
def distance_accuracy(kernel: Kernel, noise: Tensor) -> float:
    """How precise squared distances must be, so that errors stay below the noise."""
    found = stationary_part(kernel)
    if found is None or not noise.numel():
        return ACCURACY
    share = noise.min().item() / max(float(found[1]), 1e-300)
    return min(ACCURACY, _ERROR * share)


@torch.no_grad()
def state(kernel: Kernel) -> Tensor:
    """All numbers that a kernel depends on, in one vector.

    What :func:`prepare` copies is valid as long as this is equal. One comparison of
    values: setters of upstream change data behind the version counter.
    """
    tensors = [*kernel.parameters(), *kernel.buffers()]
    numbers = [tensor.reshape(-1).double() for tensor in tensors]
    return torch.cat(numbers) if numbers else torch.zeros(0)


def _without_scales(kernel: Kernel) -> tuple[Kernel, Tensor | float]:
    amplitude = 1.0
    while type(kernel) is ScaleKernel and not kernel.batch_shape:
        amplitude = kernel.outputscale * amplitude
        kernel = kernel.base_kernel
    return kernel, amplitude


def _selected(kernel: Kernel, X: Tensor) -> Tensor:
    # As upstream: by the outermost kernel, whose scales call what is inside directly.
    if kernel.active_dims is None:
        return X
    return X.index_select(-1, kernel.active_dims)


def _stationary(
    base: Kernel,
    left: Tensor,
    right: Tensor | None,
    dtype: torch.dtype,
    accuracy: float,
) -> Tiles:
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

    return Tiles(a, b, evaluate, 1.0, dtype)


def feature_part(
    kernel: Kernel, X: Tensor
) -> tuple[Callable[[Tensor], Tensor], Tensor, Kernel, Tensor | float] | None:
    """Features of a kernel that has fewer of them than there are points.

    Args:
        kernel: Any kernel without batch shape.
        X: Points ``n x d``.

    Returns:
        The function to ``n x f``, differentiable in hyperparameters; the columns of the
        points that it takes; the kernel that it is of; the amplitude around it.
    """
    base, amplitude = _without_scales(kernel)
    features, X = _feature_function(base, X.dtype), _selected(kernel, X)
    if features is None or not len(X):
        return None
    with torch.no_grad():
        few = features(X[:1]).shape[-1] <= len(X)
    return (features, X, base, amplitude) if few else None


def _by_features(
    base: Kernel, left: Tensor, right: Tensor | None, dtype: torch.dtype
) -> Tiles | None:
    """Products through features, where a kernel has fewer of them than points."""
    features = _feature_function(base, dtype)
    points = max(len(left), 0 if right is None else len(right))
    if features is None or not points:
        return None
    some = left if len(left) else right
    f = features(some[:1]).shape[-1]
    if f > points:
        return None  # a tile may cost less than its features
    total = len(left) + (0 if right is None else len(right))
    if 8 * total * f > FEATURE_BYTES:
        right = left if right is None else right
        called = _upstream(base, dtype, selected=True)
        return Tiles(left, right, called, 1.0, dtype, features, f)

    a = _evaluated(features, left, f)
    b = a if right is None else _evaluated(features, right, f)
    if hasattr(base, "representation"):
        # The tangent kernel contracts a tile layer by layer, which costs less than the
        # product of so many features: points are held beside these.
        a = torch.cat([a, left], -1)
        b = a if right is None else torch.cat([b, right], -1)
        called = _upstream(base, dtype, selected=True)

    def evaluate(rows, columns, equal=None):
        if rows.shape[-1] == f:
            return rows @ columns.mT
        return called(rows[:, f:], columns[:, f:], equal)

    return Tiles(a, b, evaluate, 1.0, dtype, lambda rows: rows[:, :f].to(dtype), f)


def _evaluated(features: Callable, X: Tensor, f: int) -> Tensor:
    parts = [features(x) for x in X.split(feature_rows(f))]
    return torch.cat(parts)


def feature_rows(f: int) -> int:
    """Points whose features are formed at once."""
    return max(1, FEATURE_BYTES // (8 * max(f, 1)))


def _feature_function(kernel: Kernel, dtype: torch.dtype) -> Callable | None:
    """Features of points whose columns are already selected, ``n x d`` to ``n x f``."""
    if kernel.batch_shape:
        return None
    if type(kernel) is LinearKernel:
        own = kernel.raw_variance.dtype
        return lambda x: (x.to(own) * kernel.variance.sqrt()).to(dtype)
    if not hasattr(kernel, "features"):  # those of ours that have finitely many
        return None
    own = _dtype_of(kernel)
    return lambda x: kernel.features(x if own is None else x.to(own)).to(dtype)


def _added(terms: list[Tiles], dtype: torch.dtype) -> Tiles:
    """The sum of prepared kernels: their rows side by side, their tiles added."""
    widths = [term.left.shape[-1] for term in terms]
    own = [term.left.dtype for term in terms]
    wide = torch.float64 if torch.float64 in own else own[0]
    left, right = (
        torch.cat([getattr(term, side).to(wide) for term in terms], -1)
        for side in ("left", "right")
    )

    def evaluate(rows, columns, equal=None):
        total = 0.0
        pairs = zip(rows.split(widths, -1), columns.split(widths, -1), strict=True)
        for term, kind, (a, b) in zip(terms, own, pairs, strict=True):
            tile = term.evaluate(a.to(kind), b.to(kind), equal).mul_(term.amplitude)
            total = tile.add_(total)
        return total

    if any(term.features is None for term in terms):
        return Tiles(left, right, evaluate, 1.0, dtype)

    def features(rows):
        parts = zip(terms, own, rows.split(widths, -1), strict=True)
        each = [t.amplitude**0.5 * t.features(x.to(kind)) for t, kind, x in parts]
        return torch.cat(each, -1)

    f = sum(term.num_features for term in terms)
    return Tiles(left, right, evaluate, 1.0, dtype, features, f)


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


# By smoothness: the factor of the inputs, and the kernel of the squared distance.
# Rasmussen and Williams (2006), eqs. (4.9) and (4.17).
_PROFILES = {
    math.inf: (math.sqrt(0.5), _gaussian),
    0.5: (1.0, _matern12),
    1.5: (math.sqrt(3.0), _matern32),
    2.5: (math.sqrt(5.0), _matern52),
}


def _dtype_of(kernel: Kernel) -> torch.dtype | None:
    floats = (p.dtype for p in kernel.parameters() if p.is_floating_point())
    return next(floats, None)


def _upstream(kernel: Kernel, dtype: torch.dtype, selected: bool = False) -> Callable:
    own = _dtype_of(kernel)
    # Without __call__ it is upstream's plain function of selected columns.
    matrix = kernel.forward if selected else kernel

    def evaluate(rows, columns, equal=None):
        if own is not None:
            rows, columns = rows.to(own), columns.to(own)
        # Always a new tensor, which a sum may overwrite.
        tile = to_dense(matrix(rows, columns)).to(dtype, copy=True)
        if equal is not None:  # upstream's distance of a point to itself is rounded
            tile[equal] = to_dense(
                matrix(rows[equal[0]], rows[equal[0]], diag=True)
            ).to(dtype)
        return tile

    return evaluate
