r"""A solver for an operator, by its size and by what is cheap."""

from __future__ import annotations

from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_positive
from gpbridge.partial_products import has_cheap_columns
from gpbridge.solvers.cholesky import Cholesky
from gpbridge.solvers.conjugate_gradients import ConjugateGradients
from gpbridge.solvers.sketch_and_project import SketchAndProject
from gpbridge.types import Solver

_DENSE = 4000  # below, a factor costs less than a few passes of any iteration


def choose_solver(operator: LinearOperator | Tensor, tolerance: float = 1e-2) -> Solver:
    """The solver that needs least thought.

    :class:`Cholesky` up to a few thousand equations; :class:`SketchAndProject` where
    rows can be had one by one, as those of a kernel matrix can;
    :class:`ConjugateGradients` where only products can.

    Args:
        operator: What will be solved with, ``... x n x n``.
        tolerance: Relative residual.

    Returns:
        A solver with default options.
    """
    check_positive(tolerance=tolerance)
    if operator.shape[-1] <= _DENSE:
        return Cholesky(tolerance=max(tolerance, 1e-6))
    if has_cheap_columns(operator):
        return SketchAndProject(tolerance=tolerance)
    return ConjugateGradients(tolerance=tolerance)
