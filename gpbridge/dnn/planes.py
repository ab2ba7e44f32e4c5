r"""Planes through the space of weights, and the loss on them.

In: three weight vectors, or the iterates of a run. Out: a plane that turns weights into
two coordinates and back, and the mean loss on a grid of it. Next: ``plots`` draws it.

References:
    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity,
    and fast ensembling of DNNs, NeurIPS 2018, supplement. Li, Xu, Taylor, Studer,
    Goldstein, Visualizing the loss landscape of neural nets, NeurIPS 2018, section 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor, nn

from gpbridge.checks import (
    ShapeError,
    check_count,
    check_finite,
    check_tensor,
)
from gpbridge.dnn.loss_surface import losses_at
from gpbridge.functional import FunctionalNet


class WeightPlane(nn.Module):
    r"""The weights :math:`w(x, y) = o + x u + y v` with orthonormal u and v.

    Distances in the plane are those between weights. Memory 3 p.

    Args:
        net: The network as a function of its weights.
        origin: o, ``p``.
        axes: u and v, ``2 x p``, orthonormal.
        points: Coordinates to remember, ``k x 2``, around which a grid is laid.
        explained: Shares of the variance of a run along the axes, ``2``, if known.
    """

    def __init__(
        self,
        net: FunctionalNet,
        origin: Tensor,
        axes: Tensor,
        points: Tensor,
        explained: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("origin", origin.detach())
        self.register_buffer("axes", axes.detach())
        self.register_buffer("points", points.detach())
        self.register_buffer("explained", explained)

    def weights(self, coordinates: Tensor) -> Tensor:
        """Weights ``... x p`` at coordinates ``... x 2``."""
        return self.origin + coordinates.to(self.axes) @ self.axes

    def coordinates(self, weights: Tensor) -> Tensor:
        """Coordinates ``... x 2`` of the nearest points to weights ``... x p``."""
        return (weights.detach().to(self.origin) - self.origin) @ self.axes.mT


class LossPlane(NamedTuple):
    """The loss on a grid of a plane.

    ``x`` and ``y`` are the coordinates of its columns and rows, ``loss`` the mean
    losses, ``len(y) x len(x)``, ``error`` the shares of wrong labels (None for
    regression), ``points`` the coordinates that the plane remembers, ``k x 2``.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    error: Tensor | None
    points: Tensor


def plane_through(net: FunctionalNet, weights: Tensor) -> WeightPlane:
    """The plane through three weights.

    The first is the origin, the second lies on the horizontal axis: for a curve pass
    ``curve.control_points[[0, 2, 1]]``, and its ends are level.

    Args:
        net: The network.
        weights: ``3 x p``.

    Returns:
        The plane; it remembers the three points.

    Raises:
        ShapeError: If there are not three weights of the network.
        ValueError: If they lie on one line.

    Example:
        >>> net = FunctionalNet(nn.Linear(2, 1))
        >>> corners = torch.tensor([[0.0, 0, 0], [2, 0, 0], [1, 1, 0]])
        >>> plane_through(net, corners).points.tolist()
        [[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]
    """
    _check_rows(net, weights)
    if len(weights) != 3:
        raise ShapeError(
            f"weights must be 3 x {net.num_params}, since three points span a plane, "
            f"but have shape {tuple(weights.shape)}. For more see principal_plane."
        )
    corners = weights.detach().double()
    u, v = corners[1] - corners[0], corners[2] - corners[0]
    scale = torch.maximum(u.norm(), v.norm())
    u_norm = u.norm()
    u = u / u_norm
    v = v - (v @ u) * u
    v = v - (v @ u) * u  # again, since the first one cancels
    if not (bool(u_norm > 1e-6 * scale) and bool(v.norm() > 1e-6 * scale)):
        raise ValueError(
            "The three weights lie on one line, so they span no plane. Bend the curve, "
            "or take another point."
        )
    axes = torch.stack([u, v / v.norm()])
    points = (corners - corners[0]) @ axes.mT
    points[0], points[1, 1] = 0.0, 0.0  # but for rounding
    return WeightPlane(
        net, corners[0].to(weights), axes.to(weights), points.to(weights)
    )


def principal_plane(net: FunctionalNet, weights: Tensor) -> WeightPlane:
    """The plane of largest variance of the iterates of a run, about their mean.

    Its axes point to where the run ends. Costs s^2 p.

    Args:
        net: The network.
        weights: Iterates in their order, ``s x p``, at least three.

    Returns:
        The plane; it remembers the iterates as they are seen in it, and how much of
        their variance lies along each axis.

    Raises:
        ShapeError: If there are fewer than three weights of the network.
        ValueError: If they lie on one line.
    """
    _check_rows(net, weights)
    if len(weights) < 3:
        raise ShapeError(
            f"weights must have at least three rows to span a plane, but have shape "
            f"{tuple(weights.shape)}. Collect more iterates."
        )
    iterates = weights.detach().double()
    mean = iterates.mean(0)
    deviations = iterates - mean
    _, singular, axes = torch.linalg.svd(deviations, full_matrices=False)
    if len(singular) < 2 or not bool(singular[1] > 1e-6 * singular[0]):
        raise ValueError(
            "The weights lie on one line, so they span no plane. Collect iterates of "
            "more than one step."
        )
    axes = axes[:2]
    signs = torch.where(axes @ deviations[-1] < 0, -1.0, 1.0).to(axes)
    axes = signs[:, None] * axes
    variances = singular.square()
    return WeightPlane(
        net,
        mean.to(weights),
        axes.to(weights),
        (deviations @ axes.mT).to(weights),
        (variances[:2] / variances.sum()).to(weights),
    )


def loss_plane(
    plane: WeightPlane,
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood | None = None,
    *,
    size: int = 21,
    margin: float = 0.2,
    batches: Iterable[Tensor] | None = None,
    chunk_size: int = 21,
    row_chunk_size: int = 500,
    progress: bool = True,
) -> LossPlane:
    """Mean losses on a grid around the points that a plane remembers.

    Costs ``size^2`` passes over the data, and as many over the batches, ``chunk_size``
    of them at once.

    Args:
        plane: The plane.
        X: Inputs ``n x d``, or ``n x input_shape``.
        Y: Targets as for :func:`~gpbridge.dnn.fit_map`.
        likelihood: Picks the loss, as for :func:`~gpbridge.dnn.fit_curve`.
        size: Points along each side.
        margin: Room around the points, as a share of their larger extent.
        batches: Training inputs from which batch norm takes its statistics anew at each
            point; needed if there are any.
        chunk_size: Points evaluated at once.
        row_chunk_size: Rows evaluated at once.
        progress: Whether to show a bar, if there is a terminal.

    Returns:
        The losses.

    Raises:
        ValueError: If the margin is negative, or the network has batch norm and there
            are no batches.
    """
    check_count(size=size, chunk_size=chunk_size)
    if size < 2 or not margin >= 0:
        raise ValueError(
            "A grid needs a size of at least 2 and a margin of at least 0, but they "
            f"are {size} and {margin}."
        )
    low, high = plane.points.amin(0), plane.points.amax(0)
    room = margin * (high - low).amax()  # the same all around: units are equal
    low, high = low - room, high + room
    shares = torch.linspace(0, 1, size, dtype=torch.float64).to(low)
    x, y = (low + shares[:, None] * (high - low)).unbind(-1)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    grid = torch.stack([columns, rows], -1).reshape(-1, 2)
    chunks = (plane.weights(part) for part in grid.split(chunk_size))
    loss, error = losses_at(
        plane.net,
        chunks,
        X,
        Y,
        likelihood,
        batches=batches,
        row_chunk_size=row_chunk_size,
        total=-(-len(grid) // chunk_size),
        progress=progress,
    )
    error = None if error is None else error.reshape(size, size)
    return LossPlane(x, y, loss.reshape(size, size), error, plane.points)


def _check_rows(net: FunctionalNet, weights: Tensor) -> None:
    check_tensor(weights=weights)
    if weights.dim() != 2 or weights.shape[-1] != net.num_params:
        raise ShapeError(
            f"weights must be ``s x {net.num_params}``, one row for each, but have "
            f"shape {tuple(weights.shape)}. Try net.flatten(params)."
        )
    check_finite(weights=weights)
