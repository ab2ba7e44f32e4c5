r"""Augmentations of vectors: rotations of a plane, and Gaussian noise on the inputs.

In: points. Out: their orbits, with the law of differences of rotations, and the closed
form of noise on a squared exponential kernel. Next: ``images`` moves pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from gpytorch.constraints import Positive
from torch import Generator, Tensor, nn

from gpbridge.augmentation.base import (
    Augmentation,
    BoundedAugmentation,
    DifferenceLaw,
)
from gpbridge.checks import ShapeError, check_count, check_number, check_positive


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

    def __init__(
        self,
        num_samples: int = 16,
        init: float = 0.05 * math.pi,
        cap: float = math.pi,
        columns: Sequence[int] | None = None,
        sampling: str = "grid",
        seed: int = 0,
    ) -> None:
        check_number(init=init)
        check_angle_cap(cap)
        if columns is not None and not (
            isinstance(columns, Sequence)
            and len(columns) == len(set(columns)) == 2
            and all(type(c) is int and c >= 0 for c in columns)
        ):
            raise ValueError(
                "columns must be two different numbers of columns, counted from zero, "
                f"but is {columns!r}."
            )
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


class GaussianInputNoise(Augmentation):
    r"""Normal noise on the inputs, :math:`T_a x = x + \sqrt{v}\, \epsilon_a`.

    On a squared exponential kernel of lengthscale :math:`\ell` and variance s the
    average is again one, of lengthscale :math:`\ell'` with
    :math:`\ell'^2 = \ell^2 + 2 v` and of variance :math:`s\, (\ell / \ell')^d`: take
    that kernel instead. Elsewhere it is a local invariance, to small changes in any
    direction.

    Args:
        num_columns: The number d of input columns.
        num_samples: The number s of shifts.
        init: The variance v at the start.
        sampling: As for :class:`~gpbridge.augmentation.Augmentation`, or ``"gauss"``:
            the tensor product of Gauss-Hermite nodes, with their weights, for few
            columns. Then s must be a d-th power.
        seed: As there.

    Raises:
        ValueError: If s is no d-th power and the nodes are Gauss-Hermite's.

    Example:
        >>> noise = GaussianInputNoise(2, num_samples=9, sampling="gauss")
        >>> noise(torch.zeros(5, 2)).shape
        torch.Size([5, 9, 2])
    """

    def __init__(
        self,
        num_columns: int,
        num_samples: int = 16,
        init: float = 0.01,
        sampling: str = "auto",
        seed: int = 0,
    ) -> None:
        check_count(num_columns=num_columns)
        check_number(init=init)
        check_positive(init=init)
        gauss = sampling == "gauss"
        super().__init__(num_samples, num_columns, "qmc" if gauss else sampling, seed)
        dtype = torch.get_default_dtype()
        self.register_parameter(
            "raw_variance", nn.Parameter(torch.zeros((), dtype=dtype))
        )
        self.register_constraint("raw_variance", Positive())
        self.variance = init
        node_weights = None
        if gauss:
            self.sampling = sampling
            nodes, node_weights = _gauss_nodes(num_columns, num_samples)
            self.noise = nodes
        self.register_buffer("node_weights", node_weights)

    @property
    def variance(self) -> Tensor:
        """Variance v of the noise."""
        return self.raw_variance_constraint.transform(self.raw_variance)

    @variance.setter
    def variance(self, value: float | Tensor) -> None:
        raw = self.raw_variance
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        check_positive(variance=value)
        raw = self.raw_variance_constraint.inverse_transform(value)
        self.initialize(raw_variance=raw)

    @property
    def weights(self) -> Tensor | None:
        """The weights of Gauss-Hermite nodes times their number, or None."""
        return self.node_weights

    def transform(self, x: Tensor) -> Tensor:
        """The shifted points."""
        if x.shape[-1] != self.num_parameters:
            raise ShapeError(
                f"The noise has {self.num_parameters} columns, but x has "
                f"{x.shape[-1]} (shape {tuple(x.shape)})."
            )
        return x[..., None, :] + self.variance.to(x).sqrt() * self.noise.to(x)

    def _centred(self, points: Tensor) -> Tensor:
        return torch.special.ndtri(points.clamp(1e-9, 1 - 1e-9))

    def _redraw(self, generator: Generator | None) -> bool:
        return self.sampling != "gauss" and super()._redraw(generator)


def _gauss_nodes(num_columns: int, num_samples: int) -> tuple[Tensor, Tensor]:
    """Nodes ``s x d`` and weights ``s``, times s, for a standard normal."""
    q = round(num_samples ** (1 / num_columns))
    if q**num_columns != num_samples:
        raise ValueError(
            f"num_samples must be q**{num_columns} for Gauss-Hermite nodes in "
            f"{num_columns} columns, as {max(q, 2) ** num_columns}, but is "
            f"{num_samples}."
        )
    nodes, weights = np.polynomial.hermite_e.hermegauss(q)
    nodes = torch.from_numpy(nodes)
    weights = torch.from_numpy(weights / weights.sum())
    grid = torch.cartesian_prod(*[nodes] * num_columns).reshape(-1, num_columns)
    product = torch.cartesian_prod(*[weights] * num_columns).reshape(-1, num_columns)
    return grid, product.prod(-1) * num_samples


def check_angle_cap(cap: float) -> None:
    """Require a half-width of angles that does not pass half a turn."""
    check_number(cap=cap)
    check_positive(cap=cap)
    if cap > math.pi * (1 + 1e-12):
        raise ValueError(
            f"cap of a rotation must be at most pi = {math.pi:.6f}, but is {cap:.6g}. "
            "Angles on [-pi, pi] are all there are."
        )
