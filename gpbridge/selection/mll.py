"""The evidence of a linearised network as a gpytorch objective.

In: a :class:`~gpbridge.LinearizedGP`. Out: a ``MarginalLogLikelihood`` that
``botorch.fit_gpytorch_mll`` optimises. Next: ``evidence`` chooses the fastest way.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.mlls import MarginalLogLikelihood
from torch import Tensor, nn

from gpbridge.linearized.gp import LinearizedGP


class LaplaceEvidence(MarginalLogLikelihood):
    r"""Log evidence of a linearised network divided by the number of targets.

    Exact for Gaussian noise, Laplace's approximation at the linear model's own optimum
    otherwise (see :mod:`gpbridge.linearized.evidence`). Per datum, as gpytorch's
    objectives are; ``model.log_evidence()`` is in total nats. The log densities of
    priors that are registered on hyperparameters are added, as gpytorch does.

    Args:
        likelihood: The model's likelihood.
        model: The model.

    Raises:
        TypeError: If the model is not a LinearizedGP.

    Example:
        >>> import torch, gpbridge
        >>> X = torch.rand(8, 1).double()
        >>> net = torch.nn.Linear(1, 1).double()
        >>> model = gpbridge.LinearizedGP(net, X, X.sin())
        >>> mll = LaplaceEvidence(model.likelihood, model)
        >>> bool(mll(model(X), X.sin().squeeze(-1)).isfinite())
        True
    """

    def __init__(self, likelihood: Likelihood, model: LinearizedGP) -> None:
        if not isinstance(model, LinearizedGP):
            raise TypeError(
                "LaplaceEvidence needs a gpbridge.LinearizedGP, but model is "
                f"{type(model).__name__}. For an ExactGP use gpytorch's "
                "ExactMarginalLogLikelihood."
            )
        super().__init__(likelihood, model)

    def forward(
        self, function_dist: MultivariateNormal, target: Tensor, *params: Any
    ) -> Tensor:
        """Evidence per datum; the prior it needs is the model's, not the argument."""
        return -self.compute_custom_loss()

    def compute_custom_loss(self, **kwargs: Any) -> Tensor:
        """What botorch minimises: it never builds the prior over the data."""
        evidence = self.model.log_evidence()
        total = evidence + log_prior(self.model, evidence)
        return -total / self.model.train_targets.numel()


def log_prior(module: nn.Module, like: Tensor) -> Tensor:
    """Log density of the hyperpriors, summed for each element of a batch.

    Args:
        module: A gpytorch module, or one that contains some.
        like: A value of the batch shape that is wanted.

    Returns:
        Nats, of the shape of ``like``. Zero without hyperpriors.
    """
    total = torch.zeros_like(like)
    if not hasattr(module, "named_priors"):  # a wrapper of botorch's
        return sum((log_prior(child, like) for child in module.children()), total)
    for _, owner, prior, closure, _ in module.named_priors():
        terms = prior.log_prob(closure(owner)).to(like)
        total = total + terms.reshape(*terms.shape[: like.dim()], -1).sum(-1)
    return total
