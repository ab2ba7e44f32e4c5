"""The error of a run that met NaN or infinity, with what was good before.

In: a message, the run's last good state. Out: an exception. Next: every loop that
trains raises it.
"""

from __future__ import annotations

from typing import Any


class DivergedError(RuntimeError):
    """A loss or a weight became NaN or infinite; ``last_good`` is the run before that.

    Of ``fit_map`` it is the network, of ``fit_ensemble`` an ``EnsembleFit``, of
    ``train_replicas`` a :class:`~gpbridge.dnn.ReplicaFit`, of ``fit_vae``,
    ``fit_gp_vae``, ``fit_deep_gp``, ``fit_sparse_gp``, ``fit_online`` and
    ``learn_invariance`` what they return, of ``learn_last_layer_invariance`` an
    ``ELBOFit``, of ``fit_iterative`` its record; of ``fit_mean_field``,
    ``fit_variational``, ``fit_curve`` and of chains the object itself.
    """

    def __init__(self, message: str, last_good: Any) -> None:
        super().__init__(message)
        self.last_good = last_good


def rate_advice(learning_rate: float, usual: float) -> str:
    """A rate to try: a tenth, and no more than what is usual."""
    return f"learning_rate={min(learning_rate / 10, usual):g} (it is {learning_rate:g})"
