"""How copies of a network are trained, epoch by epoch.

In: options of :func:`gpbridge.dnn.train_replicas`, checked. Out: an optimiser over
stacked weights, its rate in an epoch, and the decay of each copy. Next:
``stacked_training`` asks before every epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpbridge.checks import ShapeError, check_choice, check_count, check_positive
from gpbridge.dnn.run_key import described
from gpbridge.types import Params

Decay = float | Tensor | Callable[[int, Params], float | Tensor]


@dataclass(frozen=True)
class ReplicaOptions:
    """Batches, optimiser, rate and decay, as for :func:`gpbridge.dnn.train_replicas`.

    Raises:
        ValueError: If one is out of range.
    """

    batch_size: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: Decay
    schedule: Callable[[int], float] | None

    def __post_init__(self) -> None:
        check_count(batch_size=self.batch_size)
        check_choice("optimizer", self.optimizer, ("adam", "sgd"))
        check_positive(learning_rate=self.learning_rate)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), but is {self.momentum}.")

    def optimizer_of(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        """An optimiser that moves stacked weights."""
        # One fused kernel per step.
        fused = all(p.device.type in ("cpu", "cuda") for p in leaves)
        if self.optimizer == "adam":
            return torch.optim.Adam(leaves, lr=self.learning_rate, fused=fused)
        return torch.optim.SGD(
            leaves, lr=self.learning_rate, momentum=self.momentum, fused=fused
        )

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch."""
        factor = 1.0 if self.schedule is None else float(self.schedule(epoch))
        return self.learning_rate * factor

    def decay(self, epoch: int, state: Params) -> Tensor:
        """The weight decay of an epoch, one number or one for each of k copies.

        Args:
            epoch: Its number.
            state: Weights and buffers by name, ``k x shape``.

        Returns:
            A scalar or ``k``, float64.

        Raises:
            ValueError: If it is negative or not finite.
            ShapeError: If it is neither one number nor k.
        """
        value, where = self.weight_decay, "weight_decay"
        if callable(value):
            value, where = value(epoch, state), f"weight_decay in epoch {epoch}"
        value = torch.as_tensor(value, dtype=torch.float64)
        if not bool(((value >= 0) & torch.isfinite(value)).all()):
            raise ValueError(
                f"{where} must be finite and not negative, but is {value.tolist()}. "
                "For none pass 0."
            )
        k = len(next(iter(state.values())))
        if value.shape not in ((), (k,)):
            raise ShapeError(
                f"{where} must be one number or one for each of the {k} copies, but "
                f"has shape {tuple(value.shape)}."
            )
        return value

    def key(self) -> dict[str, Any]:
        """What a continued run must have in common with the one before."""
        return {
            "batch size": self.batch_size,
            "optimizer": self.optimizer,
            "learning rate": self.learning_rate,
            "momentum": self.momentum,
            "weight decay": described(self.weight_decay),
            "schedule": described(self.schedule),
        }
