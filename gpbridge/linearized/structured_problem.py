r"""The linear model of a network on its data, with a structured curvature.

What :class:`~gpbridge.linearized.structures.Structure` inference keeps while a model is
fitted: the curvature of the data at unit prior scale. A prior variance, and a noise
that serves all points, are added without another pass over the data.

In: what :class:`~gpbridge.linearized.problem.TangentProblem` knows of data and prior.
Out: the curvature, its prediction strategy. Next: ``problem``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor

from gpbridge.checks import check_memory, warn_user
from gpbridge.data_features import DataFeatures, PrecisionOperator
from gpbridge.features import TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import is_gaussian
from gpbridge.linearized.data_curvature import (
    CHUNK_BYTES,
    curvature_roots,
    factored_curvature,
    numbers_at_work,
    unit_roots,
)
from gpbridge.linearized.factored import FactoredCurvature, FactoredStrategy
from gpbridge.linearized.low_rank import (
    LowRankCurvature,
    LowRankStrategy,
    lanczos_eigenpairs,
    randomised_eigenpairs,
)
from gpbridge.linearized.sampling import solve_within
from gpbridge.linearized.structured_weights import (
    StructuredWeights,
    add_curvatures,
    combine_channels,
    curvature_product,
)
from gpbridge.linearized.structures import LowRank, Structure
from gpbridge.linearized.weight_blocks import WeightBlock, weight_blocks

Curvature = FactoredCurvature | LowRankCurvature

_CAPTURED = 0.9  # share of the trace below which a low rank warns
_DENSE = 1000  # weights up to which a mean is solved for by a factor
_MEAN_ERROR = 1e-3  # of the posterior mean, in posterior standard deviations


class StructuredProblem:
    """The part of a ``TangentProblem`` for curvature structures."""

    net: FunctionalNet
    X: Tensor
    Y: Tensor
    likelihood: Likelihood
    groups: list[list[str]]
    unit_std: dict[str, Tensor]
    outputs: Tensor  # n x m
    num_params: int
    inference: Structure
    previous: StructuredWeights | None = None  # the posterior that is the prior

    _curvature: tuple[Tensor, Curvature] | None = None
    _curvature_key: str | None = None  # filled by curvature_state
    recall: Callable[[Tensor], Curvature | None] | None = None  # one that was saved

    @property
    def curvature(self) -> Curvature:
        """Curvature of the data at unit prior scale, made anew for another root."""
        if self._curvature is not None and self._has_fixed_root:
            return self._curvature[1]
        with torch.no_grad():
            root = self._base_root()
            if self._curvature is None or not torch.equal(self._curvature[0], root):
                found = None if self.recall is None else self.recall(root)
                self._curvature = root, self._make(root) if found is None else found
        return self._curvature[1]

    @property
    def has_channels(self) -> bool:
        """Whether the curvature is a sum over outputs with the noise as weights."""
        return (
            is_gaussian(self.likelihood)
            and has_shared_noise(self.likelihood)
            and not getattr(self.likelihood, "rank", 0)
            and self.inference.curvature != "empirical"
        )

    def channel_weights(self) -> Tensor:
        """Inverse noise variance of each output, or one; differentiable."""
        if not self.has_channels:
            return self.outputs.new_ones(1)
        return self.root()[0].diagonal().square()

    def structured_strategy(
        self, prior_variance: Tensor
    ) -> FactoredStrategy | LowRankStrategy:
        """Condition the linear model by the structure."""
        variance, weights = prior_variance.detach().double(), self.channel_weights()
        if self.previous is not None:
            return self.total_curvature().condition(variance, weights.new_ones(1))
        return self.curvature.condition(variance, weights.detach())

    def total_curvature(self) -> Curvature:
        """Curvature at the present noise, with that of the previous data, if any."""
        own = combine_channels(self.curvature, self.channel_weights().detach())
        if self.previous is None:
            return own
        return add_curvatures(self.previous.curvature, own)

    def continued_mean(self, prior_variance: Tensor) -> Tensor:
        r"""Posterior mean of the weights from the previous posterior, ``p``.

        .. math:: (S^{-1} + M_1 + J^\top \Lambda J) \, w
                  = H_1 \mu_1 + J^\top \Lambda (y - m)
        """
        std = self.flat_prior_std(prior_variance)
        operator = _ContinuedPrecision(
            self.root().detach(), std, self.data, self.previous.curvature
        )
        misfit = (self.Y.double() - self.prior_mean)[..., None]
        first = self.previous
        pulled = std[:, None] * first.precision_product(first.mean[:, None])
        rhs = pulled + operator.to_weights(self.root().detach().mT @ misfit)
        if len(std) <= _DENSE:
            eye = torch.eye(len(std)).to(std)
            L = torch.linalg.cholesky(operator @ eye)
            return std * torch.cholesky_solve(rhs, L)[:, 0]
        limit = rhs.new_tensor(_MEAN_ERROR)
        solution = solve_within(self.inference.solver, operator, rhs, lambda _: limit)
        return std * solution.value[:, 0]

    def solve_mean(self, prior_variance: Tensor, whitened: Tensor) -> Tensor:
        r"""Scaled weights :math:`S^{1/2} J^\top R A^{-1} v` by products, ``p``."""
        std = self.flat_prior_std(prior_variance)
        operator = PrecisionOperator(self.root().detach(), std, self.data)
        rhs = operator.to_weights(whitened[..., None])
        limit = rhs.new_tensor(_MEAN_ERROR)
        solution = solve_within(self.inference.solver, operator, rhs, lambda _: limit)
        return solution.value[:, 0]

    @cached_property
    def derivatives_per_point(self) -> int:
        """Numbers that the derivatives of one point take at work."""
        features = self._features(self.X[:2])
        return numbers_at_work(features, self._blocks(features), self._sizes())

    # -- sums over the data -----------------------------------------------------------

    @property
    def _has_fixed_root(self) -> bool:
        """Whether no hyperparameter moves the roots of the outputs' curvature."""
        if is_gaussian(self.likelihood):
            return self.has_channels
        return not list(self.likelihood.parameters())

    def _base_root(self) -> Tensor:
        """Roots ``n x m x r`` of the outputs' curvature, at unit noise for channels."""
        if self.has_channels:
            return unit_roots(self.outputs)
        options = self.inference
        generator = torch.Generator(self.outputs.device).manual_seed(options.seed)
        return curvature_roots(
            self.likelihood, self.outputs, self.Y, options, generator
        )

    def _make(self, root: Tensor) -> Curvature:
        if isinstance(self.inference, LowRank):
            return self._low_rank(root)
        return self._factored(root)

    def _features(self, X: Tensor) -> TangentFeatures:
        return tangent_features(self.net, X, self.unit_std, "layers")

    def _sizes(self) -> dict[str, torch.Size]:
        return {name: self.net.params[name].shape for name in self.unit_std}

    def _blocks(self, features: TangentFeatures) -> list[WeightBlock]:
        members = [set(names) for names in self.groups]
        return weight_blocks(features, self._sizes(), members)

    def _chunks_of(self, root: Tensor) -> Iterator[tuple[TangentFeatures, Tensor]]:
        """Features at unit scale of chunks that fit into memory, with their roots."""
        per_point = self.X.element_size() * self.derivatives_per_point
        step = max(1, CHUNK_BYTES // per_point)
        for x, r in zip(self.X.split(step), root.split(step), strict=True):
            yield self._features(x), r

    def _factored(self, root: Tensor) -> FactoredCurvature:
        channels = root.shape[-1] if self.has_channels else 1
        return factored_curvature(
            lambda: self._chunks_of(root),
            self._sizes(),
            self._blocks(self._features(self.X[:1])),
            self.inference,
            channels,
        )

    def _low_rank(self, root: Tensor) -> LowRankCurvature:
        options, p = self.inference, self.num_params
        needed = 8.0 * p * (options.rank + 20) * 3
        check_memory(
            f"The eigenvectors of rank {options.rank} for {p} random weights",
            needed,
            options.memory_budget,
            "Choose a smaller rank, LowRank(rank=...), fewer random weights "
            "(parameters=...), or Diagonal().",
        )
        data, scale = self.data, self.unit_scale()

        def product(columns: Tensor) -> Tensor:
            seen = root.mT @ data.matmul(scale[:, None] * columns)
            return scale[:, None] * data.t_matmul(root @ seen)

        generator = torch.Generator(self.outputs.device).manual_seed(options.seed)
        like = self.outputs.new_zeros(())
        if options.method == "lanczos":
            steps = options.rank + options.num_iterations
            found = lanczos_eigenpairs(product, p, options.rank, steps, generator, like)
        else:
            rank, rounds = options.rank, options.num_iterations
            found = randomised_eigenpairs(product, p, rank, rounds, generator, like)
        core = found.values.diag()[None]
        if self.has_channels and root.shape[-1] > 1:
            seen = data.matmul(scale[:, None] * found.vectors).movedim(1, 0)
            core = seen.mT @ seen  # m x r x r
        one = torch.arange(len(self.groups), device=self.outputs.device)
        groups = self.expand(one.double()).long()
        curvature = LowRankCurvature(found.vectors, core, found.trace, groups)
        if curvature.captured < _CAPTURED:
            warn_user(
                f"LowRank(rank={options.rank}) captures {curvature.captured:.0%} of "
                "the trace of the curvature: variances are too large in the "
                "directions that are left out. Choose a larger rank, or Kronecker()."
            )
        return curvature


def has_shared_noise(likelihood: Likelihood) -> bool:
    """Whether one noise covariance serves every point."""
    return isinstance(likelihood, GaussianLikelihood) or hasattr(
        likelihood, "num_tasks"
    )


class _ContinuedPrecision(PrecisionOperator):
    """Posterior precision of the scaled weights, with a curvature that came before."""

    def __init__(
        self, root: Tensor, std: Tensor, data: DataFeatures, before: Curvature
    ) -> None:
        super().__init__(root, std, data)
        self.before = before

    def _curved(self, rhs: Tensor) -> Tensor:
        std = self.std[:, None]
        return super()._curved(rhs) + std * curvature_product(self.before, std * rhs)
