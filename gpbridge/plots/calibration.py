"""Whether confidence can be trusted: reliability, its gap, entropies of other data.

In: probabilities and labels, or their reliability curve. Out: axes. Next: ``examples``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gpbridge.checks import ShapeError
from gpbridge.metrics import ReliabilityCurve, predictive_entropy, reliability_curve
from gpbridge.plots.style import COLORS, INK, dressed, vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    confidence, accuracy, count = vectors(
        confidence=curve.confidence, accuracy=curve.accuracy, count=curve.count
    )
    share = count / count.sum()
    error = (share * abs(accuracy - confidence)).sum()
    ax = dressed(ax)
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


def plot_confidence_gap(
    ax: Axes | None,
    probabilities: Tensor | Mapping[str, Tensor],
    labels: Tensor,
    *,
    bins: int = 20,
    color: str | None = None,
) -> Axes:
    """Draw confidence minus accuracy against confidence; above zero is overconfident.

    Each bin holds equally many points, and the axis of the confidence c is
    -log(1 - c), which spreads out the confident end where a trained network has most of
    its points. Confidences above 1 - 1e-6 are drawn there.

    Args:
        ax: Axes to draw into, or None for a new figure.
        probabilities: Class probabilities, ``n x C``, or several by name.
        labels: Integer labels, ``n``.
        bins: Number of bins.
        color: Any color of matplotlib, for a single model.

    Returns:
        The axes.

    Raises:
        ValueError: If no model is named.

    References:
        Maddox, Garipov, Izmailov, Vetrov, Wilson, A simple baseline for Bayesian
        uncertainty in deep learning, NeurIPS 2019 (its reliability diagrams).
    """
    models = (
        probabilities if isinstance(probabilities, Mapping) else {"": probabilities}
    )
    if not models:
        raise ValueError("probabilities must name at least one model, but is empty.")
    ax = dressed(ax)
    ax.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    lowest, highest = 1.0, 0.0
    for place, (name, own) in enumerate(models.items()):
        curve = reliability_curve(own, labels, bins, equal="mass")
        confidence, accuracy, count = vectors(
            confidence=curve.confidence, accuracy=curve.accuracy, count=curve.count
        )
        gap = confidence - accuracy
        error = (count * abs(gap)).sum() / count.sum()
        ax.plot(
            confidence.clip(0, 1 - _NEAREST),
            gap,
            color=color or COLORS[place % len(COLORS)],
            linewidth=1.8,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"{name + ', ' if name else ''}ECE {error:.3f}",
        )
        lowest, highest = min(lowest, *confidence), max(highest, *confidence)
    ax.set_xscale("function", functions=(_spread, _gather))
    low, high = _spread(lowest), _spread(highest)
    margin = 0.05 * (high - low) + 0.05
    ax.set_xlim(_gather(max(low - margin, 0.0)), _gather(high + margin))
    ticks = [c for c in _TICKS if low - margin <= _spread(c) <= high + margin]
    ax.set_xticks(ticks, [f"{c:g}" for c in ticks])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="confidence", ylabel="confidence − accuracy")
    ax.legend(frameon=False)
    return ax


def plot_entropy_histograms(
    ax: Axes | None,
    inside: Tensor,
    outside: Tensor,
    *,
    bins: int = 30,
    colors: tuple[str, str] = COLORS[:2],
    labels: tuple[str, str] = ("in distribution", "out of distribution"),
) -> Axes:
    """Draw how undecided predictions are, in and out of the training distribution.

    Both are densities over the same bins from 0 to log C nats, the entropy of a guess.

    Args:
        ax: Axes to draw into, or None for a new figure.
        inside: Class probabilities of data of the training kind, ``n x C``.
        outside: Class probabilities of other data, ``k x C``.
        bins: Number of bins.
        colors: Of the two histograms.
        labels: Their names in the legend, beside the mean entropy.

    Returns:
        The axes.

    Raises:
        ShapeError: If the numbers of classes differ.
    """
    entropies = [predictive_entropy(part) for part in (inside, outside)]
    if inside.shape[1] != outside.shape[1]:
        raise ShapeError(
            f"inside has {inside.shape[1]} classes, but outside has "
            f"{outside.shape[1]}. Pass predictions of one network."
        )
    top = math.log(inside.shape[1])
    ax = dressed(ax)
    for entropy, color, label in zip(entropies, colors, labels, strict=True):
        # Rounding can leave an entropy just above that of a guess.
        values = vectors(entropy=entropy)[0].clip(0, top)
        density, edges = np.histogram(values, bins, range=(0, top), density=True)
        ax.stairs(density, edges, fill=True, color=color, alpha=0.25)
        named = f"{label}, mean {values.mean():.2f}"
        ax.stairs(density, edges, color=color, linewidth=1.6, label=named)
    ax.set(xlim=(0, top), xlabel="predictive entropy (nats)", ylabel="density")
    ax.legend(frameon=False)
    return ax


_NEAREST = 1e-6  # to one, where the axis ends
_TICKS = (0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 0.99999)


def _spread(confidence: Any) -> Any:
    """The axis of the confidence, -log(1 - c)."""
    return -np.log1p(-np.clip(confidence, None, 1 - _NEAREST))


def _gather(place: Any) -> Any:
    """The confidence at a place on the axis."""
    return -np.expm1(-np.asarray(place))
