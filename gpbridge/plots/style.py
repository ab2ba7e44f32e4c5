"""How every figure looks: colors, axes without a box, tensors as numpy vectors.

In: an ``Axes`` or None, and tensors. Out: dressed axes and checked vectors. Nothing is
styled globally. Next: every other file of ``plots``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_not_empty,
    check_same_length,
    check_tensor,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue, orange, green, purple: distinct in grey and for colour-blind readers.
COLORS = ("#2f6db3", "#d9772b", "#3f8f6b", "#7a5aa6")
INK = "#3a3f47"
EDGE, GRID = "#b8bdc6", "#e6e8ec"
STYLE = {  # the same look for a whole figure: pyplot.rcParams.update(STYLE)
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
}


def dressed(ax: Axes | None) -> Axes:
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
    ax.spines[["left", "bottom"]].set_color(EDGE)
    ax.tick_params(color=EDGE, labelcolor=INK)
    ax.grid(color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def vectors(**values: Tensor) -> list:
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
