r"""The evidence of the linear model at its own optimum, in total nats.

.. math::
    E(S) = \log p(y \mid m + J \hat w_S) - \tfrac12 \hat w_S^\top S^{-1} \hat w_S
           - \tfrac12 \log\det(I + R^\top K R)

Exact for Gaussian noise. For other likelihoods it is Laplace's approximation with R
frozen at the network's outputs: neither exact nor a bound, but its spectrum is reusable
and, since the optimum is stationary, its gradient is exact with the optimum held fixed.

In: a :class:`~gpbridge.linearized.problem.TangentProblem`. Out: an
:class:`~gpbridge.types.Evidence`. Next: ``gp`` offers it, ``selection`` optimises it.
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.low_rank import LowRankCurvature
from gpbridge.linearized.mode import Mode, find_mode
from gpbridge.linearized.problem import TangentProblem
from gpbridge.linearized.structures import Structure
from gpbridge.prediction import factorise, whiten
from gpbridge.spectral import (
    GaussianSpectrum,
    Spectrum,
    decompose,
    gaussian_spectrum,
    gaussian_spectrum_of_rows,
    gaussian_spectrum_of_weights,
)
from gpbridge.types import Evidence

# An eigendecomposition costs as much as a few factorisations with their gradients, and
# every later evaluation next to nothing: from this one on, hyperparameters are learnt.
_LEARNING_FROM = 3


def evidence(
    problem: TangentProblem,
    prior_variance: Tensor,
    start: Mode | None = None,
    count_dimension: bool = True,
) -> tuple[Evidence, Mode | None]:
    """Evaluate the evidence, differentiable in the prior variances and the noise.

    Time is that of one Cholesky factorisation of the smaller matrix, and its backward;
    with one prior variance and one noise variance the third evaluation decomposes that
    matrix and later ones are linear in the number of data.

    Args:
        problem: The linear model.
        prior_variance: One variance per group, float64.
        start: A nearby optimum, for likelihoods that need iterations.
        count_dimension: Whether to compute the effective dimension, which costs as much
            as the rest; else it may be NaN.

    Returns:
        The evidence, and the optimum to start from next time.
    """
    structured = isinstance(problem.inference, Structure)
    if not structured and _is_repeated(problem):
        return _noise_spectral_evidence(problem, prior_variance[0]), start
    mode = find_mode(problem, prior_variance, start)
    fit = problem.log_prob(mode.values) - 0.5 * (mode.norms / prior_variance).sum()
    if structured:
        return _structured_evidence(problem, prior_variance, mode, fit)
    if problem.space == "function":
        L = factorise(whiten(problem.gram(prior_variance), problem.root()))
    else:
        scale = problem.expand(prior_variance.sqrt())
        L = factorise(problem.precision() * scale * scale[:, None])
    complexity = L.diagonal().log().sum()
    dimension = torch.full_like(complexity.detach(), torch.nan)
    if count_dimension:
        with torch.no_grad():
            eye = torch.eye(len(L)).to(L)
            inverse = torch.linalg.solve_triangular(L, eye, upper=False)
            dimension = len(L) - inverse.square().sum()
    return Evidence(fit - complexity, fit, complexity, dimension), mode


def _structured_evidence(
    problem: TangentProblem, prior_variance: Tensor, mode: Mode, fit: Tensor
) -> tuple[Evidence, Mode]:
    """The log determinant of the structure, at the optimum of the linear model."""
    curvature, weights = problem.curvature, problem.channel_weights()
    low_rank = isinstance(curvature, LowRankCurvature)
    logdet = curvature.logdet_bound if low_rank else curvature.logdet
    complexity = 0.5 * logdet(prior_variance, weights)
    if is_gaussian(problem.likelihood) and not problem.has_channels:
        complexity = complexity + _NoGradient.apply(problem.root())
    with torch.no_grad():
        dimension = curvature.effective_dimension(prior_variance, weights)
    bound = curvature.is_lower_bound
    return Evidence(fit - complexity, fit, complexity, dimension, bound), mode


class _NoGradient(torch.autograd.Function):
    """Zero, where a gradient would be wrong: an error if one is asked for."""

    @staticmethod
    def forward(ctx: Any, root: Tensor) -> Tensor:
        return root.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError(
            "The evidence of a curvature structure has no gradient in noise that is "
            "not one variance for all points or one per output. Fix that noise, "
            "likelihood.requires_grad_(False), or choose inference=Exact()."
        )


def _is_repeated(problem: TangentProblem) -> bool:
    """Count evaluations that a spectrum would serve, and say when it pays."""
    one = len(problem.groups) == 1 and isinstance(
        problem.likelihood, GaussianLikelihood
    )
    # Eigenvalues of J'J, all there is of a J that is not held, lose half their digits.
    if not one or (problem.space == "weight" and problem.rows() is None):
        return False
    problem.evaluations += 1
    return problem.evaluations >= _LEARNING_FROM


def _noise_spectral_evidence(
    problem: TangentProblem, prior_variance: Tensor
) -> Evidence:
    spectrum = noise_spectrum(problem)
    noise_variance = problem.likelihood.noise.double().squeeze(-1)
    value = spectrum.log_evidence(prior_variance, noise_variance)
    signal = prior_variance / noise_variance * spectrum.eigenvalues
    complexity = 0.5 * torch.log1p(signal).sum()
    with torch.no_grad():
        dimension = spectrum.effective_dimension(prior_variance, noise_variance)
    return Evidence(value, value + complexity, complexity, dimension)


def spectral_evidence(
    problem: TangentProblem,
    prior_variance: Tensor,
    spectrum: Spectrum,
    start: Mode | None = None,
) -> tuple[Evidence, Mode]:
    """The same for one prior variance and frozen R, from one eigendecomposition."""
    mode = find_mode(problem, prior_variance, start)
    fit = problem.log_prob(mode.values) - 0.5 * (mode.norms / prior_variance).sum()
    complexity = 0.5 * spectrum.logdet(prior_variance[0])
    dimension = spectrum.effective_dimension(prior_variance.detach()[0])
    return Evidence(fit - complexity, fit, complexity, dimension), mode


@torch.no_grad()
def frozen_spectrum(problem: TangentProblem) -> Spectrum:
    """Spectrum of the whitened prior covariance at unit variance, R frozen."""
    if problem.space == "function":
        return decompose(whiten(problem.grams()[0], problem.root()))
    return decompose(problem.precision())


@torch.no_grad()
def noise_spectrum(problem: TangentProblem) -> GaussianSpectrum:
    """What the evidence for one prior variance and one noise variance depends on.

    Kept by the problem: it depends on data and network only.
    """
    if problem.noise_spectrum is None:
        problem.noise_spectrum = _decompose(problem)
    return problem.noise_spectrum


def _decompose(problem: TangentProblem) -> GaussianSpectrum:
    targets = (problem.Y.double() - problem.prior_mean).reshape(-1)
    if problem.space == "function":
        return gaussian_spectrum(problem.grams()[0], targets)
    rows = problem.rows()
    if rows is not None:
        return gaussian_spectrum_of_rows(rows, targets)
    return gaussian_spectrum_of_weights(
        problem.scatter()[0, 0], problem.matmul, problem.t_matmul, targets
    )
