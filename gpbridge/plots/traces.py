"""Quantities over the steps of a run.

In: one value per step and run. Out: axes with the median run. Next: ``examples``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_finite, check_tensor
from gpbridge.plots.style import COLORS, INK, dressed, vectors

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


def plot_evidence_history(ax: Axes | None, history: Mapping[str, Tensor]) -> Axes:
    """Draw the evidence over the epochs, below the fit by the complexity.

    Args:
        ax: Axes to draw into, or None for a new figure.
        history: Of :func:`gpbridge.selection.fit_online`: ``epoch``, ``evidence``,
            ``fit`` and ``complexity``, one entry per update, in nats.

    Returns:
        The axes.

    Raises:
        ValueError: If an entry is missing, as in a run without updates.
    """
    names = ("epoch", "evidence", "fit", "complexity")
    missing = [name for name in names if name not in history]
    if missing:
        raise ValueError(
            f"history has no {', '.join(missing)}, only {', '.join(history)}. Pass the "
            "history of a fit_online with at least one update of its hyperparameters."
        )
    epoch, value, fit, complexity = vectors(**{n: history[n] for n in names})
    ax = dressed(ax)
    ax.fill_between(epoch, value, fit, color=COLORS[1], alpha=0.15, linewidth=0)
    ax.plot(epoch, fit, color=COLORS[1], linewidth=1.5, label="fit")
    ax.plot(epoch, value, color=COLORS[0], linewidth=2, label="evidence")
    ax.annotate(
        f"complexity {complexity[-1]:.3g}",
        (epoch[-1], (value[-1] + fit[-1]) / 2),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=INK,
        fontsize="small",
    )
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="epoch", ylabel="nats")
    ax.legend(frameon=False)
    return ax
