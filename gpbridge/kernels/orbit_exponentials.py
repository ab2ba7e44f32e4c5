r"""Averages of a squared exponential over orbits, without keeping its values.

.. math:: C_{zn} = \sum_a w_a\, e^{-|z - o_{na}|^2 / 2}, \qquad
    v_n = \sum_{a, b} w_a w_b\, e^{-|o_{na} - o_{nb}|^2 / 2}

Orbits of s points make s, or s², exponentials for each entry. Made a few inputs at a
time, they stay in the cache of a processor: a matrix product, the exponential in place
and another product. The backward pass makes them once more and needs products only, as
:math:`\partial_z e^{-|z - o|^2 / 2} = e^{-|z - o|^2 / 2} (o - z)`.

In: points and orbits divided by the lengthscale. Out: both averages, with first
derivatives in all arguments. Next: ``patch_sums``, where orbits are patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpbridge.kernels.orbit_blocks import exponentials, with_norms

_CACHED = 2**19  # exponentials made at a time on a CPU, 2 MiB in float32
_LAUNCHED = 2**25  # and elsewhere, where starting a kernel costs more


def orbit_cross(Z: Tensor, orbits: Tensor, weights: Tensor) -> Tensor:
    """The average C of points and orbits.

    Args:
        Z: Points ``u x d``, divided by the lengthscale.
        orbits: Orbits ``n x s x d``, divided likewise.
        weights: Weights w, ``s``.

    Returns:
        The matrix, ``u x n``.
    """
    return _Cross.apply(Z, orbits, weights)


def orbit_variance(orbits: Tensor, weights: Tensor) -> Tensor:
    """The average v of each orbit with itself.

    Args:
        orbits: Orbits ``n x s x d``, divided by the lengthscale.
        weights: Weights w, ``s``.

    Returns:
        The variances, ``n``.
    """
    return _Variance.apply(orbits, weights)


def exponentials_held(rows: int, columns: int, number: int, like: Tensor) -> int:
    """How many exponentials either pass holds at once.

    Args:
        rows: Points, or those of an orbit, s.
        columns: Points of an orbit, s.
        number: Orbits.
        like: A tensor where they are made.
    """
    orbits, height = _block(rows, columns, like)
    return min(orbits, number) * min(height, rows) * columns


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Z: Tensor, orbits: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(Z, orbits, weights)
        u, s = len(Z), orbits.shape[-2]
        left, right = with_norms(Z, row=True), with_norms(orbits, row=False)
        size, height = _block(u, s, Z)

        def average(rows: Tensor, part: Tensor) -> Tensor:
            K = _exponentials(rows, part.flatten(0, 1))
            return (K.view(-1, s) @ weights).view(len(rows), -1)

        parts = [
            torch.cat([average(rows, part) for rows in left.split(height)])
            for part in right.split(size)
        ]
        return torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z, orbits, weights = ctx.saved_tensors
        (u, d), s = Z.shape, orbits.shape[-2]
        left, right = with_norms(Z, row=True), with_norms(orbits, row=False)
        points = torch.cat([Z, torch.ones_like(Z[:, :1])], -1)  # u x (d + 1)
        size, height = _block(u, s, Z)
        dZ = torch.zeros_like(points)

        def add(rows: slice, part: Tensor, weighted: Tensor, g: Tensor) -> Tensor:
            """Of some points and some orbits; what belongs to the orbits."""
            K = _exponentials(left[rows], part)
            K.view(len(g), -1, s).mul_(g[..., None])
            dZ[rows].addmm_(K, weighted)
            return K.mT @ points[rows]

        blocks = [slice(start, start + height) for start in range(0, u, height)]
        sums = []
        for part, own, g in zip(
            right.split(size), orbits.split(size), grad.split(size, -1), strict=True
        ):
            weighted = _weighted(own, weights).flatten(0, 1)
            part = part.flatten(0, 1)
            sums.append(sum(add(rows, part, weighted, g[rows]) for rows in blocks))
        dZ = dZ[:, :d] - Z * dZ[:, d:]
        sums = torch.cat(sums).view(-1, s, d + 1)
        dO = (sums[..., :d] - orbits * sums[..., d:]) * weights[:, None]
        return dZ, dO, sums[..., d].sum(0)


class _Variance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, orbits: Tensor, weights: Tensor) -> Tensor:
        s, d = orbits.shape[-2:]
        left, right = with_norms(orbits, row=True), with_norms(orbits, row=False)
        weighted = _weighted(orbits, weights)
        size, height = _block(s, s, orbits)
        # All that the backward pass needs, since it is linear in its one number.
        parts = [
            torch.cat([_exponentials(r, b) @ c for r in a.split(height, -2)], -2)
            for a, b, c in zip(
                left.split(size), right.split(size), weighted.split(size), strict=True
            )
        ]
        sums = torch.cat(parts)  # n x s x (d + 1)
        ctx.save_for_backward(orbits, weights, sums)
        return sums[..., d] @ weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        orbits, weights, sums = ctx.saved_tensors
        d = orbits.shape[-1]
        dO = (sums[..., :d] - orbits * sums[..., d:]) * weights[:, None]
        return 2 * grad[:, None, None] * dO, 2 * grad @ sums[..., d]


def _weighted(orbits: Tensor, weights: Tensor) -> Tensor:
    """Weights times the points and one."""
    extended = torch.cat([orbits, torch.ones_like(orbits[..., :1])], -1)
    return extended * weights[:, None]


def _exponentials(left: Tensor, right: Tensor) -> Tensor:
    return exponentials(left @ right.mT)


def _block(rows: int, columns: int, like: Tensor) -> tuple[int, int]:
    """Orbits of a block, and rows: all of them, or some with one orbit."""
    room = _CACHED if like.device.type == "cpu" else _LAUNCHED
    orbits = room // max(1, rows * columns)
    if orbits:
        return orbits, max(1, rows)
    return 1, max(1, room // columns)
