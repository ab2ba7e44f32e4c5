r"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_choice, check_positive, check_share
from gpbridge.partial_products import (
    has_cheap_columns,
    precision,
    smallest_eigenvalue,
)
from gpbridge.solvers.factors import raise_indefinite
from gpbridge.solvers.preconditioners import (
    Preconditioner,
    nystrom_preconditioner,
    pivoted_cholesky_preconditioner,
)
from gpbridge.solvers.refinement import refine
from gpbridge.solvers.system import Progress, Steps, System
from gpbridge.types import Solution


@dataclass(frozen=True)
class ConjugateGradients:
    r"""Preconditioned conjugate gradients in float64, checked by the true residual.

    The iteration is repeated on the exact residual (iterative refinement) until every
    right-hand side has reached the tolerance, since recursive residuals drift. One
    iteration costs one product with the operator for all right-hand sides that are not
    done.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_iterations: Over all repetitions.
        preconditioner_rank: Rank of the preconditioner; 0 for none.
        preconditioner: ``"nystrom"`` sketches by one product with as many columns,
            ``"pivoted_cholesky"`` evaluates as many columns of the matrix; ``"auto"``
            takes the second where columns are cheap, as those of a kernel are.
        seed: Of the preconditioner, which does not affect what is solved.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each iteration.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> A = DiagLinearOperator(torch.arange(1.0, 4.0))
        >>> solution = ConjugateGradients(preconditioner_rank=0)(A, torch.ones(3, 1))
        >>> solution.converged
        True

    References:
        Hestenes and Stiefel, Methods of conjugate gradients for solving linear
        systems, Journal of Research of the NBS 1952.
        Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM Journal on
        Matrix Analysis and Applications 2023, algorithms 2.1 and 5.1.
    """

    tolerance: float = 1e-6
    max_iterations: int = 1000
    preconditioner_rank: int = 100
    seed: int = 0
    preconditioner: str = "auto"
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
    )

    name: ClassVar[str] = "Conjugate gradients"
    remedy: ClassVar[str] = "Raise max_iterations or preconditioner_rank, or the noise."

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_positive(max_iterations=self.max_iterations)
        check_choice(
            "preconditioner",
            self.preconditioner,
            ("auto", "nystrom", "pivoted_cholesky"),
        )

    @property
    def max_passes(self) -> float:
        """The limit is ``max_iterations``."""
        return float("inf")

    def __call__(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance.

        Args:
            operator: Symmetric and positive definite, ``... x n x n``.
            rhs: Right-hand sides.
            initial: A first guess, such as the solution of a similar problem.
            preconditioner: Product with an approximate inverse; default is built.

        Returns:
            The solution in the dtype of ``rhs``.
        """
        cache = {} if preconditioner is None else {"preconditioner": preconditioner}
        return refine(
            self,
            operator,
            rhs,
            initial,
            max_iterations=self.max_iterations,
            cache=cache,
            batched=True,
        )

    def steps(self, system: System) -> Steps:
        """Hestenes and Stiefel's iteration, from zero."""
        inverse = self._preconditioner(system)
        tiny = torch.finfo(torch.float64).tiny
        negligible = precision(system.operator) ** 0.5
        r = system.rhs.clone()
        x = torch.zeros_like(r)
        p = z = inverse(r)
        rz = (r * z).sum(-2, keepdim=True)
        while True:
            Hp = system.product(p)
            system.iterations += 1
            curvature = (p * Hp).sum(-2, keepdim=True)
            size = p.norm(dim=-2, keepdim=True) * Hp.norm(dim=-2, keepdim=True)
            if bool((curvature < -negligible * size).any()):
                raise_indefinite(
                    f"a direction of curvature {(curvature / size).min().item():.1e}"
                )
            step = torch.where(curvature > tiny, rz / curvature.clamp_min(tiny), 0.0)
            x = torch.addcmul(x, step, p)
            r = torch.addcmul(r, step, Hp, value=-1.0)
            z = inverse(r)
            before, rz = rz, (r * z).sum(-2, keepdim=True)
            ratio = torch.where(before > tiny, rz / before.clamp_min(tiny), 0.0)
            p = torch.addcmul(z, ratio, p)
            keep = yield x, r.norm(dim=-2)
            if keep is not None:
                x, r, p, rz = (v[..., keep] for v in (x, r, p, rz))

    def _preconditioner(self, system: System) -> Preconditioner:
        if "preconditioner" in system.cache:
            return system.cache["preconditioner"]
        kind, operator = self.preconditioner, system.operator
        if kind == "auto":
            cheap = has_cheap_columns(operator) and not operator.shape[:-2]
            kind = "pivoted_cholesky" if cheap else "nystrom"
        rank = min(self.preconditioner_rank, operator.shape[-1])
        if rank == 0:
            inverse = torch.clone
        elif kind == "nystrom":
            system.passes += 1.0
            shift = smallest_eigenvalue(operator)
            inverse = nystrom_preconditioner(operator, rank, shift, self.seed)
        else:
            system.passes += rank / operator.shape[-1]
            inverse = pivoted_cholesky_preconditioner(operator, rank, self.seed)
        system.cache["preconditioner"] = inverse
        return inverse
