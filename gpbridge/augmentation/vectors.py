r"""Augmentations of vectors: rotations of a plane, and Gaussian noise on the inputs.

In: points. Out: their orbits, with the law of differences of rotations, and the closed
form of noise on a squared exponential kernel. Next: ``images`` moves pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpbridge.augmentation.base import BoundedAugmentation, DifferenceLaw
from gpbridge.checks import ShapeError, check_positive


class Rotation2d(BoundedAugmentation):
    r"""Rotations of a plane about the origin by angles uniform on [-b, b].

    .. math:: T_a x = R(b u_a)\, x, \qquad u_a \in [-1, 1].

    On a grid of s angles the differences of two of them take only 2 s - 1 values, so
    that with an isotropic kernel the double average costs 2 s - 1 evaluations per pair
    instead of s², with the same result (``difference_law``).

    Args:
        num_samples: The number s of angles.
        init: Half-width b at the start, in radians.
        cap: Its upper limit, at most pi: wider laws cover the circle twice, and have
            further optima.
        columns: The two columns to rotate; default both of two. Others stay.
        sampling: As for :class:`~gpbridge.augmentation.Augmentation`.
        seed: As there.

    Raises:
        ValueError: If ``cap`` exceeds pi.

    Example:
        >>> Rotation2d(num_samples=8)(torch.zeros(5, 2)).shape
        torch.Size([5, 8, 2])
    """

    is_isometry = True

    def __init__(
        self,
        num_samples: int = 16,
        init: float = 0.05 * math.pi,
        cap: float = math.pi,
        columns: Sequence[int] | None = None,
        sampling: str = "grid",
        seed: int = 0,
    ) -> None:
        check_angle_cap(cap)
        if columns is not None and len(set(columns)) != 2:
            raise ValueError(f"columns must be two different ones, but is {columns!r}.")
        limits = torch.tensor([cap, init], dtype=torch.float64)
        super().__init__(limits[:1], limits[1:], num_samples, sampling, seed)
        self.columns = None if columns is None else tuple(columns)

    def transform(self, x: Tensor) -> Tensor:
        """The rotated points."""
        return self._rotate(x, self.parameters_of(x)[:, 0])

    def difference_law(self) -> DifferenceLaw | None:
        """Differences of a grid's angles, triangular; None without a grid."""
        if self.sampling != "grid":
            return None
        s = self.num_samples
        steps = torch.arange(1 - s, s, device=self.noise.device)
        weights = (s - steps.abs()).double() / s**2

        def orbit(x: Tensor) -> Tensor:
            return self._rotate(x, steps.to(x) * (2 / s) * self.bound.to(x))

        return DifferenceLaw(orbit, weights)

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        columns = (0, 1) if self.columns is None else self.columns
        width = x.shape[-1]
        if (self.columns is None and width != 2) or max(columns) >= width:
            needed = "two columns" if self.columns is None else f"columns {columns}"
            raise ShapeError(
                f"Rotation2d needs {needed}, but x has {width} (shape "
                f"{tuple(x.shape)}). Choose two columns with columns=."
            )
        first, second = (x[..., c, None] for c in columns)  # ... x n x 1
        cos, sin = angles.cos(), angles.sin()
        rotated = {
            columns[0]: cos * first - sin * second,
            columns[1]: sin * first + cos * second,
        }
        still = first.expand(rotated[columns[0]].shape)
        parts = [
            rotated[c] if c in rotated else x[..., c, None].expand_as(still)
            for c in range(width)
        ]
        return torch.stack(parts, -1)


def check_angle_cap(cap: float) -> None:
    """Require a half-width of angles that does not pass half a turn."""
    check_positive(cap=cap)
    if cap > math.pi * (1 + 1e-12):
        raise ValueError(
            f"cap of a rotation must be at most pi = {math.pi:.6f}, but is {cap:.6g}. "
            "Angles on [-pi, pi] are all there are."
        )
