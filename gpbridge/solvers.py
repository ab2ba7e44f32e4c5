r"""Linear solvers as objects: an operator and right-hand sides in, a solution out.

In: a symmetric positive definite operator that offers products. Out: a
:class:`~gpbridge.types.Solution`, which says how good it is. Next: ``matrix_free``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from linear_operator import LinearOperator
from linear_operator.utils import linear_cg
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from gpbridge.checks import NotConvergedWarning, check_positive
from gpbridge.types import Solution

Preconditioner = Callable[[Tensor], Tensor]

_SWEEP = 1e-8  # reduction after which recursive and true residual may have drifted


@dataclass(frozen=True)
class ConjugateGradients:
    r"""Preconditioned conjugate gradients in float64, checked by the true residual.

    Upstream's iteration is repeated on the residual (iterative refinement) until every
    right-hand side has reached the tolerance, since its own criterion is a mean over
    right-hand sides of residuals that were updated and not recomputed. One iteration
    costs one product with the operator for all right-hand sides.

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_iterations: Over all repetitions.
        preconditioner_rank: Rank of the randomised Nyström preconditioner, which costs
            as many columns of one product; 0 for none.
        seed: Of the preconditioner's sketch, which does not affect what is solved.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> A = DiagLinearOperator(torch.arange(1.0, 4.0))
        >>> solution = ConjugateGradients(preconditioner_rank=0)(A, torch.ones(3, 1))
        >>> solution.converged
        True

    References:
        Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM Journal on
        Matrix Analysis and Applications 2023, algorithms 2.1 and 5.1.
    """

    tolerance: float = 1e-6
    max_iterations: int = 1000
    preconditioner_rank: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        check_positive(tolerance=self.tolerance, max_iterations=self.max_iterations)

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
        with torch.no_grad():
            solution = self._solve(operator, rhs.double(), initial, preconditioner)
        if not solution.converged:
            warnings.warn(
                f"Conjugate gradients stopped after {solution.iterations} iterations "
                f"at a relative residual of {solution.residual_norm:.1e}, and not "
                f"{self.tolerance:.1e}. Raise max_iterations or preconditioner_rank, "
                "or the noise.",
                NotConvergedWarning,
                stacklevel=2,
            )
        return solution._replace(value=solution.value.to(rhs))

    def _solve(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        initial: Tensor | None,
        preconditioner: Preconditioner | None,
    ) -> Solution:
        calls = 0

        def product(v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return operator._matmul(v.to(operator.dtype)).double()

        value = torch.zeros_like(rhs) if initial is None else initial.double()
        if rhs.numel() == 0:
            return Solution(value, 0.0, 0, True)
        residual = rhs.clone() if initial is None else rhs - product(value)
        norms = rhs.norm(dim=-2, keepdim=True)
        norms = torch.where(norms > 0, norms, 1.0)
        worst = _worst(residual, norms)
        if preconditioner is None and worst > self.tolerance:
            if self.preconditioner_rank > 0:
                preconditioner = nystrom_preconditioner(
                    operator, self.preconditioner_rank, seed=self.seed
                )
        calls = 0
        while worst > self.tolerance and calls < self.max_iterations:
            relative = residual.norm(dim=-2, keepdim=True) / norms
            todo = (relative > self.tolerance).flatten(0, -2).any(0).squeeze()
            todo = todo.reshape(-1).nonzero()[:, 0]  # columns short of the tolerance
            wanted = (0.5 * self.tolerance / relative[..., todo]).min().item()
            step = _upstream(
                product,
                residual[..., todo],
                max(wanted, _SWEEP),
                self.max_iterations - calls,
                preconditioner,
            )
            better = value.clone()
            better[..., todo] += step
            residual = rhs - product(better)
            previous, worst = worst, _worst(residual, norms)
            if not worst < previous:  # round-off: the last sweep made nothing better
                residual, worst = rhs - product(value), previous
                break
            value = better
        return Solution(value, worst, calls, worst <= self.tolerance)


def nystrom_preconditioner(
    operator: LinearOperator, rank: int, shift: float = 0.0, seed: int = 0
) -> Preconditioner:
    r"""Approximate inverse of :math:`A = M + \mu I` from a sketch of M.

    With the randomised Nyström approximation :math:`M \approx U \Lambda U^\top`,

    .. math::
        P^{-1} = (\lambda_r + \mu) U (\Lambda + \mu)^{-1} U^\top + (I - U U^\top),

    which removes the largest eigenvalues from the spectrum. Costs one product with
    ``rank`` columns, memory n rank.

    Args:
        operator: A, ``... x n x n``.
        rank: Number of eigenvalues that are removed, r.
        shift: A lower bound :math:`\mu` of the eigenvalues of A.
        seed: Of the sketch.

    Returns:
        The product with the inverse, ``... x n x k`` to ``... x n x k``.

    References:
        Frangella, Tropp, Udell, Randomized Nyström preconditioning, SIAM Journal on
        Matrix Analysis and Applications 2023, algorithm 2.1 and eq. (1.3).
    """
    n = operator.shape[-1]
    generator = torch.Generator(operator.device).manual_seed(seed)
    sketch = torch.randn(
        *operator.batch_shape,
        n,
        min(rank, n),
        generator=generator,
        dtype=torch.float64,
        device=operator.device,
    )
    with torch.no_grad():
        sketch = torch.linalg.qr(sketch).Q
        seen = operator._matmul(sketch.to(operator.dtype)).double() - shift * sketch
        # M is positive semi-definite up to round-off, which the small shift covers.
        size = torch.linalg.matrix_norm(seen, keepdim=True).clamp_min(1e-290)
        small = torch.finfo(operator.dtype).eps * size
        seen = seen + small * sketch
        core = sketch.mT @ seen
        values, vectors = torch.linalg.eigh(0.5 * (core + core.mT))
        values = torch.maximum(values, small[..., 0])
        root = seen @ (vectors / values.sqrt()[..., None, :])
        U, singular, _ = torch.linalg.svd(root, full_matrices=False)
        spectrum = (singular.square() - small[..., 0]).clamp_min(0.0) + shift
        spectrum = torch.maximum(spectrum, small[..., 0])
        gain = spectrum[..., -1:] / spectrum - 1.0

    def inverse(v: Tensor) -> Tensor:
        return v + U @ (gain[..., :, None] * (U.mT @ v))

    return inverse


def _upstream(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    tolerance: float,
    max_iterations: int,
    preconditioner: Preconditioner | None,
) -> Tensor:
    with warnings.catch_warnings():
        # Ours is raised instead, on the true residual.
        warnings.simplefilter("ignore", NumericalWarning)
        return linear_cg(
            product,
            rhs,
            tolerance=tolerance,
            # Upstream's 1e-10 guards a division by squared norms of residuals, so that
            # it would stall at a relative residual of 1e-5.
            eps=1e-60,
            stop_updating_after=1e-3 * tolerance,
            max_iter=max_iterations,
            max_tridiag_iter=0,
            preconditioner=preconditioner,
        )


def _worst(residual: Tensor, norms: Tensor) -> float:
    return (residual.norm(dim=-2, keepdim=True) / norms).max().item()
