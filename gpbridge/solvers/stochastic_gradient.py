r"""Stochastic gradient descent on the squared residual, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_positive
from gpbridge.partial_products import column_products
from gpbridge.solvers.descent import (
    check_momentum,
    descend,
    draw_rows,
    largest_eigenvalue,
)
from gpbridge.solvers.refinement import Progress, Steps, System, refine
from gpbridge.types import Solution


@dataclass(frozen=True)
class StochasticGradientDescent:
    r"""Minibatch descent on the primal objective :math:`\|b - H a\|^2 / 2`.

    The gradient of b rows I is :math:`\tfrac{n}{b} H_{\cdot I} (H_{I\cdot} a - b_I)`,
    so that the condition number is squared: use it as a reference, and
    :class:`~gpbridge.solvers.StochasticDualDescent` for work. This form needs products
    only; the original takes random features of the kernel for the noise term.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_passes: Limit of passes over the matrix; a step visits rows and columns.
        batch_size: Rows of a step, b.
        step_size: In units of the inverse of the largest eigenvalue of H squared;
            default one half. A step that diverges is halved.
        momentum: Of Nesterov's look-ahead.
        averaging: Window of the geometric average, in passes.
        seed: Of the draw of rows.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each pass.

    References:
        Lin, Antorán, Padhy, Janz, Hernández-Lobato, Terenin, Sampling from Gaussian
        process posteriors using stochastic gradient descent, NeurIPS 2023, eq. (9).
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

    name: ClassVar[str] = "Stochastic gradient descent"
    remedy: ClassVar[str] = (
        "Choose StochasticDualDescent or SketchAndProject; raise max_passes or the "
        "noise; leave step_size to the automatic rule."
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
        """Descend on batches of rows, from zero."""
        operator, n = system.operator, len(system.rhs)
        b = min(self.batch_size, n)
        if "step" not in system.cache:
            rows = draw_rows(n, b, system.generator, system.rhs.device)
            # The eigenvalue of a block, scaled up, is that of H or more.
            largest = n / b * largest_eigenvalue(operator, rows)
            given = 0.5 if self.step_size is None else self.step_size
            system.cache["step"] = given / largest**2

        def push(v: Tensor, rows: Tensor, r: Tensor, step: float) -> None:
            v -= step * n / b * column_products(operator, rows, r)

        return descend(
            system,
            push,
            batch_size=b,
            momentum=self.momentum,
            averaging=self.averaging,
            visits=2,
        )
