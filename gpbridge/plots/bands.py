"""Predictions of one input with bands of uncertainty.

In: inputs, means, standard deviations. Out: axes with the bands. Next: ``examples``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gpbridge.plots.style import COLORS, INK, dressed, vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    x, mean, std = vectors(x=x, mean=mean, std=std)
    order = x.argsort()
    x, mean, std = x[order], mean[order], std[order]
    ax = dressed(ax)
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
        train_x, train_y = vectors(train_x=train_x, train_y=train_y)
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
