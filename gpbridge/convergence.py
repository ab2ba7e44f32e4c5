r"""Whether an objective that is ascended still rose when the run ended.

In: the values of an objective, one for each epoch or step, noisy or not. Out: by how
much it rose over the end of the run, if that is more than its noise; a warning.
Next: ``dnn.elbo_training`` asks at its last epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.checks import NotConvergedWarning, warn_user

SHORTEST = 24  # values: of fewer, noise and trend cannot be told apart
CERTAINTY = 4.0  # standard errors
NATS_PER_DATUM = 0.01  # of a bound; less makes no prediction better
_SHARE = 0.25  # of a run, its end
_PARTS = 3


class Rise(NamedTuple):
    """By how much the mean of the last ``window`` values is above that of those before.

    ``error`` is its standard error; ``steady``: the means of the last three windows are
    in order.
    """

    height: float
    error: float
    window: int
    steady: bool


def rise_at_the_end(values: Sequence[float]) -> Rise | None:
    r"""The rise of a moving average over the end of a run.

    The last quarter of the values, at least 24 of them, has three parts of w values.
    The height is the difference of the means of the last two. Its error comes from what
    is left of the quarter after a parabola, whose lag-one correlation :math:`\rho`
    leaves :math:`w (1 - \rho) / (1 + \rho)` independent values of w: with a constant
    learning rate what an epoch found too high the next finds too.

    Args:
        values: One for each epoch or step, in order.

    Returns:
        The rise, or None of fewer than 24 values.
    """
    n = len(values)
    if n < SHORTEST:
        return None
    w = max(SHORTEST, math.ceil(_SHARE * n)) // _PARTS
    y = torch.as_tensor(values[-_PARTS * w :], dtype=torch.float64)
    y = y - y.mean()  # an objective may be far from zero
    t = torch.linspace(-1, 1, len(y), dtype=torch.float64)
    parabola = torch.stack([torch.ones_like(t), t, t.square()], -1)
    rest = y - parabola @ torch.linalg.lstsq(parabola, y[:, None]).solution[:, 0]
    variance = rest.square().sum() / (len(y) - parabola.shape[1])
    rho = _correlation(rest)
    error = (2 * variance * (1 + rho) / (1 - rho) / w).sqrt()
    first, second, third = y.unflatten(0, (_PARTS, w)).mean(-1).tolist()
    return Rise(third - second, float(error), w, first < second < third)


def _correlation(rest: Tensor) -> float:
    """Lag-one correlation of residuals, at least 0 and below 1."""
    total = float(rest.square().sum())
    if total == 0:
        return 0.0
    return min(max(float((rest[1:] * rest[:-1]).sum()) / total, 0.0), 0.95)


def still_rises(values: Sequence[float], least: float = NATS_PER_DATUM) -> bool:
    """Whether an objective rose at its end by more than its noise and than ``least``.

    Args:
        values: One for each epoch or step, in order; fewer than 24 tell nothing.
        least: What counts, in units of the objective.
    """
    rise = rise_at_the_end(values)
    if rise is None or not rise.steady:
        return False
    return rise.height > max(least, CERTAINTY * rise.error)


def warn_if_rising(values: Sequence[float], name: str, remedy: str) -> None:
    """Say that a run of epochs ended before its bound did, in nats per datum.

    Args:
        values: The bound of each epoch.
        name: Of what ended.
        remedy: What to try.

    Warns:
        NotConvergedWarning: If the bound still rises.
    """
    if still_rises(values):
        warn_user(rising_message(values, name, remedy), NotConvergedWarning)


def rising_message(values: Sequence[float], name: str, remedy: str) -> str:
    """The sentence of :func:`warn_if_rising`."""
    rise = rise_at_the_end(values)
    return (
        f"{name} ended after {len(values)} epochs while its bound still rose: the mean "
        f"over the last {rise.window} is {rise.height:.2g} nats per datum above that "
        f"of the {rise.window} before. {remedy}"
    )
