r"""Averages over the patches of images, where the kernel is a squared exponential.

In: the same as for other orbits. Out: the same covariances, from one product of patches
that are not formed for all images, and one pass of the exponential; for other kernels
of patches what ``orbit_sums`` has. Next: ``convolutional``.
"""

from __future__ import annotations

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor
from torch.nn import functional

from gpbridge.kernels.orbit_blocks import (
    block_sizes,
    distance_exponents,
    exponentials,
    in_blocks,
    symmetric_in_blocks,
)
from gpbridge.kernels.orbit_exponentials import (
    exponentials_held,
    orbit_cross,
    orbit_variance,
)
from gpbridge.kernels.orbit_sums import (
    CROSS_REMEDY,
    DIAGONAL_REMEDY,
    DIRECT,
    MATRIX_REMEDY,
    Held,
    OrbitAverage,
    Sums,
    average_cross,
    average_diagonal,
    average_matrix,
    check_average,
    numbers_held,
)
from gpbridge.kernels.patch_kernel import PatchKernel

PATCH_ENTRIES = 2**25  # pixels of patches at a time, where no value is kept


def patch_matrix(average: OrbitAverage, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
    """As :func:`~gpbridge.kernels.orbit_sums.average_matrix`, of flat images."""
    if not _is_direct(average, x1, x2):
        return average_matrix(average, x1, x2, same)
    patches, P = average.augmentation, average.augmentation.num_samples
    weights = patches.coefficients(x1)
    n1, n2, width = len(x1), len(x2), patches.output_width(x1.shape[-1])
    size, across = block_sizes(
        P * P, n2, average.chunk_size, x1.device, P * (width + 1)
    )
    symmetric = same and across >= n2 > 0
    height = min(size, -(-n1 // 8) if symmetric else n1)
    check_average(
        average,
        x1,
        (n1, n2),
        (P, P),
        numbers_held(
            average,
            n1 * n2,
            height * min(across, n2) * P * P,
            _pixels(average, height + n2),
            stored=symmetric and 8 * height >= n1,
            held=_held(average),
        ),
        MATRIX_REMEDY,
    )

    def block(images: Tensor, others: Tensor, aligned: bool = False) -> Tensor:
        filters = patches(images).flatten(0, 1)
        aligned = len(images) if aligned else 0
        K = _values(average, filters, others, aligned) @ weights  # n' x (b P)
        return (K.unflatten(-1, (len(images), P)) @ weights).mT

    if symmetric:
        return symmetric_in_blocks(
            lambda start, stop: block(x1[start:stop], x1[start:], True), n1, size, 1
        )

    def against(part: Tensor) -> Tensor:
        return in_blocks(lambda images: block(images, part), (x1,), size, dim=-2)

    return torch.cat([against(part) for part in x2.split(across)], -1)


def patch_diagonal(average: OrbitAverage, x1: Tensor, x2: Tensor, same: bool) -> Tensor:
    """As :func:`~gpbridge.kernels.orbit_sums.average_diagonal`, of flat images."""
    direct = same and _is_direct(average, x1, x2) and _is_exponential(average)
    if not direct:
        return average_diagonal(average, x1, x2, same)
    patches, P = average.augmentation, average.augmentation.num_samples
    weights, size = patches.coefficients(x1), _images(average, x1)
    part = min(size, len(x1))
    check_average(
        average,
        x1,
        (len(x1),),
        (P, P),
        2 * len(x1)
        + 6.5 * _pixels(average, part)  # measured
        + exponentials_held(P, P, part, x1),
        DIAGONAL_REMEDY,
    )

    def block(images: Tensor) -> Tensor:
        orbits = patches(images) - _shift(x1)
        return orbit_variance(orbits / _column_lengthscale(average, x1), weights)

    return in_blocks(block, (x1,), size, dim=-1)


def patch_cross(average: OrbitAverage, Z: Tensor, x: Tensor) -> Tensor:
    """As :func:`~gpbridge.kernels.orbit_sums.average_cross`, of patches and images."""
    if not _is_direct(average, Z, x):
        return average_cross(average, Z, x)
    patches, P = average.augmentation, average.augmentation.num_samples
    weights, u, n = patches.coefficients(x), len(Z), len(x)
    exponential = _is_exponential(average)
    if exponential:
        size = _images(average, x)
        factor = 6 if torch.is_grad_enabled() else 2.5  # measured
        numbers = 3 * (u * n + Z.numel()) + factor * _pixels(average, min(size, n))
        numbers += exponentials_held(u, P, min(size, n), x)
    else:
        size, _ = block_sizes(P, u, average.chunk_size, x.device, _pixels(average, 1))
        part = min(size, n)
        numbers = numbers_held(
            average, u * n, u * P * part, _pixels(average, part), held=_held(average)
        )
    check_average(
        average,
        x,
        (u, n),
        (1, P),
        numbers,
        CROSS_REMEDY,
    )

    def block(images: Tensor) -> Tensor:
        return (_values(average, Z, images) @ weights).mT

    def exponential_block(images: Tensor) -> Tensor:
        lengthscale, shift = _column_lengthscale(average, x), _shift(x)
        orbits = (patches(images) - shift) / lengthscale
        return orbit_cross((Z - shift) / lengthscale, orbits, weights)

    return in_blocks(exponential_block if exponential else block, (x,), size, dim=-1)


PATCH_SUMS = Sums(patch_matrix, patch_diagonal, patch_cross)


def _is_direct(average: OrbitAverage, x1: Tensor, x2: Tensor) -> bool:
    """Whether one product holds the distances: RBF, and no batches."""
    unbatched = x1.dim() == x2.dim() == 2 and not len(average.base.batch_shape)
    return unbatched and type(_pixel_kernel(average)) is RBFKernel


def _is_exponential(average: OrbitAverage) -> bool:
    """Whether k_g is one squared exponential of all columns of a patch."""
    base = average.base
    return not isinstance(base, PatchKernel) or type(base.location_kernel) is RBFKernel


def _pixel_kernel(average: OrbitAverage) -> Kernel:
    base = average.base
    return base.base_kernel if isinstance(base, PatchKernel) else base


def _column_lengthscale(average: OrbitAverage, like: Tensor) -> Tensor:
    """The lengthscale of each column of a patch, places last."""
    patches = average.augmentation
    parts = [_pixel_kernel(average).lengthscale[0].expand(patches.patch_width)]
    if patches.locations:
        parts.append(average.base.location_kernel.lengthscale[0].expand(2))
    return torch.cat(parts).to(like)


def _shift(x: Tensor) -> Tensor:
    # Distances do not change with a common shift, their rounding errors do.
    return x.detach().mean()


def _images(average: OrbitAverage, x: Tensor) -> int:
    """Images whose patches are formed at a time, where no value is kept."""
    return average.chunk_size or max(1, PATCH_ENTRIES // _pixels(average, 1))


def _pixels(average: OrbitAverage, num_images: int) -> int:
    """Numbers of the patches of images, their norms included."""
    patches = average.augmentation
    return num_images * patches.num_samples * (patches.output_width(0) + 1)


def _held(average: OrbitAverage) -> Held:
    """Numbers held for each value of k_g, which places multiply, and each pixel."""
    located = isinstance(average.base, PatchKernel)
    return Held(2.25, 2.25, 2.75, 2) if located else DIRECT._replace(points=2)


def _values(average: OrbitAverage, Z: Tensor, x: Tensor, aligned: int = 0) -> Tensor:
    """The base kernel between ``u`` patches and those of images, ``n x u x P``.

    The patches may be those of the first images; ``aligned`` says of how many.
    """
    patches = average.augmentation
    images = patches.images(x)
    Z, places = Z[:, : patches.patch_width], Z[:, patches.patch_width :]
    shift = _shift(images)
    scale = _pixel_kernel(average).lengthscale.reciprocal()  # 1 x (1 or d')
    Z = (Z - shift) * scale
    windows = functional.unfold(
        images - shift, patches.patch_shape, stride=patches.stride
    )
    windows = windows * scale.mT
    K = distance_exponents(Z, windows)
    if aligned:
        own = K[:aligned].unflatten(-2, (aligned, -1)).diagonal(dim1=0, dim2=1)
        with torch.no_grad():
            own.diagonal(dim1=0, dim2=1).zero_()
    K = exponentials(K)
    if patches.locations:
        location_kernel = average.base.location_kernel
        K = K * location_kernel(places, patches.places.to(x)).to_dense()
    return K
