r"""Stochastic dual descent: momentum on random coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from linear_operator import LinearOperator
from torch import Generator, Tensor

from gpbridge.partial_products import diagonal
from gpbridge.solvers.descent import (
    Descent,
    descend,
    draw_rows,
    largest_eigenvalue,
)
from gpbridge.solvers.system import Steps, System


@dataclass(frozen=True)
class StochasticDualDescent(Descent):
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

    name: ClassVar[str] = "Stochastic dual descent"
    remedy: ClassVar[str] = (
        "Raise max_passes or the noise; leave step_size to the automatic rule."
    )

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
