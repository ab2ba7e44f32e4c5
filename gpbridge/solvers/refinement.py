r"""What all iterative solvers share: the residual is recomputed before it is believed.

A solver is a generator of steps for :math:`H e = r` from zero; around it runs iterative
refinement: columns have unit norm, a first guess becomes a residual, columns that are
done leave, and when the solver's own estimate says that it is finished, one exact
product decides. Columns that fail go round again; a column is replaced by a better one
only, so that neither NaN nor divergence ever leaves.

In: an operator, right-hand sides and a generator of steps. Out: a
:class:`~gpbridge.types.Solution`. Next: one file per solver.
"""

from __future__ import annotations

from typing import Any

import torch
from linear_operator import LinearOperator, to_linear_operator
from torch import Tensor
from tqdm import tqdm

from gpbridge.lazy_covariance import tiled
from gpbridge.partial_products import exact_products, full_precision, precision
from gpbridge.solvers.factors import IndefiniteError, check_entries, raise_indefinite
from gpbridge.solvers.system import (
    Iteration,
    Progress,
    System,
    check_system,
    warn_not_converged,
)
from gpbridge.types import Solution

_PATIENCE = 50  # passes in low precision that do not halve the residual
_NEGATIVE = 1e-6  # cosine between v and H v that is not round-off
_HUGE = 1e100  # beyond, a product may overflow
_MARGIN = 0.9  # estimates must be this much below what the exact residual must be


def refine(
    solver: Iteration,
    operator: LinearOperator,
    rhs: Tensor,
    initial: Tensor | None = None,
    *,
    max_iterations: float = float("inf"),
    cache: dict[str, Any] | None = None,
    batched: bool = False,
) -> Solution:
    """Run the steps of a solver until exact residuals are below its tolerance.

    Args:
        solver: Its options and steps.
        operator: Symmetric and positive definite, ``... x n x n``.
        rhs: Right-hand sides ``... x n x k``.
        initial: A first guess, also of an interrupted run.
        max_iterations: Limit of steps besides ``solver.max_passes``.
        cache: What the steps may reuse.
        batched: Whether the steps take batches; otherwise members go one by one.

    Returns:
        The solution in the dtype of ``rhs``.
    """
    if isinstance(operator, Tensor):
        operator = to_linear_operator(operator)
    operator = tiled(operator)
    check_system(operator, rhs, initial)
    options = {"max_iterations": max_iterations, "cache": cache, "batched": batched}
    if rhs.dim() > 2 and not operator.shape[:-2]:
        return _as_columns(solver, operator, rhs, initial, options)
    batch = torch.broadcast_shapes(operator.shape[:-2], rhs.shape[:-2])
    rhs = rhs.expand(*batch, *rhs.shape[-2:])
    if batch and not batched:
        return _one_by_one(
            lambda *args: refine(solver, *args, max_iterations=max_iterations),
            operator,
            rhs,
            initial,
            batch,
        )
    cache = {} if cache is None else cache
    with torch.no_grad():
        run = _Run(solver, operator, rhs, initial, max_iterations, cache)
        solution = run.solve()
    if not solution.converged:
        warn_not_converged(solver, solution, run.diverged)
    return solution._replace(value=solution.value.to(rhs))


class _Run:
    """One call of a solver."""

    def __init__(self, solver, operator, rhs, initial, max_iterations, cache):
        self.solver, self.operator = solver, operator
        self.limits = solver.max_passes, max_iterations
        self.rhs = rhs.detach().double()
        norms = self.rhs.norm(dim=-2, keepdim=True)
        self.norms = torch.where(norms > 0, norms, 1.0)
        self.value = torch.zeros_like(self.rhs)
        self.passes, self.iterations = 0.0, 0
        self.residual = self.rhs / self.norms
        if initial is not None:
            self.value = self.value + initial.detach().double()
            self.residual = self.exact_residual(self.value)
        self.relative = self.residual.norm(dim=-2)  # ... x k
        generator = torch.Generator(self.rhs.device).manual_seed(solver.seed)
        self.system = System(operator, self.residual, generator, cache=cache)
        self.diverged = self.stuck = False
        self.rough = full_precision(operator) is not operator
        # What a round may reduce by before recursive and exact residual part.
        self.floor = precision(operator) ** 0.5

    def exact_residual(self, value: Tensor) -> Tensor:
        self.passes += 1.0
        return (self.rhs - exact_products(self.operator, value)) / self.norms

    def solve(self) -> Solution:
        self.bar = tqdm(
            total=round(min(self.limits)),
            desc=self.solver.name,
            unit="pass",
            disable=None if self.solver.progress else True,
        )
        with self.bar:
            while self.wanting().any() and not self.exhausted():
                before = self.relative
                try:
                    self.round(self.wanting())
                except IndefiniteError:
                    if not self.sharpen():
                        raise
                    continue
                better = bool((self.relative < before).any())
                if self.diverged or self.stuck or not better:
                    if not self.sharpen():
                        break  # round-off: nothing became better
        worst = self.relative.max().item() if self.relative.numel() else 0.0
        return Solution(
            self.value,
            worst,
            self.iterations,
            bool(worst <= self.solver.tolerance),
            self.passes,
            self.relative,
        )

    def sharpen(self) -> bool:
        """Go on in full precision, if that was not the precision until here."""
        full = full_precision(self.operator)
        if full is self.operator:
            return False
        self.operator = self.system.operator = full
        self.floor = precision(full) ** 0.5
        self.rough = self.stuck = self.diverged = False
        return True

    def wanting(self) -> Tensor:
        """Columns short of the tolerance in any member of a batch, ``k``."""
        short = ~(self.relative <= self.solver.tolerance)
        if short.numel() == 0:
            return short.new_zeros(short.shape[-1])
        return short.reshape(-1, short.shape[-1]).any(0)

    def exhausted(self) -> bool:
        # Shares of a pass need not add up to one exactly.
        return self.passes > self.limits[0] - 1e-6 or self.iterations >= self.limits[1]

    def round(self, wanting: Tensor) -> None:
        todo = wanting.nonzero()[:, 0]
        scale = self.relative[..., None, todo]
        scale = torch.where(scale > 0, scale, 1.0)
        system = self.system
        system.rhs = self.residual[..., todo] / scale
        target = (_MARGIN * self.solver.tolerance / scale[..., 0, :]).clamp_min(
            self.floor
        )
        found = torch.zeros_like(system.rhs)  # ... x n x k
        active = torch.arange(len(todo), device=todo.device)
        steps = self.solver.steps(system)
        estimates = torch.ones_like(target)
        sent, least, since = None, float("inf"), 0
        try:
            while True:
                iterate, norms = next(steps) if sent is None else steps.send(sent)
                sent = None
                self.count()
                if not bool(torch.isfinite(norms).all()):
                    self.diverged = True
                    break
                found[..., active] = iterate
                estimates[..., active] = norms
                self.report(found, estimates, scale, todo)
                done = norms <= target[..., active]
                done = done.reshape(-1, done.shape[-1]).all(0)
                if bool(done.all()) or self.exhausted():
                    break
                # Only where there is a precision to change to: plateaus are normal.
                since += 1
                if self.rough and float(norms.max()) < 0.5 * least:
                    least, since = float(norms.max()), 0
                if self.rough and since >= _PATIENCE:
                    self.stuck = True
                    break
                if 4 * int(done.sum()) >= len(done):
                    sent = (~done).nonzero()[:, 0]
                    active = active[sent]
        except StopIteration:
            pass
        finally:
            steps.close()
        self.adopt(todo, found * scale * self.norms[..., todo])

    def adopt(self, todo: Tensor, step: Tensor) -> None:
        """Keep what an exact product finds to be better, column by column."""
        value = self.value.clone()
        value[..., todo] += step
        if not bool(torch.isfinite(value).all()):
            self.diverged = True
            return
        residual = self.exact_residual(value)
        if not bool(torch.isfinite(residual).all()):
            if bool(value.abs().max() > _HUGE):
                self.diverged = True
                return
            check_entries(residual)
        self.check_curvature(value, self.rhs - self.norms * residual)
        relative = residual.norm(dim=-2)
        better = (relative < self.relative)[..., None, :]
        self.value = torch.where(better, value, self.value)
        self.residual = torch.where(better, residual, self.residual)
        self.relative = self.residual.norm(dim=-2)

    def check_curvature(self, value: Tensor, product: Tensor) -> None:
        """A direction v with negative v'Hv is proof that no pass will help."""
        curvature = (value * product).sum(-2)
        size = value.norm(dim=-2) * product.norm(dim=-2)
        if bool((curvature < -_NEGATIVE * size).any()):
            share = (curvature / size.clamp_min(1e-300)).min().item()
            raise_indefinite(f"a direction of curvature {share:.1e}")

    def count(self) -> None:
        previous = self.passes
        self.passes += self.system.passes
        self.iterations += self.system.iterations
        self.system.passes, self.system.iterations = 0.0, 0
        self.bar.update(round(self.passes) - round(previous))

    def report(
        self, found: Tensor, estimates: Tensor, scale: Tensor, todo: Tensor
    ) -> None:
        if self.solver.progress and not self.bar.disable:
            worst = (estimates * scale[..., 0, :]).max().item()
            self.bar.set_postfix_str(f"residual {worst:.1e}", refresh=False)
        if self.solver.callback is not None:
            relative, value = self.relative.clone(), self.value.clone()
            relative[..., todo] = estimates * scale[..., 0, :]
            value[..., todo] += found * scale * self.norms[..., todo]
            self.solver.callback(Progress(self.passes, relative, value))


def _as_columns(solver, operator, rhs, initial, options) -> Solution:
    """A batch of right-hand sides for one matrix, side by side."""
    *batch, n, k = rhs.shape

    def flat(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return value.expand(*batch, n, k).movedim(-2, 0).reshape(n, -1)

    found = refine(solver, operator, flat(rhs), flat(initial), **options)
    return found._replace(
        value=found.value.reshape(n, *batch, k).movedim(0, -2),
        residual_norms=found.residual_norms.reshape(*batch, k),
    )


def _one_by_one(solve, operator, rhs, initial, batch) -> Solution:
    n, k = rhs.shape[-2:]
    operator = operator.expand(*batch, n, n)
    rhs = rhs.expand(*batch, n, k)
    initial = None if initial is None else initial.expand(*batch, n, k)
    found = []
    for place in torch.cartesian_prod(*map(torch.arange, batch)).reshape(
        -1, len(batch)
    ):
        at = tuple(place.tolist())
        guess = None if initial is None else initial[at]
        found.append(solve(operator[at], rhs[at], guess))
    if not found:
        return Solution(
            torch.zeros_like(rhs), 0.0, 0, True, 0.0, rhs.new_zeros(*batch, k)
        )
    return Solution(
        torch.stack([s.value for s in found]).reshape(*batch, n, k),
        max(s.residual_norm for s in found),
        sum(s.iterations for s in found),
        all(s.converged for s in found),
        sum(s.passes for s in found),
        torch.stack([s.residual_norms for s in found]).reshape(*batch, k),
    )
