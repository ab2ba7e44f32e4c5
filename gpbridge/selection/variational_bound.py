r"""The variational lower bound of the evidence, whole and in total nats.

.. math:: \log p(y) \ge \sum_i E_{q(f_i)} \log p(y_i \mid f_i)
    - \mathrm{KL}(q(u) \,\|\, p(u)), \qquad \text{Hensman et al. (2015), eq. (6)}

Of the model as upstream defines it, which adds a jitter to the prior variance of every
point and inducing point; in float64 that is 1e-6, and with a noise variance not far
above it the bound is of a slightly noisier model.

In: a variational GP with all its data. Out: both terms. Next: ``marginal_likelihood``.
"""

from __future__ import annotations

import torch
from botorch.models.approximate_gp import ApproximateGPyTorchModel
from botorch.models.model import Model
from gpytorch.likelihoods import Likelihood
from gpytorch.variational import DeltaVariationalDistribution
from torch import Tensor, nn

from gpbridge.checks import ShapeError, check_finite, check_inputs, check_same_length

_CHUNK = 2048  # rows at a time: upstream forms their joint covariance below a size


def prepared(
    model: nn.Module, X: Tensor | None, Y: Tensor | None, likelihood: Likelihood | None
) -> tuple[Tensor, Tensor, Likelihood]:
    """Data of a variational GP after its transforms, and the likelihood that sees them.

    Args:
        model: Of gpytorch or botorch.
        X: Inputs ``n x d``.
        Y: Targets, ``n x m`` or ``n``.
        likelihood: Where the model has none.

    Returns:
        Inputs ``n x d``, targets ``n`` or ``n x m``, and the likelihood.

    Raises:
        ValueError: If data or likelihood are missing.
        ShapeError: If the data have another shape.
    """
    kind = type(model).__name__
    if X is None or Y is None:
        raise ValueError(
            f"A variational GP keeps no data, and {kind} was given without. Pass all "
            "training inputs and targets, X and Y."
        )
    own = getattr(model, "likelihood", None)
    if own is None and likelihood is None:
        raise ValueError(
            f"{kind} has no likelihood of its own. Pass likelihood=, the one it was "
            "trained with."
        )
    likelihood = own if likelihood is None else likelihood
    check_inputs(X, "X")
    check_same_length(X=X, Y=Y)
    check_finite(Y=Y)
    if X.dim() != 2 or Y.dim() not in (1, 2):
        raise ShapeError(
            "X must be ``n x d`` and Y ``n`` or ``n x m``, but they have shapes "
            f"{tuple(X.shape)} and {tuple(Y.shape)}."
        )
    if isinstance(model, Model):
        transform = getattr(model, "outcome_transform", None)
        training = model.training
        model.eval()  # transforms apply, and learn nothing
        try:
            X = model.transform_inputs(X)
            if transform is not None:
                Y, _ = transform(Y[:, None] if Y.dim() == 1 else Y, X=X)
        finally:
            model.train(training)
    return X, Y[:, 0] if Y.dim() == 2 and Y.shape[1] == 1 else Y, likelihood


def expected_fit(
    model: nn.Module, X: Tensor, Y: Tensor, likelihood: Likelihood
) -> tuple[Tensor, Tensor]:
    """Expected log likelihood and KL divergence of all data, in total nats.

    Args:
        model: A variational GP.
        X: From :func:`prepared`.
        Y: From :func:`prepared`.
        likelihood: From :func:`prepared`.

    Returns:
        Both terms of the bound, differentiable.
    """
    inner = model.model if isinstance(model, ApproximateGPyTorchModel) else model
    training = model.training, likelihood.training
    model.train()
    likelihood.train()
    devices = [X.device] if X.is_cuda else []
    try:
        # Upstream draws from the global state: to place a new distribution over the
        # inducing values, and in likelihoods without quadrature. It is put back.
        with torch.random.fork_rng(devices=devices):
            fit = sum(
                likelihood.expected_log_prob(y, inner(x)).sum(-1)
                for x, y in zip(X.split(_CHUNK), Y.split(_CHUNK), strict=True)
            )
        complexity = inner.variational_strategy.kl_divergence()
        for term in inner.added_loss_terms():
            complexity = complexity + term.loss()
    finally:
        model.train(training[0])
        likelihood.train(training[1])
    return fit, complexity


def inducing_strategy(model: nn.Module) -> nn.Module:
    """The strategy that holds the inducing values, below those that mix tasks."""
    inner = model.model if isinstance(model, ApproximateGPyTorchModel) else model
    strategy = inner.variational_strategy
    while hasattr(strategy, "base_variational_strategy"):
        strategy = strategy.base_variational_strategy
    return strategy


@torch.no_grad()
def learnt_directions(strategy: nn.Module) -> Tensor:
    """Trace of I - P^-1 S over the inducing values, summed over tasks."""
    posterior, prior = strategy.variational_distribution, strategy.prior_distribution
    count = torch.as_tensor(float(prior.mean.shape[-1]), device=prior.mean.device)
    if not hasattr(posterior, "lazy_covariance_matrix"):
        return count.double()
    S = posterior.lazy_covariance_matrix.to_dense().double()
    P = prior.lazy_covariance_matrix.to_dense().double()
    ratio = torch.linalg.solve(P, S).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (count - ratio).sum()


def is_point_estimate(strategy: nn.Module) -> bool:
    """Whether the inducing values have no distribution, and the value is no bound."""
    kind = strategy._variational_distribution
    return isinstance(kind, DeltaVariationalDistribution)
