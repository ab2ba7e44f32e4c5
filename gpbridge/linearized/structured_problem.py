r"""The linear model of a network on its data, with a structured curvature.

What :class:`~gpbridge.linearized.structures.Structure` inference keeps while a model is
fitted: the curvature of the data at unit prior scale. A prior variance, and a noise
that serves all points, are added without another pass over the data.

In: what :class:`~gpbridge.linearized.problem.TangentProblem` knows of data and prior.
Out: the curvature, its prediction strategy. Next: ``problem``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor

from gpbridge.checks import check_memory, warn_user
from gpbridge.data_features import PrecisionOperator
from gpbridge.features import TangentFeatures
from gpbridge.functional import FunctionalNet
from gpbridge.layer_gram import tangent_features
from gpbridge.likelihoods import (
    hessian_root,
    is_gaussian,
    residual,
    sample_residual,
)
from gpbridge.linearized.curvature_sums import kronecker_sums, squares_in_basis
from gpbridge.linearized.factored import Basis, FactoredCurvature, FactoredStrategy
from gpbridge.linearized.low_rank import (
    LowRankCurvature,
    LowRankStrategy,
    lanczos_eigenpairs,
    randomised_eigenpairs,
)
from gpbridge.linearized.sampling import solve_within
from gpbridge.linearized.structures import Diagonal, Kronecker, LowRank, Structure
from gpbridge.linearized.weight_blocks import (
    BlockJacobian,
    WeightBlock,
    block_jacobian,
    weight_blocks,
)

Curvature = FactoredCurvature | LowRankCurvature

_CHUNK_BYTES = 64 * 2**20  # derivatives of one chunk of points
_CAPTURED = 0.9  # share of the trace below which a low rank warns
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

    _curvature: tuple[Tensor, Curvature] | None = None

    @property
    def curvature(self) -> Curvature:
        """Curvature of the data at unit prior scale, made anew for another root."""
        with torch.no_grad():
            root = self._base_root()
            if self._curvature is None or not torch.equal(self._curvature[0], root):
                self._curvature = root, self._make(root)
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
        return self.curvature.condition(variance, weights.detach())

    def solve_mean(self, prior_variance: Tensor, whitened: Tensor) -> Tensor:
        r"""Scaled weights :math:`S^{1/2} J^\top R A^{-1} v` by products, ``p``."""
        std = self.flat_prior_std(prior_variance)
        operator = PrecisionOperator(self.root().detach(), std, self.data)
        rhs = operator.to_weights(whitened[..., None])
        limit = rhs.new_tensor(_MEAN_ERROR)
        solution = solve_within(self.inference.solver, operator, rhs, lambda _: limit)
        return solution.value[:, 0]

    @property
    def derivatives_per_point(self) -> int:
        """Numbers that stand for the derivatives of one point, in the worst case."""
        return self.num_params * self.outputs.shape[1]

    # -- sums over the data -----------------------------------------------------------

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

    def _chunks_of(self, root: Tensor) -> Iterator[tuple[TangentFeatures, Tensor]]:
        """Features at unit scale of chunks that fit into memory, with their roots."""
        step = points_per_chunk(self.X, self.outputs.shape[1], self.num_params)
        for x, r in zip(self.X.split(step), root.split(step), strict=True):
            yield self._features(x), r

    def _factored(self, root: Tensor) -> FactoredCurvature:
        sizes = {name: self.net.params[name].shape for name in self.unit_std}
        channels = root.shape[-1] if self.has_channels else 1
        return factored_curvature(
            lambda: self._chunks_of(root), sizes, self.groups, self.inference, channels
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
        values = found.values[None]
        if self.has_channels and root.shape[-1] > 1:
            seen = data.matmul(scale[:, None] * found.vectors)  # n x m x r
            values = seen.square().sum(0)
        one = torch.arange(len(self.groups), device=self.outputs.device)
        groups = self.expand(one.double()).long()
        curvature = LowRankCurvature(found.vectors, values, found.trace, groups)
        if curvature.captured < _CAPTURED:
            warn_user(
                f"LowRank(rank={options.rank}) captures {curvature.captured:.0%} of "
                "the trace of the curvature: variances are too large in the "
                "directions that are left out. Choose a larger rank, or Kronecker()."
            )
        return curvature


def unit_roots(outputs: Tensor) -> Tensor:
    """Roots at unit noise, one column for each output of ``n x m``: the identity."""
    n, m = outputs.shape
    return torch.eye(m).to(outputs).expand(n, m, m)


def curvature_roots(
    likelihood: Likelihood,
    outputs: Tensor,
    targets: Tensor,
    options: Structure,
    generator: torch.Generator,
) -> Tensor:
    """Roots R of the outputs' curvature, of the kind that the options name.

    Args:
        likelihood: The likelihood.
        outputs: Of the network, ``n x m``.
        targets: In the likelihood's form; the empirical curvature reads them.
        options: ``curvature`` and ``num_samples``.
        generator: Of the draws of the Monte Carlo curvature.

    Returns:
        ``n x m x r``, without a gradient.
    """
    if options.curvature == "empirical":
        root = residual(likelihood, outputs, targets)[..., None]
    elif options.curvature == "monte_carlo":
        draws = [
            sample_residual(likelihood, outputs, generator)
            for _ in range(options.num_samples)
        ]
        root = torch.stack(draws, -1) / options.num_samples**0.5
    else:
        root = hessian_root(likelihood, outputs)
    return root.detach()


def points_per_chunk(X: Tensor, num_outputs: int, num_params: int) -> int:
    """Points like X of which the derivatives fit into the workspace."""
    step = max(1, _CHUNK_BYTES // (X.element_size() * num_outputs * num_params))
    return max(step, 128)  # where signals stand for derivatives, many more fit


def factored_curvature(
    chunks: Callable[[], Iterable[tuple[TangentFeatures, Tensor]]],
    sizes: Mapping[str, torch.Size],
    groups: Sequence[Sequence[str]],
    options: Structure,
    channels: int = 1,
) -> FactoredCurvature:
    """Kronecker or diagonal curvature of data that come in chunks.

    One pass over the data, and one eigendecomposition per layer; a second pass with
    ``eigenvalue_correction``. All sums are linear in the data: how they are divided
    does not matter.

    Args:
        chunks: Makes a pass: features at unit scale, with roots ``n x m x r``.
        sizes: Shape of each random weight, in the order of the features.
        groups: Names of the weights that share a prior variance.
        options: :class:`~gpbridge.linearized.structures.Kronecker` or ``Diagonal``.
        channels: r to keep the columns of the roots apart, 1 to add them up.

    Returns:
        The curvature, at unit prior scale.

    Raises:
        MemoryError: If the factors are beyond the budget; it names the layer.
    """
    members = [set(names) for names in groups]
    blocks: list[WeightBlock] = []
    totals: list = []
    bases: list[Basis] = []
    values: list[Tensor] = []

    def jacobians() -> Iterator[tuple[Tensor, Iterator[BlockJacobian]]]:
        for features, root in chunks():
            if not blocks:
                blocks.extend(weight_blocks(features, sizes, members))
                check_structure_size(blocks, options, channels)
            root = root.to(features.value)
            own = (block_jacobian(features, block, sizes) for block in blocks)
            yield features.value, (J.weighted(root) for J in own)

    if isinstance(options, Kronecker):
        for _, parts in jacobians():
            sums = [kronecker_sums(J, channels, options.sharing) for J in parts]
            pairs = zip(totals, sums, strict=True)
            totals = [a.add(b) for a, b in pairs] if totals else sums
        for sums in totals:
            left = torch.linalg.eigh(sums.G.sum(0)).eigenvectors
            right = torch.linalg.eigh(sums.A.sum(0)).eigenvectors
            bases.append(Basis(left, right))
            # In this basis; the eigenvalues themselves where there is one channel.
            g = (left * (sums.G @ left)).sum(-2).clamp_min(0.0)  # c x o
            a = (right * (sums.A @ right)).sum(-2).clamp_min(0.0)  # c or 1 x i
            count = sums.count.clamp_min(torch.finfo(g.dtype).tiny)
            values.append(g[..., :, None] * a[..., None, :] / count[:, None, None])
    if not isinstance(options, Kronecker) or options.eigenvalue_correction:
        values = []
        for like, parts in jacobians():
            bases = bases or [Basis(None, None)] * len(blocks)
            squares = []
            for J, basis in zip(parts, bases, strict=True):
                left, right = (None if q is None else q.to(like) for q in basis)
                squares.append(squares_in_basis(J.rotated(left, right), channels))
            pairs = zip(values, squares, strict=True)
            values = [a + b for a, b in pairs] if values else squares
    bound = isinstance(options, Diagonal) and options.curvature == "ggn"
    return FactoredCurvature(sizes, blocks, bases, values, bound)


def has_shared_noise(likelihood: Likelihood) -> bool:
    """Whether one noise covariance serves every point."""
    return isinstance(likelihood, GaussianLikelihood) or hasattr(
        likelihood, "num_tasks"
    )


def check_structure_size(
    blocks: list[WeightBlock], options: Structure, channels: int
) -> None:
    """Refuse factors beyond the budget, and name the layer that asks for most."""
    if not isinstance(options, Kronecker):
        sizes = [8.0 * channels * block.o * block.i for block in blocks]
    else:
        sizes = [
            8.0 * (3 * (1 + channels) * (b.o**2 + b.i**2) + channels * b.o * b.i)
            for b in blocks
        ]
    largest = blocks[max(range(len(blocks)), key=sizes.__getitem__)]
    check_memory(
        f"{type(options).__name__}, most of it for {largest.label} "
        f"({largest.o} x {largest.i}),",
        sum(sizes),
        options.memory_budget,
        "Leave that layer out (parameters=...), choose Diagonal() or LowRank(...), "
        "which take any layer, or a larger memory_budget.",
    )
