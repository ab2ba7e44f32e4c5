r"""Log densities of single data under draws of a function, and under their mixture.

In: a likelihood, or a user's function in its place, draws of a function and data. Out:
one log density per draw and datum, and the mean of the mixture's on held-out data.
Next: whatever is chosen by held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_inputs,
    check_not_empty,
    check_same_device,
    check_same_length,
    check_tensor,
)
from gpbridge.likelihoods import log_prob
from gpbridge.targets import check_targets
from gpbridge.types import FunctionDraws

PointLikelihood = Callable[[Tensor, Tensor], Tensor]
"""From outputs ``s x n x m`` and targets to log densities of each datum, ``s x n``."""

_ROWS = 4096  # evaluated at a time


def point_log_density(
    likelihood: Likelihood | PointLikelihood,
    outputs: Tensor,
    Y: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Log density of each datum under each draw, ``s x n``.

    Args:
        likelihood: A gpytorch likelihood, or a function of outputs and targets that
            returns the same.
        outputs: ``s x n x m``.
        Y: Targets, ``n`` of them.
        noise: As for :func:`gpbridge.likelihoods.log_prob`.

    Returns:
        Nats.

    Raises:
        ShapeError: If a user's function returns another shape.
    """
    if isinstance(likelihood, Likelihood):
        return log_prob(likelihood, outputs, Y, noise)
    values = likelihood(outputs, Y)
    check_tensor(likelihood=values)
    if values.shape != outputs.shape[:-1]:
        s, n, m = outputs.shape
        raise ShapeError(
            "likelihood must return one log density per draw and datum, "
            f"``{s} x {n}``, for outputs ``{s} x {n} x {m}``, but returned shape "
            f"{tuple(values.shape)}. Sum over outputs, not over data."
        )
    return values


def check_data(X: Tensor, Y: Tensor, suffix: str = "") -> None:
    """Require inputs ``n x d`` and as many targets, at least one."""
    x, y = f"X{suffix}", f"Y{suffix}"
    check_inputs(X, x)
    if X.dim() != 2:
        raise ShapeError(
            f"{x} must be ``n x d``, but has shape {tuple(X.shape)}. Flatten images to "
            "rows and give the network's input_shape."
        )
    check_tensor(**{y: Y})
    check_not_empty(**{x: X})
    check_same_length(**{x: X, y: Y})
    check_same_device(**{x: X, y: Y})


@torch.no_grad()
def mixture_log_density(
    likelihood: Likelihood | PointLikelihood,
    draws: FunctionDraws,
    X: Tensor,
    Y: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Mean log density of data under the mixture of all draws, in nats per datum.

    .. math:: \frac1n \sum_i \log \frac1s \sum_j p(y_i \mid f_j(x_i))

    Args:
        likelihood: As for :func:`point_log_density`.
        draws: The functions.
        X: Inputs ``n x d``.
        Y: Targets in the form of the likelihood.
        noise: Noise variances of these points, one row each, for a likelihood whose own
            are those of other points.

    Returns:
        A scalar, float64.

    Raises:
        ValueError: If the likelihood has fixed noise and these points have none.
    """
    if noise is None and isinstance(likelihood, FixedNoiseGaussianLikelihood):
        raise ValueError(
            f"{type(likelihood).__name__} holds the noise of the training data, not "
            "that of what is held out. Pass noise variances of the held-out points, "
            "as noise_val= to a tuning function."
        )
    if noise is not None:
        check_tensor(noise=noise)
        check_same_length(X=X, noise=noise)
    total = 0.0
    for rows in torch.arange(len(X), device=X.device).split(_ROWS):
        own = None if noise is None else noise[rows]
        logs = point_log_density(likelihood, draws(X[rows]), Y[rows], own).double()
        total = total + (torch.logsumexp(logs, 0) - math.log(len(logs))).sum()
    return total / len(X)


def check_point_targets(
    likelihood: Likelihood | PointLikelihood,
    X: Tensor,
    Y: Tensor,
    num_outputs: int,
    name: str = "Y",
) -> Tensor:
    """Targets in canonical form, checked where the likelihood has a rule for it."""
    if check_targets.dispatch(type(likelihood)) is check_targets.dispatch(object):
        return Y
    return check_targets(likelihood, Y, num_outputs, len(X), X.dtype, name=name)
