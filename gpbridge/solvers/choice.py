r"""A solver for an operator, by its size and by what is cheap."""

from __future__ import annotations

from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_share
from gpbridge.lazy_covariance import tiled
from gpbridge.partial_products import (
    diagonal,
    has_cheap_columns,
    smallest_eigenvalue,
)
from gpbridge.solvers.cholesky import Cholesky
from gpbridge.solvers.conjugate_gradients import ConjugateGradients
from gpbridge.solvers.sketch_and_project import SketchAndProject
from gpbridge.types import Solver

_DENSE = 4000  # below, a factor costs less than a few passes of any iteration


def choose_solver(
    operator: LinearOperator | Tensor, tolerance: float | None = None
) -> Solver:
    """The solver that needs least thought.

    :class:`Cholesky` up to a few thousand equations; :class:`SketchAndProject` where
    rows can be had one by one, as those of a kernel matrix can;
    :class:`ConjugateGradients` where only products can.

    Args:
        operator: What will be solved with, ``... x n x n``.
        tolerance: Relative residual. Default: a tenth of the noise standard deviation
            in units of the data's, where both are known, between 1e-4 and 0.01; else
            0.01. A residual of the size of the noise moves a mean by as much as a
            posterior standard deviation.

    Returns:
        A solver with default options.
    """
    operator = tiled(operator)
    tolerance = _by_noise(operator) if tolerance is None else tolerance
    check_share(tolerance=tolerance)
    if operator.shape[-1] <= _DENSE:
        return Cholesky(tolerance=max(tolerance, 1e-6))
    if has_cheap_columns(operator):
        return SketchAndProject(tolerance=tolerance)
    return ConjugateGradients(tolerance=tolerance)


def _by_noise(operator: LinearOperator | Tensor) -> float:
    """Relative residual that is small beside the noise."""
    noise = smallest_eigenvalue(operator)
    if not noise > 0 or not has_cheap_columns(operator):
        return 1e-2
    power = diagonal(operator).mean().item()
    return min(max(0.1 * (noise / power) ** 0.5, 1e-4), 1e-2)
