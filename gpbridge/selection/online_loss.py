r"""The loss that weights descend on while prior and noise move.

.. math::
    \frac1n \Big( -\log p(y \mid f(w)) + \tfrac12 w^\top S^{-1} w \Big)

A Gaussian loss is in squared units of the targets: half the squared residual, whatever
the noise, so that a learning rate keeps its meaning.

In: a likelihood and its noise. Out: the loss of a batch, and the gradient of the prior.
Next: ``online_training`` descends on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from gpytorch.likelihoods import Likelihood, SoftmaxLikelihood
from torch import Tensor
from torch.nn import functional as F

from gpbridge.likelihoods import is_gaussian, log_prob


class BatchLoss:
    """The mean loss of a batch at the noise of the moment.

    Args:
        likelihood: Of the targets.
        noise_variance: One per output, of Gaussian noise; else None.
        dtype: Of the outputs.

    Attributes:
        unit: Units of the loss per nat.
    """

    def __init__(
        self, likelihood: Likelihood, noise_variance: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.likelihood, self._is_gaussian = likelihood, is_gaussian(likelihood)
        self.unit, self._ratio, self._constant = 1.0, None, 0.0
        if self._is_gaussian:
            unit = noise_variance.mean()
            if len(noise_variance) > 1:
                self._ratio = (unit / noise_variance).to(dtype)
            self.unit = float(unit)
            constant = 0.5 * (2 * math.pi * noise_variance).log().sum()
            self._constant = float(constant)

    def __call__(self, outputs: Tensor, Y: Tensor) -> Tensor:
        """The loss of outputs ``n x m``, in its own units, without its constant."""
        if isinstance(self.likelihood, SoftmaxLikelihood):
            return F.cross_entropy(outputs, Y)  # the same, in one kernel
        if not self._is_gaussian:
            return -log_prob(self.likelihood, outputs, Y).mean()
        if self._ratio is None:
            return 0.5 * F.mse_loss(outputs, Y)
        squares = (outputs - Y).square() * self._ratio
        return squares.sum() * (0.5 / len(Y))

    def in_nats(self, loss: float) -> float:
        """Mean negative log likelihood of a mean loss."""
        return loss / self.unit + self._constant


@torch.no_grad()
def add_prior_gradient(
    weights: Sequence[list[Tensor]], decays: Sequence[float]
) -> None:
    """Add the gradient of the prior, since an optimiser's own decay may be decoupled.

    Args:
        weights: Of each group.
        decays: One per group, in units of the loss.
    """
    for group, decay in zip(weights, decays, strict=True):
        for p in group:
            if p.grad is None:  # not part of this batch's graph
                p.grad = torch.zeros_like(p)
        torch._foreach_add_([p.grad for p in group], group, alpha=decay)
