r"""Stochastic gradient descent on the squared residual, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gpbridge.partial_products import column_products
from gpbridge.solvers.descent import (
    Descent,
    descend,
    draw_rows,
    largest_eigenvalue,
)
from gpbridge.solvers.system import Steps, System


@dataclass(frozen=True)
class StochasticGradientDescent(Descent):
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

    name: ClassVar[str] = "Stochastic gradient descent"
    remedy: ClassVar[str] = (
        "Choose StochasticDualDescent or SketchAndProject; raise max_passes or the "
        "noise; leave step_size to the automatic rule."
    )

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
