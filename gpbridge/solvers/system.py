r"""The linear system that an iterative solver sees, and what is said of its end.

In: an operator and right-hand sides, checked. Out: :class:`System` for a generator of
steps, :class:`Progress` for a callback, and the warning of a solver that stopped short.
Next: ``refinement`` runs the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from botorch.exceptions.errors import InputDataError
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import NotConvergedWarning, ShapeError, check_finite, warn_user
from gpbridge.types import Solution

Steps = Generator[tuple[Tensor, Tensor], Tensor | None, None]
"""Yields the iterate ``n x k`` and estimated residual norms ``k``, about once per pass;
is sent the columns that stay."""


class Progress(NamedTuple):
    """What a ``callback`` sees about once per pass.

    ``residual_norms`` are the solver's estimates, relative, one per column; ``value``
    is the iterate, which resumes the run as ``initial``.
    """

    passes: float
    residual_norms: Tensor
    value: Tensor


@dataclass
class System:
    """The equations :math:`H e = r` that a generator of steps sees.

    Attributes:
        operator: H.
        rhs: r, float64, of unit columns.
        generator: Source of randomness.
        passes: Sum over the steps of the share of H that each has visited.
        iterations: Number of steps.
        cache: What outlives a round, such as a preconditioner.
    """

    operator: LinearOperator
    rhs: Tensor
    generator: torch.Generator
    passes: float = 0.0
    iterations: int = 0
    cache: dict[str, Any] = field(default_factory=dict)

    def product(self, V: Tensor) -> Tensor:
        """One pass: H V."""
        self.passes += 1.0
        return self.operator._matmul(V.to(self.operator.dtype)).double()


class Iteration(Protocol):
    """What :func:`refine` asks of an iterative solver."""

    name: str
    remedy: str
    tolerance: float
    max_passes: float
    seed: int
    progress: bool
    callback: Callable[[Progress], None] | None

    def steps(self, system: System) -> Steps:
        """Improve from zero, forever."""
        ...


def check_system(
    operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
) -> None:
    """Require a square operator and finite right-hand sides that fit it."""
    if operator.shape[-1] != operator.shape[-2]:
        raise ShapeError(f"operator must be square, but is {tuple(operator.shape)}.")
    if not operator.dtype.is_floating_point:
        raise TypeError(
            f"operator must be of floating point, but is {operator.dtype}. Try "
            ".double()."
        )
    if rhs.dim() < 2 or rhs.shape[-2] != operator.shape[-1]:
        raise ShapeError(
            f"rhs must be ``... x n x k`` for an operator {tuple(operator.shape)}, but "
            f"has shape {tuple(rhs.shape)}. For one column try rhs[:, None]."
        )
    if initial is not None and initial.shape[-2:] != rhs.shape[-2:]:
        raise ShapeError(
            f"initial must have the shape of rhs, {tuple(rhs.shape)}, but has "
            f"{tuple(initial.shape)}. Pad the solution of a smaller system with zeros."
        )
    for name, value in (("rhs", rhs), ("initial", initial)):
        if value is not None and not bool(torch.isfinite(value).all()):
            check_finite(**{name: value.mT if value.dim() == 2 else value})
            raise InputDataError(f"{name} contains NaN or Inf.")


def warn_not_converged(solver: Any, solution: Solution, diverged: bool = False) -> None:
    """Say how far a solver came, and what to do."""
    how = "diverged" if diverged else "stopped"
    limit, ended = getattr(solver, "max_passes", float("inf")), ""
    if not diverged and solution.passes > limit - 1e-6:
        ended = f"max_passes={limit:g} ended it. "
    warn_user(
        f"{solver.name} {how} after {solution.iterations} iterations "
        f"({solution.passes:.1f} passes over the matrix) at a relative residual of "
        f"{solution.residual_norm:.1e}, and not {solver.tolerance:.1e}. "
        f"{ended}{solver.remedy}",
        NotConvergedWarning,
    )
