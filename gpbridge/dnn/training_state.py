"""How far the training of one network has come.

In: a network, its optimiser, a source of batches. Out: a history, the weights of the
best epoch and of the last good one, and a state from which the next epoch gives the
same bits. Next: ``training`` runs the epochs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from gpbridge.dnn.run_key import check_same_run


class TrainingState:
    """All that the next epoch depends on, but for data and options.

    Args:
        network: What is trained, in place.
        optimizer: Of its weights.
        generator: Source of the batches. Dropout has torch's own state.
        key: What a run that goes on must have in common with this one.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        generator: Generator,
        key: dict[str, Any],
    ) -> None:
        self.network, self.optimizer = network, optimizer
        self.generator, self.key = generator, key
        self.history: dict[str, list[float]] = {}
        self.good = self.copies()
        self.best_loss, self.best = math.inf, None

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.history.get("train_loss", ()))

    def copies(self) -> list[Tensor]:
        """Weights and buffers as they are now."""
        return [tensor.detach().clone() for tensor in _tensors(self.network)]

    @torch.no_grad()
    def restore(self, copies: list[Tensor]) -> None:
        """Set weights and buffers to copies."""
        for tensor, kept in zip(_tensors(self.network), copies, strict=True):
            tensor.copy_(kept)

    def record(self, entry: dict[str, float], good: list[Tensor], keep: bool) -> None:
        """Take an epoch into the history.

        Args:
            entry: What was measured.
            good: What to go back to if the next epoch diverges.
            keep: Whether to remember the best validation loss.
        """
        self.good = good
        loss = entry.get("validation_loss", math.inf)
        if keep and loss < self.best_loss:
            self.best_loss, self.best = loss, self.copies()
        for key, value in entry.items():
            self.history.setdefault(key, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for :func:`gpbridge.storage.save_state`."""
        state = {
            "epoch": self.epoch,
            "tensors": self.copies(),
            "good": self.good,
            "best": self.best,
            "best_loss": self.best_loss,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "noise": [torch.get_rng_state()],
            "run": self.key,
        }
        device = self._accelerator()
        if device is not None:
            state["noise"].append(torch.cuda.get_rng_state(device))
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was left.

        Raises:
            ValueError: If it was another run.
        """  # noqa: DOC502
        check_same_run(
            state["run"], self.key, "Pass the same arguments, or start anew."
        )
        state = copy.deepcopy(state)
        self.restore(state["tensors"])
        self.good, self.best = state["good"], state["best"]
        self.best_loss, self.history = state["best_loss"], state["history"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["noise"][0].cpu())
        device = self._accelerator()
        if device is not None and len(state["noise"]) > 1:
            torch.cuda.set_rng_state(state["noise"][1].cpu(), device)

    def _accelerator(self) -> torch.device | None:
        device = next(self.network.parameters()).device
        return device if device.type == "cuda" else None


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
