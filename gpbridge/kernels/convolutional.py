r"""Convolutional kernels: one function of patches, added over an image.

In: a kernel of patches and the shapes of images and patches. Out: an invariant kernel
whose orbit are the patches, taken from some images at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpytorch.kernels import Kernel, RBFKernel
from torch import Tensor
from torch.nn import functional

from gpbridge.augmentation.base import DifferenceLaw
from gpbridge.augmentation.patches import PatchAugmentation
from gpbridge.kernels.compositions import register_with_botorch
from gpbridge.kernels.invariant import InvariantKernel
from gpbridge.kernels.orbit_blocks import (
    exponential_of_distances,
    in_blocks,
    symmetric_in_blocks,
)
from gpbridge.kernels.orbit_exponentials import orbit_cross, orbit_variance

_PATCH_ENTRIES = 2**25  # pixels of patches at a time, where no value is kept


class PatchKernel(Kernel):
    r"""A kernel of patches times a kernel of their places.

    .. math::
        k_g\bigl((z, p), (z', p')\bigr) = k_0(z, z')\, k_\ell(p, p')

    Args:
        base_kernel: The kernel k_0 of the first columns.
        location_kernel: The kernel k_l of the last two, row and column in pixels.

    Example:
        >>> kernel = PatchKernel(RBFKernel(), RBFKernel())
        >>> kernel(torch.zeros(5, 11)).shape
        torch.Size([5, 5])
    """

    has_lengthscale = False

    def __init__(self, base_kernel: Kernel, location_kernel: Kernel, **kwargs) -> None:
        super().__init__(**kwargs)
        self.base_kernel = base_kernel
        self.location_kernel = location_kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> Tensor:
        """Covariance of all pairs, or of pairs of the same row if ``diag``."""
        patches = self.base_kernel(x1[..., :-2], x2[..., :-2], diag=diag, **params)
        places = self.location_kernel(x1[..., -2:], x2[..., -2:], diag=diag, **params)
        if diag:
            return patches * places
        return patches.to_dense() * places.to_dense()

    def named_sub_kernels(self):
        """The two kernels: what lies inside them is their own business."""
        yield "base_kernel", self.base_kernel
        yield "location_kernel", self.location_kernel

    def __getitem__(self, index) -> PatchKernel:
        chosen = super().__getitem__(index)
        if chosen is not self:
            # Upstream never shortens the batch shape of a kernel without parameters.
            chosen.batch_shape = torch.broadcast_shapes(
                chosen.base_kernel.batch_shape, chosen.location_kernel.batch_shape
            )
        return chosen


class ConvolutionalKernel(InvariantKernel):
    r"""Covariance of a weighted mean of one function over the patches of an image.

    .. math::
        f(x) = \frac1P \sum_p w_p\, g\bigl(x^{[p]}\bigr), \qquad
        k(x, x') = \frac{1}{P^2} \sum_{p, p'} w_p w_{p'}\,
        k_g\bigl(x^{[p]}, x'^{[p']}\bigr).

    What g learns of a patch holds at all places; the weights, learnt, say which places
    matter. With a location kernel g may vary smoothly over the image.

    A matrix of n and n' images takes n n' P² evaluations of the base kernel. For more
    than some hundred images take inducing patches, g at ``u x d'`` patches, whose
    covariance is ``base_kernel(Z)`` and whose cross covariance ``base_cross(Z, x)``
    takes u n P evaluations.

    For a base kernel ``RBFKernel``, with or without ARD, a block of images is one
    product of patches and one pass of the exponential; the patches of other images are
    not formed meanwhile. A convolution gives the same inner products in twice the time
    of the product.

    Args:
        base_kernel: The kernel of flat patches, ``channels * height * width`` columns.
        image_shape: (channels, height, width), or (height, width) of one channel.
        patch_shape: (height, width) of a patch.
        weights: Whether each place has a weight, learnt from one on.
        location_kernel: A kernel of places, row and column in pixels, that multiplies
            the base kernel. Inducing patches then carry their place in two more
            columns. Start its lengthscale at the size of the image.
        stride: Pixels from one patch to the next.
        chunk_size: As for :class:`InvariantKernel`.
        memory_budget: As there.
        **kwargs: ``active_dims``, as for any gpytorch kernel.

    Raises:
        ShapeError: If the patch is larger than the image.
        ValueError: If a kernel of patches or places selects columns itself.

    Example:
        >>> kernel = ConvolutionalKernel(RBFKernel(), (6, 6), (3, 3))
        >>> images = torch.zeros(4, 36)
        >>> kernel(images).shape, kernel.base_cross(torch.zeros(2, 9), images).shape
        (torch.Size([4, 4]), torch.Size([2, 4]))

    References:
        van der Wilk, Rasmussen and Hensman, Convolutional Gaussian processes, NeurIPS
        2017, eqs. (15) to (17). Dutordoir, van der Wilk, Artemev and Hensman, Bayesian
        image classification with deep convolutional Gaussian processes, AISTATS 2020
        (locations).
    """

    def __init__(
        self,
        base_kernel: Kernel,
        image_shape: Sequence[int],
        patch_shape: Sequence[int],
        weights: bool = True,
        location_kernel: Kernel | None = None,
        *,
        stride: int = 1,
        chunk_size: int | None = None,
        memory_budget: float = 4 * 2**30,
        **kwargs,
    ) -> None:
        patches = PatchAugmentation(
            image_shape, patch_shape, weights, location_kernel is not None, stride
        )
        for name, part in (("base", base_kernel), ("location", location_kernel)):
            if getattr(part, "active_dims", None) is not None:
                raise ValueError(
                    f"{name}_kernel must see all its columns, but has active_dims "
                    f"{part.active_dims.tolist()}. Leave them unset."
                )
        if location_kernel is not None:
            base_kernel = PatchKernel(base_kernel, location_kernel)
        super().__init__(
            base_kernel,
            patches,
            chunk_size=chunk_size,
            memory_budget=memory_budget,
            **kwargs,
        )

    def base_cross(self, Z: Tensor, x: Tensor) -> Tensor:
        """Cross covariance of g at patches and f at images, ``u x n``.

        Args:
            Z: Patches ``... x u x d'``, with their places if there is a location
                kernel.
            x: Images ``... x n x d``.

        Returns:
            The covariance, ``... x u x n``.

        Raises:
            ShapeError: If the patches have another size.
        """
        if not self._is_direct(Z, x):
            return super().base_cross(Z, x)
        x = self._select(x)
        self._check_inducing(Z, x)
        u, P = len(Z), self.augmentation.num_samples
        self._check_memory(x.shape[:-2], (u, len(x)), (1, P), 1, x)
        weights = self.augmentation.coefficients(x)

        def block(images: Tensor) -> Tensor:
            return (self._patch_matrix(Z, images) @ weights).mT

        def exponential_block(images: Tensor) -> Tensor:
            lengthscale, shift = self._column_lengthscale(x), self._shift(x)
            orbits = (self.augmentation(images) - shift) / lengthscale
            return orbit_cross((Z - shift) / lengthscale, orbits, weights)

        if self._is_exponential():
            size = self.chunk_size or max(1, _PATCH_ENTRIES // (P * Z.shape[-1]))
            return in_blocks(exponential_block, (x,), size, dim=-1)
        size, _ = self._block(P, u, x)
        return in_blocks(block, (x,), size, dim=-1)

    def _diagonal(
        self, x1: Tensor, x2: Tensor, same: bool, law: DifferenceLaw | None
    ) -> Tensor:
        if not (same and self._is_direct(x1, x2) and self._is_exponential()):
            return super()._diagonal(x1, x2, same, law)
        weights = self.augmentation.coefficients(x1)

        def block(images: Tensor) -> Tensor:
            orbits = self.augmentation(images) - self._shift(x1)
            return orbit_variance(orbits / self._column_lengthscale(x1), weights)

        P = self.augmentation.num_samples
        width = self.augmentation.output_width(x1.shape[-1])
        size = self.chunk_size or max(1, _PATCH_ENTRIES // (P * width))
        return in_blocks(block, (x1,), size, dim=-1)

    def _matrix(
        self, x1: Tensor, x2: Tensor, same: bool, law: DifferenceLaw | None
    ) -> Tensor:
        if not self._is_direct(x1, x2):
            return super()._matrix(x1, x2, same, law)
        patches, P = self.augmentation, self.augmentation.num_samples
        self._check_memory(x1.shape[:-2], (len(x1), len(x2)), (P, P), 1, x1)
        weights = patches.coefficients(x1)

        size, across = self._block(P * P, len(x2), x1)

        def block(images: Tensor, others: Tensor) -> Tensor:
            filters = patches(images).flatten(0, 1)
            K = self._patch_matrix(filters, others) @ weights  # n' x (b P)
            return (K.unflatten(-1, (len(images), P)) @ weights).mT

        if same and across >= len(x2) > 0:
            return symmetric_in_blocks(
                lambda start, stop: block(x1[start:stop], x1[start:]), len(x1), size, 1
            )

        def against(part: Tensor) -> Tensor:
            return in_blocks(lambda images: block(images, part), (x1,), size, dim=-2)

        return torch.cat([against(part) for part in x2.split(across)], -1)

    def _is_direct(self, x1: Tensor, x2: Tensor) -> bool:
        """Whether one product holds the distances: RBF, and no batches."""
        unbatched = x1.dim() == x2.dim() == 2 and not len(self.batch_shape)
        return unbatched and type(self._pixel_kernel()) is RBFKernel

    def _is_exponential(self) -> bool:
        """Whether k_g is one squared exponential of all columns of a patch."""
        located = isinstance(self.base_kernel, PatchKernel)
        return not located or type(self.base_kernel.location_kernel) is RBFKernel

    def _column_lengthscale(self, like: Tensor) -> Tensor:
        """The lengthscale of each column of a patch, places last."""
        patches = self.augmentation
        parts = [self._pixel_kernel().lengthscale[0].expand(patches.patch_width)]
        if patches.locations:
            parts.append(self.base_kernel.location_kernel.lengthscale[0].expand(2))
        return torch.cat(parts).to(like)

    def _shift(self, x: Tensor) -> Tensor:
        # Distances do not change with a common shift, their rounding errors do.
        return x.detach().mean()

    def _pixel_kernel(self) -> Kernel:
        located = isinstance(self.base_kernel, PatchKernel)
        return self.base_kernel.base_kernel if located else self.base_kernel

    def _patch_matrix(self, Z: Tensor, x: Tensor) -> Tensor:
        """The base kernel between ``u`` patches and those of images, ``n x u x P``."""
        patches = self.augmentation
        images = patches.images(x)
        Z, places = Z[:, : patches.patch_width], Z[:, patches.patch_width :]
        # Distances do not change with a common shift, their rounding errors do.
        shift = images.detach().mean()
        scale = self._pixel_kernel().lengthscale.reciprocal()  # 1 x (1 or d')
        Z = (Z - shift) * scale
        windows = functional.unfold(
            images - shift, patches.patch_shape, stride=patches.stride
        )
        windows = windows * scale.mT
        K = exponential_of_distances(Z, windows)
        if patches.locations:
            location_kernel = self.base_kernel.location_kernel
            K = K * location_kernel(places, patches.places.to(x)).to_dense()
        return K


register_with_botorch(ConvolutionalKernel)
