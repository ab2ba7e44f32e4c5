r"""Some elements of an orbit in place of all: the pieces of stochastic bounds.

In: an augmentation, or a kernel that averages over one. Out: elements of its orbit,
drawn without replacement or, where the orbit is infinite, independently; the base
kernel's covariances at these elements of each input; and from moments of single
elements the unbiased moments of the average.
Next: ``inducing_strategy`` conditions them, ``selection.elbo`` makes bounds of them.

References:
    van der Wilk et al., Learning invariances using the marginal likelihood, NeurIPS
    2018, section 4.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel, ScaleKernel
from torch import Generator, Tensor
from torch.func import functional_call

from gpbridge.augmentation import Augmentation, FiniteOrbit
from gpbridge.checks import check_count
from gpbridge.inducing_covariances import has_orbits
from gpbridge.randomness import fresh


class OrbitMoments(NamedTuple):
    r"""Of :math:`h_c(x) = w_c\, g(T_c x)` under q, for C elements c of each orbit.

    ``mean`` and ``variance`` are those of each element, ``... n x C``; ``pooled`` is
    the variance of their average, ``... n``; ``offset`` is the prior mean of f.
    """

    mean: Tensor
    variance: Tensor
    pooled: Tensor
    offset: Tensor


def draw_elements(
    augmentation: Augmentation, num_elements: int, generator: Generator | None = None
) -> Tensor:
    """Elements of an orbit.

    Args:
        augmentation: The distribution over transformations.
        num_elements: The number C of elements.
        generator: Source of randomness. Without one, draws differ in each call.

    Returns:
        Their numbers, ``C``, drawn without replacement; for an infinite orbit
        independent base noise, ``C x k``. Either is what :func:`orbit_elements` takes.

    Raises:
        ValueError: If there are fewer.
    """
    check_count(num_elements=num_elements)
    size, noise = augmentation.orbit_size, augmentation.noise
    if num_elements > size:
        raise ValueError(
            f"{num_elements} elements cannot be drawn without replacement from an "
            f"orbit of {size}. Ask for at most {size}, which is the exact average."
        )
    generator = fresh(generator, noise.device)
    device = generator.device
    if math.isinf(size):
        shape = num_elements, augmentation.num_parameters
        options = {"dtype": torch.float64, "device": device}
        points = torch.rand(shape, generator=generator, **options)
        return augmentation._centred(points).to(noise)
    order = torch.randperm(size, generator=generator, device=device)
    return order[:num_elements].to(noise.device)


def orbit_elements(augmentation: Augmentation, x: Tensor, elements: Tensor) -> Tensor:
    """Some elements of the orbits of inputs, ``... n x d`` to ``... n x C x d'``."""
    if elements.is_floating_point():
        return functional_call(augmentation, {"noise": elements}, (x,))
    if isinstance(augmentation, FiniteOrbit):
        return functional_call(augmentation, {"chosen": elements}, (x,))
    return augmentation(x)[..., elements, :]


def orbit_kernel(kernel: Kernel) -> tuple[Tensor | None, Kernel]:
    """The one kernel with orbits inside of scales, and the product of these scales.

    Raises:
        TypeError: If the kernel is another composition.
    """
    scale = None
    while isinstance(kernel, ScaleKernel):
        outputscale = kernel.outputscale
        scale = outputscale if scale is None else scale * outputscale
        kernel = kernel.base_kernel
    if not has_orbits(kernel):
        raise TypeError(
            "Elements of orbits can be drawn for an InvariantKernel or a "
            f"ConvolutionalKernel, alone or in a ScaleKernel, but the kernel is a "
            f"{type(kernel).__name__}. Use gpytorch's VariationalELBO, which is exact."
        )
    return scale, kernel


def orbit_covariances(
    kernel: Kernel, Z: Tensor, x: Tensor, elements: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Covariances of :math:`h_c(x) = w_c\, g(T_c x)` with u = g(Z), and per input.

    Args:
        kernel: With orbits, alone or in scales.
        Z: Inducing points ``... m x d'``.
        x: Inputs ``... n x d``.
        elements: C of the orbit, from :func:`draw_elements`.

    Returns:
        Those with u, ``... m x n x C``, and those among the elements of each input,
        ``... n x C x C``.
    """
    scale, kernel = orbit_kernel(kernel)
    if kernel.active_dims is not None:
        x = x.index_select(-1, kernel.active_dims)
    orbits = orbit_elements(kernel.augmentation, x, elements)  # ... n x C x d'
    n, C, width = orbits.shape[-3:]
    base = kernel.base_kernel
    batch = torch.broadcast_shapes(Z.shape[:-2], orbits.shape[:-3])
    flat = orbits.flatten(-3, -2).expand(*batch, n * C, width)
    cross = base(Z.expand(*batch, *Z.shape[-2:]), flat).to_dense()
    cross = cross.unflatten(-1, (n, C))
    # The inputs become the first axis, so that a batch of kernels meets its own.
    own = orbits.reshape(
        *(1,) * max(0, len(base.batch_shape) - orbits.dim() + 3), *orbits.shape
    )
    own = base(own.movedim(-3, 0)).to_dense().movedim(0, -3)
    weights = kernel.augmentation.weights
    # Weights of nodes are those of a quadrature, not of independent draws.
    if weights is not None and not elements.is_floating_point():
        weights = weights.to(x)[elements]
        cross = cross * weights
        own = own * (weights[:, None] * weights)
    if scale is not None:
        scale = scale[..., None, None, None]
        cross, own = cross * scale, own * scale
    return cross, own


def unbiased_moments(moments: OrbitMoments, orbit_size: float) -> tuple[Tensor, Tensor]:
    r"""Unbiased estimates of the first two moments of f, which averages all elements.

    With C of |A| elements drawn without replacement,
    :math:`w = \frac{C}{C-1}(1 - \frac1{|A|})` and :math:`v = \frac1{|A|} - \frac wC`,

    .. math:: \hat\mu = \bar\mu, \qquad \widehat{E f^2} =
        w\,(\mathrm{var}\,\bar h + \bar\mu^2) + v\,\overline{\mathrm{var}_c + \mu_c^2},

    where a bar is a mean over the C. All of the orbit gives the exact moments. The
    second is an estimate: it may lie below the square of the first.

    Args:
        moments: Of the elements that were drawn.
        orbit_size: The number |A| of elements, or infinity.

    Returns:
        Estimates of E f and of E f^2, the prior mean of f included, ``... n``.

    Raises:
        ValueError: If one of several elements was drawn: it says nothing about pairs.
    """
    C = moments.mean.shape[-1]
    if C == 1 < orbit_size:
        raise ValueError(
            f"One element of an orbit of {orbit_size} has no pairs of different "
            "elements, which the second moment of the average is made of. Draw two or "
            "more."
        )
    inverse = 1 / orbit_size
    pairs = 1.0 if C == 1 else C / (C - 1) * (1 - inverse)
    single = inverse - pairs / C
    mean = moments.mean.mean(-1)
    each = moments.variance + moments.mean.square()
    second = pairs * (moments.pooled + mean.square()) + single * each.mean(-1)
    offset = moments.offset
    return mean + offset, second + 2 * offset * mean + offset.square()
