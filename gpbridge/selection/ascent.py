"""Ascent of a deterministic objective in the free parameters of a module.

In: a module and a scalar. Out: the value reached, the module there; never worse than
the start. Next: ``scan`` refits at each value of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from botorch.optim.core import OptimizationStatus, scipy_minimize
from botorch.optim.utils import get_parameters_and_bounds
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor, nn

NATS = 0.1  # of an evidence; a smaller rise at the end is not worth a word


class Ascent(NamedTuple):
    """Where an ascent ended; ``message`` is empty, or says that it was cut off."""

    value: float
    message: str = ""


def ascend(model: nn.Module, objective: Callable[[], Tensor], steps: int) -> Ascent:
    """Raise an objective by L-BFGS in the parameters that require gradients.

    Args:
        model: The module that holds them; it ends at the best of start and end.
        objective: A scalar in nats, deterministic.
        steps: Limit of iterations; 0 only evaluates.

    Returns:
        The value reached, never less than at the start; minus infinity, with nothing
        moved, where the start has no finite value. And whether the limit came while the
        objective still rose.
    """
    start = parameter_values(model)
    try:
        first = objective()
    except (NanError, NotPSDError):
        return Ascent(-math.inf)
    before = float(first.detach())
    if not math.isfinite(before):
        return Ascent(-math.inf)
    if steps == 0 or not first.requires_grad:
        return Ascent(before)
    del first  # and its graph
    parameters, bounds = get_parameters_and_bounds(model, requires_grad=True)
    best, message = [before], ""  # after each evaluation

    def closure() -> tuple[Tensor, list[Tensor | None]]:
        loss = -objective()
        best.append(max(best[-1], -float(loss.detach())))
        free = list(parameters.values())
        return loss, list(torch.autograd.grad(loss, free, allow_unused=True))

    try:
        end = scipy_minimize(closure, parameters, bounds, options={"maxiter": steps})
        window = -(-len(best) // 4)
        rise = best[-1] - best[-1 - window] if len(best) > window else 0.0
        if end.status is OptimizationStatus.STOPPED and rise > NATS:
            message = (
                f"L-BFGS stopped at its limit of {steps} iterations while the "
                f"objective still rose, by {rise:.2g} nats within {window} evaluations"
            )
        with torch.no_grad():
            after = float(objective())
    except (NanError, NotPSDError):
        after = -math.inf
    if after >= before:
        return Ascent(after, message)
    load_values(model, start)
    return Ascent(before)


def parameter_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def load_values(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy values where names and shapes agree: a setter may have built new ones."""
    for name, parameter in model.named_parameters():
        value = state.get(name)
        if value is not None and value.shape == parameter.shape:
            parameter.copy_(value)


@torch.no_grad()
def load_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values of buffers where names and shapes agree."""
    for name, buffer in model.named_buffers():
        if name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])
