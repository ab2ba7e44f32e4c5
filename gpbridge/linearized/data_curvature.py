r"""Kronecker and diagonal curvature of data that come in chunks.

What a fitted model and a training run share: roots of the outputs' curvature, sums over
chunks of features, and the bases and eigenvalues that they give.

In: features of chunks with roots. Out: a
:class:`~gpbridge.linearized.factored.FactoredCurvature`. Next: ``structured_problem``
for data in memory, ``selection.online_evidence`` for data that pass by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from gpytorch.likelihoods import Likelihood
from torch import Tensor

from gpbridge.checks import check_memory
from gpbridge.data_features import feature_bytes
from gpbridge.features import TangentFeatures
from gpbridge.likelihoods import hessian_root, residual, sample_residual
from gpbridge.linearized.curvature_sums import kronecker_sums, squares_in_basis
from gpbridge.linearized.factored import Basis, FactoredCurvature
from gpbridge.linearized.structures import Kronecker, Structure
from gpbridge.linearized.weight_blocks import (
    BlockJacobian,
    WeightBlock,
    block_jacobian,
)

CHUNK_BYTES = 64 * 2**20  # derivatives of one chunk of points


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


def numbers_at_work(
    features: TangentFeatures,
    blocks: Sequence[WeightBlock],
    sizes: Mapping[str, torch.Size],
    columns: int | None = None,
) -> int:
    """Numbers that the derivatives of one point take while they are summed.

    Signals where a layer is called at one position; the derivatives of one layer at
    a time where there are several.

    Args:
        features: Of some points.
        blocks: The weights.
        sizes: Shape of each random weight, in the order of the features.
        columns: Of the roots that the derivatives are multiplied with; default one
            for each output.
    """
    value = features.value
    columns = value.shape[1] if columns is None else max(columns, value.shape[1])
    held = feature_bytes(features) // value.element_size() // len(value)
    formed = [0]
    for block in blocks:
        if not block_jacobian(features, block, sizes).is_rank_one:
            formed.append(columns * block.o * block.i)
    # Signals of a layer become one for each column of the root.
    return held * columns // value.shape[1] + 2 * max(formed)


def factored_curvature(
    chunks: Callable[[], Iterable[TangentFeatures]],
    sizes: Mapping[str, torch.Size],
    blocks: Sequence[WeightBlock],
    options: Structure,
    channels: int = 1,
    is_ggn: bool = False,
) -> FactoredCurvature:
    r"""Kronecker or diagonal curvature of data that come in chunks.

    One pass over the data, and one eigendecomposition per layer; a second pass with
    ``eigenvalue_correction``. All sums are linear in the data: how they are divided
    does not matter.

    Args:
        chunks: Makes a pass: features at unit scale of the combinations
            :math:`R^\top f` by the roots, r of each point.
        sizes: Shape of each random weight, in the order of the features.
        blocks: The weights in blocks.
        options: :class:`~gpbridge.linearized.structures.Kronecker` or ``Diagonal``.
        channels: r to keep the columns of the roots apart, 1 to add them up.
        is_ggn: Whether the roots are those of the Gauss-Newton matrix whatever the
            options say, as under Gaussian noise.

    Returns:
        The curvature, at unit prior scale.

    Raises:
        MemoryError: If the factors are beyond the budget; it names the layer.
    """
    check_structure_size(blocks, options, channels)
    totals: list = []
    bases = [Basis(None, None)] * len(blocks)
    values: list[Tensor] = []

    def jacobians() -> Iterator[tuple[Tensor, Iterator[BlockJacobian]]]:
        for features in chunks():
            own = (block_jacobian(features, block, sizes) for block in blocks)
            yield features.value, own

    if isinstance(options, Kronecker):
        for _, parts in jacobians():
            sums = [kronecker_sums(J, channels, options.sharing) for J in parts]
            pairs = zip(totals, sums, strict=True)
            totals = [a.add(b) for a, b in pairs] if totals else sums
        bases = []
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
            squares = []
            for J, basis in zip(parts, bases, strict=True):
                left, right = (None if q is None else q.to(like) for q in basis)
                squares.append(squares_in_basis(J.rotated(left, right), channels))
            pairs = zip(values, squares, strict=True)
            values = [a + b for a, b in pairs] if values else squares
    # Hadamard's inequality in an orthonormal basis of each block.
    diagonal = not isinstance(options, Kronecker) or options.eigenvalue_correction
    bound = diagonal and (is_ggn or options.curvature == "ggn")
    return FactoredCurvature(sizes, blocks, bases, values, bound)


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
