r"""Finite orbits, averaged exactly: flips, quarter turns, permutations of columns.

In: permutations of the input columns, or functions. Out: all images of each input.
Next: ``patches`` takes parts of images instead of moving them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from gpbridge.augmentation.base import Augmentation, DifferenceLaw
from gpbridge.augmentation.images import full_image_shape
from gpbridge.checks import ShapeError, check_choice, check_count, check_sequence
from gpbridge.randomness import fresh

MAX_ELEMENTS = 5040  # all orders of seven columns
TABLE_ENTRIES = 2**24  # of the products that show whether elements form a group

Elements = Tensor | Sequence[Sequence[int]] | Sequence[Callable[[Tensor], Tensor]]


class FiniteOrbit(Augmentation):
    r"""All of a finite set of transformations, or some of them.

    Averaged over a finite group, a kernel is invariant exactly. For a group of
    permutations and an isotropic kernel one of the two averages is enough:
    :math:`k(T_a x, T_{a'} x') = k(x, T_a^{-1} T_{a'} x')`, and the product runs
    through the group (``difference_law``).

    Args:
        elements: Permutations, ``s x d`` indices with :math:`(T_a x)_i = x_{a_i}`; or
            functions from ``... x d`` to ``... x d'`` that treat each row alone, of one
            number d' of columns.
        num_samples: Take so many of them, drawn without replacement; default all.
        seed: Of that draw, at construction.

    Raises:
        ShapeError: If rows are no permutations, or inputs have another width.
        TypeError: If elements are no sequence.
        ValueError: If there is no element, or there are fewer than ``num_samples``.

    Example:
        >>> FiniteOrbit.quarter_turns((8, 8))(torch.zeros(5, 64)).shape
        torch.Size([5, 4, 64])
        >>> FiniteOrbit.permutations(3)(torch.zeros(5, 3)).shape
        torch.Size([5, 6, 3])
    """

    def __init__(
        self, elements: Elements, num_samples: int | None = None, seed: int = 0
    ) -> None:
        index, functions = None, None
        check_sequence(elements=elements)
        if not isinstance(elements, Tensor) and any(callable(e) for e in elements):
            functions = list(elements)
            size = len(functions)
        else:
            index = _checked_permutations(elements)
            size = len(index)
        num_samples = size if num_samples is None else num_samples
        check_count(num_samples=num_samples)
        if num_samples > size:
            raise ValueError(
                f"num_samples must be at most {size}, the number of elements, but is "
                f"{num_samples}."
            )
        super().__init__(num_samples)
        self.orbit_size = size
        self.functions = functions
        self.register_buffer("index", index)
        self.register_buffer("chosen", torch.arange(num_samples))
        if num_samples < size:
            self.chosen = self._choose(Generator().manual_seed(seed))
        self._widths: dict[int, int] = {}  # of what the functions return, by d
        self.is_group = index is not None and _closed(index)

    @classmethod
    def flips(
        cls, image_shape: Sequence[int], axes: str = "horizontal", **options
    ) -> FiniteOrbit:
        """An image and its mirror images.

        Args:
            image_shape: (channels, height, width), or (height, width).
            axes: ``"horizontal"`` (left and right change places), ``"vertical"``, or
                ``"both"``, which makes four images.
            **options: As for the class.
        """
        check_choice("axes", axes, ("horizontal", "vertical", "both"))
        pixels = _pixels(image_shape)
        images = [pixels]
        if axes in ("horizontal", "both"):
            images += [image.flip(-1) for image in images]
        if axes in ("vertical", "both"):
            images += [image.flip(-2) for image in images]
        return cls(torch.stack([image.flatten() for image in images]), **options)

    @classmethod
    def quarter_turns(
        cls, image_shape: Sequence[int], flips: bool = False, **options
    ) -> FiniteOrbit:
        """An image in its four orientations.

        Args:
            image_shape: (channels, side, side), or (side, side).
            flips: Whether mirror images belong to the orbit, eight images then.
            **options: As for the class.

        Raises:
            ShapeError: If the image is not square.
        """
        pixels = _pixels(image_shape)
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ShapeError(
                f"Quarter turns need square images, but image_shape is "
                f"{tuple(pixels.shape)}: a turned image would have another shape. Pad "
                "the images to a square first, or use flips."
            )
        images = [pixels, pixels.flip(-1)] if flips else [pixels]
        turned = [image.rot90(k, (-2, -1)) for image in images for k in range(4)]
        return cls(torch.stack([image.flatten() for image in turned]), **options)

    @classmethod
    def permutations(
        cls, num_blocks: int, block_size: int = 1, **options
    ) -> FiniteOrbit:
        """All orders of the columns, or of blocks of columns that belong together.

        Args:
            num_blocks: The number b of blocks; the orbit has b! elements.
            block_size: Columns of each block.
            **options: As for the class.

        Raises:
            ValueError: If there are more than 5040 orders.
        """
        check_count(num_blocks=num_blocks, block_size=block_size)
        if math.factorial(num_blocks) > MAX_ELEMENTS:
            raise ValueError(
                f"{num_blocks} blocks have {math.factorial(num_blocks)} orders, more "
                f"than {MAX_ELEMENTS}. Pass some of them as elements, or sort the "
                "columns of the inputs."
            )
        orders = torch.tensor(list(itertools.permutations(range(num_blocks))))
        columns = torch.arange(num_blocks * block_size).reshape(num_blocks, block_size)
        return cls(columns[orders].flatten(1), **options)

    def transform(self, x: Tensor) -> Tensor:
        """All images of the inputs."""
        if self.functions is not None:
            # A few dozen at most, so that reading the choice costs nothing.
            chosen = [self.functions[a] for a in self.chosen.tolist()]
            return torch.stack([function(x) for function in chosen], -2)
        if x.shape[-1] != self.index.shape[-1]:
            raise ShapeError(
                f"The permutations are of {self.index.shape[-1]} columns, but x has "
                f"{x.shape[-1]} (shape {tuple(x.shape)})."
            )
        return x[..., self.index[self.chosen]]

    def output_width(self, width: int) -> int:
        """The number d' of columns that the elements make of d."""
        if self.functions is None:
            return width
        if width not in self._widths:
            self._widths[width] = self._measured_width(width)
        return self._widths[width]

    def _measured_width(self, width: int) -> int:
        # Tensors that a function holds decide what it takes, and nothing tells which.
        zeros = torch.zeros(1, width, dtype=torch.float64, device=self.noise.device)
        with torch.no_grad():
            try:
                return self.functions[0](zeros).shape[-1]
            except RuntimeError:
                return self.functions[0](zeros.float()).shape[-1]

    def difference_law(self) -> DifferenceLaw | None:
        """Uniform on the group; None if the elements are not known to be one."""
        if not self.is_group or self.num_samples < self.orbit_size:
            return None
        s = self.num_samples
        weights = torch.full((s,), 1 / s, dtype=torch.float64, device=self.noise.device)
        return DifferenceLaw(self.transform, weights)

    def _redraw(self, generator: Generator | None) -> bool:
        if self.num_samples == self.orbit_size:
            return False
        self.chosen = self._choose(fresh(generator))
        return True

    def _choose(self, generator: Generator) -> Tensor:
        device = generator.device
        order = torch.randperm(self.orbit_size, generator=generator, device=device)
        return order[: self.num_samples].to(self.chosen.device)


def _pixels(image_shape: Sequence[int]) -> Tensor:
    """The column of each pixel, as an image."""
    shape = full_image_shape(image_shape)
    return torch.arange(math.prod(shape)).reshape(shape)


def _checked_permutations(elements: Tensor | Sequence[Sequence[int]]) -> Tensor:
    try:
        index = torch.as_tensor(elements)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            "elements must be ``s x d`` whole numbers, rows of one length, or "
            f"functions, but are {elements!r}."
        ) from error
    if index.numel() == 0:
        raise ValueError("elements must hold at least one transformation.")
    sides = index.dim() == 2 and not index.is_floating_point()
    columns = torch.arange(index.shape[-1], device=index.device)
    if not sides or not bool((index.sort(-1).values == columns).all()):
        raise ShapeError(
            "elements must be ``s x d`` whole numbers, each row an order of 0 .. d - 1 "
            f"(or functions), but have shape {tuple(index.shape)} and dtype "
            f"{index.dtype}, or a row that is no permutation."
        )
    return index.long()


def _closed(index: Tensor) -> bool:
    """Whether the products of any two permutations are among them."""
    s, d = index.shape
    if s * s * d > TABLE_ENTRIES:
        return False  # not known
    products = index[:, index].flatten(0, 1)
    return len(torch.cat([index, products]).unique(dim=0)) == s
