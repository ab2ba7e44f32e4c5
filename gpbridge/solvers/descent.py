r"""Descent on batches of rows, with momentum, averaging and a guard of the step.

In: a system of equations and what one batch does to the velocity. Out: steps. Next:
``dual_descent`` and ``stochastic_gradient`` differ in that one line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from linear_operator import LinearOperator
from torch import Generator, Tensor

from gpbridge.checks import check_positive, check_share
from gpbridge.partial_products import principal_block, row_products
from gpbridge.solvers.factors import check_entries, raise_indefinite
from gpbridge.solvers.refinement import refine
from gpbridge.solvers.system import Progress, Steps, System
from gpbridge.types import Solution

_DIVERGED = 10.0  # growth of the residual of a batch at which the step is shortened
_CHANGES = 60
_MOST = 2.0**64  # by which a step is divided at once

Push = Callable[[Tensor, Tensor, Tensor, float], None]
"""``push(velocity, rows, residual, step)`` changes the velocity in place."""


@dataclass(frozen=True)
class Descent:
    """The options that all descents have, and how they are checked."""

    tolerance: float = 1e-2
    max_passes: float = 200.0
    batch_size: int = 500
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float = 1.0
    seed: int = 0
    progress: bool = False
    callback: Callable[[Progress], None] | None = field(
        default=None, compare=False, repr=False
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
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Solve for ``... x n x k`` right-hand sides; warns short of the tolerance."""
        return refine(self, operator, rhs, initial)


def descend(
    system: System,
    push: Push,
    *,
    batch_size: int,
    momentum: float,
    averaging: float,
    visits: int = 1,
) -> Steps:
    """Look ahead, push, move, average; shorten a step that makes residuals grow.

    Growth by many orders at once says by how much the step is too long; otherwise it is
    halved. After each change the descent goes on from the last average whose residual
    had not grown.

    Args:
        system: The equations; ``system.cache["step"]`` is the first step.
        push: What the residual of a batch does to the velocity.
        batch_size: Rows of a step, b.
        momentum: Share of the velocity that stays.
        averaging: Window of the geometric average, in passes.
        visits: How often a step evaluates the entries of its rows.

    Yields:
        The average, and the norms of the latest residual of each row; infinite if no
        step is short enough.
    """
    operator, rhs = system.operator, system.rhs
    n = len(rhs)
    b = min(batch_size, n)
    weight = min(1.0, b / n / averaging)
    a, v, average = (torch.zeros_like(rhs) for _ in range(3))
    good = average.clone()  # the last average at the end of a pass
    seen = rhs.clone()
    start, changes, fresh = rhs.norm(), 0, 0  # steps since a start from rest
    while True:
        growth = 0.0
        for _ in range(-(-n // b)):
            rows = draw_rows(n, b, system.generator, rhs.device)
            ahead = torch.add(a, v, alpha=momentum)
            r = row_products(operator, rows, ahead).double() - rhs[rows]
            system.passes += visits * b / n
            system.iterations += 1
            # Rows may have more than their share of a right-hand side.
            growth = float(_size(r, n) / torch.maximum(start, _size(rhs[rows], n)))
            if not growth <= _DIVERGED:  # NaN is growth
                break
            seen[rows] = r
            v.mul_(momentum)
            push(v, rows, r, system.cache["step"])
            a += v
            average.lerp_(a, weight)
            fresh += 1
        norms = seen.norm(dim=0)
        if growth <= _DIVERGED:
            good.copy_(average)
        elif changes == _CHANGES:
            norms = torch.full_like(norms, torch.inf)
        else:
            changes += 1
            if fresh == 0 and growth <= _DIVERGED**2:
                start = start * growth  # it can descend from there
            elif fresh == 0:  # the last step of a pass was far too long, unseen
                good.zero_()
            else:  # each step has grown by about its length times an eigenvalue
                factor = growth ** (1 / fresh) / _DIVERGED
                system.cache["step"] /= max(2.0, factor) if factor < _MOST else _MOST
            average.copy_(good)
            a, v, fresh = good.clone(), torch.zeros_like(v), 0
            seen.copy_(rhs)
            norms = rhs.norm(dim=0)
        keep = yield average, norms
        if keep is not None:
            rhs, a, v, average, good, seen = (
                t[:, keep] for t in (rhs, a, v, average, good, seen)
            )
            start = rhs.norm()


def _size(r: Tensor, n: int) -> Tensor:
    """Norm of all n rows as those of a batch let expect, without overflow."""
    top = r.abs().max()
    scaled = r / torch.where(top > 0, top, 1.0)
    return top * scaled.norm() * (n / len(r)) ** 0.5


def draw_rows(
    n: int, b: int, generator: Generator | None, device: torch.device
) -> Tensor:
    """Distinct random rows; ``torch.multinomial`` ends at 2^24 of them."""
    return torch.randperm(n, generator=generator, device=device)[:b]


def largest_eigenvalue(operator: LinearOperator, rows: Tensor) -> float:
    """That of a block; refuses a block that is not positive semi-definite."""
    block = principal_block(operator, rows).double()
    check_entries(block)
    values = torch.linalg.eigvalsh(block)
    small, large = values[0].item(), values[-1].item()
    if not (large > 0 and small >= -1e-6 * large):
        raise_indefinite(f"a block of rows with an eigenvalue of {small:.1e}")
    return large


def check_momentum(momentum: float) -> None:
    """Require a share in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, but is {momentum}.")
