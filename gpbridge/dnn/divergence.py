"""The error of a run that met NaN or infinity, with what was good before.

In: a message, the run's last good state. Out: an exception. Next: ``stacked_training``,
``chains`` and ``variational_fit`` raise it.
"""

from __future__ import annotations

from typing import Any


class DivergedError(RuntimeError):
    """A loss or a weight became NaN or infinite; ``last_good`` is the run before that.

    A :class:`~gpbridge.dnn.ReplicaFit` of training; of a chain and of variational
    inference the object itself, put back.
    """

    def __init__(self, message: str, last_good: Any) -> None:
        super().__init__(message)
        self.last_good = last_good
