r"""The optimum of the linear model by products with the Jacobian only.

.. math:: \hat\omega = \arg\max_\omega \; \log p(y \mid m + J S^{1/2} \omega)
          - \tfrac12 \|\omega\|^2

In: products, likelihood, targets, prior mean and deviations. Out: the optimum. Gaussian
noise needs one solve; other likelihoods Newton steps, each by a few conjugate gradient
iterations, with a line search. Next: ``problem`` and ``selection/em``.

References:
    Nocedal, Wright, Numerical Optimization, Springer 2006, algorithm 7.1 (line-search
    Newton-CG).
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.checks import NotConvergedWarning, warn_user
from gpbridge.data_features import DataFeatures, PrecisionOperator
from gpbridge.likelihoods import hessian_root, is_gaussian, log_prob, residual
from gpbridge.linearized.sampling import solve_within
from gpbridge.solvers import ConjugateGradients
from gpbridge.types import Solver

_STEPS = 30  # Newton steps; ten are typical, fewer from a good start
_INNER = ConjugateGradients(tolerance=0.1, max_iterations=30, preconditioner_rank=0)
_ERROR = 0.01  # of the optimum under Gaussian noise, relative
_TOLERANCE = 1e-5  # of the objective in a step, relative to its size and to one nat


class SampledMode(NamedTuple):
    """The optimum: latent values ``n x m`` and scaled weights ``p``."""

    values: Tensor
    omega: Tensor


@torch.no_grad()
def find_mode_by_products(
    data: DataFeatures,
    likelihood: Likelihood,
    Y: Tensor,
    prior_mean: Tensor,
    std: Tensor,
    solver: Solver,
    start: Tensor | None = None,
) -> SampledMode:
    """Optimise the weights of the linear model.

    Args:
        data: Products with the Jacobian.
        likelihood: The likelihood.
        Y: Targets in its form.
        prior_mean: Mean of the latent values, ``n x m``.
        std: Prior standard deviations, ``p``.
        solver: Of the one system under Gaussian noise.
        start: Scaled weights ``p`` to start from.

    Returns:
        The optimum, to a hundredth of its norm or 1e-5 of the objective.

    Warns:
        NotConvergedWarning: If the Newton steps run out.
    """
    omega = torch.zeros_like(std) if start is None else start

    def outputs(omega: Tensor) -> Tensor:
        return data.matmul((std * omega)[:, None])[..., 0]

    def gradient_of(values: Tensor) -> Tensor:
        slope = residual(likelihood, values, Y)
        return std * data.t_matmul(slope[..., None])[:, 0]

    if is_gaussian(likelihood):
        root = hessian_root(likelihood, prior_mean)
        operator = PrecisionOperator(root, std, data)
        solution = solve_within(
            solver,
            operator,
            gradient_of(prior_mean)[:, None],
            lambda value: _ERROR * value.norm(dim=0),
            omega[:, None],
        )
        omega = solution.value[:, 0]
        return SampledMode(prior_mean + outputs(omega), omega)

    def objective(values: Tensor, omega: Tensor) -> float:
        fit = log_prob(likelihood, values, Y).sum()
        return float(fit - 0.5 * omega.square().sum())

    values = prior_mean + outputs(omega)
    value = objective(values, omega)
    for _ in range(_STEPS):
        operator = PrecisionOperator(hessian_root(likelihood, values), std, data)
        gradient = gradient_of(values) - omega
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)  # inexact by design
            step = _INNER(operator, gradient[:, None]).value[:, 0]
        moved = outputs(step)
        t, new = 1.0, objective(values + moved, omega + step)
        while not new >= value and t > 1e-4:
            t /= 2
            new = objective(values + t * moved, omega + t * step)
        if not new >= value:  # no step along an ascent direction: round-off
            return SampledMode(values, omega)
        values, omega = values + t * moved, omega + t * step
        gain, value = new - value, new
        if gain <= _TOLERANCE * (1 + abs(value)):
            return SampledMode(values, omega)
    warn_user(
        f"The optimum of the linear model was not reached in {_STEPS} Newton steps: "
        f"the last one gained {gain:.2g} nats of {value:.6g}. The prior variance may "
        "be extreme, or the labels separable without noise.",
        NotConvergedWarning,
    )
    return SampledMode(values, omega)
