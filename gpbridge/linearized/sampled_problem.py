r"""The linear model of a network on its data, conditioned by draws.

What :class:`~gpbridge.linearized.inference.Sampled` inference keeps while a model is
fitted: products with the Jacobian, the randomness of the draws, and their last
solution, from which the next solve starts.

In: what :class:`~gpbridge.linearized.problem.TangentProblem` knows of data and prior.
Out: draws, their prediction strategy, the optimum by products. Next: ``problem``.
"""

from __future__ import annotations

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.data_features import DataFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.linearized.inference import Inference
from gpbridge.linearized.sampled_mode import SampledMode, find_mode_by_products
from gpbridge.linearized.sampling import (
    BaseDraws,
    SampledStrategy,
    SampledWeights,
    draw_base,
    solve_draws,
)
from gpbridge.types import Solver


class SampledProblem:
    """The part of a :class:`~gpbridge.linearized.problem.TangentProblem` for draws."""

    net: FunctionalNet
    X: Tensor
    Y: Tensor
    likelihood: Likelihood
    inference: Inference
    prior_mean: Tensor  # n x m
    space: str

    _data: DataFeatures | None = None
    _base: BaseDraws | None = None
    _draws: SampledWeights | None = None

    @property
    def data(self) -> DataFeatures:
        """Products with the Jacobian at the data."""
        if self._data is None:
            budget = self.inference.memory_budget
            self._data = DataFeatures(self.net, self.X, budget)
        return self._data

    @property
    def base(self) -> BaseDraws:
        """The standard normals of every draw."""
        if self._base is None:
            generator = torch.Generator().manual_seed(self.inference.seed)
            self._base = draw_base(self.data, self.inference.num_samples, generator)
        return self._base

    def flat_prior_std(self, prior_variance: Tensor) -> Tensor:
        """Prior standard deviation of each weight, ``p``, float64, detached."""
        return self.unit_scale() * self.expand(prior_variance.detach().double().sqrt())

    def draws(
        self, prior_variance: Tensor, solver: Solver | None = None
    ) -> SampledWeights:
        """Posterior draws of the weights, started from those of the last call."""
        self._draws = solve_draws(
            self.data,
            self.root().detach(),
            self.flat_prior_std(prior_variance),
            self.base,
            self.inference.solver if solver is None else solver,
            self._draws,
            self.space == "function",
        )
        return self._draws

    def sampled_strategy(self, prior_variance: Tensor) -> SampledStrategy:
        """Condition the linear model by draws."""
        draws = self.draws(prior_variance)
        root, solver = self.root().detach(), self.inference.solver
        return SampledStrategy(self.data, root, draws.std, draws, solver)

    def mode_by_products(
        self, prior_variance: Tensor, start: Tensor | None = None
    ) -> SampledMode:
        """The optimum of the linear model, without a matrix of the data."""
        return find_mode_by_products(
            self.data,
            self.likelihood,
            self.Y,
            self.prior_mean,
            self.flat_prior_std(prior_variance),
            self.inference.solver,
            start,
        )
