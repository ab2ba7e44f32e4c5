"""What training minimises, and what is measured of a trained network.

In: a likelihood and targets. Out: a mean loss of outputs, with the targets in the form
that it wants; the outputs of a network and its residual variances on some rows.
Next: ``training`` minimises it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, Likelihood
from torch import Tensor, nn
from torch.nn import functional as F

from gpbridge.checks import check_same_dtype
from gpbridge.likelihoods import is_gaussian, log_prob
from gpbridge.targets import check_targets, default_likelihood

EVALUATION_ROWS = 4096  # rows per forward pass without gradient


class Objective(NamedTuple):
    """A mean loss of outputs ``n x m`` and of targets in the form that it wants.

    With outputs and targets of k networks, ``k x n x m``, it gives ``k``.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    targets: Tensor
    num_outputs: int
    is_regression: bool


def objective_for(
    likelihood: Likelihood | None,
    Y: Tensor,
    num_outputs: int,
    num_rows: int,
    dtype: torch.dtype,
) -> Objective:
    """Pick the loss; check the targets and bring them into its form."""
    if likelihood is None:
        likelihood = default_likelihood(Y, num_outputs, dtype)
    targets = check_targets(likelihood, Y, num_outputs, num_rows, dtype)
    if not is_gaussian(likelihood):
        return Objective(
            partial(_mean_nll, likelihood), targets, num_outputs, is_regression=False
        )
    check_same_dtype("train_Y", targets, dtype)
    if not isinstance(likelihood, FixedNoiseGaussianLikelihood):
        return Objective(_square_loss, targets, num_outputs, is_regression=True)
    precision = 1 / likelihood.noise.detach().to(Y)
    weights = (precision / precision.mean())[:, None]
    # Weights travel as a last column, so that batches keep them beside their rows.
    targets = torch.cat([targets, weights], -1)
    return Objective(_weighted_square_loss, targets, num_outputs, is_regression=True)


def _mean_nll(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    return -log_prob(likelihood, outputs, targets).mean(-1)


def _square_loss(outputs: Tensor, Y: Tensor) -> Tensor:
    squares = F.mse_loss(outputs, Y, reduction="none")
    return squares.sum((-2, -1)) * (0.5 / Y.shape[-2])


def _weighted_square_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    Y, weights = targets[..., :-1], targets[..., -1:]
    return 0.5 * (weights * (outputs - Y).square()).sum((-2, -1)) / Y.shape[-2]


def evaluate(network: nn.Module, X: Tensor, num_outputs: int) -> Tensor:
    """Outputs ``n x m`` in chunks, without gradients."""
    with torch.no_grad():
        chunks = [network(rows) for rows in X.split(EVALUATION_ROWS)]
    return torch.cat([chunk.reshape(-1, num_outputs) for chunk in chunks])


def residual_variance(
    network: nn.Module, X: Tensor, Y: Tensor, num_outputs: int
) -> Tensor | None:
    """Mean squared residual of each output, ``m``; None without rows."""
    if len(X) == 0:
        return None
    return (evaluate(network, X, num_outputs) - Y).square().mean(0)
