"""Figures of predictions, calibration and losses, drawn into the caller's axes.

In: an ``Axes`` and tensors. Out: the same ``Axes``, so that calls chain. Nothing is
shown, saved or styled globally; pass None to draw into a new figure. Needs the extra
``plots``. Next: ``examples`` save such figures.
"""

from gpbridge.plots.bands import plot_posterior_band
from gpbridge.plots.calibration import (
    plot_confidence_gap,
    plot_entropy_histograms,
    plot_reliability,
)
from gpbridge.plots.landscape import (
    plot_loss_along,
    plot_loss_plane,
    plot_subspace_density,
)
from gpbridge.plots.scan import plot_scan
from gpbridge.plots.style import COLORS, INK, STYLE
from gpbridge.plots.traces import plot_evidence_history, plot_trace

__all__ = [
    "COLORS",
    "INK",
    "STYLE",
    "plot_confidence_gap",
    "plot_entropy_histograms",
    "plot_evidence_history",
    "plot_loss_along",
    "plot_loss_plane",
    "plot_posterior_band",
    "plot_reliability",
    "plot_scan",
    "plot_subspace_density",
    "plot_trace",
]
