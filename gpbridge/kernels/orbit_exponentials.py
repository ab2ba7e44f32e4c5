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

from gpbridge.kernels.orbit_blocks import exponentials

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


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, Z: Tensor, orbits: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(Z, orbits, weights)
        u, s = len(Z), orbits.shape[-2]
        left, right = _left(Z), _right(orbits)
        parts = [
            (_exponentials(left, part.flatten(0, 1)).view(-1, s) @ weights).view(u, -1)
            for part in right.split(_block(u * s, Z))
        ]
        return torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        Z, orbits, weights = ctx.saved_tensors
        (u, d), s = Z.shape, orbits.shape[-2]
        left, right = _left(Z), _right(orbits)
        ones = torch.ones_like(Z[:, :1])
        points = torch.cat([Z, ones], -1)  # u x (d + 1)
        size = _block(u * s, Z)
        dZ = torch.zeros_like(points)
        sums = []
        for part, own, g in zip(
            right.split(size), orbits.split(size), grad.split(size, -1), strict=True
        ):
            K = _exponentials(left, part.flatten(0, 1))
            K.view(u, -1, s).mul_(g[..., None])
            weighted = torch.cat([own, torch.ones_like(own[..., :1])], -1)
            weighted = weighted * weights[:, None]
            dZ.addmm_(K, weighted.flatten(0, 1))
            sums.append(K.mT @ points)
        dZ = dZ[:, :d] - Z * dZ[:, d:]
        sums = torch.cat(sums).view(-1, s, d + 1)
        dO = (sums[..., :d] - orbits * sums[..., d:]) * weights[:, None]
        return dZ, dO, sums[..., d].sum(0)


class _Variance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, orbits: Tensor, weights: Tensor) -> Tensor:
        s, d = orbits.shape[-2:]
        weighted = torch.cat([orbits, torch.ones_like(orbits[..., :1])], -1)
        weighted = weighted * weights[:, None]
        left, right = _left(orbits), _right(orbits)
        size = _block(s * s, orbits)
        # All that the backward pass needs, since it is linear in its one number.
        parts = [
            _exponentials(a, b) @ c
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


def _left(points: Tensor) -> Tensor:
    norms = -0.5 * points.square().sum(-1, keepdim=True)
    return torch.cat([points, norms, torch.ones_like(norms)], -1)


def _right(points: Tensor) -> Tensor:
    norms = -0.5 * points.square().sum(-1, keepdim=True)
    return torch.cat([points, torch.ones_like(norms), norms], -1)


def _exponentials(left: Tensor, right: Tensor) -> Tensor:
    return exponentials(left @ right.mT)


def _block(entries: int, like: Tensor) -> int:
    room = _CACHED if like.device.type == "cpu" else _LAUNCHED
    return max(1, room // entries)
