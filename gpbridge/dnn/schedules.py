r"""Learning rates along a run, as factors for ``torch.optim.lr_scheduler.LambdaLR``.

Each function returns another one, from the number of the epoch or step to the factor of
the initial rate. LambdaLR sets the rate to the product: nothing accumulates.

In: lengths and ratios. Out: functions. Next: a training loop that ``swa``, ``swag`` or
a fast geometric ensemble observes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gpbridge.checks import check_count, check_positive

Factor = Callable[[int], float]


def swa_factor(start: int, low: float) -> Factor:
    """Constant, then linear down to a constant at which weights are averaged.

    One up to half of ``start``, linear from there to nine tenths of it, ``low`` after.

    Args:
        start: The epoch from which weights are averaged.
        low: The last rate in units of the first, as 0.2 for 0.01 of 0.05.

    Returns:
        The factor of an epoch.

    References:
        Izmailov et al., Averaging weights leads to wider optima and better
        generalization, UAI 2018, section 4.

    Example:
        >>> [round(swa_factor(100, 0.2)(e), 3) for e in (0, 50, 70, 90, 200)]
        [1.0, 1.0, 0.6, 0.2, 0.2]
    """
    check_count(start=start)
    check_positive(low=low)

    def factor(epoch: int) -> float:
        t = epoch / start
        if t <= 0.5:
            return 1.0
        return low if t >= 0.9 else 1.0 - (1.0 - low) * (t - 0.5) / 0.4

    return factor


def cyclical_factor(cycle: int) -> Factor:
    r"""Cosine from one to zero, again and again: :math:`\tfrac12 (\cos \pi t + 1)`.

    Args:
        cycle: Steps of a cycle; t is the share of it that has passed.

    Returns:
        The factor of a step.

    References:
        Zhang, Li, Zhang, Chen, Wilson, Cyclical stochastic gradient MCMC for Bayesian
        deep learning, ICLR 2020, eq. (1).

    Example:
        >>> [round(cyclical_factor(4)(k), 3) for k in range(5)]
        [1.0, 0.854, 0.5, 0.146, 1.0]
    """
    check_count(cycle=cycle)
    return lambda step: 0.5 * (math.cos(math.pi * (step % cycle) / cycle) + 1.0)


def triangular_factor(cycle: int, low: float) -> Factor:
    """Linear from one down to ``low`` and up again; members are taken at the bottom.

    Steps count from 0, which has the full rate; step k is iteration k of the paper,
    which begins with 1, and the bottom is at step ``cycle / 2``.

    Args:
        cycle: Steps of a cycle, an even number.
        low: The smallest rate in units of the first.

    Returns:
        The factor of a step.

    Raises:
        ValueError: If the cycle is odd.

    References:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson, Loss surfaces, mode
        connectivity, and fast ensembling of DNNs, NeurIPS 2018, eq. (3).

    Example:
        >>> [round(triangular_factor(4, 0.2)(k), 3) for k in range(5)]
        [1.0, 0.6, 0.2, 0.6, 1.0]
    """
    check_count(cycle=cycle)
    check_positive(low=low)
    if cycle % 2:
        raise ValueError(f"cycle must be an even number of steps, but is {cycle}.")

    def factor(step: int) -> float:
        t = (step % cycle) / cycle
        return 1.0 - (1.0 - low) * (2 * t if t <= 0.5 else 2 - 2 * t)

    return factor
