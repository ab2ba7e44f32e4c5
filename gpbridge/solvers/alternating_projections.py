r"""Alternating projections: exact block Gauss-Seidel steps where the residual is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_positive, check_share
from gpbridge.partial_products import column_products, principal_block
from gpbridge.solvers.factors import factorise
from gpbridge.solvers.refinement import refine
from gpbridge.solvers.system import Progress, Steps, System
from gpbridge.types import Solution


@dataclass(frozen=True)
class AlternatingProjections:
    r"""Greedy block Gauss-Seidel with cached factors of the diagonal blocks.

    Each step picks the block I of rows whose residual is largest, and solves it:

    .. math::
        d = H_{II}^{-1} r_I, \qquad x_I \leftarrow x_I + d, \qquad
        r \leftarrow r - H_{\cdot I} d .

    The residual is maintained and true up to round-off. A pass is n / b steps; memory
    n (k + b). No step size; blocks of one cluster of inputs help.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_passes: Limit of passes over the matrix.
        block_size: Rows of a block, b; the last block may be smaller.
        seed: Not used: the steps are deterministic.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each pass.

    References:
        Wu, Wenger, Jones, Pleiss, Gardner, Large-scale Gaussian processes via
        alternating projection, AISTATS 2024, algorithm 1.
    """

    tolerance: float = 1e-2
    max_passes: float = 200.0
    block_size: int = 1000
    seed: int = 0
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
    )

    name: ClassVar[str] = "Alternating projections"
    remedy: ClassVar[str] = "Raise max_passes, block_size, or the noise."

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_positive(
            max_passes=self.max_passes,
            block_size=self.block_size,
        )

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance."""
        return refine(self, operator, rhs, initial)

    def steps(self, system: System) -> Steps:
        """Project, block by block, from zero."""
        n = len(system.rhs)
        b = min(self.block_size, n)
        starts = list(range(0, n, b))
        factors = system.cache
        r = system.rhs.clone()
        x = torch.zeros_like(r)
        while True:
            for _ in starts:
                # Blocks of rows as an axis; the last one is filled up with zeros.
                sizes = torch.nn.functional.pad(
                    r.square().sum(-1), (0, b * len(starts) - n)
                )
                worst = int(sizes.reshape(-1, b).sum(-1).argmax())
                rows = slice(starts[worst], min(starts[worst] + b, n))
                if worst not in factors:
                    block = principal_block(system.operator, rows)
                    factors[worst] = factorise(block.double())
                d = factors[worst](r[rows])
                x[rows] += d
                r -= column_products(system.operator, rows, d)
                system.passes += (rows.stop - rows.start) / n
                system.iterations += 1
            keep = yield x, r.norm(dim=0)
            if keep is not None:
                x, r = x[:, keep], r[:, keep]
