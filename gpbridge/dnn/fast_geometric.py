"""An ensemble from the cycles of one run: fast geometric ensembling.

The learning rate goes down and up again in a few epochs; at its bottom a copy is taken.

In: a network being trained, after a usual run. Out: the factor of the learning rate,
and :class:`~gpbridge.weights.EmpiricalWeights`. Next: their draws.

References:
    Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode connectivity,
    and fast ensembling of DNNs, NeurIPS 2018, section 5, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gpbridge.dnn.schedules import triangular_factor
from gpbridge.dnn.snapshots import Snapshots
from gpbridge.functional import Parameters
from gpbridge.types import Params


class FastGeometricEnsemble(Snapshots):
    """Snapshots at the bottom of a triangular learning rate.

    Call ``update`` after every step of the schedule (an iteration, or an epoch), the
    first of which is number 0; only those at the bottom are kept, one per cycle.

    Args:
        network: The module that is trained; its weights are read, nothing is changed.
        cycle: Steps of a cycle, an even number.
        low: The smallest rate in units of the first.
        max_snapshots: Beyond it the oldest is overwritten; default all are kept.
        parameters: Which weights are kept.
        input_shape: Shape of one input.

    Raises:
        ValueError: If the cycle is odd, or ``low`` is not positive.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        >>> ensemble = FastGeometricEnsemble(network, cycle=4)
        >>> rate = torch.optim.lr_scheduler.LambdaLR(optimizer, ensemble.factor)
        >>> for _ in range(8):  # epochs
        ...     optimizer.step()  # an epoch of training
        ...     ensemble.update(network)
        ...     rate.step()
        >>> ensemble.posterior().num_members
        2
    """

    def __init__(
        self,
        network: nn.Module,
        cycle: int = 4,
        low: float = 0.01,
        max_snapshots: int | None = None,
        parameters: Parameters = "all",
        input_shape: Sequence[int] | None = None,
    ) -> None:
        triangular_factor(cycle, low)  # refuses what is out of range
        super().__init__(network, max_snapshots, parameters, input_shape)
        self.cycle, self.low = cycle, low
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def factor(self, step: int) -> float:
        """The learning rate of a step, in units of the first."""
        return triangular_factor(self.cycle, self.low)(step)

    def update(self, network: nn.Module | Params) -> None:
        """Count a step, and keep its weights if the rate was at the bottom.

        Args:
            network: The module that is trained, or its weights by name.

        Raises:
            ValueError: If a weight is missing or not finite at the bottom; the tracker
                stays as it was.
        """  # noqa: DOC502
        if int(self.num_steps) % self.cycle == self.cycle // 2:
            super().update(network)
        self.num_steps += 1
