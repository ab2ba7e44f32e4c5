r"""Quadratic forms of a covariance matrix, differentiable in its hyperparameters.

In: a kernel, inputs, noise variances, two sets of columns L and R. Out: the scalar
:math:`\mathrm{tr}(L^\top (K + \Sigma) R)`, whose gradient is summed tile by tile
together with its value, by formulas where there are some. Next: ``selection`` maximises
marginal likelihoods with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpytorch.kernels import Kernel
from torch import Tensor, nn

from gpbridge import kernel_tiles, tile_products


def quadratic_form(
    kernel: Kernel,
    X: Tensor,
    noise: Tensor,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    r"""The sum :math:`\mathrm{tr}(L^\top H R)`, differentiable in hyperparameters.

    Gradients reach the kernel's hyperparameters and the noise; ``left`` and ``right``
    are constants. With :math:`G = L R^\top` the form is a sum of entries of
    :math:`G \circ H`, which is differentiated tile by tile as it is summed: a tile and
    its mirror image in one, nothing is kept or computed twice, and memory is that of a
    few tiles. With fewer features than points it is
    :math:`\mathrm{tr}((\Phi^\top L)^\top \Phi^\top R)`, and features are evaluated
    twice. Derivatives are of first order.

    Args:
        kernel: One output per input, no batch shape.
        X: Inputs ``n x d``.
        noise: Noise variances ``n``, or one number.
        left: L, ``n x k``.
        right: R, ``n x k``.

    Returns:
        A scalar.
    """
    L, R = left.detach(), right.detach()
    noise = torch.as_tensor(noise, dtype=X.dtype, device=X.device)
    of_noise = (noise.reshape(-1, 1) * L * R).sum()
    if kernel_tiles.stationary_part(kernel) is not None:
        return of_noise + _stationary_form(kernel, X.detach(), L, R)
    found = kernel_tiles.feature_part(kernel, X.detach())
    if found is not None:
        return of_noise + _feature_form(*found, L, R)
    learnt = _learnt(kernel)
    gradients = [torch.zeros_like(p) for p in learnt]
    step = tile_products.points_per_tile(X)
    total = torch.zeros((), dtype=X.dtype, device=X.device)
    parts = list(zip(X.detach().split(step), L.split(step), R.split(step), strict=True))
    for i, (x, l_x, r_x) in enumerate(parts):
        for z, l_z, r_z in parts[i:]:
            G = l_x @ r_z.mT
            if z is not x:
                G += r_x @ l_z.mT
            # Not a checkpoint, whose hooks torch.func refuses inside a kernel.
            with torch.set_grad_enabled(bool(learnt)):
                tile = (kernel(x, z).to_dense() * G).sum()
            if learnt:
                found = torch.autograd.grad(tile, learnt, allow_unused=True)
                for gradient, new in zip(gradients, found, strict=True):
                    gradient += 0 if new is None else new
            total += tile.detach()
    return of_noise + _with_gradients(total, learnt, gradients)


def _learnt(kernel: Kernel) -> list[nn.Parameter]:
    if not torch.is_grad_enabled():
        return []
    return [p for p in kernel.parameters() if p.requires_grad]


def _with_gradients(
    value: Tensor, learnt: list[nn.Parameter], gradients: list[Tensor]
) -> Tensor:
    for p, gradient in zip(learnt, gradients, strict=True):
        value = value + ((p - p.detach()) * gradient).sum()
    return value


def _feature_form(
    features: Callable[[Tensor], Tensor],
    X: Tensor,
    base: Kernel,
    amplitude: Tensor | float,
    L: Tensor,
    R: Tensor,
) -> Tensor:
    """The sum of L R' times the kernel matrix, through features in blocks of points."""
    k, learnt = L.shape[-1], _learnt(base)
    both = torch.cat([L, R], -1).to(X)
    with torch.no_grad():
        f = features(X[:1]).shape[-1]
        parts = list(
            zip(
                *(t.split(kernel_tiles.feature_rows(f)) for t in (X, both)), strict=True
            )
        )
        left, right = sum(features(x).mT @ v for x, v in parts).split(k, -1)
    gradients = [torch.zeros_like(p) for p in learnt]
    for x, v in parts if learnt else ():
        with torch.enable_grad():
            some_left, some_right = (features(x).mT @ v).split(k, -1)
            value = (some_left * right + left * some_right).sum()
        found = torch.autograd.grad(value, learnt, allow_unused=True)
        for gradient, new in zip(gradients, found, strict=True):
            gradient += 0 if new is None else new
    return amplitude * _with_gradients((left * right).sum(), learnt, gradients)


def _stationary_form(kernel: Kernel, X: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """The sum of L R' times the kernel matrix, by formulas for its derivatives."""
    base, amplitude = kernel_tiles.stationary_part(kernel)
    total, slopes = _weighted_sum(kernel, X, L, R)
    # A shared lengthscale is broadcast, so that its derivatives add up.
    logs = base.lengthscale.log().reshape(-1)
    return amplitude * (total + ((logs - logs.detach()) * slopes).sum())


@torch.no_grad()
def _weighted_sum(
    kernel: Kernel, X: Tensor, L: Tensor, R: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The sum of :math:`G \circ K` with :math:`G = L R^\top`, and its derivatives.

    For kernels with a fast form, at unit amplitude; each tile serves twice.

    Args:
        kernel: Of which :func:`~gpbridge.kernel_tiles.stationary_part` is known.
        X: Points ``n x d``.
        L: Left factor ``n x k``.
        R: Right factor ``n x k``.

    Returns:
        The sum, and its derivative in the logarithm of each lengthscale, ``d``.
    """
    base, _ = kernel_tiles.stationary_part(kernel)
    tiles = kernel_tiles.prepare(kernel, X)
    points = tiles.right[:, :-2]  # scaled and centred, as precise as distances
    L, R = L.to(X), R.to(X)
    squares = points.square()
    nu = getattr(base, "nu", math.inf)
    total, slopes = X.new_zeros(()), X.new_zeros(points.shape[-1])
    width = min(tile_products.shape(tiles, len(X)))
    for top, bottom in tile_products.spans(len(X), width):
        for start, stop in tile_products.spans(bottom, width):
            G = L[top:bottom] @ R[start:stop].mT
            squared = torch.mm(tiles.left[top:bottom], tiles.right[start:stop].mT)
            squared = squared.to(X.dtype).clamp_(min=0.0)
            if start == top:
                squared.fill_diagonal_(0.0)
            else:
                G.addmm_(R[top:bottom], L[start:stop].mT)
            value, slope = _with_slope(squared, nu)
            total += (G * value).sum()
            # sum_ij E_ij (a_id - b_jd)^2, by three products
            E = G.mul_(slope).to(points)
            a, b = points[top:bottom], points[start:stop]
            slopes += E.sum(1) @ squares[top:bottom] + E.sum(0) @ squares[start:stop]
            slopes -= 2 * (a * (E @ b)).sum(0)
    return total, -2 * slopes


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
