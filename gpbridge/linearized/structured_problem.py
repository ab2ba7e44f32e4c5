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
from gpbridge.likelihoods import hessian_root, is_gaussian
from gpbridge.linearized.curvature_tensors import Curvature
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
    _total: tuple[Curvature, Tensor, Curvature] | None = None  # with the previous
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
        return hessian_root(self.likelihood, self.outputs[:1])[0].diagonal().square()

    def structured_strategy(
        self, prior_variance: Tensor
    ) -> FactoredStrategy | LowRankStrategy:
        """Condition the linear model by the structure."""
        variance, weights = prior_variance.detach().double(), self.channel_weights()
        if self.previous is not None:
            curvature, weights = self.total_curvature(), weights.new_ones(1)
        else:
            curvature, weights = self.curvature, weights.detach()
        found = curvature.condition(variance, weights)
        if isinstance(found, LowRankStrategy) and curvature.rest:
            self._warn_of_rank(found, curvature)
        return found

    def _warn_of_rank(self, found: LowRankStrategy, curvature: Curvature) -> None:
        """Eigenvalues are in units of the prior's precision: below one says little."""
        smallest = float(found.eigenvalues.min())
        if smallest > 1 and curvature.captured < 1 - 1e-9:
            warn_user(
                f"LowRank(rank={self.inference.rank}): the data determine more "
                "directions than are kept, the last of which they know "
                f"{smallest:.3g} times better than the prior. Variances in those left "
                "out are that much too large. Choose a larger rank, or Kronecker()."
            )

    def total_curvature(self) -> Curvature:
        """Curvature at the present noise, with that of the previous data, if any."""
        own, weights = self.curvature, self.channel_weights().detach()
        if self.previous is None:
            return combine_channels(own, weights)
        kept = self._total
        if kept is None or kept[0] is not own or not torch.equal(kept[1], weights):
            before = self.previous.curvature
            if isinstance(own, LowRankCurvature):
                ranks = own.vectors.shape[1] + before.vectors.shape[1]
                self._check_vectors(ranks)
            total = add_curvatures(before, combine_channels(own, weights))
            self._total = own, weights, total
        return self._total[2]

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

    def solve_mean(
        self, prior_variance: Tensor, whitened: Tensor, initial: Tensor | None = None
    ) -> Tensor:
        r"""Scaled weights :math:`S^{1/2} J^\top R A^{-1} v` by products, ``p``."""
        std = self.flat_prior_std(prior_variance)
        operator = PrecisionOperator(self.root().detach(), std, self.data)
        rhs = operator.to_weights(whitened[..., None])
        limit = rhs.new_tensor(_MEAN_ERROR)
        initial = None if initial is None else initial[:, None]
        solution = solve_within(
            self.inference.solver, operator, rhs, lambda _: limit, initial
        )
        return solution.value[:, 0]

    @cached_property
    def derivatives_per_point(self) -> int:
        """Numbers that the derivatives of one point take at work."""
        features = self._features(self.X[:2])
        columns = self.outputs.shape[1]
        if not self.has_channels and self.inference.curvature == "monte_carlo":
            columns = self.inference.num_samples
        return numbers_at_work(features, self._blocks(features), self._sizes(), columns)

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
        options, (n, m) = self.inference, self.outputs.shape
        if options.curvature == "monte_carlo":
            check_memory(
                f"{options.num_samples} draws for each of {n} points with {m} outputs",
                8.0 * n * m * options.num_samples,
                options.memory_budget,
                "Choose a smaller num_samples, or curvature='ggn'.",
            )
        generator = torch.Generator(self.outputs.device).manual_seed(options.seed)
        return curvature_roots(
            self.likelihood, self.outputs, self.Y, options, generator
        )

    def _make(self, root: Tensor) -> Curvature:
        if isinstance(self.inference, LowRank):
            return self._low_rank(root)
        return self._factored(root)

    def _features(self, X: Tensor, root: Tensor | None = None) -> TangentFeatures:
        """Of the outputs, or of their combinations by a root, at unit scale."""
        fixed = None if root is None else (lambda value: root.to(value))
        return tangent_features(self.net, X, self.unit_std, "layers", fixed)

    def _sizes(self) -> dict[str, torch.Size]:
        return {name: self.net.params[name].shape for name in self.unit_std}

    def _blocks(self, features: TangentFeatures) -> list[WeightBlock]:
        members = [set(names) for names in self.groups]
        return weight_blocks(features, self._sizes(), members)

    def _chunks_of(self, root: Tensor) -> Iterator[TangentFeatures]:
        """Features of the root's combinations, in chunks that fit into memory."""
        for x, r in self._rows_of(root):
            # A root of channels is the identity.
            yield self._features(x, None if self.has_channels else r)

    def _rows_of(self, root: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of such chunks, with their roots."""
        per_point = self.X.element_size() * self.derivatives_per_point
        step = max(1, CHUNK_BYTES // per_point)
        yield from zip(self.X.split(step), root.split(step), strict=True)

    def _factored(self, root: Tensor) -> FactoredCurvature:
        channels = root.shape[-1] if self.has_channels else 1
        return factored_curvature(
            lambda: self._chunks_of(root),
            self._sizes(),
            self._blocks(self._features(self.X[:1])),
            self.inference,
            channels,
            self.has_channels,
        )

    def _check_vectors(self, rank: int, spare: int = 0) -> None:
        check_memory(
            f"The eigenvectors of rank {rank} for {self.num_params} random weights",
            8.0 * self.num_params * (rank + spare) * 3,
            self.inference.memory_budget,
            "Choose a smaller rank, LowRank(rank=...), fewer random weights "
            "(parameters=...), or Diagonal().",
        )

    def _low_rank(self, root: Tensor) -> LowRankCurvature:
        options, p = self.inference, self.num_params
        self._check_vectors(options.rank, spare=20)
        data, scale = self.data, self.unit_scale()
        product = PrecisionOperator(root, scale, data).curved
        generator = torch.Generator(self.outputs.device).manual_seed(options.seed)
        like = self.outputs.new_zeros(())
        if options.method == "lanczos":
            steps = options.rank + options.num_iterations
            found = lanczos_eigenpairs(product, p, options.rank, steps, generator, like)
        else:
            rank, rounds = options.rank, options.num_iterations
            found = randomised_eigenpairs(product, p, rank, rounds, generator, like)
        core, traces = found.values.diag()[None], self._traces(root)
        if self.has_channels and root.shape[-1] > 1:
            seen = data.matmul(scale[:, None] * found.vectors).movedim(1, 0)
            core = seen.mT @ seen  # m x r x r
        else:
            traces = traces.sum(0, keepdim=True)
        one = torch.arange(len(self.groups), device=self.outputs.device)
        groups = self.expand(one.double()).long()
        curvature = LowRankCurvature(
            found.vectors, core, traces, groups, root.shape[0] * root.shape[-1]
        )
        if curvature.captured < _CAPTURED:
            warn_user(
                f"LowRank(rank={options.rank}) captures {curvature.captured:.0%} of "
                "the trace of the curvature: variances are too large in the "
                "directions that are left out. Choose a larger rank, or Kronecker()."
            )
        return curvature

    def _traces(self, root: Tensor) -> Tensor:
        """Traces of the curvature, ``r x groups``: of each column and each group."""
        found = []
        for names in map(set, self.groups):
            std = {n: s for n, s in self.unit_std.items() if n in names}
            total = root.new_zeros(root.shape[-1])
            for x, r in self._rows_of(root):
                blocks = tangent_features(self.net, x, std, "layers").blocks()
                total += (r * (blocks.double() @ r)).sum((0, 1))
            found.append(total)
        return torch.stack(found, -1)


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

    def curved(self, rhs: Tensor) -> Tensor:
        std = self.std[:, None]
        return super().curved(rhs) + std * curvature_product(self.before, std * rhs)
