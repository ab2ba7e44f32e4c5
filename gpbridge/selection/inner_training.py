r"""Training to a minimum, from where the last one was.

In: a loss, parameters and hyperparameters. Out: the parameters at a minimum, as
precisely as the implicit function theorem needs them. Next: ``hypergradient_descent``
trains so before each step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from gpbridge.checks import check_choice, check_count, check_share
from gpbridge.selection.loss_curvature import (
    CurvatureOperator,
    flatten,
    relative_inner_gradient,
    unflatten,
    zeros_for_none,
)
from gpbridge.selection.loss_gradient import Loss, value_and_gradient
from gpbridge.types import Params

_PATIENCE = 3  # rounds without progress


@dataclass(frozen=True)
class LBFGSTraining:
    """Minimise a deterministic loss by L-BFGS with line search.

    Stops where the relative inner gradient of :class:`Hypergradient` is below the
    tolerance, or where round-off ends all progress, as float32 does near 1e-3. The cost
    is one or two gradients of all data per iteration.

    Args:
        tolerance: Of the relative inner gradient.
        max_iterations: At most so many, rounded up to tens.
        history_size: Pairs of steps and gradient changes that are kept.
        curvature: Of the relative inner gradient: that of the hypergradient.

    References:
        Liu and Nocedal, On the limited memory BFGS method for large scale optimization,
        Mathematical Programming 1989.
    """

    tolerance: float = 1e-3
    max_iterations: int = 500
    history_size: int = 20
    curvature: str = "hessian"

    def __post_init__(self) -> None:
        """Check the options."""
        check_share(tolerance=self.tolerance)
        check_count(max_iterations=self.max_iterations, history_size=self.history_size)
        check_choice("curvature", self.curvature, ("hessian", "ggn"))

    def __call__(
        self,
        loss: Loss,
        params: Params,
        hparams: Params,
        batches: Iterable[Any] | None = None,
    ) -> Params:
        """The parameters of least loss that were met; those given are not changed.

        Args:
            loss: As for :func:`~gpbridge.selection.hypergradient`.
            params: Where to start.
            hparams: The hyperparameters.
            batches: Re-iterable batches, or None.

        Returns:
            The parameters.
        """
        theta = flatten(params).detach().clone()
        like = {k: p.detach() for k, p in params.items()}
        fixed = {k: h.detach() for k, h in hparams.items()}

        def closure():
            value, slopes, _ = value_and_gradient(
                loss, unflatten(theta, like), fixed, batches
            )
            theta.grad = flatten(zeros_for_none(slopes, like))
            return value

        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=10,
            history_size=self.history_size,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )
        best = theta.clone()
        least = steepest = float("inf")
        since = 0
        unit = 4 * torch.finfo(theta.dtype).eps
        for iteration in range(0, self.max_iterations + 10, 10):
            value, size = float(closure()), float(theta.grad.norm())
            if not (abs(value) < float("inf") and size < float("inf")):
                break
            # Losses that differ by round-off only are told apart by their gradients.
            slack = unit * abs(value)
            if value < least - slack or (value <= least + slack and size < steepest):
                best, since = theta.clone(), 0
                least, steepest = value, size
            else:
                since += 1
            if since >= _PATIENCE or self._converged(loss, theta, like, fixed, batches):
                break
            if iteration < self.max_iterations:
                try:
                    optimizer.step(closure)
                except IndexError:  # upstream's line search, where all it met was NaN
                    break
        return unflatten(best, like)

    def _converged(self, loss, theta, like, hparams, batches) -> bool:
        operator = CurvatureOperator(
            theta,
            theta.new_zeros(()),
            like=like,
            hparams=hparams,
            loss=loss,
            curvature=self.curvature,
            batches=batches,
        )
        return relative_inner_gradient(operator, theta.grad) <= self.tolerance
