r"""Stochastic dual descent: momentum on random coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_positive
from gpbridge.partial_products import diagonal, principal_block, row_products
from gpbridge.solvers.factors import raise_indefinite
from gpbridge.solvers.refinement import Progress, Steps, System, refine
from gpbridge.types import Solution

_DIVERGED = 10.0  # growth of the residual of a batch at which the step is halved
_HALVINGS = 40


@dataclass(frozen=True)
class StochasticDualDescent:
    r"""Stochastic gradient descent on :math:`a^\top H a / 2 - b^\top a`.

    A step draws b rows I and looks ahead to :math:`q = a + \rho v`:

    .. math::
        v \leftarrow \rho v - \beta\, \tfrac{n}{b} \sum_{i \in I} e_i (H_{i\cdot} q -
        b_i)^\top, \qquad a \leftarrow a + v .

    The noise of random coordinates vanishes at the solution; iterates are averaged with
    geometric weights.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_passes: Limit of passes over the matrix.
        batch_size: Rows of a step, b.
        step_size: The step in units :math:`\beta n`, as papers quote it; default by the
            largest eigenvalue of a block. A step that diverges is halved.
        momentum: :math:`\rho`.
        averaging: Window of the average, in passes.
        seed: Of the draw of rows.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each pass.

    References:
        Lin, Padhy, Antorán, Tripp, Terenin, Szepesvári, Hernández-Lobato, Janz,
        Stochastic gradient descent for Gaussian processes done right, ICLR 2024,
        algorithm 1.
    """

    tolerance: float = 1e-2
    max_passes: float = 200.0
    batch_size: int = 500
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float = 1.0
    seed: int = 0
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
    )

    name: ClassVar[str] = "Stochastic dual descent"
    remedy: ClassVar[str] = (
        "Raise max_passes or the noise; leave step_size to the automatic rule."
    )

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive(
            tolerance=self.tolerance,
            max_passes=self.max_passes,
            batch_size=self.batch_size,
        )
        if self.step_size is not None:
            check_positive(step_size=self.step_size)
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be at least 0 and below 1, but is {self.momentum}."
            )

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance."""
        return refine(self, operator, rhs, initial)

    def steps(self, system: System) -> Steps:
        """Descend on random coordinates, from zero."""
        operator, rhs = system.operator, system.rhs
        n = len(rhs)
        b = min(self.batch_size, n)
        rho = self.momentum
        if "step_size" not in system.cache:
            given = self.step_size
            system.cache["step_size"] = (
                automatic_step_size(operator, b, rho, system.generator)
                if given is None
                else given
            )
        weight = min(1.0, b / n / self.averaging) if self.averaging > 0 else 1.0
        a, v, average = (torch.zeros_like(rhs) for _ in range(3))
        good = average.clone()  # the last average at the end of a pass
        seen = rhs.clone()  # the latest residual of each row
        start = rhs.norm()
        halvings = 0
        while True:
            grown = False
            for _ in range(-(-n // b)):
                rows = draw_rows(n, b, system.generator, rhs.device)
                q = torch.add(a, v, alpha=rho)
                r = row_products(operator, rows, q).double() - rhs[rows]
                seen[rows] = r
                v.mul_(rho)
                v[rows] -= system.cache["step_size"] / b * r
                a += v
                average.lerp_(a, weight)
                system.passes += b / n
                system.iterations += 1
                size = r.norm() * (n / b) ** 0.5
                grown = not bool(size <= _DIVERGED * start)
                if grown:
                    break
            norms = seen.norm(dim=0)
            if grown and halvings < _HALVINGS:
                halvings += 1
                system.cache["step_size"] /= 2
                average.copy_(good)
                a, v = good.clone(), torch.zeros_like(v)
                seen.copy_(rhs)
                norms = rhs.norm(dim=0)
            else:
                good.copy_(average)
            keep = yield average, norms
            if keep is not None:
                rhs, a, v, average, good, seen = (
                    t[:, keep] for t in (rhs, a, v, average, good, seen)
                )
                start = rhs.norm()


def automatic_step_size(
    operator: LinearOperator, batch_size: int, momentum: float, generator=None
) -> float:
    r"""A step in units :math:`\beta n` below the threshold of divergence.

    Half of the smaller of two limits: classical stability of look-ahead momentum, with
    the largest eigenvalue of H / n judged by a block of rows, and momentum that
    outlives the visits of a coordinate, with :math:`2 (1 - \rho) b / \max_i H_{ii}`.

    Args:
        operator: H, ``n x n``.
        batch_size: Rows of a step, b.
        momentum: :math:`\rho`.
        generator: Source of the block.

    Returns:
        The step.
    """
    n = operator.shape[-1]
    rows = draw_rows(n, min(batch_size, n), generator, operator.device)
    largest = largest_eigenvalue(operator, rows) / len(rows)
    top = diagonal(operator).max().item()
    stability = (2 + 2 * momentum) / (1 + 2 * momentum) / largest
    revisits = 2 * (1 - momentum) * len(rows) / top
    return 0.5 * min(stability, revisits)


def largest_eigenvalue(operator: LinearOperator, rows: Tensor) -> float:
    """That of a block; refuses a block that is not positive semi-definite."""
    values = torch.linalg.eigvalsh(principal_block(operator, rows).double())
    small, large = values[0].item(), values[-1].item()
    if not (large > 0 and small >= -1e-6 * large):
        raise_indefinite(f"a block of rows with an eigenvalue of {small:.1e}")
    return large


def draw_rows(n: int, b: int, generator, device) -> Tensor:
    """Distinct random rows; ``torch.multinomial`` ends at 2^24 of them."""
    return torch.randperm(n, generator=generator, device=device)[:b]
