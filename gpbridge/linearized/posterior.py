r"""The posterior of the tangent model at fixed hyperparameters.

In: a :class:`~gpbridge.linearized.problem.TangentProblem`, prior variances, the choice
of mean. Out: :class:`TangentPosterior`, which answers for moments and draws at new
points, given the training data and, by a Schur complement, any further observations.
Next: ``gp`` keeps one as long as no hyperparameter changes its value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpbridge.features import TangentFeatures, flat_std
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.conditioning import (
    NewData,
    Update,
    apply_update,
    make_update,
)
from gpbridge.linearized.inference import Sampled
from gpbridge.linearized.mode import find_mode
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Structure
from gpbridge.linearized.variational import Refinement, refined_strategy
from gpbridge.prediction import Projection
from gpbridge.randomness import standard_normal

_CHUNK_BYTES = 64 * 2**20  # covariance with the training data, per chunk of points


class TangentPosterior:
    """Moments and draws of a linear model, conditioned on its training data.

    All results are float64. A mean is the linear model's own, or the network's output.

    Args:
        problem: The linear model and its data.
        prior_variance: One variance per group.
        mean: ``"linear_model"`` or ``"network"``.
        refinement: Mean and covariance around the network's output, found by the
            variational bound; they replace both.
        weights: Those of the mean, if they are known.
    """

    def __init__(
        self,
        problem: TangentProblem,
        prior_variance: Tensor,
        mean: str,
        refinement: Refinement | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.problem = problem
        self.adds_network = problem.offset or mean == "network"
        with torch.no_grad():
            self.std = problem.feature_std(prior_variance)
            if refinement is not None:
                self.strategy = refined_strategy(problem, prior_variance, refinement)
                self.weights = refinement.shift.double()
                self.refinement = refinement  # kept alive: caches go by its identity
                return
            self.strategy = problem.strategy(prior_variance)
            if weights is None:
                weights = self._mean_weights(prior_variance.double(), mean)
            self.weights = weights

    def _mean_weights(self, prior_variance: Tensor, mean: str) -> Tensor | None:
        """Scaled weights whose product with the features corrects the mean."""
        problem = self.problem
        if mean == "network":
            return None
        if isinstance(problem.inference, Structure):
            if problem.previous is not None:
                weights = problem.continued_mean(prior_variance)
                return self._offset(weights / problem.flat_prior_std(prior_variance))
            mode = find_mode(problem, prior_variance)
            weights = mode.weights / problem.expand(prior_variance.sqrt())
            return self._offset(weights)
        if not is_gaussian(problem.likelihood):
            if isinstance(problem.inference, Sampled):
                mode = problem.mode_by_products(prior_variance)
                return problem.flat_prior_std(prior_variance) * mode.omega
            mode = find_mode(problem, prior_variance)
            return mode.weights / problem.expand(prior_variance.sqrt())
        misfit = (problem.Y - problem.prior_mean)[..., None]
        weights = self.strategy.mean_weights((problem.root().mT @ misfit)[..., 0])
        return self._offset(weights)

    def _offset(self, weights: Tensor) -> Tensor:
        if self.problem.offset:
            net = self.problem.net
            trained = net.flatten(net.params).detach().double()
            weights = weights - trained / flat_std(net, self.std).double()
        return weights

    def features(
        self, Z: Tensor, outputs: Sequence[int] | None = None
    ) -> TangentFeatures:
        """Features of transformed inputs ``batch x n x d``, of some of the outputs."""
        features = self.problem.features(Z.to(self.problem.net.dtype), self.std)
        return features if outputs is None else features.select(outputs)

    def mean(self, features: TangentFeatures) -> Tensor:
        """Posterior mean given the training data, ``batch x n x m``."""
        if self.weights is None:
            return features.value.double()
        moved = features.matmul(self.weights.to(features.value)).double()
        return moved + features.value.double() if self.adds_network else moved

    def update(self, new: NewData, outputs: Sequence[int] | None = None) -> Update:
        """Prepare to condition on further observations."""
        features = self.features(new.X, outputs)
        projection = self.strategy.project(features)
        return make_update(self.strategy, projection, self.mean(features), new)

    def joint(
        self,
        Z: Tensor,
        outputs: Sequence[int] | None = None,
        update: Update | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean ``batch x n x m`` and covariance ``batch x (n m) x (n m)``."""
        features = self.features(Z, outputs)
        projection, mean = self.strategy.project(features), self.mean(features)
        covariance = self.strategy.covariance(projection)
        if update is not None:
            mean, G = apply_update(self.strategy, update, projection, mean)
            covariance = covariance - G @ G.mT
        return mean, covariance

    def marginals(
        self,
        Z: Tensor,
        outputs: Sequence[int] | None = None,
        update: Update | None = None,
        single_precision: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Mean ``n x m`` and covariance ``n x m x m`` of each point, in chunks.

        Args:
            Z: Transformed inputs ``n x d``.
            outputs: Outputs to keep; default all.
            update: Further observations, unbatched.
            single_precision: Whether float32 products may serve where they are safe.

        Returns:
            The moments.
        """
        problem = self.problem
        width = max(problem.outputs.numel() * problem.outputs.shape[1], 1)
        if isinstance(problem.inference, Structure):
            width = problem.derivatives_per_point
        elif isinstance(problem.inference, Sampled):
            # The draws are few; what takes memory are the features of the points.
            width = problem.data.numbers_per_point
        elif problem.space == "weight":
            width = problem.num_params * problem.outputs.shape[1]
        fewest = 1 if isinstance(problem.inference, Structure) else 16
        step = max(fewest, _CHUNK_BYTES // (8 * width))
        means, blocks = [], []
        for part in Z.split(step):
            features = self.features(part, outputs)
            mean, block = self.mean(features), None
            if single_precision and update is None:
                block = self.strategy.single_precision_blocks(features)
            if block is None:
                projection: Projection = self.strategy.project(features)
                block = projection.blocks
                if update is not None:
                    mean, G = apply_update(self.strategy, update, projection, mean)
                    G = G.unflatten(-2, mean.shape[-2:])
                    block = block - G @ G.mT
            means.append(mean)
            blocks.append(block)
        return torch.cat(means), torch.cat(blocks)

    def draw(
        self,
        num_samples: int,
        generator: torch.Generator | None = None,
        update: Update | None = None,
        new: NewData | None = None,
    ) -> Tensor:
        """Weight changes of functions drawn from the posterior, ``s x p``, unscaled.

        A draw is ``J change``, plus the network's output if ``adds_network``.

        Args:
            num_samples: The number s.
            generator: Source of randomness.
            update: Further observations, prepared.
            new: The same observations.

        Returns:
            ``s x p``
        """
        weights = self.strategy.draw_weights(num_samples, generator)
        if self.weights is not None:
            weights = weights + self.weights
        if update is not None:
            weights = self._condition(weights, update, new, generator)
        return weights * flat_std(self.problem.net, self.std).double()

    def _condition(
        self,
        weights: Tensor,
        update: Update,
        new: NewData,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Matheron's rule in weight space for further observations."""
        features = update.projection.features
        like = features.value
        values = torch.stack([features.matmul(w.to(like)) for w in weights]).double()
        if self.adds_network:
            values = values + like.double()
        noise = standard_normal(values.shape, generator, values)
        roots = torch.linalg.cholesky(new.noise.double())  # n' x m x m
        values = values + (roots @ noise[..., None])[..., 0]
        misfit = (new.Y.double() - values).flatten(1).mT  # (n' m) x s
        cross = self.strategy.cross_weights(update.projection)  # (n' m) x p
        return weights + (cross.mT @ torch.cholesky_solve(misfit, update.cholesky)).mT
