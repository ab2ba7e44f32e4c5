r"""Covariances of inducing variables that live where a base kernel's inputs live.

A kernel that averages over orbits, :math:`f(x) = E_a\, g(T_a x)`, has inducing
variables u = g(Z): their covariance costs no average, and that with f a single one,

.. math:: K_{uu} = k_g(Z, Z), \qquad K_{uf} = E_a\, k_g(Z, T_a x).

Scales, sums and products of kernels have the scales, sums and products of these: a sum
:math:`f_1 + f_2` takes :math:`u = g_1(Z) + g_2(Z)`, and a kernel without orbits is its
own base kernel. Everything stays jointly positive semi-definite.

Whoever registers rules for another kernel can put it into sparse and deep GPs.

In: a kernel, inducing points ``... m x d'`` and inputs ``... n x d``. Out: dense
matrices. Next: ``inducing_strategy`` makes a posterior of them, ``dnn.deep_gp_layer``
a layer.

References:
    van der Wilk et al., Learning invariances using the marginal likelihood, NeurIPS
    2018, section 4.2; Convolutional Gaussian processes, NeurIPS 2017, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ProductKernel, ScaleKernel
from torch import Tensor

from gpbridge.checks import ShapeError

_COMPOSITIONS = ScaleKernel, AdditiveKernel, ProductKernel


def has_orbits(kernel: Kernel) -> bool:
    """Whether a kernel itself, not one inside of it, averages a base kernel."""
    return hasattr(kernel, "base_cross")


def has_own_domain(kernel: Kernel) -> bool:
    """Whether inducing variables are other things than function values at inputs.

    So for kernels with orbits, for others that have a rule of their own, and for
    scales, sums and products with one of these.
    """
    if isinstance(kernel, _COMPOSITIONS):
        parts = getattr(kernel, "kernels", None) or [kernel.base_kernel]
        return any(map(has_own_domain, parts))
    rule = inducing_covariance.dispatch(type(kernel))
    return has_orbits(kernel) or rule is not inducing_covariance.dispatch(Kernel)


@singledispatch
def inducing_covariance(kernel: Kernel, Z: Tensor) -> Tensor:
    """Covariance :math:`K_{uu}` of the inducing variables, ``... m x m``.

    Args:
        kernel: The kernel of f.
        Z: Inducing points ``... m x d'``.

    Returns:
        The matrix, without jitter.
    """
    base = kernel.base_kernel if has_orbits(kernel) else kernel
    return base(Z).to_dense()


@singledispatch
def inducing_cross_covariance(kernel: Kernel, Z: Tensor, x: Tensor) -> Tensor:
    """Covariance :math:`K_{uf}` of inducing variables and function, ``... m x n``.

    Args:
        kernel: The kernel of f.
        Z: Inducing points ``... m x d'``.
        x: Inputs ``... n x d``.

    Returns:
        The matrix.
    """
    if has_orbits(kernel):
        if Z.dim() > 2 or len(kernel.batch_shape):
            return kernel.base_cross(*_one_batch(Z, x))
        # Convolutions are for one batch of images.
        cross = kernel.base_cross(Z, x.reshape(-1, x.shape[-1]))  # m x (... n)
        return cross.unflatten(-1, x.shape[:-1]).movedim(0, -2)
    return kernel(*_one_batch(Z, x)).to_dense()


@singledispatch
def inducing_width(kernel: Kernel, width: int) -> int:
    """The number d' of columns of inducing points for inputs with d columns.

    Raises:
        ShapeError: If parts of the kernel disagree.
    """
    if not has_orbits(kernel):
        return width
    if kernel.active_dims is not None:
        width = len(kernel.active_dims)
    return kernel.augmentation.output_width(width)


def _one_batch(Z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    batch = torch.broadcast_shapes(Z.shape[:-2], x.shape[:-2])
    return Z.expand(*batch, *Z.shape[-2:]), x.expand(*batch, *x.shape[-2:])


def _selected(kernel: ScaleKernel, *points: Tensor) -> Iterator[Tensor]:
    """Points in the columns of a scale; upstream copies those of its base to it."""
    dims, base = kernel.active_dims, kernel.base_kernel
    if dims is None or base.active_dims is not None:
        yield from points
        return
    parts = (part for part in base.modules() if isinstance(part, Kernel))
    if any(map(has_orbits, parts)):
        raise ValueError(
            "active_dims of a ScaleKernel around a kernel with orbits do not say which "
            "columns inducing points have. Set active_dims on the inner kernel."
        )
    for point in points:
        yield point.index_select(-1, dims)


@inducing_covariance.register
def _(kernel: ScaleKernel, Z: Tensor) -> Tensor:
    (Z,) = _selected(kernel, Z)
    return _scale(kernel) * inducing_covariance(kernel.base_kernel, Z)


@inducing_cross_covariance.register
def _(kernel: ScaleKernel, Z: Tensor, x: Tensor) -> Tensor:
    Z, x = _selected(kernel, Z, x)
    return _scale(kernel) * inducing_cross_covariance(kernel.base_kernel, Z, x)


@inducing_width.register
def _(kernel: ScaleKernel, width: int) -> int:
    return inducing_width(kernel.base_kernel, width)


def _scale(kernel: ScaleKernel) -> Tensor:
    return kernel.outputscale[..., None, None]


@inducing_covariance.register
def _(kernel: AdditiveKernel, Z: Tensor) -> Tensor:
    return sum(inducing_covariance(part, Z) for part in kernel.kernels)


@inducing_cross_covariance.register
def _(kernel: AdditiveKernel, Z: Tensor, x: Tensor) -> Tensor:
    return sum(inducing_cross_covariance(part, Z, x) for part in kernel.kernels)


@inducing_covariance.register
def _(kernel: ProductKernel, Z: Tensor) -> Tensor:
    first, *others = (inducing_covariance(part, Z) for part in kernel.kernels)
    for other in others:
        first = first * other
    return first


@inducing_cross_covariance.register
def _(kernel: ProductKernel, Z: Tensor, x: Tensor) -> Tensor:
    first, *others = (inducing_cross_covariance(k, Z, x) for k in kernel.kernels)
    for other in others:
        first = first * other
    return first


@inducing_width.register(AdditiveKernel)
@inducing_width.register(ProductKernel)
def _(kernel: AdditiveKernel | ProductKernel, width: int) -> int:
    widths = [inducing_width(part, width) for part in kernel.kernels]
    if len(set(widths)) > 1:
        raise ShapeError(
            "All parts of a sum or product of kernels share their inducing points, but "
            f"the base kernels see {', '.join(map(str, widths))} columns. Try a "
            "SparseGP for each part, or let all of them see patches."
        )
    return widths[0]
