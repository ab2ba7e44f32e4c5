"""Losses and densities as functions of the weights: along paths, on planes.

In: what ``dnn`` measured along a curve or on a plane, samples in two coordinates. Out:
axes. Next: ``examples``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_choice,
    check_count,
    check_finite,
    check_positive,
    check_tensor,
)
from gpbridge.dnn.loss_surface import CurveLosses
from gpbridge.dnn.planes import LossPlane
from gpbridge.plots.style import COLORS, INK, dressed, vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_loss_plane(
    ax: Axes | None,
    plane: LossPlane,
    *,
    trajectory: Tensor | None = None,
    labels: Sequence[str] | None = None,
    quantity: str = "loss",
    highest: float | None = None,
    levels: int = 10,
    color: str = COLORS[1],
) -> Axes:
    """Draw the loss on a plane through the weights as filled contours.

    Levels are closer to each other near the smallest loss, where the valleys are: the
    gap above it grows in equal ratios. One unit is one unit of distance between
    weights on both axes.

    Args:
        ax: Axes to draw into, or None for a new figure.
        plane: The result of :func:`gpbridge.dnn.loss_plane`.
        trajectory: Coordinates of a path to draw, ``k x 2``, from
            :meth:`gpbridge.dnn.planes.WeightPlane.coordinates`.
        labels: Names of the points that the plane remembers, which are then marked; an
            empty name leaves a point out. Without, none is.
        quantity: ``"loss"``, or ``"error"`` for the share of wrong labels.
        highest: The last level; beyond it, also where the loss is not finite, is one
            color. Default the third quartile.
        levels: Their number.
        color: Of the trajectory, any of matplotlib's.

    Returns:
        The axes; the color bar stands beside them.

    Raises:
        ShapeError: If there is not a name for every point, or the trajectory is not
            ``k x 2``.
        ValueError: If the quantity was not measured, or no level is above the lowest.
    """
    check_choice("quantity", quantity, ("loss", "error"))
    check_count(levels=levels)
    measured = plane.loss if quantity == "loss" else plane.error
    if measured is None:
        raise ValueError(
            "Regression has no share of wrong labels. Ask for quantity='loss'."
        )
    if labels is not None and len(labels) != len(plane.points):
        raise ShapeError(
            f"labels must name the {len(plane.points)} points of the plane, but there "
            f"are {len(labels)}. An empty name leaves a point out."
        )
    values = measured.detach().cpu().double()
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"The {quantity} is NaN or Inf on all of the plane.")
    values = torch.where(values.isfinite(), values, finite.max())
    low = float(finite.min())
    top = float(finite.quantile(0.75)) if highest is None else float(highest)
    if not top > low:
        raise ValueError(
            f"highest must be above the lowest {quantity}, {low:.4g}, but is {top:.4g}."
        )
    edges = low + (top - low) * np.geomspace(1e-2, 1, levels)
    edges = np.concatenate([[low], edges])
    ax = dressed(ax)
    ax.grid(False)
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from matplotlib.patheffects import withStroke

    # Dark in the valleys, so that what is drawn on them stands out.
    colormap = LinearSegmentedColormap.from_list(
        "valley", ["#1f3f6e", "#5f8fc4", "#c9dbee", "#f6f3ee"]
    )
    x, y = vectors(x=plane.x), vectors(y=plane.y)
    filled = ax.contourf(
        *x,
        *y,
        values.numpy(),
        levels=edges,
        cmap=colormap,
        norm=BoundaryNorm(edges, colormap.N, extend="max"),
        extend="max",
    )
    # Inside the frame of the axes, so that it is as high as they are.
    bar = ax.figure.colorbar(filled, cax=ax.inset_axes((1.03, 0, 0.045, 1)))
    bar.set_label("loss" if quantity == "loss" else "error")
    shown = edges[:: max(1, levels // 5)]
    bar.set_ticks(shown, labels=[f"{level:.2g}" for level in shown])
    bar.ax.tick_params(color="#b8bdc6", labelcolor=INK)
    bar.outline.set_visible(False)
    if trajectory is not None:
        path = _pairs("trajectory", trajectory)
        ax.plot(*path.T, color=color, linewidth=2, zorder=3)
    for point, label in zip(plane.points, labels or (), strict=False):
        if label:
            ax.plot(
                *_pairs("points", point[None]).T,
                marker="o",
                color=INK,
                markeredgecolor="white",
                markersize=7,
                zorder=4,
            )
            is_left = bool(point[0] <= (plane.x[0] + plane.x[-1]) / 2)
            ax.annotate(
                label,
                point.tolist(),
                xytext=(7 if is_left else -7, 7),
                textcoords="offset points",
                ha="left" if is_left else "right",
                color=INK,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=5,
            )
    ax.set_aspect("equal")
    return ax


def plot_loss_along(
    ax: Axes | None,
    paths: CurveLosses | Mapping[str, CurveLosses],
    *,
    quantity: str = "loss",
    color: str | None = None,
) -> Axes:
    """Draw the loss along one path between two networks, or along several.

    Args:
        ax: Axes to draw into, or None for a new figure.
        paths: The result of :func:`gpbridge.dnn.curve_losses`, or several by name, as
            the line and the curve.
        quantity: ``"loss"``, or ``"error"`` for the share of wrong labels.
        color: Any color of matplotlib, for a single path.

    Returns:
        The axes; the legend names the barriers, above the mean of the ends.

    Raises:
        ValueError: If the quantity was not measured.
    """
    check_choice("quantity", quantity, ("loss", "error"))
    if isinstance(paths, CurveLosses):
        paths = {"": paths}
    if not paths:
        raise ValueError("paths must name at least one path, but is empty.")
    barriers = {name: path.barrier(quantity) for name, path in paths.items()}
    ax = dressed(ax)
    for place, (name, path) in enumerate(paths.items()):
        t, values = vectors(
            t=path.t, values=path.loss if quantity == "loss" else path.error
        )
        label = f"{name + ', ' if name else ''}barrier {barriers[name]:.3g}"
        ax.plot(
            t,
            values,
            color=color or COLORS[place % len(COLORS)],
            linewidth=2,
            label=label,
        )
    ax.margins(x=0)
    ax.set(xlabel="t", ylabel="loss" if quantity == "loss" else "error")
    ax.legend(frameon=False)
    return ax


def plot_subspace_density(
    ax: Axes | None,
    x: Tensor,
    y: Tensor,
    log_density: Tensor,
    *,
    samples: Tensor | None = None,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    colors: tuple[str, str] = COLORS[:2],
    label: str = "samples",
) -> Axes:
    """Draw a density of two coordinates by its smallest regions of given mass.

    A region holds the share of the mass of the grid that it is named by, so that as
    many of the samples should lie inside. The density needs no constant.

    Args:
        ax: Axes to draw into, or None for a new figure.
        x: Coordinates of the columns, equally spaced.
        y: Coordinates of the rows, equally spaced.
        log_density: ``len(y) x len(x)``, in nats, up to a constant.
        samples: Draws of the posterior, ``s x 2``.
        masses: Shares strictly between zero and one.
        colors: Of the density and of the samples.
        label: Name of the samples in the legend.

    Returns:
        The axes.

    Raises:
        ShapeError: If the density does not fit the grid, or the samples are not
            ``s x 2``.
        ValueError: If a mass is not between zero and one.
    """
    check_tensor(log_density=log_density)
    (columns,), (rows,) = vectors(x=x), vectors(y=y)
    if tuple(log_density.shape) != (len(rows), len(columns)):
        raise ShapeError(
            f"log_density must be ``len(y) x len(x)``, {len(rows)} x {len(columns)}, "
            f"but has shape {tuple(log_density.shape)}. Try .mT."
        )
    check_finite(log_density=log_density)
    for mass in masses:
        check_positive(masses=mass)
        if not mass < 1:
            raise ValueError(f"masses must be below 1, but one is {mass}.")
    log_density = log_density.detach().cpu().double()
    density = (log_density - log_density.max()).exp()
    ordered = density.flatten().sort(descending=True).values
    held = ordered.cumsum(0) / ordered.sum()
    # The density at the edge of each region, from the largest region to the smallest.
    edges = sorted({float(ordered[int((held < mass).sum())]) for mass in masses})
    ax = dressed(ax)
    from matplotlib.colors import to_rgba

    inner = [(place + 1) / len(edges) for place in range(len(edges))]
    ax.contourf(
        columns,
        rows,
        density.numpy(),
        levels=[*edges, 1.0 + 1e-9],
        colors=[to_rgba(colors[0], 0.1 + 0.35 * depth) for depth in inner],
    )
    ax.contour(
        columns,
        rows,
        density.numpy(),
        levels=edges,
        colors=colors[0],
        linewidths=[0.8 + 0.8 * depth for depth in inner],
    )
    if samples is not None:
        ax.plot(
            *_pairs("samples", samples).T,
            linestyle="",
            marker="o",
            markersize=3.5,
            color=colors[1],
            markeredgewidth=0,
            alpha=0.7,
            label=label,
        )
        ax.legend(frameon=False)
    return ax


def _pairs(name: str, values: Tensor) -> np.ndarray:
    """Points of the plane, ``k x 2``."""
    check_tensor(**{name: values})
    if values.dim() != 2 or values.shape[-1] != 2 or not len(values):
        raise ShapeError(
            f"{name} must be ``k x 2``, one point of the plane per row, but has shape "
            f"{tuple(values.shape)}. Try plane.coordinates(weights)."
        )
    check_finite(**{name: values})
    return values.detach().cpu().double().numpy()
