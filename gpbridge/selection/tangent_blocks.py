r"""Log determinants of the tangent kernel by blocks of its rows, which are bounds.

By Sylvester's identity the complexity of the evidence is
:math:`\tfrac12 \log\det(I + K)` with :math:`K = R^\top J S J^\top R`, a row for each
datum and each column of the root R. By Fischer's inequality any partition of the rows
into blocks B gives

.. math:: \log\det(I + K) \le \sum_B \log\det(I + K_{BB}),

so that the evidence with the right-hand side is a lower bound, of one block equal to
it. For classification the rows are in the symmetric root
:math:`R = \mathrm{diag}(\sqrt p) - p \sqrt p^\top`: blocks of one output of K without
the root would be no bound.

In: rows of :math:`R^\top J`. Out: :class:`BlockCurvature`, a function of prior
variances and noise. Next: ``orbit_curvature`` makes the rows.

References:
    Immer, van der Ouderaa, van der Wilk, Rätsch, Schölkopf, Stochastic marginal
    likelihood gradients using neural tangent kernels, ICML 2023, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from gpbridge.checks import check_choice, check_count, check_positive
from gpbridge.linearized.weight_blocks import BlockJacobian, WeightBlock

OUTPUTS = ("joint", "independent", "sampled")


@dataclass(frozen=True, kw_only=True)
class TangentBlocks:
    r"""The complexity by blocks of the tangent kernel, of a random partition of data.

    Small blocks bound the evidence loosely and bias learnt prior variances downwards;
    a number without its block size means little.

    Args:
        block_size: Data of a block.
        outputs: ``"joint"`` has all outputs of its data in a block, m b rows;
            ``"independent"`` one output in each, m times as many blocks of b rows;
            ``"sampled"`` one of these m, drawn for each block of data and counted m
            times, which takes one backward pass instead of m.
        num_blocks: How many blocks an update draws without replacement, counted as all
            of them are; None takes all. Drawn blocks or outputs make an unbiased
            estimate of the bound, averaged over partitions.
        memory_budget: Bytes for one block: inputs and signals of the layers on all
            orbits, derivatives, and the graph of all these.

    Raises:
        ValueError: If an option is not one of those named.
    """

    block_size: int = 100
    outputs: str = "joint"
    num_blocks: int | None = None
    memory_budget: float = 4 * 2**30

    jacobian_dtype: ClassVar[torch.dtype | None] = None

    def __post_init__(self) -> None:
        """Check the options."""
        check_count(block_size=self.block_size)
        check_choice("outputs", self.outputs, OUTPUTS)
        if self.num_blocks is not None:
            check_count(num_blocks=self.num_blocks)
        check_positive(memory_budget=self.memory_budget)


class GramBlock:
    """Blocks of rows of equal size, by group of weights at unit prior variance.

    Args:
        gram: ``g x q x k x k``, float64: q blocks of k rows.
        channels: Which noise each row has, ``q x k`` integers.
    """

    def __init__(self, gram: Tensor, channels: Tensor) -> None:
        self.gram, self.channels = gram, channels

    def factor(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Cholesky factors of I + K, ``q x k x k``."""
        K = torch.tensordot(prior_variance.to(self.gram), self.gram, dims=1)
        std = weights.to(K).sqrt()[self.channels]
        K = K * std[..., :, None] * std[..., None, :]
        eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
        return torch.linalg.cholesky(eye + K)

    def detach(self) -> GramBlock:
        """The same numbers without their graph."""
        return GramBlock(self.gram.detach(), self.channels)


class BlockCurvature:
    """Sums of log determinants over blocks, as functions of prior and noise.

    Args:
        blocks: The blocks.
        scale: What each counts: above one where blocks or outputs were drawn.
        is_lower_bound: Whether the evidence is one, and neither exact nor an estimate.
    """

    def __init__(
        self, blocks: Sequence[GramBlock], scale: float, is_lower_bound: bool
    ) -> None:
        self.blocks, self.scale = list(blocks), scale
        self.is_lower_bound = is_lower_bound

    def logdet(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Sum of log det(I + K) over blocks, differentiable.

        Args:
            prior_variance: One per group.
            weights: Inverse noise variances, or a one for labels.
        """
        logs = [
            block.factor(prior_variance, weights).diagonal(dim1=-2, dim2=-1).log().sum()
            for block in self.blocks
        ]
        return 2 * self.scale * torch.stack(logs).sum()

    def effective_dimension(self, prior_variance: Tensor, weights: Tensor) -> Tensor:
        """Number of directions that the data determine, by the same blocks."""
        found = prior_variance.new_zeros((), dtype=torch.float64)
        for block in self.blocks:
            L = block.factor(prior_variance, weights)
            eye = torch.eye(L.shape[-1]).to(L)
            inverse = torch.linalg.solve_triangular(L, eye, upper=False)
            found = found + L.shape[:-1].numel() - inverse.square().sum()
        return self.scale * found


def gram_block(
    parts: Sequence[BlockJacobian],
    blocks: Sequence[WeightBlock],
    num_groups: int,
    channels: Tensor,
    joint: bool,
) -> GramBlock:
    """The kernel's rows of some data.

    Args:
        parts: Derivatives by the weights of each block, ``n x r`` rows.
        blocks: The weights.
        num_groups: The number of prior variances.
        channels: Which noise each of r rows of a datum has, ``r`` integers.
        joint: All n r rows in one block, else r blocks of n.
    """
    grams: list[Tensor | None] = [None] * num_groups
    for J, block in zip(parts, blocks, strict=True):
        # Products cancel, so that their precision decides and not that of J.
        rows = J.dense().flatten(2).double()  # n x r x (o i)
        n, r = rows.shape[:2]
        rows = rows.flatten(0, 1)[None] if joint else rows.movedim(1, 0)
        K = rows @ rows.mT
        before = grams[block.group]
        grams[block.group] = K if before is None else before + K
    channels = channels.expand(n, r)
    channels = channels.reshape(1, -1) if joint else channels.mT
    return GramBlock(torch.stack(grams), channels)


def partition(num_rows: int, block_size: int, generator: Generator) -> list[Tensor]:
    """A random partition of the rows 0 .. n - 1 into blocks, the last one smaller."""
    device = generator.device
    return list(
        torch.randperm(num_rows, generator=generator, device=device).split(block_size)
    )
