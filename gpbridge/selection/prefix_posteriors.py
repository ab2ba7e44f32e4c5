r"""What a Gaussian model predicts for each datum from the data before it.

In whitened units, where the noise is the identity, the targets have the covariance
:math:`A = I + R^\top K R = L L^\top`, their residuals from the prior mean are r, and
with :math:`z = L^{-1} r` the rows of one Cholesky factor are all sequential predictions
at once: given the data before it, datum i has the residual :math:`L_{ii} z_i` and the
covariance :math:`L_{ii} L_{ii}^\top`, both m-dimensional for m outputs.

In: a model with Gaussian noise. Out: its :class:`WhitenedData`, and for any order of
the data the :class:`Predictions`. Next: ``speed_bound`` sums their scores.

References:
    Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006,
    section 5.4.1 (the evidence as a product of sequential predictions).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.models import GP, ExactGP
from gpytorch.settings import lazily_evaluate_kernels
from torch import Tensor

from gpbridge.checks import (
    ShapeError,
    check_finite,
    check_inputs,
    check_memory,
    check_not_empty,
    check_positive,
    check_same_device,
    check_same_length,
    check_tensor,
)
from gpbridge.likelihoods import hessian_root, is_gaussian
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.prediction import apply_root, factorise, whiten
from gpbridge.selection.gaussian_marginal import MEMORY_BUDGET, check_no_added_terms

_LEAST = 256  # rows that weight space takes in at a time, at least


class LinearModel(NamedTuple):
    r"""Bayesian linear regression :math:`y = \Phi w + e` with a normal prior of w.

    Attributes:
        features: :math:`\Phi`, ``n x f``.
        targets: y, ``n``.
        noise_variance: Of e.
        prior_variance: Of each weight.
    """

    features: Tensor
    targets: Tensor
    noise_variance: float | Tensor
    prior_variance: float | Tensor = 1.0


Model = LinearizedGP | ExactGP | LinearModel


class WhitenedData(NamedTuple):
    """Data in units in which the noise is the identity, and their prior covariance.

    ``log_scale`` is what the change of units adds to each log density. Of ``gram`` and
    ``rows``, whose product with its transpose it is, the smaller one is given.
    """

    residual: Tensor  # n x m, R' (y - prior mean)
    log_scale: Tensor  # n
    gram: Tensor | None  # (n m) x (n m), R' K R
    rows: Tensor | None  # n x m x p, R' Phi


class Predictions(NamedTuple):
    """Each datum given those before it, in the order of arrival, whitened."""

    residual: Tensor  # n x m
    innovation: Tensor  # n x m, L_ii^-1 residual
    factor: Tensor  # n x m x m, L_ii
    log_scale: Tensor  # n


def check_model(model: Model) -> None:
    """Refuse a model that has no exact posteriors of prefixes of its data.

    Args:
        model: The model.

    Raises:
        TypeError: If it is no LinearizedGP, ExactGP or LinearModel, or has no data.
        NotImplementedError: If its noise is not Gaussian, or its kernel has inducing
            points.
        ShapeError: If it is a batch of models.
        ValueError: If a variance is not positive.
    """
    if isinstance(model, LinearModel):
        check_tensor(features=model.features, targets=model.targets)
        check_inputs(model.features, "features")
        if model.features.dim() != 2 or model.targets.dim() != 1:
            raise ShapeError(
                "features must be ``n x f`` and targets ``n``, but have shapes "
                f"{tuple(model.features.shape)} and {tuple(model.targets.shape)}. "
                "Several outputs or batches are models of their own."
            )
        check_not_empty(features=model.features)
        check_same_length(features=model.features, targets=model.targets)
        check_same_device(features=model.features, targets=model.targets)
        check_finite(targets=model.targets)
        for name in ("noise_variance", "prior_variance"):
            check_positive(**{name: getattr(model, name)})
            if torch.as_tensor(getattr(model, name)).numel() != 1:
                raise ShapeError(
                    f"{name} must be one number, but has shape "
                    f"{tuple(getattr(model, name).shape)}. Scale the features or rows."
                )
        return
    if not isinstance(model, LinearizedGP | ExactGP):
        raise TypeError(
            "model must be a LinearizedGP, a gpytorch ExactGP, or a LinearModel of "
            f"features and targets, but is {type(model).__name__}."
        )
    check_no_added_terms(model, "The bound")
    if not is_gaussian(model.likelihood):
        raise NotImplementedError(
            "The bound averages over exact posteriors of the first data, which need "
            f"Gaussian noise, but the likelihood is {type(model.likelihood).__name__}. "
            "For labels, TrainingSpeed ranks training runs, and model.log_evidence() "
            "is Laplace's approximation."
        )
    if isinstance(model, LinearizedGP):
        model.check_all_data_is_training_data("The bound")
        return
    if model.train_targets is None:
        raise TypeError("model must have training data, but has none. Set them first.")
    _check_one(model.train_inputs[0].shape[:-2])


def _check_one(batch_shape: torch.Size) -> None:
    if len(batch_shape):
        raise ShapeError(
            f"model must be one GP, but is a batch of shape {tuple(batch_shape)}. "
            "Pass models of single outputs one by one, and add their bounds."
        )


def whiten_data(model: Model) -> WhitenedData:
    """The data of a checked model, differentiable in its hyperparameters, float64."""
    if isinstance(model, LinearModel):
        return _of_linear_model(model)
    if isinstance(model, LinearizedGP):
        return _of_network(model)
    return _of_process(model)


def predict_in_order(data: WhitenedData, order: Tensor) -> Predictions:
    """Predict each datum from those before it.

    Costs (n m)^3 / 3 with a Gram matrix, and with features 2 n m p^2 and no matrix
    larger than p x p or a few hundred rows.

    Args:
        data: The data.
        order: Row numbers, ``n``.

    Returns:
        The predictions in this order.
    """
    n, m = data.residual.shape
    residual, log_scale = data.residual[order], data.log_scale[order]
    if data.gram is not None:
        gram = data.gram.unflatten(1, (n, m)).unflatten(0, (n, m))
        gram = gram[order][:, :, order].flatten(2).flatten(0, 1)
        factor, innovation = _whitened(gram, residual)
    else:
        factor, innovation = _in_blocks(data.rows[order], residual)
    residual = (factor @ innovation[..., None])[..., 0]
    return Predictions(residual, innovation, factor, log_scale)


def _whitened(gram: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal blocks ``n x m x m`` of L, and L^-1 r, ``n x m``."""
    n, m = residual.shape
    L = factorise(gram)
    rhs = residual.reshape(-1, 1)
    z = torch.linalg.solve_triangular(L, rhs, upper=False).reshape(n, m)
    blocks = L.unflatten(1, (n, m)).unflatten(0, (n, m))
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0), z


def _in_blocks(rows: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The same from features ``n x m x p``: posteriors of weights between blocks."""
    m, p = rows.shape[1:]
    step = max(1, max(p, _LEAST) // m)
    scatter, pulled = rows.new_zeros(p, p), rows.new_zeros(p, 1)
    found = []
    for Phi, r in zip(rows.split(step), residual.split(step), strict=True):
        H = factorise(scatter)  # of the posterior precision I + Phi' Phi so far
        flat, size = Phi.flatten(0, 1), Phi.shape[:2]
        seen = torch.linalg.solve_triangular(H, flat.mT, upper=False)
        misfit = r.reshape(-1, 1) - flat @ torch.cholesky_solve(pulled, H)
        found.append(_whitened(seen.mT @ seen, misfit.reshape(size)))
        scatter = scatter + flat.mT @ flat
        pulled = pulled + flat.mT @ r.reshape(-1, 1)
    factors, innovations = zip(*found, strict=True)
    return torch.cat(factors), torch.cat(innovations)


def _of_linear_model(model: LinearModel) -> WhitenedData:
    Phi, y = model.features.double(), model.targets.double()
    noise, prior = (
        torch.as_tensor(value, dtype=y.dtype, device=y.device).reshape(())
        for value in (model.noise_variance, model.prior_variance)
    )
    rows = Phi * (prior / noise).sqrt()
    residual = (y / noise.sqrt())[:, None]
    log_scale = (-0.5 * noise.log()).expand(len(y))
    if rows.shape[1] < len(y):
        return WhitenedData(residual, log_scale, None, rows[:, None])
    return WhitenedData(residual, log_scale, rows @ rows.mT, None)


def _of_network(model: LinearizedGP) -> WhitenedData:
    problem, s = model.problem, model.prior_variance.double()
    root = problem.root()
    misfit = problem.Y - problem.prior_mean
    residual, log_scale = _to_units(root, misfit)
    if problem.space == "function":
        gram = whiten(problem.gram(s), root)
        return WhitenedData(residual, log_scale, gram, None)
    rows = problem.rows()
    if rows is None:
        check_memory(
            f"The Jacobian of {len(problem.X)} points and {problem.num_params} weights",
            8.0 * problem.outputs.numel() * problem.num_params,
            problem.inference.memory_budget / 4,
            "Raise the budget, Exact(memory_budget=...), of which a quarter is for it; "
            "or pass solver=, which needs products only.",
        )
    rows = apply_root(root.mT, rows * problem.expand(s.sqrt()))
    rows = rows.unflatten(0, misfit.shape)
    return WhitenedData(residual, log_scale, None, rows)


def _of_process(model: GP) -> WhitenedData:
    count = model.train_targets.numel()
    check_memory(
        f"The prior covariance of {count} targets",
        3 * 8.0 * count**2,
        MEMORY_BUDGET,
        "Choose fewer points, or a LinearModel of features, in whose space the data "
        "need no matrix of their own.",
    )
    training = model.training
    model.train()
    try:
        with lazily_evaluate_kernels(False):
            prior = model(*model.train_inputs)
            _check_one(prior.batch_shape)
            gram = prior.covariance_matrix.double()
    finally:
        model.train(training)
    mean, y = prior.mean.double(), model.train_targets.double()
    if isinstance(prior, MultitaskMultivariateNormal):
        n, m = mean.shape
        if not prior._interleaved:  # output-major
            gram = gram.reshape(m, n, m, n).permute(1, 0, 3, 2).reshape(n * m, n * m)
    else:
        mean, y = mean[:, None], y[:, None]
    root = hessian_root(model.likelihood, mean)
    residual, log_scale = _to_units(root, y - mean)
    return WhitenedData(residual, log_scale, whiten(gram, root), None)


def _to_units(root: Tensor, misfit: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened residuals ``n x m`` and the logarithms ``n`` of the change of units."""
    residual = (root.mT @ misfit[..., None])[..., 0]
    return residual, torch.linalg.slogdet(root).logabsdet
