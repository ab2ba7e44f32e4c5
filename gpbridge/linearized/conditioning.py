r"""Conditioning a posterior on further observations, without touching its factors.

The base posterior is a GP with mean m and covariance c. Observations y' at X' with
noise covariance N' change it by a Schur complement,

.. math::
    m(x) + c(x, X') C^{-1} (y' - m(X')), \qquad
    c(x, x') - c(x, X') C^{-1} c(X', x'), \qquad C = c(X', X') + N',

for any number of outputs, in any space, at a cost that does not depend on the training
data beyond that of the base posterior. Fantasies are batches of y'.

In: a strategy and new observations. Out: :class:`NewData`, and the :class:`Update` that
they make. Next: ``posterior`` applies it, ``gp`` keeps it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_same_device,
    check_same_dtype,
    check_tensor,
)
from gpbridge.prediction import PredictionStrategy, Projection


class NewData(NamedTuple):
    """Observations beyond the training set, targets in transformed units."""

    X: Tensor  # batch x n' x d, as the user passed them until they are used
    Y: Tensor  # batch' x n' x m
    noise: Tensor  # batch x n' x m x m, float64; zero where it is the likelihood's
    own_noise: Tensor  # n', whether it is the likelihood's, read when it is used


class Update(NamedTuple):
    """What further observations change: factor of C and whitened innovation."""

    projection: Projection
    cholesky: Tensor  # batch x (n' m) x (n' m)
    innovation: Tensor  # batch' x (n' m), L^-1 (y' - m(X'))


def check_observations(X: Tensor, Y: Tensor, num_outputs: int) -> None:
    """Require targets ``... x n' x m`` for inputs ``... x n' x d``."""
    check_tensor(Y=Y)
    check_same_device(X=X, Y=Y)
    check_same_dtype("Y", Y, X.dtype)
    if Y.shape[-2:] != (X.shape[-2], num_outputs):
        remedy = "Pass one row of targets for each row of X."
        if num_outputs == 1 and Y.dim() and Y.shape[-1] == X.shape[-2]:
            remedy = "Try Y.unsqueeze(-1)."
        elif X.shape[-2] == 1 and Y.shape == (num_outputs,):
            remedy = "Try Y.unsqueeze(0)."
        raise ShapeError(
            f"Y must be ``... x {X.shape[-2]} x {num_outputs}`` for X of shape "
            f"{tuple(X.shape)}, but has shape {tuple(Y.shape)}. {remedy}"
        )
    check_finite(Y=Y)


def join(old: NewData | None, new: NewData) -> NewData:
    """Concatenate observations along points, batches broadcast."""
    if old is None:
        return new
    joined = []
    for a, b, trailing in zip(old, new, (2, 2, 3, 1), strict=True):
        batch = torch.broadcast_shapes(a.shape[:-trailing], b.shape[:-trailing])
        a = a.expand(*batch, *a.shape[-trailing:])
        b = b.expand(*batch, *b.shape[-trailing:])
        joined.append(torch.cat([a, b], dim=-trailing))
    return NewData(*joined)


def make_update(
    strategy: PredictionStrategy, projection: Projection, mean: Tensor, data: NewData
) -> Update:
    """Factorise the predictive covariance of new observations.

    Args:
        strategy: The base posterior.
        projection: The new inputs seen through the training data.
        mean: Their base posterior mean, ``batch x n' x m``.
        data: The observations.

    Returns:
        The update that :func:`apply_update` applies.
    """
    covariance = add_blocks(strategy.covariance(projection), data.noise)
    L = torch.linalg.cholesky(covariance)
    misfit = (data.Y.double() - mean).flatten(-2)[..., None]
    innovation = torch.linalg.solve_triangular(L, misfit, upper=False)[..., 0]
    return Update(projection, L, innovation)


def apply_update(
    strategy: PredictionStrategy, update: Update, projection: Projection, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior mean and the root of the reduction of the covariance at test points.

    Args:
        strategy: The base posterior.
        update: The new observations.
        projection: Test points.
        mean: Their base posterior mean, ``batch x t x m``.

    Returns:
        The mean ``batch x t x m`` and G, ``batch x (t m) x (n' m)``; the covariance
        falls by G G'.
    """
    cross = strategy.covariance(projection, update.projection)
    G = torch.linalg.solve_triangular(update.cholesky, cross.mT, upper=False).mT
    moved = (G @ update.innovation[..., None])[..., 0]
    return mean + moved.unflatten(-1, mean.shape[-2:]), G


def add_blocks(covariance: Tensor, blocks: Tensor) -> Tensor:
    """Add ``batch x n x m x m`` blocks to the diagonal of ``batch x (n m) x (n m)``."""
    n, m = blocks.shape[-3:-1]
    if m == 1:
        return covariance + torch.diag_embed(blocks[..., 0, 0])
    full = torch.diag_embed(blocks.movedim(-3, -1))  # batch x m x m x n x n
    full = full.movedim((-4, -3), (-3, -1))  # batch x n x m x n x m
    return covariance + full.flatten(-4, -3).flatten(-2)
