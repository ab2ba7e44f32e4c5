r"""The evidence at weights that are the MAP of the moment, for learning while training.

.. math::
    E = \log p(y \mid f(w)) - \tfrac12 w^\top S^{-1} w
        - \tfrac12 \log\det(I + S^{1/2} M S^{1/2})

The first two terms are at the trained weights, which are the optimum under the current
prior S because training minimises their negative; the curvature M is that of the
tangent model there. Data are passed over once; then every prior variance and noise
costs O(p).

In: a network at its weights, batches. Out: :class:`OnlineEvidence`.
Next: ``online_training`` ascends it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpytorch.likelihoods import (
    BernoulliLikelihood,
    GaussianLikelihood,
    Likelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from torch import Tensor

from gpbridge.checks import check_memory
from gpbridge.features import TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import (
    LogisticLikelihood,
    is_gaussian,
    log_prob,
    noise_variances,
)
from gpbridge.linearized.data_curvature import (
    CHUNK_BYTES,
    curvature_roots,
    factored_curvature,
    numbers_at_work,
)
from gpbridge.linearized.factored import FactoredCurvature
from gpbridge.linearized.inference import Exact
from gpbridge.linearized.structures import Diagonal, Kronecker
from gpbridge.linearized.weight_blocks import weight_blocks
from gpbridge.selection.training_batches import TrainingBatches
from gpbridge.types import Evidence

OnlineStructure = Kronecker | Diagonal | Exact

_LABELS = (SoftmaxLikelihood, BernoulliLikelihood, LogisticLikelihood)


class FullCurvature:
    """The whole matrix M, for networks of few weights.

    Args:
        scatter: One matrix per channel at unit prior scale, ``c x p x p``, float64.
        groups: Number of the prior variance of each weight, ``p`` integers.
    """

    is_lower_bound = False

    def __init__(self, scatter: Tensor, groups: Tensor) -> None:
        self.scatter, self.groups = scatter, groups

    def logdet(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        r""":math:`\log\det(I + S^{1/2} M S^{1/2})`, O(p^3), differentiable."""
        return 2 * self._factor(prior_variance, weights).diagonal().log().sum()

    def effective_dimension(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Number of directions that the data determine."""
        L = self._factor(prior_variance, weights)
        eye = torch.eye(len(L)).to(L)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)
        return len(L) - inverse.square().sum()

    def _factor(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        std = prior_variance.sqrt()[self.groups]
        M = torch.tensordot(weights, self.scatter, dims=1)
        eye = torch.eye(len(std)).to(M)
        return torch.linalg.cholesky(eye + std[:, None] * M * std)


class OnlineEvidence:
    """The evidence as a function of prior variances and noise, at fixed weights.

    Args:
        curvature: Of the data, at unit prior scale and unit noise.
        squares: Squared norm of the weights of each group, ``groups``.
        misfit: Sum of squared residuals of each output, ``m``, of Gaussian noise; else
            the log likelihood, a scalar.
        num_rows: The number n of data.
    """

    def __init__(
        self,
        curvature: FactoredCurvature | FullCurvature,
        squares: Tensor,
        misfit: Tensor,
        num_rows: int,
    ) -> None:
        self.curvature, self.squares = curvature, squares
        self.misfit, self.num_rows = misfit, num_rows

    def __call__(
        self,
        prior_variance: Tensor,
        noise_variance: Tensor | None,
        count_dimension: bool = False,
    ) -> Evidence:
        """Evaluate at ``groups`` prior variances and ``m`` noise variances.

        Differentiable in both. The effective dimension is NaN unless it is asked for.
        """
        weights, fit = self.squares.new_ones(1), self.misfit
        if noise_variance is not None:
            weights = noise_variance.reciprocal()
            constant = (2 * math.pi * noise_variance).log().sum()
            fit = -0.5 * (self.num_rows * constant + self.misfit @ weights)
        fit = fit - 0.5 * (self.squares / prior_variance).sum()
        complexity = 0.5 * self.curvature.logdet(prior_variance, weights)
        dimension = torch.full_like(complexity.detach(), torch.nan)
        if count_dimension:
            dimension = self.curvature.effective_dimension(prior_variance, weights)
        bound = self.curvature.is_lower_bound
        return Evidence(fit - complexity, fit, complexity, dimension, bound)


@torch.no_grad()
def measure_evidence(
    net: FunctionalNet,
    batches: TrainingBatches,
    groups: list[list[str]],
    structure: OnlineStructure,
    seed: int,
) -> OnlineEvidence:
    """Pass over the data once (twice with corrected eigenvalues).

    Args:
        net: The network at its current weights, in eval mode.
        batches: The data.
        groups: Names of the weights that share a prior variance.
        structure: Of the curvature.
        seed: Of Monte Carlo curvature.

    Returns:
        The evidence at these weights.
    """
    likelihood, like = batches.likelihood, net.flatten(net.params).double()
    gaussian = is_gaussian(likelihood)
    unit_std = {name: like.new_ones((), dtype=net.dtype) for name in net.params}
    sizes = {name: value.shape for name, value in net.params.items()}
    channels = net.num_outputs if gaussian else 1
    options = Kronecker() if isinstance(structure, Exact) else structure
    misfit = like.new_zeros(net.num_outputs if gaussian else ())

    few = batches.first[:2].flatten(1).to(net.dtype)
    first = tangent_features(net, few, unit_std, "layers")
    blocks = weight_blocks(first, sizes, [set(names) for names in groups])
    per_point = few.element_size() * numbers_at_work(first, blocks, sizes)
    step = max(1, CHUNK_BYTES // per_point)

    def chunks() -> Iterator[TangentFeatures]:
        generator = torch.Generator(like.device).manual_seed(seed)
        misfit.zero_()
        for X, Y in batches.every():
            X = X.flatten(1).to(net.dtype)
            for x, y in zip(X.split(step), Y.split(step), strict=True):
                outputs = x.new_empty(0)

                def root(value: Tensor, y: Tensor = y) -> Tensor:
                    nonlocal outputs
                    outputs = value
                    return curvature_roots(likelihood, value, y, options, generator)

                if gaussian:  # at unit noise, the root is the identity
                    features = tangent_features(net, x, unit_std, "layers")
                    misfit.add_((y - features.value).double().square().sum(0))
                else:
                    features = tangent_features(net, x, unit_std, "layers", root)
                    misfit.add_(log_prob(likelihood, outputs.double(), y).sum())
                yield features

    if isinstance(structure, Exact):
        group_of = {n: g for g, names in enumerate(groups) for n in names}
        spread = [
            torch.full((size.numel(),), group_of[name], device=like.device)
            for name, size in sizes.items()
        ]
        curvature = FullCurvature(_scatter(chunks, like, channels), torch.cat(spread))
    else:
        curvature = factored_curvature(chunks, sizes, blocks, structure, channels)
    squares = torch.stack(
        [
            torch.stack([net.params[n].double().square().sum() for n in names]).sum()
            for names in groups
        ]
    )
    return OnlineEvidence(curvature, squares, misfit, batches.num_rows)


def _scatter(chunks, like: Tensor, channels: int) -> Tensor:
    """Sums of outer products, ``c x p x p``."""
    p = len(like)
    total = like.new_zeros(channels, p, p)
    for features in chunks():
        rows = features.rows().double().unflatten(0, features.value.shape)  # n x r x p
        rows = rows.movedim(1, 0) if channels > 1 else rows.flatten(0, 1)[None]
        total.baddbmm_(rows.mT, rows)
    return total


def check_structure(net: FunctionalNet, structure: OnlineStructure) -> None:
    """Require a structure that batches can be summed into, within its budget.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it reads the targets.
        MemoryError: If a full matrix does not fit.
    """
    if not isinstance(structure, OnlineStructure):
        raise TypeError(
            "structure must be Kronecker(...), Diagonal(...) or, for few weights, "
            f"Exact(...) of gpbridge.linearized, but is {type(structure).__name__}."
        )
    if isinstance(structure, Exact):
        p, m = net.num_params, net.num_outputs
        check_memory(
            f"The full curvature of {p} weights",
            8.0 * p**2 * (m + 4),
            structure.memory_budget,
            "Choose Kronecker() or Diagonal(), or a larger Exact(memory_budget=...).",
        )
    elif structure.curvature == "empirical":
        raise ValueError(
            "structure must not have curvature='empirical', which vanishes where the "
            "network fits its targets: the evidence would grow without bound. Choose "
            "'ggn' or 'monte_carlo'."
        )


def check_learnable(likelihood: Likelihood) -> None:
    """Require a likelihood whose evidence has this form.

    Raises:
        NotImplementedError: If noise is fixed per point, correlated, or predicted.
    """
    if isinstance(likelihood, MultitaskGaussianLikelihood):
        fine = likelihood.has_task_noise and likelihood.rank == 0
    elif is_gaussian(likelihood):
        fine = type(likelihood) is GaussianLikelihood
    else:
        fine = isinstance(likelihood, _LABELS)
    if not fine:
        kind = type(likelihood).__name__
        raise NotImplementedError(
            f"fit_online learns one noise variance per output, which this {kind} does "
            "not have. Pass GaussianLikelihood(), MultitaskGaussianLikelihood(m, "
            "rank=0), a softmax or a binary likelihood; or train with fit_map and "
            "call fit_evidence."
        )


class Noise(NamedTuple):
    """Noise variances ``m``, float64, their bounds, and whether they are learnt."""

    variance: Tensor
    floor: Tensor
    ceiling: Tensor
    is_learnt: bool


def noise_of(likelihood: Likelihood, like: Tensor) -> Noise:
    """The noise of a likelihood, and where its constraint lets it be.

    Args:
        likelihood: A Gaussian likelihood that ``check_learnable`` accepts.
        like: One row of outputs, ``1 x m``, float64.

    Returns:
        The variances; those that are learnt start inside of the bounds.
    """
    noise = noise_variances(likelihood, like).detach()[0].double().clone()
    if isinstance(likelihood, GaussianLikelihood):
        constraint = likelihood.noise_covar.raw_noise_constraint
    else:
        constraint = likelihood.raw_task_noises_constraint
    # A value on a bound has no finite inverse transform.
    floor = constraint.lower_bound.to(noise).clamp_min(1e-300) * (1 + 1e-6)
    ceiling = constraint.upper_bound.to(noise) * (1 - 1e-6)
    floor, ceiling = floor.expand_as(noise), ceiling.expand_as(noise)
    is_learnt = any(p.requires_grad for p in likelihood.parameters())
    if is_learnt:
        noise = noise.clamp(floor, ceiling)
    return Noise(noise, floor, ceiling, is_learnt)
