r"""A truncated Neumann series in place of the inverse of a matrix.

In: a symmetric positive definite operator and right-hand sides. Out: a
:class:`~gpbridge.types.Solution` whose quality is the number of terms. Next:
``hypergradient``, where it is the memory-light relative of unrolled training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linear_operator import LinearOperator
from torch import Tensor

from gpbridge.checks import check_count, check_positive, check_share
from gpbridge.solvers.factors import raise_indefinite
from gpbridge.solvers.system import check_system
from gpbridge.types import Solution

_GROWN = 1 + 1e-3  # terms of a convergent series never grow; round-off may
_RESTARTS = 5
_READ_EVERY = 10  # terms


class SeriesDivergedError(RuntimeError):
    """The terms of a Neumann series grow: the step size is too large."""


@dataclass(frozen=True)
class NeumannSeries:
    r"""The first terms of :math:`H^{-1} = a \sum_k (I - a H)^k`.

    With terms 0 to K this is what K + 1 steps of gradient descent, unrolled at the
    optimum, would give. The relative error in the direction of eigenvalue h is
    :math:`(1 - a h)^{K + 1}`: flat directions need many terms, where conjugate
    gradients need few. The series converges where :math:`0 < a < 2 / h_{\max}`; the
    default is :math:`a = 1 / h_{\max}` by power iteration. A larger step is refused,
    and terms that grow are an error: the sum would be finite and wrong. One product per
    term, those of the power iteration, one for the sign of the curvature, and one for
    the residual.

    Args:
        num_terms: K, the number of terms after the first.
        step_size: a, or None for power iteration.
        tolerance: Relative residual above which the solution counts as not converged;
            None accepts whatever the terms give.
        power_iterations: Products to find the largest eigenvalue.
        seed: Of the power iteration.

    Example:
        >>> from linear_operator.operators import DiagLinearOperator
        >>> A = DiagLinearOperator(torch.tensor([1.0, 2.0]))
        >>> series = NeumannSeries(num_terms=30, step_size=0.5)
        >>> series(A, torch.ones(2, 1)).value[:, 0]
        tensor([1.0000, 0.5000])

    References:
        Lorraine, Vicol, Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020, algorithm 3.
    """

    num_terms: int = 20
    step_size: float | None = None
    tolerance: float | None = 0.1
    power_iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.num_terms, bool) or not (
            isinstance(self.num_terms, int) and self.num_terms >= 0
        ):
            raise ValueError(
                "num_terms must be a whole number, zero or more, but is "
                f"{self.num_terms!r}."
            )
        check_count(power_iterations=self.power_iterations)
        if self.step_size is not None:
            check_positive(step_size=self.step_size)
        if self.tolerance is not None:
            check_share(tolerance=self.tolerance)

    @torch.no_grad()
    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Sum the series for ``n x k`` right-hand sides.

        Args:
            operator: Symmetric and positive definite, ``n x n``.
            rhs: Right-hand sides.
            initial: A first guess, which the series then corrects.

        Returns:
            The sum, with its true residual.

        Raises:
            SeriesDivergedError: If the step size is too large.
            IndefiniteError: If a direction of negative curvature is met.
        """  # noqa: DOC502
        check_system(operator, rhs, initial)
        start = torch.zeros_like(rhs) if initial is None else initial.to(rhs)
        residual = rhs - operator._matmul(start) if initial is not None else rhs
        largest = self._largest_eigenvalue(operator, rhs)
        # One for the sign of the curvature, one for the residual.
        passes = self.power_iterations + 2.0 + (initial is not None)
        for _ in range(_RESTARTS):
            step = 1 / largest if self.step_size is None else self.step_size
            if step * largest >= 2:
                self._refuse(step, largest)
            total, found, count = self._sum(operator, residual, step)
            passes += count
            if found is None:
                break
            if self.step_size is not None:
                self._refuse(step, found)
            largest = max(found, 1.5 * largest)  # power iteration fell short
        else:
            self._refuse(1 / largest, largest)
        value = start + total
        norms = rhs.norm(dim=0)
        left = (rhs - operator._matmul(value)).norm(dim=0)
        relative = left / torch.where(norms > 0, norms, 1.0)
        worst = float(relative.max())
        converged = self.tolerance is None or worst <= self.tolerance
        return Solution(value, worst, self.num_terms, converged, passes, relative)

    def _sum(
        self, operator: LinearOperator, rhs: Tensor, step: float
    ) -> tuple[Tensor, float | None, int]:
        """The sum, where terms grow the eigenvalue that makes them, and products."""
        v = step * rhs
        total = v.clone()
        facts = []
        for k in range(1, self.num_terms + 1):
            product = operator._matmul(v)
            after = v - step * product
            facts.append(
                torch.stack(
                    [v.norm(), after.norm(), product.norm(), (v * product).sum()]
                )
            )
            v = after
            total = total + v
            # Reading a number waits for the device.
            if k % _READ_EVERY == 0 or k == self.num_terms:
                for before, size, bent, inner in torch.stack(facts).tolist():
                    if not size <= _GROWN * before:  # so that NaN counts as growth
                        _check_positive_curvature(inner, before * bent)
                        return total, bent / before, k
                facts = []
        return total, None, self.num_terms

    def _largest_eigenvalue(self, operator: LinearOperator, like: Tensor) -> float:
        """A lower bound of it, by power iteration."""
        generator = torch.Generator().manual_seed(self.seed)
        v = torch.randn(len(like), 1, generator=generator, dtype=torch.float64)
        v = v.to(like)
        norms = []
        for _ in range(self.power_iterations):
            v = v / v.norm()
            v = operator._matmul(v)
            norms.append(v.norm())
        norms = torch.stack(norms).tolist()
        for norm in norms:
            if not 0 < norm < float("inf"):
                raise ValueError(
                    f"The operator maps a random vector to one of norm {norm}: it "
                    "is zero or not finite, so that no step size can be found."
                )
        product = operator._matmul(v)
        _check_positive_curvature(
            float((v * product).sum()), float(v.norm() * product.norm())
        )
        return norms[-1]

    def _refuse(self, step: float, largest: float) -> None:
        raise SeriesDivergedError(
            f"The Neumann series diverges: step_size {step:.3g} must be below 2 over "
            f"the largest eigenvalue, which is at least {largest:.3g}. Pass "
            f"step_size=None, or at most {1 / largest:.3g}."
        )


def _check_positive_curvature(inner: float, norms: float) -> None:
    """Of v'Hv and the product of the norms of v and H v."""
    curvature = inner / norms if norms else 0.0
    if curvature < -1e-6:
        raise_indefinite(f"a direction of curvature {curvature:.1e}")
