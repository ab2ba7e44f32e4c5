r"""Accelerated sketch-and-project: no step size to tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_positive, check_share
from gpbridge.partial_products import (
    diagonal,
    principal_block,
    row_products,
    smallest_eigenvalue,
)
from gpbridge.randomness import standard_normal
from gpbridge.solvers.factors import factorise, raise_indefinite
from gpbridge.solvers.refinement import refine
from gpbridge.solvers.system import Progress, Steps, System
from gpbridge.types import Solution

_POWER_STEPS = 10
_SAFETY = 0.9  # power iteration comes from below, so that the step would be too long

# Strong convexity that momentum counts on, in units of its upper limit: with factors of
# the blocks, and with approximations where the published rule, noise over the amplitude
# of the kernel, is not known of the operator.
_CONVEXITY = 0.3
_LOW_CONVEXITY = 0.03


@dataclass(frozen=True)
class SketchAndProject:
    r"""Projections onto random blocks of rows, with Nesterov acceleration.

    A pass is a fresh random partition into blocks; a step solves the equations of a
    block I at the look-ahead y, :math:`d = H_{II}^{-1} (H_{I\cdot} y - r_I)`. Of large
    blocks :math:`H_{II} = A + \sigma^2 I` a randomised Nyström preconditioner P of a
    given rank takes the place of the factor, and the step along
    :math:`P^{-1} (H_{I\cdot} y - r_I)` is :math:`1 / \lambda_{\max}(P^{-1} H_{II})`
    long. No step size to tune; memory n k + b^2. Blocks that stay the same for all
    passes would be far slower.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_passes: Limit of passes over the matrix.
        block_size: Rows of a block, b; the last of a pass may be smaller.
        rank: Rank of the approximation of a block; default is its Cholesky factor,
            which costs b^3 / 3 and is the better choice up to about 2000 rows.
        accelerated: Use momentum.
        seed: Of the draw of blocks and of the sketches.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each pass.

    References:
        Rathore, Frangella, Garg, Fazliani, Dereziński, Udell, Turbocharging Gaussian
        process inference with approximate sketch-and-project, NeurIPS 2025,
        algorithm 3.
    """

    tolerance: float = 1e-2
    max_passes: float = 200.0
    block_size: int = 1000
    rank: int | None = None
    accelerated: bool = True
    seed: int = 0
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
    )

    name: ClassVar[str] = "Sketch and project"
    remedy: ClassVar[str] = "Raise max_passes, block_size or rank, or the noise."

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_positive(
            max_passes=self.max_passes,
            block_size=self.block_size,
            rank=1 if self.rank is None else self.rank,
        )

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance."""
        return refine(self, operator, rhs, initial)

    def steps(self, system: System) -> Steps:
        """Project onto random blocks, from zero."""
        operator, rhs = system.operator, system.rhs
        n = len(rhs)
        b = min(self.block_size, n)
        blocks = n / b
        shift = smallest_eigenvalue(operator)
        mu = _CONVEXITY / blocks
        if self.rank is not None and self.rank < b:
            mu = _LOW_CONVEXITY / blocks
            amplitude = diagonal(operator).max().item() - shift
            if shift > 0 and amplitude > 0:
                mu = min(max(shift / amplitude, 0.1 * mu), 1 / blocks)
        beta = 1 - (mu / blocks) ** 0.5
        gamma = 1 / (mu * blocks) ** 0.5
        alpha = 1 / (1 + gamma * blocks)
        V, Y = torch.zeros_like(rhs), torch.zeros_like(rhs)
        seen = rhs.clone()  # the latest residual of each row
        while True:
            order = torch.randperm(n, generator=system.generator, device=rhs.device)
            for rows in order.split(b):
                A = principal_block(operator, rows).double()
                if self.rank is None or self.rank >= len(A):
                    inverse, step = factorise(A), 1.0
                else:
                    inverse, step = self._projection(A, shift, system.generator)
                r = row_products(operator, rows, Y).double() - rhs[rows]
                seen[rows] = r
                move = step * inverse(r)
                V.lerp_(Y, 1 - beta)
                V[rows] -= gamma * move
                Y[rows] -= move
                W = Y  # the iterate; Y becomes the look-ahead
                if self.accelerated:
                    Y = torch.lerp(W, V, alpha)
                system.passes += len(rows) / n
                system.iterations += 1
            keep = yield W, seen.norm(dim=0)
            if keep is not None:
                rhs, V, Y, seen = (t[:, keep] for t in (rhs, V, Y, seen))

    def _projection(
        self, A: Tensor, shift: float, generator: torch.Generator
    ) -> tuple[Callable[[Tensor], Tensor], float]:
        """Product with the inverse preconditioner of a block, and the step length."""
        U, values = _nystrom(A, shift, min(self.rank, len(A)), generator)
        damping = shift + values[-1]
        damping = torch.maximum(damping, 1e-12 * (values[0] + damping)).clamp_min(
            1e-290
        )
        gain = damping / (values + damping) - 1.0

        def inverse(x: Tensor) -> Tensor:
            return (x + U @ (gain[:, None] * (U.mT @ x))) / damping

        v = standard_normal((len(A), 1), generator, A)
        largest = v.new_ones(())
        for _ in range(_POWER_STEPS):
            v = inverse(A @ (v / v.norm()))
            largest = v.norm()
        if not bool(largest > 0):
            raise_indefinite("a block of rows without positive eigenvalues")
        return inverse, (_SAFETY / largest).item()


def _nystrom(
    A: Tensor, shift: float, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a randomised Nyström approximation of ``A - shift I``."""
    sketch = torch.linalg.qr(standard_normal((len(A), rank), generator, A)).Q
    seen = A @ sketch - shift * sketch
    small = torch.finfo(A.dtype).eps * A.diagonal().sum()
    seen = seen + small * sketch
    values, vectors = torch.linalg.eigh(sketch.mT @ seen)
    if bool(values[0] < -1e-6 * values[-1].abs()):
        raise_indefinite(f"a block with an eigenvalue below {values[0].item():.1e}")
    root = seen @ (vectors / values.clamp_min(small).sqrt())
    U, singular, _ = torch.linalg.svd(root, full_matrices=False)
    return U, (singular.square() - small).clamp_min(0.0)
