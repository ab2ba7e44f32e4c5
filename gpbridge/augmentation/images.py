r"""Affine augmentations of images: turn, shift, scale and shear, by learnable amounts.

In: flat rows of pixels and the shape of the image. Out: warped images, flat again.
Next: ``orbits`` has exact transformations of pixels: flips and quarter turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gpbridge.augmentation.base import BoundedAugmentation
from gpbridge.augmentation.vectors import check_angle_cap
from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_number,
    check_sequence,
    sides_of,
)

GENERATORS = {
    "rotation": ((0, -1, 0), (1, 0, 0), (0, 0, 0)),
    "tx": ((0, 0, 1), (0, 0, 0), (0, 0, 0)),
    "ty": ((0, 0, 0), (0, 0, 1), (0, 0, 0)),
    "scale": ((1, 0, 0), (0, 1, 0), (0, 0, 0)),
    "xscale": ((1, 0, 0), (0, 0, 0), (0, 0, 0)),
    "yscale": ((0, 0, 0), (0, 1, 0), (0, 0, 0)),
    "shear": ((0, 1, 0), (1, 0, 0), (0, 0, 0)),
}
CAPS = dict.fromkeys(GENERATORS, 1.0) | {"rotation": math.pi}
SIX = ("rotation", "tx", "ty", "xscale", "yscale", "shear")


class AffineAugmentation2d(BoundedAugmentation):
    r"""Affine maps of images whose generators have uniform coefficients.

    .. math::
        T_a = \exp\Bigl(\sum_i u_{ai}\, b_i\, G_i\Bigr), \qquad
        u_a \in [-1, 1]^k.

    Rotations are in radians; translations in halves of the image's width or height;
    scales are logarithms of factors. Off-diagonal entries carry the ratio of the sides,
    so that an angle is an angle in images that are not square.

    Interpolation removes high frequencies, more for some angles than for others, which
    rewards wide laws: bilinear rotation leaves .91 of the norm at 15 degrees,
    bicubic .99. So a warp is no isometry. What leaves the frame is lost: ``padding``
    makes room first.

    Args:
        image_shape: Shape (channels, height, width), or (height, width) of one channel.
        generators: Names among ``rotation``, ``tx``, ``ty``, ``scale``, ``xscale``,
            ``yscale`` and ``shear``; default all but ``scale``, the sum of two others.
        num_samples: The number s of warps.
        init: Half-widths b at the start: one number, or by name of the generators
            above, default .05.
        caps: Upper limits by name; default pi for the rotation, 1 for others.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``, which has no
            gradient in b.
        padding_mode: What lies outside: ``"zeros"``, ``"border"``, ``"reflection"``.
        padding: Rows and columns of zeros to put around the images first. The orbits
            then have the shape ``output_shape``.
        sampling: As for :class:`~gpbridge.augmentation.Augmentation`.
        seed: As there.

    Raises:
        ShapeError: If ``image_shape`` is no shape of an image, or is not that of the
            inputs.
        TypeError: If ``init`` or ``caps`` are no numbers.
        ValueError: If a generator is unknown or named twice, if ``init`` or ``caps``
            name another one, or if a cap passes the period.

    Example:
        >>> augmentation = AffineAugmentation2d((8, 8), ["rotation"], num_samples=4)
        >>> augmentation(torch.zeros(5, 64)).shape
        torch.Size([5, 4, 64])

    References:
        Benton et al., Learning invariances in neural networks from training data,
        NeurIPS 2020, section 3.2 (generators and exponential map).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        generators: Sequence[str] = SIX,
        num_samples: int = 16,
        init: float | Mapping[str, float] = 0.05,
        caps: Mapping[str, float] | None = None,
        *,
        interpolation: str = "bicubic",
        padding_mode: str = "zeros",
        padding: int = 0,
        sampling: str = "auto",
        seed: int = 0,
    ) -> None:
        image_shape = full_image_shape(image_shape)
        names = _checked_names(generators)
        if not isinstance(caps, Mapping | None):
            raise TypeError(
                "caps must be upper limits by name, as {'rotation': 1.0}, but is "
                f"{caps!r}."
            )
        numbers = init if isinstance(init, Mapping) else {"of all": init}
        check_number(**{f"init {name}": value for name, value in numbers.items()})
        check_number(**{f"caps {name}": value for name, value in (caps or {}).items()})
        for word, given in (("init", init), ("caps", caps)):
            if isinstance(given, Mapping) and not set(given) <= set(names):
                raise ValueError(
                    f"{word} must name generators of this augmentation, {names}, but "
                    f"names {tuple(given)}. Add them to generators, or leave them out."
                )
        caps = CAPS | dict(caps or {})
        check_angle_cap(caps["rotation"])
        check_choice("interpolation", interpolation, ("bicubic", "bilinear", "nearest"))
        check_choice("padding_mode", padding_mode, ("zeros", "border", "reflection"))
        if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
            raise ValueError(f"padding must be a number of pixels, but is {padding!r}.")
        starts = [
            init.get(n, 0.05) if isinstance(init, Mapping) else init for n in names
        ]
        super().__init__(
            torch.tensor([caps[name] for name in names], dtype=torch.float64),
            torch.tensor(starts, dtype=torch.float64),
            num_samples,
            sampling,
            seed,
        )
        self.image_shape = image_shape
        self.generators = names
        self.interpolation = interpolation
        self.padding_mode = padding_mode
        self.padding = padding
        matrices = [GENERATORS[name] for name in names]
        basis = torch.tensor(matrices, dtype=torch.get_default_dtype())
        _, height, width = self.output_shape
        # The coordinates of a sampling grid run from -1 to 1 along both sides.
        basis[:, 0, 1] *= height / width
        basis[:, 1, 0] *= width / height
        self.register_buffer("basis", basis, persistent=False)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of an image of the orbit."""
        channels, height, width = self.image_shape
        return channels, height + 2 * self.padding, width + 2 * self.padding

    def output_width(self, width: int) -> int:
        """Pixels of an image of the orbit."""
        return math.prod(self.output_shape)

    def matrices(self, x: Tensor) -> Tensor:
        """Affine maps from the places of the orbit to those of x, ``s x 2 x 3``."""
        exponents = torch.tensordot(self.parameters_of(x), self.basis.to(x), 1)
        return torch.matrix_exp(exponents)[:, :2]

    def transform(self, x: Tensor) -> Tensor:
        """The warped images, flat."""
        check_image_rows(x, self.image_shape)
        images = x.reshape(-1, *self.image_shape[1:])  # images and channels in one axis
        if self.padding:
            images = functional.pad(images, 4 * [self.padding])
        channels, height, width = self.output_shape
        matrices = self.matrices(x)
        s = len(matrices)  # a bound that draws elements of the orbit may take fewer
        grid = functional.affine_grid(
            matrices, (s, 1, height, width), align_corners=False
        )
        # All images share the grids, so that they are channels of one image per grid.
        warped = functional.grid_sample(
            images.expand(s, *images.shape),
            grid,
            mode=self.interpolation,
            padding_mode=self.padding_mode,
            align_corners=False,
        )
        warped = warped.reshape(s, -1, channels * height * width)
        return warped.movedim(0, 1).reshape(*x.shape[:-1], s, -1)


def full_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) of a shape with or without channels.

    Raises:
        ShapeError: If it is anything else.
    """
    given, shape = image_shape, sides_of(image_shape)
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ShapeError(
            "image_shape must be (height, width) or (channels, height, width), but is "
            f"{given!r}. Rows of pixels do not say how they are laid out."
        )
    return shape


def check_image_rows(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Require rows that hold one image each."""
    if x.shape[-1] != math.prod(image_shape):
        raise ShapeError(
            f"Images of shape {image_shape} have {math.prod(image_shape)} columns, but "
            f"x has {x.shape[-1]} (shape {tuple(x.shape)}). Flatten the images, or "
            "pass their image_shape."
        )


def _checked_names(generators: Sequence[str]) -> tuple[str, ...]:
    names = [generators] if isinstance(generators, str) else generators
    check_sequence(generators=names)
    names = tuple(names)
    for name in names:
        check_choice("generators", name, tuple(GENERATORS))
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"generators must be different names, at least one, but are {names!r}."
        )
    return names
