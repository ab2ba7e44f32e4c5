"""Copies of the weights along a run, each a member of an ensemble.

In: a network being trained. Out: :class:`~gpbridge.weights.EmpiricalWeights`, with the
batch-norm statistics that each copy had. Next: their draws.

References:
    Huang, Li, Pleiss, Liu, Hopcroft, Weinberger, Snapshot ensembles: train 1, get M for
    free, ICLR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpbridge.checks import check_count
from gpbridge.dnn.trackers import WeightTracker
from gpbridge.functional import Parameters
from gpbridge.weights import EmpiricalWeights

_KEPT = "kept_"  # before the names of buffers with one row per snapshot


class Snapshots(WeightTracker):
    """Copies of the weights, and of the network's buffers, whenever they are asked for.

    Memory p for each snapshot and up to as much again, since room is doubled when it is
    used up.

    Args:
        network: The module that is trained; its weights are read, nothing is changed.
        max_snapshots: Beyond it the oldest is overwritten; default all are kept.
        parameters: Which weights are kept, as in
            :class:`~gpbridge.functional.FunctionalNet`; the others are taken as they
            are at the last update.
        input_shape: Shape of one input, to unflatten the ``d`` columns.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> snapshots = Snapshots(network)
        >>> for _ in range(3):  # epochs
        ...     snapshots.update(network)
        >>> snapshots.posterior().num_members
        3
    """

    def __init__(
        self,
        network: nn.Module,
        max_snapshots: int | None = None,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(network, parameters, input_shape)
        if max_snapshots is not None:
            check_count(max_snapshots=max_snapshots)
        self.max_snapshots = max_snapshots
        weights = self.net.flatten(self.net.params).detach()
        self.register_buffer("kept", weights.new_empty(0, len(weights)))
        self._held = {
            name: _KEPT + name.replace(".", "__")
            for name, _ in self.net.network.named_buffers()
        }
        for name, value in self.net.network.named_buffers():
            self.register_buffer(self._held[name], value.new_empty(0, *value.shape))

    def extra_repr(self) -> str:
        """How many snapshots were taken, and how many are kept."""
        return f"{super().extra_repr()}, num_kept={self.num_kept}"

    @property
    def num_kept(self) -> int:
        """The number of snapshots there are."""
        taken = int(self.num_snapshots)
        return taken if self.max_snapshots is None else min(taken, self.max_snapshots)

    def _take(self, weights: Tensor) -> None:
        room = len(self.kept)
        taken = int(self.num_snapshots)
        row = taken if self.max_snapshots is None else taken % self.max_snapshots
        if row >= room:
            room = max(8, 2 * room)
            self._resize(
                room if self.max_snapshots is None else min(room, self.max_snapshots)
            )
        self.kept[row] = weights
        for name, value in self.net.network.named_buffers():
            getattr(self, self._held[name])[row] = value
        self.num_snapshots += 1

    def _resize(self, rows: int) -> None:
        for name in ("kept", *self._held.values()):
            old = getattr(self, name)
            new = old.new_zeros(rows, *old.shape[1:])
            count = min(rows, len(old))
            new[:count] = old[:count]
            setattr(self, name, new)

    def posterior(self) -> EmpiricalWeights:
        """The snapshots, the oldest first, equally likely.

        Raises:
            RuntimeError: If there is none.
        """
        self._need(1)
        k = self.num_kept
        rows = (torch.arange(k, device=self.kept.device) + self.num_snapshots) % k
        statistics = {
            name: getattr(self, held)[rows] for name, held in self._held.items()
        }
        return EmpiricalWeights(self.own_net(), self.kept[rows], statistics)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        taken = state_dict.get(f"{prefix}num_snapshots")
        kept = state_dict.get(f"{prefix}kept")
        if taken is not None and kept is not None:
            rows, room = self._rows_from(int(taken), len(kept))
            state_dict = dict(state_dict)
            for name in ("kept", *self._held.values()):
                given = state_dict.get(prefix + name)
                if given is not None:
                    value = given.new_zeros(room, *given.shape[1:])
                    value[list(rows)] = given[list(rows.values())]
                    state_dict[prefix + name] = value
            self._resize(room)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _rows_from(self, taken: int, length: int) -> tuple[dict[int, int], int]:
        """Where rows of another tracker belong here, and the room that they need.

        Args:
            taken: Snapshots that the other has taken.
            length: Its rows, overwritten in turn if it has taken more.

        Returns:
            The number there of each row here, and how many rows there are.

        Raises:
            ValueError: If it has overwritten snapshots that would be here.
        """
        there, here = min(taken, length), self.max_snapshots
        count = taken if here is None else min(taken, here)
        if count > there:
            raise ValueError(
                f"The state holds the last {there} of {taken} snapshots, but the "
                f"tracker would keep {count} of them (max_snapshots={here}). Build it "
                f"with max_snapshots={there} or less."
            )
        period = taken if here is None else here
        numbers = range(taken - count, taken)
        rows = {i % max(period, 1): i % max(length, 1) for i in numbers}
        return rows, length if here is None else min(length, here)
