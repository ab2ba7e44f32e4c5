r"""The Gaussian that a model with Gaussian noise gives to its training targets.

.. math:: y \sim N(\mu, C), \qquad C = K + \Sigma

In: an exact GP or a linearised network. Out: a :class:`GaussianMarginal`, float64, the
same for every class of model: all tasks of a point stand together. Next:
``marginal_likelihood`` is its log density, ``held_out`` leaves points out of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.models import GP, ExactGP
from linear_operator.operators import DiagLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from gpbridge.checks import check_finite, check_memory
from gpbridge.likelihoods import is_gaussian, noise_covariance
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.structures import Structure

MEMORY_BUDGET = 4 * 2**30  # bytes, of the dense matrices of an exact GP


class GaussianMarginal(NamedTuple):
    """Targets, their mean under the model, and what they vary by; float64.

    In transformed units, those that the likelihood sees. ``m`` counts the tasks of a
    multitask likelihood; outputs that botorch keeps in the batch stay a batch.
    """

    targets: Tensor  # ... x n x m
    mean: Tensor  # ... x n x m
    covariance: Tensor  # K + Sigma, ... x (n m) x (n m), tasks of a point together
    noise: Tensor  # Sigma, ... x n x m x m

    @property
    def residual(self) -> Tensor:
        """Targets less their mean, ``... x (n m)``."""
        return (self.targets - self.mean).flatten(-2)

    def factor(self) -> Tensor:
        """Lower Cholesky factor of the covariance."""
        return psd_safe_cholesky(self.covariance)

    def subset(self, points: Tensor) -> GaussianMarginal:
        """The marginal of some points, by their numbers."""
        m = self.targets.shape[-1]
        rows = (points[:, None] * m + torch.arange(m, device=points.device)).flatten()
        return GaussianMarginal(
            self.targets[..., points, :],
            self.mean[..., points, :],
            self.covariance[..., rows[:, None], rows],
            self.noise[..., points, :, :],
        )


def log_density(marginal: GaussianMarginal, factor: Tensor | None = None) -> Tensor:
    """Log density of the targets in total nats, Rasmussen and Williams eq. (2.30).

    Args:
        marginal: The Gaussian.
        factor: Its Cholesky factor, if at hand.

    Returns:
        One number per batch, differentiable.
    """
    L = marginal.factor() if factor is None else factor
    residual = marginal.residual.unsqueeze(-1)
    white = torch.linalg.solve_triangular(L, residual, upper=False)[..., 0]
    half_log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * L.shape[-1] * math.log(2 * math.pi)
    return -0.5 * white.square().sum(-1) - half_log_det - constant


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal, ``... x (n m) x (n m)`` to ``... x n x m x m``."""
    n = matrix.shape[-1] // size
    split = matrix.unflatten(-1, (n, size)).unflatten(-3, (n, size))
    points = torch.arange(n, device=matrix.device)
    # Two indices with a slice between them put their dimension in front.
    return split[..., points, :, points, :].movedim(0, -3)


def gaussian_marginal(model: GP) -> GaussianMarginal:
    """The distribution that a model gives to its training targets.

    Memory of three dense ``n m x n m`` matrices.

    Args:
        model: An exact GP with its data, or a LinearizedGP with Gaussian noise.

    Returns:
        The Gaussian, differentiable in the hyperparameters.

    Raises:
        TypeError: If the model has no such Gaussian.
        NotImplementedError: If its curvature is a structure, whose Gaussian is another.
        ValueError: If an exact GP has no data.
        MemoryError: If the matrices do not fit.
    """
    if isinstance(model, LinearizedGP):
        return _of_linearized(model)
    if not isinstance(model, ExactGP):
        raise TypeError(
            "The Gaussian of the training targets needs a gpbridge.LinearizedGP or a "
            f"gpytorch ExactGP, but model is {type(model).__name__}."
        )
    if model.train_inputs is None or model.train_targets is None:
        raise ValueError(
            f"{type(model).__name__} has no training data. Try model.set_train_data."
        )
    check_finite(**{"model.train_targets": model.train_targets.reshape(-1)})
    batch = model.train_inputs[0].shape[:-2].numel()
    count = model.train_targets.numel() // batch
    check_memory(
        f"The exact evidence of {count} targets",
        3 * 8.0 * batch * count**2,
        MEMORY_BUDGET,
        "Choose fewer points, or a variational GP, whose evidence is a bound.",
    )
    training = model.training
    model.train()
    try:
        prior = model(*model.train_inputs)
        noise = model.likelihood(_without_variance(prior), *model.train_inputs)
        return _marginal(model.train_targets, prior, noise)
    finally:
        model.train(training)


def check_no_added_terms(model: GP, what: str) -> None:
    """Refuse a model whose evidence is a bound with terms beside the Gaussian.

    Raises:
        NotImplementedError: As of an ``InducingPointKernel``, whose bound has a trace
            term of all data, which no part of the data determines.
    """
    owners = [m for m in model.modules() if getattr(m, "_added_loss_terms", None)]
    if isinstance(model, ExactGP) and owners:
        kinds = ", ".join(sorted({type(owner).__name__ for owner in owners}))
        raise NotImplementedError(
            f"{what} has no closed form for a model with {kinds}, whose evidence is a "
            "bound with a term for all data together. Score it on held-out data."
        )


def _without_variance(prior: MultivariateNormal) -> MultivariateNormal:
    """The same mean without variance: a likelihood adds its noise and nothing else."""
    zero = DiagLinearOperator(torch.zeros_like(prior.mean.flatten(len(_batch(prior)))))
    if isinstance(prior, MultitaskMultivariateNormal):
        return MultitaskMultivariateNormal(
            prior.mean, zero, interleaved=prior._interleaved
        )
    return MultivariateNormal(prior.mean, zero)


def _batch(prior: MultivariateNormal) -> torch.Size:
    return prior.mean.shape[: prior.mean.dim() - len(prior.event_shape)]


def _marginal(
    targets: Tensor, prior: MultivariateNormal, noisy: MultivariateNormal
) -> GaussianMarginal:
    batch = _batch(prior)
    K = prior.lazy_covariance_matrix.to_dense().double()
    noise = noisy.lazy_covariance_matrix.to_dense().double()
    mean = prior.mean
    if isinstance(prior, MultitaskMultivariateNormal):
        n, m = prior.event_shape
        if not prior._interleaved:  # tasks are the slow index: sort by point
            order = torch.arange(n * m, device=K.device).reshape(m, n).mT.reshape(-1)
            K = K[..., order[:, None], order]
        if not noisy._interleaved:
            order = torch.arange(n * m, device=K.device).reshape(m, n).mT.reshape(-1)
            noise = noise[..., order[:, None], order]
    else:
        n, m = mean.shape[-1], 1
        mean, targets = mean.unsqueeze(-1), targets.unsqueeze(-1)
    return GaussianMarginal(
        targets.double().expand(*batch, n, m),
        mean.double(),
        K + noise,
        diagonal_blocks(noise, m),
    )


def _of_linearized(model: LinearizedGP) -> GaussianMarginal:
    model.check_all_data_is_training_data("The Gaussian of the targets")
    problem = model.problem
    if not is_gaussian(model.likelihood):
        raise TypeError(
            f"{type(model.likelihood).__name__} observes labels, whose distribution "
            "under the model is no Gaussian."
        )
    if isinstance(model.inference, Structure):
        raise NotImplementedError(
            "The joint distribution of the targets is that of the exact posterior, but "
            f"the model has inference={type(model.inference).__name__}(...). Score it "
            "on held-out data, or build it with inference=Exact()."
        )
    count = problem.outputs.numel()
    check_memory(
        f"The joint distribution of {count} targets",
        3 * 8.0 * count**2,
        model.inference.memory_budget,
        "Choose fewer points, or a larger budget, Exact(memory_budget=...).",
    )
    Y = problem.Y.double()
    noise = noise_covariance(model.likelihood, Y).double()
    n, m = Y.shape
    covariance = problem.gram(model.prior_variance.double())
    same = torch.eye(n, dtype=noise.dtype, device=noise.device)
    added = same[:, None, :, None] * noise[:, :, None, :]  # n x m x n x m
    return GaussianMarginal(
        Y, problem.prior_mean, covariance + added.reshape(n * m, n * m), noise
    )
