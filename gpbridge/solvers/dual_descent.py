r"""Stochastic dual descent: momentum on random coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from linear_operator import LinearOperator
from torch import Generator, Tensor

from gpbridge.checks import check_positive
from gpbridge.partial_products import diagonal
from gpbridge.solvers.descent import (
    check_momentum,
    descend,
    draw_rows,
    largest_eigenvalue,
)
from gpbridge.solvers.refinement import Progress, Steps, System, refine
from gpbridge.types import Solution


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
            step_size=1.0 if self.step_size is None else self.step_size,
            averaging=self.averaging,
        )
        check_momentum(self.momentum)

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance."""
        return refine(self, operator, rhs, initial)

    def steps(self, system: System) -> Steps:
        """Descend on random coordinates, from zero."""
        b = min(self.batch_size, len(system.rhs))
        if "step" not in system.cache:
            step = self.step_size
            if step is None:
                step = automatic_step_size(
                    system.operator, b, self.momentum, system.generator
                )
            system.cache["step"] = step

        def push(v: Tensor, rows: Tensor, r: Tensor, step: float) -> None:
            v[rows] -= step / b * r

        return descend(
            system,
            push,
            batch_size=b,
            momentum=self.momentum,
            averaging=self.averaging,
        )


def automatic_step_size(
    operator: LinearOperator,
    batch_size: int,
    momentum: float,
    generator: Generator | None = None,
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
