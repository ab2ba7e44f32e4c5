r"""The maxima of many functions over one box, from several starts each, side by side.

In: a function that evaluates every problem at a point of its own. Out: the point that
each has climbed to. All problems take a step with every evaluation, each with its own
step length and curvature: none waits for another's line search, and nothing leaves the
device. Next: ``thompson``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MEMORY = 10  # pairs of steps and changes of the gradient
_ARMIJO = 1e-4
_LONGEST_FIRST = 0.1  # of the box, for the step along the bare gradient


def climb(
    function: Callable[[Tensor], Tensor],
    starts: Tensor,
    bounds: Tensor,
    max_evaluations: int = 200,
    tolerance: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    r"""Projected L-BFGS for independent problems in a box.

    The step of a problem is :math:`x \leftarrow P(x + t H g)`, with the gradient g and
    the quasi-Newton matrix H restricted to the coordinates that no bound holds, P the
    projection on the box and t halved until the value has risen enough. A problem ends
    when the rise that its step promises is below the tolerance times the spread of the
    starting values of all, or below rounding.

    Args:
        function: Values ``... x d`` to ``...``, each of its own row alone.
        starts: Points in the box, ``... x d``.
        bounds: ``2 x d``. A column of width zero stays as it is.
        max_evaluations: Of the function and its gradient.
        tolerance: See above.

    Returns:
        The points, in the box, and their values, at least those of the starts.

    References:
        Bertsekas, Projected Newton methods for optimization problems with simple
        constraints, SIAM J. Control Optim. 1982; Nocedal, Wright, Numerical
        Optimization, 2006, algorithm 7.4.
    """
    low, width = bounds[0], bounds[1] - bounds[0]
    shape = starts.shape
    scaled = torch.where(width > 0, (starts - low) / width.clamp_min(1e-300), 0.0)
    u = scaled.clamp(0, 1).reshape(-1, shape[-1])

    def point(u: Tensor) -> Tensor:
        x = torch.where(width > 0, low + width * u, starts.reshape(u.shape))
        return torch.minimum(torch.maximum(x, low), bounds[1]).reshape(shape)

    def loss(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            values = -function(point(u))
            (gradient,) = torch.autograd.grad(values.sum(), u)
        return values.detach().flatten(), gradient

    f, g = loss(u)
    spread = f.max() - f.min()
    rounding = 16 * torch.finfo(f.dtype).eps
    memory = _Memory(u)
    direction, slope, step = _direction(u, g, memory)
    least = torch.maximum(tolerance * spread, rounding * f.abs())
    active = -slope > least
    for _ in range(max_evaluations - 1):
        if not bool(active.any()):
            break
        trial = (u + step[:, None] * direction).clamp(0, 1)
        trial = torch.where(active[:, None], trial, u)
        f_new, g_new = loss(trial)
        change = trial - u
        risen = f_new <= f + _ARMIJO * (g * change).sum(-1)
        taken = active & risen & torch.isfinite(g_new).all(-1)
        memory.add(change, g_new - g, taken)
        u = torch.where(taken[:, None], trial, u)
        f = torch.where(taken, f_new, f)
        g = torch.where(taken[:, None], g_new, g)
        ahead, _, first = _direction(u, g, memory)
        direction = torch.where(taken[:, None], ahead, direction)
        step = torch.where(taken, first, 0.5 * step)
        slope = (direction * g).sum(-1)
        least = torch.maximum(tolerance * spread, rounding * f.abs())
        active = active & (-slope > least) & (-slope * step > rounding * f.abs())
    return point(u), -f.reshape(shape[:-1])


class _Memory:
    """The last steps of every problem and the changes of its gradient along them."""

    def __init__(self, u: Tensor) -> None:
        self.steps = u.new_zeros(_MEMORY, *u.shape)
        self.changes = u.new_zeros(_MEMORY, *u.shape)

    def add(self, step: Tensor, change: Tensor, taken: Tensor) -> None:
        """Remember the steps that were taken and bend upwards."""
        curvature = (step * change).sum(-1)
        good = taken & (curvature > 1e-10 * change.square().sum(-1))
        keep = good[None, :, None]
        for name, new in (("steps", step), ("changes", change)):
            old = getattr(self, name)
            moved = torch.cat([old[1:], new[None]])
            setattr(self, name, torch.where(keep, moved, old))

    def times(self, g: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Product of the inverse Hessian with gradients; which of them know any."""
        steps, changes = self.steps * free, self.changes * free
        curvature = (steps * changes).sum(-1)  # k x b
        good = curvature > 1e-12
        rho = torch.where(good, 1 / curvature.clamp_min(1e-12), 0.0)
        r, alphas = g * free, []
        for i in reversed(range(_MEMORY)):
            alpha = rho[i] * (steps[i] * r).sum(-1)
            r = r - alpha[:, None] * changes[i]
            alphas.append(alpha)
        size = g.new_ones(len(g))
        for i in range(_MEMORY):  # that of the last good pair
            ratio = curvature[i] / changes[i].square().sum(-1).clamp_min(1e-300)
            size = torch.where(good[i], ratio, size)
        r = size[:, None] * r
        for i in range(_MEMORY):
            beta = rho[i] * (changes[i] * r).sum(-1)
            r = r + (alphas[-1 - i] - beta)[:, None] * steps[i]
        return r * free, good.any(0)


def _direction(u: Tensor, g: Tensor, memory: _Memory) -> tuple[Tensor, Tensor, Tensor]:
    """Where to go, the slope there, and how far at first."""
    held = ((u <= 0) & (g > 0)) | ((u >= 1) & (g < 0))
    free = (~held).to(g)
    product, known = memory.times(g, free)
    slope = -(product * g).sum(-1)
    bare = ~known | (slope >= 0) | ~torch.isfinite(slope)
    direction = torch.where(bare[:, None], -g * free, -product)
    slope = (direction * g).sum(-1)
    largest = direction.abs().amax(-1).clamp_min(1e-300)
    step = torch.where(bare, _LONGEST_FIRST / largest, torch.ones_like(largest))
    return direction, slope, step
