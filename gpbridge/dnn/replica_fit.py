"""What the training of many copies of one network gives, also when it fails.

In: stacked weights, buffers and losses. Out: records. Next: ``stacked_training`` fills
them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gpbridge.types import Params


class ReplicaFit(NamedTuple):
    """Trained copies of one network.

    Attributes:
        weights: One row per copy, ``k x p``.
        state: The same weights by name, and each copy's buffers, ``k x shape``.
        history: One ``epochs x k`` tensor per recorded quantity.
        best_epoch: The epoch whose weights these are, ``k``; None for the last.
    """

    weights: Tensor
    state: Params
    history: dict[str, Tensor]
    best_epoch: Tensor | None

    def __repr__(self) -> str:
        """Numbers of copies and weights, and the last losses."""
        recorded = ", ".join(
            f"{name} {float(values[-1].mean()):.4g}"
            for name, values in self.history.items()
        )
        k, p = self.weights.shape
        return (
            f"{type(self).__name__}({k} copies of {p} weights; last mean: {recorded})"
        )
