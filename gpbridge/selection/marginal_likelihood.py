r"""The log evidence of every model, in total nats and without hyperpriors.

Upstream's objectives divide: the exact one by the number of targets, tasks included,
the variational ones by the size of the batch, a sum over models by the number of
models; and all of them add log hyperpriors. Here a number is the log probability of the
data, or says that it is a bound of it.

In: a model, and data where it keeps none. Out: a scalar, or :class:`EvidenceParts`.
Next: ``held_out`` asks the same of points left out, ``compare`` makes a table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from botorch.models import ModelListGP
from botorch.models.approximate_gp import ApproximateGPyTorchModel
from botorch.models.model import Model
from gpytorch.likelihoods import Likelihood
from gpytorch.mlls import InducingPointKernelAddedLossTerm
from gpytorch.models import GP, ApproximateGP, ExactGP
from torch import Generator, Tensor, nn

from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.gp import LinearizedGP
from gpbridge.linearized.structures import Structure
from gpbridge.selection.gaussian_marginal import (
    diagonal_blocks,
    gaussian_marginal,
    log_density,
)
from gpbridge.selection.mll import log_prior
from gpbridge.selection.variational_bound import (
    expected_fit,
    inducing_strategy,
    is_point_estimate,
    learnt_directions,
    prepared,
)

EXACT, BOUND, APPROXIMATION = "exact", "lower bound", "approximation"
ESTIMATE = "estimated lower bound"


class EvidenceParts(NamedTuple):
    r"""A log evidence in total nats, ``value = fit - complexity``, and what it is.

    ``kind`` is ``"exact"``, ``"lower bound"``, ``"approximation"``, which is neither,
    or ``"estimated lower bound"`` where the likelihood of a variational GP, such as
    gpytorch's softmax, is averaged over 256 draws; ``standard_error`` is the error of
    that average in total nats, and zero elsewhere.

    ===============  =====================================  ==========================
    model            fit                                    complexity
    ===============  =====================================  ==========================
    Gaussian noise   log joint density at the optimum       :math:`\frac12 \log \det (I
                                                            + \Sigma^{-1/2} K
                                                            \Sigma^{-1/2})`
    variational      expected log likelihood                KL divergence from the prior
    labels           as for Gaussian noise, by Laplace's    the same, at the network's
                     approximation                          outputs
    ===============  =====================================  ==========================

    ``effective_dimension`` counts the directions that the data determine: the trace of
    :math:`K C^{-1}`, or of one minus the ratio of posterior to prior covariance of the
    inducing values. ``log_prior`` is that of the hyperparameters and no part of the
    value. ``num_targets`` counts numbers, not points.
    """

    value: Tensor
    kind: str
    fit: Tensor
    complexity: Tensor
    effective_dimension: Tensor
    log_prior: Tensor
    num_targets: int
    standard_error: Tensor | float = 0.0


def log_evidence(
    model: GP | Model,
    X: Tensor | None = None,
    Y: Tensor | None = None,
    likelihood: Likelihood | None = None,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Log marginal likelihood of a model's training data, in total nats.

    Without hyperpriors, in transformed units, those that the likelihood sees. Exact for
    a LinearizedGP with Gaussian noise and for gpytorch's ExactGP: dense Cholesky
    factors in float64 whatever upstream's global settings say. A lower bound for
    variational GPs and for an exact GP with an ``InducingPointKernel`` (Titsias),
    Laplace's approximation for a LinearizedGP with labels or a structured curvature.

    Args:
        model: The model; a ModelListGP has the sum over its models.
        X: Inputs ``n x d``, for variational GPs, which keep no data.
        Y: Targets, ``n x m`` or ``n``, untransformed.
        likelihood: For gpytorch's own variational GPs, which have none.
        generator: Of draws for a likelihood without closed form or quadrature; by
            default one with seed 0, so that two calls give the same.

    Returns:
        A scalar, differentiable in the hyperparameters; a batch for batched models,
        among them botorch's with several independent outputs.

    Raises:
        TypeError: If the model has no evidence here.
        ValueError: If data are missing, or given to a model that keeps its own.

    Example:
        >>> from botorch.models import SingleTaskGP
        >>> X = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
        >>> log_evidence(SingleTaskGP(X, X.sin())).shape
        torch.Size([])
    """
    if isinstance(model, ModelListGP):
        _check_no_data(model, X, Y)
        return sum(log_evidence(each).sum() for each in model.models)
    if isinstance(model, LinearizedGP):
        _check_no_data(model, X, Y)
        return model.log_evidence()
    if isinstance(model, ExactGP):
        _check_no_data(model, X, Y)
        return log_density(gaussian_marginal(model)) + _added_terms(model)
    if isinstance(model, ApproximateGP | ApproximateGPyTorchModel):
        bound = expected_fit(model, *prepared(model, X, Y, likelihood), generator)
        return bound.fit - bound.complexity
    raise TypeError(
        "log_evidence needs a LinearizedGP, a gpytorch ExactGP with training data, or "
        f"a variational GP with X and Y, but model is {type(model).__name__}."
    )


def evidence_parts(
    model: GP | Model,
    X: Tensor | None = None,
    Y: Tensor | None = None,
    likelihood: Likelihood | None = None,
    *,
    generator: Generator | None = None,
) -> EvidenceParts:
    """The log evidence, its parts, and whether it is exact, a bound or neither.

    Args:
        model: As for :func:`log_evidence`, no ModelListGP.
        X: As for :func:`log_evidence`.
        Y: As for :func:`log_evidence`.
        likelihood: As for :func:`log_evidence`.
        generator: As for :func:`log_evidence`.

    Returns:
        The parts; ``value`` equals :func:`log_evidence`. Batched where it is.

    Raises:
        TypeError: If the model has no evidence here.
        ValueError: As for :func:`log_evidence`.
    """
    if isinstance(model, LinearizedGP):
        _check_no_data(model, X, Y)
        found = model.evidence()
        return EvidenceParts(
            found.value,
            _kind(model, found.lower_bound),
            found.fit,
            found.complexity,
            found.effective_dimension,
            log_prior(model, found.value),
            model.train_targets.numel(),
        )
    if isinstance(model, ExactGP):
        _check_no_data(model, X, Y)
        return _parts_of_exact(model)
    if isinstance(model, ApproximateGP | ApproximateGPyTorchModel):
        X, Y, likelihood = prepared(model, X, Y, likelihood)
        fit, divergence, error = expected_fit(model, X, Y, likelihood, generator)
        strategy = inducing_strategy(model)
        prior = log_prior(model, fit)
        if all(likelihood is not module for module in model.modules()):
            prior = prior + log_prior(likelihood, fit)
        kind = BOUND if error is None else ESTIMATE
        return EvidenceParts(
            fit - divergence,
            APPROXIMATION if is_point_estimate(strategy) else kind,
            fit,
            divergence,
            learnt_directions(strategy),
            prior,
            Y.numel(),
            0.0 if error is None else error,
        )
    raise TypeError(
        "evidence_parts needs a LinearizedGP, a gpytorch ExactGP or a variational GP, "
        f"but model is {type(model).__name__}."
    )


def _kind(model: LinearizedGP, is_bound: bool) -> str:
    """Laplace's approximation of labels has no side, whatever its curvature."""
    if not is_gaussian(model.likelihood):
        return APPROXIMATION
    if isinstance(model.inference, Structure):
        return BOUND if is_bound else APPROXIMATION
    return EXACT


def _parts_of_exact(model: ExactGP) -> EvidenceParts:
    marginal = gaussian_marginal(model)
    L = marginal.factor()
    added = _added_terms(model)
    value = log_density(marginal, L) + added
    half_log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    own = torch.linalg.cholesky(marginal.noise).diagonal(dim1=-2, dim2=-1)
    complexity = half_log_det - own.log().sum((-1, -2))
    with torch.no_grad():
        m = marginal.targets.shape[-1]
        blocks = diagonal_blocks(torch.cholesky_inverse(L), m)
        noise_share = (blocks * marginal.noise).sum((-1, -2, -3))
        dimension = L.shape[-1] - noise_share
    terms = list(model.added_loss_terms())
    titsias = [isinstance(term, InducingPointKernelAddedLossTerm) for term in terms]
    kind = BOUND if all(titsias) else APPROXIMATION
    return EvidenceParts(
        value,
        kind if terms else EXACT,
        value + complexity,
        complexity,
        dimension,
        log_prior(model, value),
        L.shape[-1],
    )


def _added_terms(model: ExactGP) -> Tensor | float:
    """What upstream's objective adds, as the trace term of inducing points."""
    return sum(term.loss().double() for term in model.added_loss_terms())


def _check_no_data(model: nn.Module, X: Tensor | None, Y: Tensor | None) -> None:
    if X is not None or Y is not None:
        raise ValueError(
            f"X and Y are for variational GPs, but {type(model).__name__} keeps its "
            "training data. Leave them out, or build the model on these data."
        )
