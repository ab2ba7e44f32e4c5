r"""Stochastic descent over minibatches of points, in the weights of a linear model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from gpbridge.checks import check_positive, check_share
from gpbridge.solvers.descent import check_momentum
from gpbridge.solvers.refinement import refine
from gpbridge.solvers.system import Progress, Steps, System
from gpbridge.types import Solution

_PROBED = 4  # batches whose curvature is measured
_POWER_STEPS = 10
_HALVINGS = 60
# H is at least the identity, so that no solution is longer than its right-hand side,
# which has norm one here: an iterate of this length is on its way to infinity.
_ESCAPED = 10.0


@runtime_checkable
class BatchedOperator(Protocol):
    r"""The operator :math:`H = I + \sum_c P_c^\top P_c` over batches c of points."""

    def batches(self, size: int) -> list[Any]:
        """Random disjoint batches of at most ``size`` points that cover the data."""
        ...

    def batch_outputs(self, omega: Tensor, batch: Any) -> Tensor:
        r"""Product :math:`P_c \omega`, ``p x k`` to ``b x m x k``."""
        ...

    def batch_weights(self, outputs: Tensor, batch: Any) -> Tensor:
        r"""Product :math:`P_c^\top u`, ``b x m x k`` to ``p x k``."""
        ...


@dataclass(frozen=True)
class MinibatchDescent:
    r"""SAGA on :math:`\omega^\top H \omega / 2 - b^\top \omega`, a batch at a time.

    For the precision of a linear model, :math:`H = I + \sum_c P_c^\top P_c` with N
    batches c of points. A table keeps the outputs :math:`u_c = P_c \omega_{old}` of the
    last visit, G their sum :math:`\sum_c P_c^\top u_c`. A step visits a batch,

    .. math::
        \omega \leftarrow \omega - \eta \left( \omega - b + G
        + N P_c^\top (P_c \omega - u_c) \right),

    then replaces :math:`u_c` and corrects G. The noise vanishes at the solution, so
    that convergence is linear, for the same two products per batch as plain gradient
    descent. The error shrinks by a constant factor in about :math:`3 \max_c
    \|P_c\|^2` passes, in which the number of points does not occur.

    Memory: about ten matrices ``p x k``, half of them those of the refinement around
    every solver, and the table of n m k numbers, all float64.

    Take :class:`ConjugateGradients` instead, the default: measured on a CNN for digits
    (p = 1898, n m = 12970, 8 draws, one seed), they need 14 passes to a residual of .1
    and 21 to .01 at the prior variance of most evidence; this solver 101 and more than
    150, or 40 to .1 with batches of 8 points. Only where the prior is so tight that the
    curvature of a batch is of order one do they meet (5 and 6 passes to .1, 8 and 9 to
    .01, at a variance 64 times smaller).

    Args:
        tolerance: Residual norm divided by the norm of the right-hand side.
        max_passes: Limit of passes over the data.
        batch_size: Points of a batch.
        variance_reduction: False drops the table and descends with momentum and
            averaging; its noise does not vanish, the residual stalls.
        step_size: :math:`\eta`; default :math:`1 / (3 L)`, or :math:`(1 - \rho) / L`
            without variance reduction, with :math:`L = 1 + N \max_c \|P_c\|^2` by power
            iteration on four batches. A step that diverges is halved, from the start.
        momentum: :math:`\rho`, without variance reduction.
        averaging: Window of the average in passes, without variance reduction.
        seed: Of the order of batches.
        progress: Show a progress bar, if there is a terminal.
        callback: Called with a :class:`~gpbridge.solvers.Progress` at each pass.

    Raises:
        ValueError: If an option is out of its range.

    References:
        Defazio, Bach, Lacoste-Julien, SAGA: A fast incremental gradient method with
        support for non-strongly convex composite objectives, NeurIPS 2014, algorithm 1
        and theorem 1. Antorán, Padhy, Barbano, Nalisnick, Janz, Hernández-Lobato,
        Sampling-based inference for large linear models, with application to linearised
        Laplace, ICLR 2023, section 3, for the objective and plain descent.
    """

    tolerance: float = 1e-1
    max_passes: float = 200.0
    batch_size: int = 32
    variance_reduction: bool = True
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float = 1.0
    seed: int = 0
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
    )

    name: ClassVar[str] = "Minibatch descent"
    remedy: ClassVar[str] = (
        "Leave step_size to the automatic rule and raise max_passes, or take "
        "ConjugateGradients."
    )

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_positive(
            max_passes=self.max_passes,
            batch_size=self.batch_size,
            step_size=1.0 if self.step_size is None else self.step_size,
            averaging=self.averaging,
        )
        check_momentum(self.momentum)

    def __call__(
        self, operator: BatchedOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``p x k`` right-hand sides; warns short of the tolerance.

        Args:
            operator: A sum over points, ``p x p``.
            rhs: Right-hand sides.
            initial: A first guess, also of an interrupted run.

        Returns:
            The solution in the dtype of ``rhs``.

        Raises:
            TypeError: If the operator has no batches of points.
        """
        if not isinstance(operator, BatchedOperator):
            raise TypeError(
                "MinibatchDescent needs an operator that is a sum over points, "
                "gpbridge.data_features.PrecisionOperator, but got "
                f"{type(operator).__name__}. In Sampled(...) choose space='weight'; "
                "for other operators take ConjugateGradients."
            )
        return refine(self, operator, rhs, initial)

    def steps(self, system: System) -> Steps:
        """Descend over batches, from zero."""
        batches = system.operator.batches(self.batch_size)
        if "step" not in system.cache:
            step = self.step_size
            if step is None:
                share = 1 / 3 if self.variance_reduction else 1 - self.momentum
                step = share / _smoothness(system, batches)
            system.cache["step"] = step
        descend = self._reduced if self.variance_reduction else self._plain
        return descend(system, batches)

    def _reduced(self, system: System, batches: list[Any]) -> Steps:
        operator, rhs = system.operator, system.rhs
        omega, total = torch.zeros_like(rhs), torch.zeros_like(rhs)
        table: list[Tensor | None] = [None] * len(batches)  # None is zero
        halvings = 0
        while True:
            escaped = False
            for c in _visits(system, len(batches)):
                seen = operator.batch_outputs(omega, batches[c])
                old, table[c] = table[c], seen
                moved = seen if old is None else seen - old
                change = operator.batch_weights(moved, batches[c])
                gradient = omega - rhs + total
                gradient.add_(change, alpha=len(batches))
                total += change
                omega.sub_(gradient, alpha=system.cache["step"])
                escaped = _has_escaped(omega)
                if escaped:
                    break
            norms = (rhs - omega - total).norm(dim=0)
            if escaped:
                halvings += 1
                _halve(system, halvings)
                omega, total = torch.zeros_like(rhs), torch.zeros_like(rhs)
                table = [None] * len(batches)
                norms = rhs.norm(dim=0)
            keep = yield omega, norms
            if keep is not None:
                rhs, omega, total = (t[:, keep] for t in (rhs, omega, total))
                table = [None if u is None else u[..., keep] for u in table]

    def _plain(self, system: System, batches: list[Any]) -> Steps:
        operator, rhs = system.operator, system.rhs
        omega, velocity, average = (torch.zeros_like(rhs) for _ in range(3))
        weight = min(1.0, 1 / len(batches) / self.averaging)
        halvings = 0
        while True:
            escaped, total = False, torch.zeros_like(rhs)
            for c in _visits(system, len(batches)):
                ahead = torch.add(omega, velocity, alpha=self.momentum)
                seen = operator.batch_outputs(ahead, batches[c])
                change = operator.batch_weights(seen, batches[c])
                total += change
                gradient = (ahead - rhs).add_(change, alpha=len(batches))
                velocity.mul_(self.momentum)
                velocity.sub_(gradient, alpha=system.cache["step"])
                omega += velocity
                average.lerp_(omega, weight)
                escaped = _has_escaped(omega)
                if escaped:
                    break
            norms = (rhs - average - total).norm(dim=0)
            if escaped:
                halvings += 1
                _halve(system, halvings)
                omega, velocity, average = (torch.zeros_like(rhs) for _ in range(3))
                norms = rhs.norm(dim=0)
            keep = yield average, norms
            if keep is not None:
                rhs, omega, velocity, average = (
                    t[:, keep] for t in (rhs, omega, velocity, average)
                )


def _visits(system: System, count: int) -> Iterator[int]:
    """One pass over the batches in random order, counted."""
    order = torch.randperm(
        count, generator=system.generator, device=system.generator.device
    )
    for c in order.tolist():
        system.passes += 1 / count
        system.iterations += 1
        yield c


def _has_escaped(omega: Tensor) -> bool:
    # Written so that NaN counts.
    return not bool(omega.norm(dim=0).amax() <= _ESCAPED)


def _halve(system: System, halvings: int) -> None:
    # After the last one the iterate stays at zero, and refinement ends with a warning.
    if halvings <= _HALVINGS:
        system.cache["step"] /= 2


def _smoothness(system: System, batches: list[Any]) -> float:
    r"""The bound :math:`1 + N \max_c \|P_c\|^2`, from below, by power iteration."""
    operator, largest = system.operator, 0.0
    start = torch.randn(
        system.rhs.shape[0],
        1,
        generator=system.generator,
        dtype=system.rhs.dtype,
        device=system.rhs.device,
    )
    order = torch.randperm(
        len(batches), generator=system.generator, device=system.generator.device
    )
    for c in order[:_PROBED].tolist():
        v, value = start / start.norm(), 0.0
        for _ in range(_POWER_STEPS):
            seen = operator.batch_outputs(v, batches[c])
            v = operator.batch_weights(seen, batches[c])
            value = v.norm().item()
            if value == 0.0:
                break
            v = v / value
            system.passes += 1 / len(batches)
        largest = max(largest, value)
    return 1.0 + len(batches) * largest
