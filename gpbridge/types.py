"""The types that more than one room names in its signatures.

In: nothing. Out: the parameter dictionary, the three protocols of the library (a linear
solver, a posterior over weights, a draw of functions) and its records. Behaviour lives
elsewhere. Next: ``functional`` turns a module into a function of such a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

Params = dict[str, Tensor]
"""Weights by name, in the order of ``module.named_parameters()``."""

Apply = Callable[[Params, Tensor], Tensor]
"""A network as a function of its weights and ``... x n x d`` inputs."""


class Solution(NamedTuple):
    """The result of a linear solve, with the evidence of its quality.

    ``residual_norm`` is the largest relative residual over the right-hand sides,
    ``residual_norms`` has all of them, ``... x k``; both are of exact products.
    ``passes`` counts visits to all n^2 entries of the matrix, the exact check included.
    """

    value: Tensor
    residual_norm: float
    iterations: int
    converged: bool
    passes: float = 0.0
    residual_norms: Tensor | None = None


class Evidence(NamedTuple):
    """A log marginal likelihood in total nats, ``value = fit - complexity``.

    ``fit`` is the log joint density at the optimum, constants included; ``complexity``
    is half the log determinant of ``I + R' K R``; ``effective_dimension`` is the trace
    of ``K R (I + R' K R)^-1 R'``, the number of directions that the data determine.
    ``lower_bound`` says whether the value is at most that of the full curvature, as it
    is for a diagonal one; exact values are none.
    """

    value: Tensor
    fit: Tensor
    complexity: Tensor
    effective_dimension: Tensor
    lower_bound: bool = False


@dataclass(frozen=True)
class FitResult:
    """A trained network and the facts about its training that a posterior needs.

    Attributes:
        network: The trained module, in eval mode; the caller's module is untouched.
        fit_rows: Row numbers of the data used for gradient steps.
        validation_rows: Row numbers held out for early stopping, or empty.
        residual_variance: Mean squared residual on the fit rows, per output (``m``),
            in squared units of the targets; None for classification.
        validation_variance: The same on the validation rows; None without them.
        weight_decay: The coupled weight decay at the end of training, for the loss
            that is a mean over data.
        history: One list per recorded quantity, one entry per epoch.
    """

    network: nn.Module
    fit_rows: Tensor
    validation_rows: Tensor
    residual_variance: Tensor | None
    validation_variance: Tensor | None
    weight_decay: float
    history: dict[str, list[float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Numbers of rows, and what was recorded."""
        recorded = ", ".join(
            f"{name} {values[-1]:.4g}"
            for name, values in self.history.items()
            if values
        )
        return (
            f"{type(self).__name__}({type(self.network).__name__}, "
            f"{len(self.fit_rows)} fit rows, {len(self.validation_rows)} validation "
            f"rows, weight_decay {self.weight_decay:.3g}; last: {recorded})"
        )


@runtime_checkable
class Solver(Protocol):
    """Solves ``operator @ value = rhs`` for a symmetric positive definite operator."""

    def __call__(
        self, operator: LinearOperator, rhs: Tensor, initial: Tensor | None = None
    ) -> Solution:
        """Return the solution for ``... x n x k`` right-hand sides."""
        ...


@runtime_checkable
class FunctionDraws(Protocol):
    """Frozen draws of a function, differentiable in their argument."""

    def __call__(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        ...


@runtime_checkable
class WeightPosterior(Protocol):
    """A distribution over the functions that a network can be."""

    def draw(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> FunctionDraws:
        """Freeze ``num_samples`` functions."""
        ...
