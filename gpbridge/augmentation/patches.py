r"""Patches of images as an orbit: what a convolution sees.

In: flat rows of pixels. Out: all patches of each image, with weights that can be
learnt, and with the place of each if asked. Next: ``kernels.convolutional``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpbridge.augmentation.base import Augmentation
from gpbridge.augmentation.images import check_image_rows, full_image_shape
from gpbridge.checks import ShapeError, check_count, is_whole


class PatchAugmentation(Augmentation):
    r"""All patches of an image, with weights.

    A function :math:`f(x) = \frac1P \sum_p w_p\, g(x^{[p]})` of an image is a weighted
    mean of one function g of its P patches.

    Args:
        image_shape: (channels, height, width), or (height, width) of one channel.
        patch_shape: (height, width) of a patch, or one number for both; it covers all
            channels.
        weights: Whether each place has a weight, learnt from one on. Without, all
            patches count alike, wherever they are.
        locations: Whether the row and the column of the patch, in pixels, are appended
            to its columns.
        stride: Pixels from one patch to the next.

    Raises:
        ShapeError: If the patch is larger than the image.

    Example:
        >>> patches = PatchAugmentation((8, 8), (3, 3), locations=True)
        >>> patches(torch.zeros(5, 64)).shape
        torch.Size([5, 36, 11])

    References:
        van der Wilk, Rasmussen and Hensman, Convolutional Gaussian processes, NeurIPS
        2017, section 4 and eq. (15).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        patch_shape: int | Sequence[int],
        weights: bool = True,
        locations: bool = False,
        stride: int = 1,
    ) -> None:
        image_shape = full_image_shape(image_shape)
        given, sides = patch_shape, image_shape[1:]
        if is_whole(patch_shape):
            patch_shape = patch_shape, patch_shape  # as torch's kernel_size
        patch_shape = tuple(patch_shape) if isinstance(patch_shape, Sequence) else ()
        whole = all(map(is_whole, patch_shape))
        patch_shape = tuple(map(int, patch_shape)) if whole else ()
        if len(patch_shape) != 2 or not all(
            1 <= side <= limit for side, limit in zip(patch_shape, sides, strict=True)
        ):
            raise ShapeError(
                "patch_shape must be (height, width), or one number for both, within "
                f"the image, whose sides are {sides}, but is {given!r}."
            )
        check_count(stride=stride)
        rows, columns = (
            torch.arange(0, limit - side + 1, stride)
            for side, limit in zip(patch_shape, sides, strict=True)
        )
        super().__init__(len(rows) * len(columns))
        self.image_shape = image_shape
        self.patch_shape = patch_shape
        self.patch_width = image_shape[0] * patch_shape[0] * patch_shape[1]
        self.stride = stride
        self.locations = locations
        self.orbit_size = self.num_samples
        dtype = torch.get_default_dtype()
        places = torch.cartesian_prod(rows, columns).reshape(-1, 2).to(dtype)
        self.register_buffer("places", places, persistent=False)
        ones = torch.ones(self.num_samples, dtype=dtype)
        self.patch_weights = nn.Parameter(ones) if weights else None

    @property
    def weights(self) -> Tensor | None:
        """The weight of each patch, row after row of the image."""
        return self.patch_weights

    def output_width(self, width: int) -> int:
        """Columns of a patch, its place included."""
        return self.patch_width + 2 * self.locations

    def images(self, x: Tensor) -> Tensor:
        """Flat rows ``... x n x d`` as one batch of images."""
        check_image_rows(x, self.image_shape)
        return x.reshape(-1, *self.image_shape)

    def transform(self, x: Tensor) -> Tensor:
        """The patches, each flat, channel after channel."""
        patches = functional.unfold(
            self.images(x), self.patch_shape, stride=self.stride
        )
        patches = patches.mT.reshape(*x.shape[:-1], self.num_samples, -1)
        if not self.locations:
            return patches
        places = self.places.to(x).expand(*patches.shape[:-1], 2)
        return torch.cat([patches, places], -1)
