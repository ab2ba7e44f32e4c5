"""Augmentation of training data with noise of its own for each row, frozen.

In: a function of inputs, noise and hyperparameters. Out: a record of it. Next:
``held_out_problem`` learns the hyperparameters on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gpbridge.checks import check_positive
from gpbridge.types import Params


@dataclass(frozen=True)
class RowAugmentation:
    """A random change of each row of the inputs whose parameters can be learnt.

    Every row has noise of its own, unlike the orbits of :mod:`gpbridge.augmentation`,
    which all rows share.

    Args:
        function: Maps (X, noise, hparams) to the changed inputs, ``n x d``,
            differentiably in the hyperparameters. The noise is standard normal and
            frozen, so that training has a minimum: use it, draw none.
        hparams: First values of its hyperparameters, by name.
        noise_shape: Of the noise per row; default the shape of a row.

    Example:
        >>> def scale(X, noise, hparams):
        ...     return X * (1 + hparams["log_std"].exp() * noise)
        >>> augmentation = RowAugmentation(scale, {"log_std": -2.0}, noise_shape=(1,))
    """

    function: Callable[[Tensor, Tensor, Params], Tensor]
    hparams: Mapping[str, float | Tensor] = field(default_factory=dict)
    noise_shape: tuple[int, ...] | None = None


def input_noise(std: float = 0.1) -> RowAugmentation:
    """Gaussian noise on every input, with the standard deviation ``log_noise_std``."""
    check_positive(std=std)
    return RowAugmentation(_add_noise, {"log_noise_std": math.log(std)})


def _add_noise(X: Tensor, noise: Tensor, hparams: Params) -> Tensor:
    return X + hparams["log_noise_std"].exp() * noise
