"""Quantities over the steps of a run.

In: one value per step and run. Out: axes with the median run. Next: ``examples``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_finite, check_tensor
from gpbridge.plots.style import COLORS, INK, dressed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ax = dressed(ax)
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
