r"""Convolutional kernels: one function of patches, added over an image.

In: a kernel of patches and the shapes of images and patches. Out: a kernel of images
whose orbit are the patches, taken from some images at a time. Next: any GP; inducing
patches in ``inducing_strategy``.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpytorch.kernels import Kernel

from gpbridge.augmentation.patches import PatchAugmentation
from gpbridge.checks import check_kind
from gpbridge.kernels.compositions import register_with_botorch
from gpbridge.kernels.orbit_kernel import OrbitKernel
from gpbridge.kernels.patch_kernel import PatchKernel
from gpbridge.kernels.patch_sums import PATCH_SUMS


class ConvolutionalKernel(OrbitKernel):
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
    of the product. Its diagonal and ``base_cross`` have first derivatives only; take
    them from the matrix for second ones.

    Args:
        base_kernel: The kernel of flat patches, ``channels * height * width`` columns.
        image_shape: (channels, height, width), or (height, width) of one channel.
        patch_shape: (height, width) of a patch, or one number for both.
        weights: Whether each place has a weight, learnt from one on.
        location_kernel: A kernel of places, row and column in pixels, that multiplies
            the base kernel. Inducing patches then carry their place in two more
            columns. Start its lengthscale at the size of the image.
        stride: Pixels from one patch to the next.
        chunk_size: As for :class:`~gpbridge.kernels.InvariantKernel`.
        memory_budget: As there.
        **kwargs: ``active_dims``, as for any gpytorch kernel.

    Raises:
        ShapeError: If the patch is larger than the image.
        TypeError: If a kernel is none.
        ValueError: If a kernel of patches or places selects columns itself.

    Example:
        >>> import torch
        >>> from gpytorch.kernels import RBFKernel
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

    sums = PATCH_SUMS

    def __init__(
        self,
        base_kernel: Kernel,
        image_shape: Sequence[int],
        patch_shape: int | Sequence[int],
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
        if location_kernel is not None:
            check_kind(Kernel, location_kernel=location_kernel)
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


register_with_botorch(ConvolutionalKernel)
