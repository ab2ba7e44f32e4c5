r"""Dense factorisation: exact, for a few thousand equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_memory, check_positive, check_share
from gpbridge.partial_products import full_precision
from gpbridge.solvers.factors import factorise
from gpbridge.solvers.system import check_system, warn_not_converged
from gpbridge.types import Solution


@dataclass(frozen=True)
class Cholesky:
    r"""Solution by a Cholesky factor of the dense matrix, in float64.

    Time n^3 / 3 + n^2 k, memory 2 n^2 numbers. Of a singular matrix, such as that of
    repeated points without noise, the pseudo-inverse is taken; the residual then says
    whether the equations have a solution.

    Args:
        tolerance: Relative residual above which a warning says that the matrix is too
            ill-conditioned.
        memory_budget: Bytes that matrix and factor may take.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> A = DiagLinearOperator(torch.arange(1.0, 4.0))
        >>> Cholesky()(A, torch.ones(3, 1)).value[:, 0]
        tensor([1.0000, 0.5000, 0.3333])
    """

    tolerance: float = 1e-6
    memory_budget: float = 8 * 2.0**30

    name: ClassVar[str] = "Cholesky"
    remedy: ClassVar[str] = "The matrix is nearly singular: raise the noise."

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_positive(memory_budget=self.memory_budget)

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; ``initial`` has no effect."""
        check_system(operator, rhs, initial)
        n = operator.shape[-1]
        check_memory(
            f"The Cholesky factor of {n} equations",
            16.0 * n * n * operator.shape[:-2].numel(),
            self.memory_budget,
            "Choose an iterative solver, or a larger memory_budget.",
        )
        with torch.no_grad():
            operator = full_precision(operator)
            dense = operator if isinstance(operator, Tensor) else operator.to_dense()
            dense, b = dense.double(), rhs.double()
            value = factorise(dense)(b)
            norms = b.norm(dim=-2)
            residual = (b - dense @ value).norm(dim=-2)
            relative = residual / torch.where(norms > 0, norms, 1.0)
        worst = relative.max().item() if relative.numel() else 0.0
        solution = Solution(
            value.to(rhs), worst, 1, worst <= self.tolerance, 1.0, relative
        )
        if not solution.converged:
            warn_not_converged(self, solution)
        return solution
