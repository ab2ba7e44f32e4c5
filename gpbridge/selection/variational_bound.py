r"""The variational lower bound of the evidence, whole and in total nats.

.. math:: \log p(y) \ge \sum_i E_{q(f_i)} \log p(y_i \mid f_i)
    - \mathrm{KL}(q(u) \,\|\, p(u)), \qquad \text{Hensman et al. (2015), eq. (6)}

Of the model as upstream defines it, which adds a jitter to the prior variance of every
point and inducing point; in float64 that is 1e-6, and with a noise variance not far
above it the bound is of a slightly noisier model.

In: a variational GP with all its data. Out: a :class:`Bound`.
Next: ``marginal_likelihood``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from botorch.models.approximate_gp import ApproximateGPyTorchModel
from botorch.models.model import Model
from gpytorch.likelihoods import Likelihood
from gpytorch.settings import num_likelihood_samples
from gpytorch.variational import DeltaVariationalDistribution
from torch import Generator, Tensor, nn

from gpbridge.checks import ShapeError, check_finite, check_inputs, check_same_length
from gpbridge.dnn.training import isolated_randomness

_CHUNK = 2048  # rows at a time: upstream forms their joint covariance below a size
_DRAWS = 256  # of a likelihood without quadrature
_ROUNDS = 8  # independent estimates that they are divided into


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
    likelihood = likelihood_of(model, likelihood)
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


def likelihood_of(model: nn.Module, given: Likelihood | None) -> Likelihood:
    """The likelihood that was passed, or else the model's own.

    Raises:
        ValueError: If there is neither.
    """
    likelihood = getattr(model, "likelihood", None) if given is None else given
    if likelihood is None:
        raise ValueError(
            f"{type(model).__name__} has no likelihood of its own. Pass likelihood=, "
            "the one it was trained with."
        )
    return likelihood


class Bound(NamedTuple):
    """The terms of the bound in total nats.

    ``standard_error`` is that of ``fit`` where the likelihood has neither a closed form
    nor a quadrature and is averaged over draws; None otherwise.
    """

    fit: Tensor
    complexity: Tensor
    standard_error: Tensor | None


def expected_fit(
    model: nn.Module,
    X: Tensor,
    Y: Tensor,
    likelihood: Likelihood,
    generator: Generator | None = None,
) -> Bound:
    """Expected log likelihood and KL divergence of all data, in total nats.

    Args:
        model: A variational GP.
        X: From :func:`prepared`.
        Y: From :func:`prepared`.
        likelihood: From :func:`prepared`.
        generator: Of all draws; by default one with seed 0.

    Returns:
        Both terms of the bound, differentiable.
    """
    inner = model.model if isinstance(model, ApproximateGPyTorchModel) else model
    generator = Generator().manual_seed(0) if generator is None else generator
    training = model.training, likelihood.training
    grad = torch.is_grad_enabled()
    model.train()
    likelihood.train()
    draws = _is_drawn(likelihood)
    rounds = _ROUNDS if draws else 1
    count = max(_DRAWS, num_likelihood_samples.value()) // rounds
    fits = [0.0] * rounds  # independent estimates, or the value
    try:
        # Upstream draws from the global state: to place a new distribution over the
        # inducing values, and in likelihoods without quadrature. It is put back.
        with (
            isolated_randomness(generator, X.device),
            torch.set_grad_enabled(grad),
            num_likelihood_samples(count if draws else num_likelihood_samples.value()),
        ):
            for x, y in zip(X.split(_CHUNK), Y.split(_CHUNK), strict=True):
                latent = inner(x)
                for i in range(rounds):
                    fits[i] = fits[i] + likelihood.expected_log_prob(y, latent).sum(-1)
        complexity = inner.variational_strategy.kl_divergence()
        for term in inner.added_loss_terms():
            complexity = complexity + term.loss()
    finally:
        model.train(training[0])
        likelihood.train(training[1])
    fits = torch.stack(fits)
    error = fits.detach().std(0) / rounds**0.5 if draws else None
    return Bound(fits.mean(0), complexity, error)


def _is_drawn(likelihood: Likelihood) -> bool:
    """Whether upstream's default applies, an average over draws."""
    return type(likelihood).expected_log_prob is Likelihood.expected_log_prob


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
