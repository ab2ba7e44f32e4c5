"""Figures of predictions, calibration and progress, drawn into the caller's axes.

In: an ``Axes`` and tensors. Out: the same ``Axes``, so that calls chain. Nothing is
shown, saved or styled globally; pass None to draw into a new figure. Needs the extra
``plots``. Next: ``examples`` save such figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_not_empty,
    check_same_length,
    check_tensor,
)
from gpbridge.metrics import ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue, orange, green, purple: distinct in grey and for colour-blind readers.
COLORS = ("#2f6db3", "#d9772b", "#3f8f6b", "#7a5aa6")
INK = "#3a3f47"


def plot_posterior_band(
    ax: Axes | None,
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    train_x: Tensor | None = None,
    train_y: Tensor | None = None,
    color: str = COLORS[0],
    label: str = "mean",
) -> Axes:
    """Draw a mean with bands of one and two standard deviations (68% and 95%).

    Args:
        ax: Axes to draw into, or None for a new figure.
        x: Inputs, ``t`` or ``t x 1``, in any order.
        mean: Predictive means, ``t`` or ``t x 1``.
        std: Predictive standard deviations, ``t`` or ``t x 1``.
        train_x: Inputs of the data to scatter, ``n`` or ``n x 1``.
        train_y: Their targets, ``n`` or ``n x 1``.
        color: Any color of matplotlib.
        label: Name of the mean in the legend.

    Returns:
        The axes.
    """
    x, mean, std = _vectors(x=x, mean=mean, std=std)
    order = x.argsort()
    x, mean, std = x[order], mean[order], std[order]
    ax = _dressed(ax)
    for width, alpha in ((2, 0.16), (1, 0.22)):
        ax.fill_between(
            x,
            mean - width * std,
            mean + width * std,
            color=color,
            alpha=alpha,
            linewidth=0,
            label="95% interval" if width == 2 else None,
        )
    ax.plot(x, mean, color=color, linewidth=2, label=label)
    if train_x is not None and train_y is not None:
        train_x, train_y = _vectors(train_x=train_x, train_y=train_y)
        ax.scatter(
            train_x,
            train_y,
            s=22,
            color=INK,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
            label="data",
        )
    ax.margins(x=0)
    ax.legend(frameon=False)
    return ax


def plot_reliability(
    ax: Axes | None,
    curve: ReliabilityCurve,
    *,
    color: str = COLORS[0],
    label: str | None = None,
) -> Axes:
    """Draw accuracy against confidence; below the diagonal means overconfident.

    The area of a marker grows with the number of points in its bin. Call it again with
    the same axes to compare models.

    Args:
        ax: Axes to draw into, or None for a new figure.
        curve: The result of :func:`gpbridge.metrics.reliability_curve`.
        color: Any color of matplotlib.
        label: Name in the legend, beside the calibration error.

    Returns:
        The axes.
    """
    confidence, accuracy, count = _vectors(
        confidence=curve.confidence, accuracy=curve.accuracy, count=curve.count
    )
    share = count / count.sum()
    error = (share * abs(accuracy - confidence)).sum()
    ax = _dressed(ax)
    ax.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    ax.vlines(confidence, confidence, accuracy, color=color, alpha=0.35, linewidth=2)
    ax.plot(confidence, accuracy, color=color, linewidth=1.5, alpha=0.8)
    ax.scatter(
        confidence,
        accuracy,
        s=20 + 180 * share,
        color=color,
        edgecolor="white",
        linewidth=0.8,
        zorder=3,
        label=f"{label + ', ' if label else ''}ECE {error:.3f}",
    )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.set(xlabel="confidence", ylabel="accuracy")
    ax.set_aspect("equal")
    ax.legend(frameon=False, loc="upper left")
    return ax


def plot_trace(
    ax: Axes | None,
    values: Tensor,
    *,
    first_step: int = 0,
    target: float | None = None,
    color: str = COLORS[0],
    label: str | None = None,
    xlabel: str = "step",
    ylabel: str = "value",
) -> Axes:
    """Draw a quantity over steps; several runs become their median and quartiles.

    Args:
        ax: Axes to draw into, or None for a new figure.
        values: One value per step, ``steps``, or per run and step, ``runs x steps``.
        first_step: Number of the first step.
        target: A level to mark, as a known optimum.
        color: Any color of matplotlib.
        label: Name in the legend.
        xlabel: Name of the steps.
        ylabel: Name of the quantity.

    Returns:
        The axes.

    Raises:
        ShapeError: If the values are neither a vector nor a matrix.
    """
    check_tensor(values=values)
    if values.dim() not in (1, 2) or values.numel() == 0:
        raise ShapeError(
            "values must be ``steps`` or ``runs x steps``, but has shape "
            f"{tuple(values.shape)}."
        )
    check_finite(values=values)
    runs = torch.atleast_2d(values.detach().cpu().double())
    steps = range(first_step, first_step + runs.shape[1])
    ax = _dressed(ax)
    if len(runs) > 1:
        low, high = (runs.quantile(q, dim=0).numpy() for q in (0.25, 0.75))
        ax.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    ax.plot(
        steps,
        runs.quantile(0.5, dim=0).numpy(),
        color=color,
        linewidth=2,
        marker="o" if len(steps) <= 40 else None,
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label=label,
    )
    if target is not None:
        ax.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate(
            f"target {target:g}",
            (1, target),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=INK,
            fontsize="small",
        )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _dressed(ax: Axes | None) -> Axes:
    """The axes, or new ones, with a light grid and no box."""
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                "gpbridge.plots needs matplotlib to make a figure. Try "
                'pip install "gpbridge[plots]".'
            ) from error
        ax = pyplot.subplots(layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b8bdc6")
    ax.tick_params(color="#b8bdc6", labelcolor=INK)
    ax.grid(color="#e6e8ec", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _vectors(**values: Tensor) -> list:
    """Check tensors ``n`` or ``n x 1`` of one length and make them numpy vectors."""
    check_tensor(**values)
    for name, value in values.items():
        if value.dim() not in (1, 2) or value.numel() != len(value):
            raise ShapeError(
                f"{name} must be ``n`` or ``n x 1``, but has shape "
                f"{tuple(value.shape)}. Draw one output at a time."
            )
    check_not_empty(**values)
    check_same_length(**values)
    check_finite(**values)
    return [v.detach().cpu().double().flatten().numpy() for v in values.values()]
