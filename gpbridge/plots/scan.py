"""The evidence over a grid, its local maxima and where ascent from them ended.

In: what :func:`gpbridge.selection.scan` returned. Out: axes with the curve. Next:
``examples``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gpbridge.plots.style import COLORS, INK, dressed
from gpbridge.selection.scan import ScanResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_scan(
    ax: Axes | None,
    result: ScanResult,
    *,
    color: str = COLORS[0],
    label: str | None = None,
    xlabel: str | None = None,
) -> Axes:
    """Draw the curve of a scan; a star is the best point found.

    Circles are the local maxima that were followed up, or all where none was.

    Args:
        ax: Axes to draw into, or None for a new figure.
        result: The scan; grid values without a finite evidence are left out.
        color: Any color of matplotlib.
        label: Name in the legend.
        xlabel: Name of the quantity, by default that of the scan.

    Returns:
        The axes.

    Raises:
        TypeError: If the result is not that of a scan.
    """
    if not isinstance(result, ScanResult):
        raise TypeError(
            "result must be what gpbridge.selection.scan returned, but is "
            f"{type(result).__name__}."
        )
    ax = dressed(ax)
    finite = torch.isfinite(result.evidence)
    grid, evidence = result.grid.numpy(), result.evidence.numpy()
    ax.plot(
        result.grid[finite].numpy(),
        result.evidence[finite].numpy(),
        color=color,
        linewidth=1.8,
        marker=".",
        markersize=5,
        label=label,
    )
    places = list(result.maxima)[: len(result.polished) or None]
    ax.plot(
        grid[places],
        evidence[places],
        linestyle="none",
        marker="o",
        markersize=8,
        markerfacecolor="none",
        markeredgecolor=INK,
        zorder=3,
    )
    if isinstance(result.best_value, float):
        ax.plot(
            [result.best_value],
            [result.best_evidence],
            linestyle="none",
            marker="*",
            markersize=12,
            color=COLORS[1],
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=4,
        )
    ratio = float(result.grid[-1] / result.grid[0]) if result.grid[0] > 0 else 1.0
    steps = result.grid.diff()
    if ratio > 50 and float(steps.max() / steps.min()) > 5:
        ax.set_xscale("log")
    ax.set(xlabel=result.name if xlabel is None else xlabel, ylabel="log evidence")
    if label is not None:
        ax.legend(frameon=False)
    return ax
