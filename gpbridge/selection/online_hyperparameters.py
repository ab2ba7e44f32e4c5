r"""Prior variances and noise of a run that learns them, and their ascent.

In: a likelihood, starting values. Out: the values, which Adam on their logarithms moves
up the evidence at fixed weights. Next: ``online_training`` has one beside its weights.
"""

from __future__ import annotations

import copy
import math

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.noise import release_noise, set_noise
from gpbridge.selection.online_evidence import OnlineEvidence, noise_of
from gpbridge.types import Evidence

_LOG_BOUND = 25.0  # of a log prior variance: beyond it a group is pruned, or free


class OnlineHyperparameters:
    """One prior variance per group of weights, and one noise per Gaussian output.

    Args:
        likelihood: That of the run; its noise is where learning starts, stays inside of
            its constraint, and stays what it is if it has no gradient.
        num_groups: Of weights.
        like: One row of outputs, ``1 x m``, float64, where they live.
        prior_variance: Where learning starts.
        learning_rate: Of Adam, for the logarithms.

    Attributes:
        learnt: The logarithms that Adam moves.
        optimizer: Adam.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        num_groups: int,
        like: Tensor,
        prior_variance: float,
        learning_rate: float,
    ) -> None:
        self.log_prior = like.new_full((num_groups,), math.log(prior_variance))
        self.learnt = [self.log_prior.requires_grad_()]
        self.log_noise = self._noise_bounds = None
        self._learns_noise = False
        if is_gaussian(likelihood):
            noise, floor, ceiling, self._learns_noise = noise_of(likelihood, like)
            self.log_noise = noise.log()
            self._noise_bounds = floor.log(), ceiling.log()
            if self._learns_noise:
                self.learnt.append(self.log_noise.requires_grad_())
        self.optimizer = torch.optim.Adam(self.learnt, lr=learning_rate)

    @property
    def prior_variance(self) -> Tensor:
        """One per group."""
        return self.log_prior.detach().exp()

    @property
    def noise_variance(self) -> Tensor | None:
        """One per output, of Gaussian noise."""
        return None if self.log_noise is None else self.log_noise.detach().exp()

    @property
    def values(self) -> list[Tensor]:
        """All logarithms, those that stay included."""
        noise = [] if self.log_noise is None else [self.log_noise]
        return [value.detach() for value in (self.log_prior, *noise)]

    def ascend(self, measured: OnlineEvidence, steps: int) -> Evidence:
        """Take steps at a fixed curvature.

        Args:
            measured: The evidence as a function of the hyperparameters.
            steps: Of Adam.

        Returns:
            The evidence after them.
        """
        for _ in range(steps):
            self.optimizer.zero_grad()
            noise = None if self.log_noise is None else self.log_noise.exp()
            (-measured(self.log_prior.exp(), noise).value).backward()
            self.optimizer.step()
            with torch.no_grad():
                self.log_prior.clamp_(-_LOG_BOUND, _LOG_BOUND)
                if self._learns_noise:
                    self.log_noise.clamp_(*self._noise_bounds)
        with torch.no_grad():
            return measured(self.prior_variance, self.noise_variance, True)

    def applied_to(self, likelihood: Likelihood, dtype: torch.dtype) -> Likelihood:
        """A copy of the likelihood with the noise that was learnt."""
        likelihood = copy.deepcopy(likelihood)
        if self._learns_noise:
            set_noise(likelihood, self.noise_variance.to(dtype))
            release_noise(likelihood)
        return likelihood
