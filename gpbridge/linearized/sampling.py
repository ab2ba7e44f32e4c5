r"""Draws from the posterior of the linear model, by solving instead of factorising.

In the scaled weights :math:`\omega = S^{-1/2} w`, whose prior is a standard normal, the
posterior precision is :math:`H = I + S^{1/2} M S^{1/2}` with the Gauss-Newton matrix
:math:`M = J^\top R R^\top J`. With standard normals :math:`e` and :math:`\xi`,

.. math::
    H \omega = e + S^{1/2} J^\top R \xi
    \quad \Rightarrow \quad \omega \sim N(0, H^{-1}),

since the right-hand side has covariance H: the minimum of a least-squares problem whose
noise enters once and exactly. The same draw by the system of size n m,

.. math::
    \omega = e - S^{1/2} J^\top R A^{-1} (R^\top J S^{1/2} e - \xi), \qquad
    A = I + R^\top J S J^\top R.

The part :math:`J^\top R \xi` does not depend on the prior: with e and :math:`\xi` kept,
a new prior variance changes the right-hand side smoothly, and the draws of the old one
are a good start for the new solve.

In: products with the Jacobian of the data, roots, deviations. Out: a prediction
strategy in the weights themselves. Next: ``problem`` chooses it, ``selection/em``
learns hyperparameters with it.

References:
    Antorán, Padhy, Barbano, Nalisnick, Janz, Hernández-Lobato, Sampling-based inference
    for large linear models, with application to linearised Laplace, ICLR 2023, eqs.
    (9) to (12). Matthews, Hron, Turner, Ghahramani, Sample-then-optimize posterior
    sampling for Bayesian linear models, 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gpbridge.data_features import DataFeatures, OutputOperator, PrecisionOperator
from gpbridge.features import TangentFeatures
from gpbridge.partial_products import precision
from gpbridge.prediction import Projection
from gpbridge.randomness import standard_normal
from gpbridge.types import Solution, Solver

_ROUNDS = 5  # in which a tolerance may be tightened
_TIGHTEST = 1e-9
_DRAW_ERROR = 0.1  # of draws, in roots of their effective dimension
_MEAN_ERROR = 0.1  # of any mean, in posterior standard deviations


class BaseDraws(NamedTuple):
    """Standard normals that stay the same while hyperparameters change."""

    prior: Tensor  # e, p x s
    noise: Tensor  # xi, n x m x s


class SampledWeights(NamedTuple):
    """Solved draws of the scaled weights, and how well they were solved."""

    omega: Tensor  # p x s
    std: Tensor  # p, the prior deviations that they were solved for
    solution: Solution


def draw_base(
    data: DataFeatures, num_samples: int, generator: torch.Generator
) -> BaseDraws:
    """Draw the randomness of ``num_samples`` functions, float64."""
    (rows, p), m = data.shape, data.net.num_outputs
    like = data.X.new_zeros((), dtype=torch.float64)
    prior = standard_normal((p, num_samples), generator, like)
    noise = standard_normal((rows // m, m, num_samples), generator, like)
    return BaseDraws(prior, noise)


@torch.no_grad()
def solve_draws(
    data: DataFeatures,
    root: Tensor,
    std: Tensor,
    base: BaseDraws,
    solver: Solver,
    start: SampledWeights | None = None,
    in_outputs: bool = False,
) -> SampledWeights:
    """Solve for posterior draws of the scaled weights around zero.

    Args:
        data: Products with the Jacobian.
        root: Roots R of the output Hessians, ``n x m x m``, float64.
        std: Prior standard deviations of the weights, ``p``.
        base: Standard normals.
        solver: Of the systems.
        start: Draws for other hyperparameters, from the same standard normals.
        in_outputs: Whether to solve the system of size n m.

    Returns:
        The draws.
    """
    if in_outputs:
        operator = OutputOperator(root, std, data)
        rhs = (operator.to_outputs(base.prior) - base.noise).flatten(0, 1)

        def weights(value: Tensor) -> Tensor:
            explained = value.unflatten(0, base.noise.shape[:2])
            return base.prior - operator.to_weights(explained)

        solution = solve_within(solver, operator, rhs, _small_beside(operator, weights))
        return SampledWeights(weights(solution.value), std, solution)
    operator = PrecisionOperator(root, std, data)
    rhs = base.prior + operator.to_weights(base.noise)
    # From a prior draw, what the data say nothing about is right from the start.
    initial = base.prior if start is None else rescale(start, std)
    error = _small_beside(operator, lambda omega: omega)
    solution = solve_within(solver, operator, rhs, error, initial)
    return SampledWeights(solution.value, std, solution)


def _small_beside(
    operator: PrecisionOperator | OutputOperator, weights: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A tenth of the root of the effective dimension, as the draws have it."""

    def error(value: Tensor) -> Tensor:
        seen = operator.to_outputs(weights(value)).square().sum((0, 1)).mean()
        return _DRAW_ERROR * seen.clamp_min(1.0).sqrt()

    return error


def solve_within(
    solver: Solver,
    operator: PrecisionOperator | OutputOperator,
    rhs: Tensor,
    error: Callable[[Tensor], Tensor],
    initial: Tensor | None = None,
) -> Solution:
    r"""Solve :math:`H x = b` to a certain error, however loose the solver is.

    Since :math:`H \succeq I`, an approximate solution with the residual r is off by

    .. math:: \|x - \hat x\| \le \|r\|, \qquad
              |\phi^\top (x - \hat x)| \le \sqrt{\phi^\top H^{-1} \phi} \; \|r\| ,

    the last factor being the posterior standard deviation of any feature
    :math:`\phi`, and :math:`\|R^\top J S^{1/2} (x - \hat x)\| \le \|r\|`. A residual
    relative to b says none of this: b is large along few directions.

    Args:
        solver: With a ``tolerance``, which is tightened where needed; one without is
            taken as it is.
        operator: H, or the matrix of the outputs.
        rhs: b, one column per solution.
        error: What the norms of r may be, given the solutions.
        initial: A first guess.

    Returns:
        The solution.
    """
    size = rhs.norm(dim=0)
    solution = solver(operator, rhs, initial)
    for _ in range(_ROUNDS):
        if not solution.converged or not is_dataclass(solver):
            break  # which the solver has warned of, or cannot do better
        wanted = error(solution.value)
        relative = solution.residual_norms
        if relative is None or bool((relative * size <= wanted).all()):
            break
        tolerance = (0.9 * wanted / size.clamp_min(1e-300)).min().item()
        tolerance = max(tolerance, _TIGHTEST, 10 * precision(operator))
        if tolerance >= solver.tolerance:
            break
        solver = replace(solver, tolerance=tolerance)
        before = solution.passes
        solution = solver(operator, rhs, solution.value)
        solution = solution._replace(passes=solution.passes + before)
    return solution


def rescale(draws: SampledWeights, std: Tensor) -> Tensor:
    """The same weights in the scale of another prior; dead weights stay zero."""
    ratio = torch.where(std > 0, draws.std / std, 0.0)
    return ratio[:, None] * draws.omega


class SampledStrategy:
    r"""Conditioning by draws: :math:`\Sigma \approx F F^\top / s` with F = J w.

    Unlike the exact strategies it works in the weights themselves: features are at unit
    prior deviations, ``std`` is applied to the draws.

    Args:
        data: Products with the Jacobian of the training data.
        root: Roots R of the output Hessians, ``n x m x m``.
        std: Prior standard deviations of the weights, ``p``.
        draws: Solved draws of the scaled weights.
        solver: Of further systems.
    """

    def __init__(
        self,
        data: DataFeatures,
        root: Tensor,
        std: Tensor,
        draws: SampledWeights,
        solver: Solver,
    ) -> None:
        self.data, self.root, self.std = data, root, std
        self.draws, self.solver = draws, solver

    @cached_property
    def _weights(self) -> Tensor:
        """Draws of the weights themselves over the root of s, ``p x s``."""
        omega = self.draws.omega
        return self.std[:, None] * omega / omega.shape[-1] ** 0.5

    def project(self, features: TangentFeatures) -> Projection:
        """See test points through the draws."""
        F = features.matmul(self._weights.to(features.value)).double()
        return Projection(features, F.flatten(-3, -2), True, F @ F.mT)

    def covariance(self, left: Projection, right: Projection | None = None) -> Tensor:
        """Posterior covariance between the outputs of two sets of points."""
        other = left if right is None else right
        return left.factor @ other.factor.mT

    def single_precision_blocks(self, features: TangentFeatures) -> Tensor | None:
        """None: products with few draws are cheap."""
        return None

    def cross_weights(self, projection: Projection) -> Tensor:
        """Posterior covariance of outputs and weights."""
        return projection.factor @ self._weights.mT

    def mean_weights(self, whitened: Tensor) -> Tensor:
        r"""Posterior mean :math:`S J^\top R A^{-1} v` of the weights, ``p``."""
        operator = PrecisionOperator(self.root, self.std, self.data)
        rhs = operator.to_weights(whitened.reshape(*self.root.shape[:2], 1))
        with torch.no_grad():
            limit = rhs.new_tensor(_MEAN_ERROR)
            solution = solve_within(self.solver, operator, rhs, lambda _: limit)
        return self.std * solution.value[:, 0]

    def draw_weights(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Gaussian combinations of the draws: their covariance, without a solve."""
        weights = self._weights
        shape = (num_samples, weights.shape[-1])
        return standard_normal(shape, generator, weights) @ weights.mT
