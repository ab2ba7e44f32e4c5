r"""Functions drawn from a posterior: prior draws that a linear solve pulls to the data.

.. math:: (f | y)(\cdot) = f_0(\cdot) + k(\cdot, X) v, \qquad
          H v = y - f_0(X) - \epsilon, \quad H = k(X, X) + \Sigma

In: a prior draw, data, a solver of any kind. Out: a function of X, differentiable and
frozen, that is evaluated anywhere without another solve. Its error has two parts: that
of the features (how well :math:`f_0` has the kernel's covariance) and of the solve.
Next: ``pathwise`` hands such draws to botorch; ``sampled`` builds a model of them.

References:
    Wilson et al., Pathwise conditioning of Gaussian processes, JMLR 2021, eq. (12).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from torch import Generator, Tensor, nn

from gpbridge.checks import ShapeError, check_finite, check_inputs, check_tensor
from gpbridge.kernel_operator import cross_products, solving_operator
from gpbridge.prior_draws import TILE_BYTES, PriorDraw, check_points
from gpbridge.randomness import fresh, row_normals
from gpbridge.solvers import choose_solver
from gpbridge.types import Solution, Solver


class PosteriorDraw(nn.Module):
    r"""Frozen functions :math:`m(x) + f_0(x) + k(x, X) v`, in the caller's units.

    Made by :func:`condition` and by ``SampledGP.draw``. It owns what it needs, so that
    later changes of a kernel do not reach it; memory n (d + s m) and the prior draw.
    Computed in float64, returned in the dtype of the argument.

    Args:
        prior: The functions before the data.
        X: Inputs ``n x d``, transformed; ``n`` may be 0.
        weights: Representer weights v, ``n x s x m``.
        mean: Mean function, None for zero.
        input_transform: From the caller's inputs to those of the kernel.
        outcome_transform: Its inverse maps values to the caller's targets.
        solution: What is known about the solve.
    """

    def __init__(
        self,
        prior: PriorDraw,
        X: Tensor,
        weights: Tensor,
        mean: Mean | None = None,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        solution: Solution | None = None,
    ) -> None:
        super().__init__()
        self.prior, self.mean = prior, mean
        self.input_transform = input_transform
        self.outcome_transform = outcome_transform
        self.register_buffer("X", X)
        self.register_buffer("weights", weights)
        self.solution = None if solution is None else solution._replace(value=None)

    @property
    def num_samples(self) -> int:
        """The number s of functions."""
        return self.weights.shape[1]

    @property
    def num_outputs(self) -> int:
        """The number m of outputs."""
        return self.weights.shape[2]

    def forward(self, X: Tensor) -> Tensor:
        """Evaluate all draws, ``... x n x d`` to ``s x ... x n x m``."""
        Z = self._prepared(X)
        moved = kernel_products(self.prior.kernel, Z, self.X, self.weights.flatten(1))
        moved = moved.unflatten(-1, self.weights.shape[1:]).movedim(-2, 0)
        return self._finished(self.prior(Z) + moved, Z, X)

    def each(self, X: Tensor) -> Tensor:
        """Evaluate each draw at inputs of its own, ``s x ... x n x d`` likewise."""
        Z = self._prepared(X, self.num_samples)
        rows = Z.flatten(1, -2)  # s x rows x d
        step = max(1, TILE_BYTES // (8 * max(1, len(self.X) * rows.shape[1])))
        parts = [self.weights.new_zeros(0, rows.shape[1], self.num_outputs)]
        for some, v in zip(
            rows.split(step), self.weights.movedim(1, 0).split(step), strict=True
        ):
            K = dense(self.prior.kernel, some.flatten(0, 1), self.X)
            parts.append(K.unflatten(0, some.shape[:2]) @ v)
        moved = torch.cat(parts).reshape(*Z.shape[:-1], self.num_outputs)
        return self._finished(self.prior.each(Z) + moved, Z, X)

    def take(self, samples: Tensor) -> PosteriorDraw:
        """Some of the functions, by number."""
        return PosteriorDraw(
            self.prior.take(samples),
            self.X,
            self.weights[:, samples],
            self.mean,
            self.input_transform,
            self.outcome_transform,
            self.solution,
        )

    def _prepared(self, X: Tensor, num_samples: int | None = None) -> Tensor:
        check_tensor(X=X)
        if self.input_transform is None:
            check_points(X, self.prior.num_inputs, num_samples)
            return X.to(self.weights)
        check_points(X, X.shape[-1] if X.dim() else 1, num_samples)
        Z = self.input_transform(X)
        check_points(Z, self.prior.num_inputs, num_samples)
        return Z.to(self.weights)

    def _finished(self, values: Tensor, Z: Tensor, X: Tensor) -> Tensor:
        values = values + mean_values(self.mean, Z, self.num_outputs)
        values = values.to(X.dtype)
        if self.outcome_transform is not None:
            values, _ = self.outcome_transform.untransform(values, X=X)
        return values


def condition(
    prior_draw: PriorDraw,
    X: Tensor,
    Y: Tensor,
    noise: float | Tensor,
    solver: Solver | None = None,
    *,
    mean: Mean | None = None,
    initial: Tensor | None = None,
    generator: Generator | None = None,
) -> PosteriorDraw:
    r"""Condition drawn functions on noisy observations by Matheron's rule.

    .. math:: (f | y)(\cdot) = f_0(\cdot) + k(\cdot, X) v, \qquad
              H v = y - m(X) - f_0(X) - \epsilon, \quad \epsilon \sim N(0, \Sigma)

    One solve for all functions. The noise is drawn into the right-hand sides once; the
    functions are draws of f, not of y.

    Args:
        prior_draw: Functions from the prior, zero mean; copied.
        X: Inputs ``n x d``.
        Y: Targets ``n`` or ``n x m``.
        noise: Noise variance, one number or ``n``.
        solver: Default :func:`~gpbridge.solvers.choose_solver`.
        mean: Prior mean function; copied.
        initial: A first guess of the weights, ``n x s x m``.
        generator: Source of the noise. Without one, draws are fresh on each call; the
            global random state is left alone in either case.

    Returns:
        The conditioned functions; without data they are the prior draw plus the mean.

    Raises:
        ShapeError: If shapes disagree.
        TypeError: If ``prior_draw`` is not one.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from gpbridge.prior_draws import draw_prior
        >>> X = torch.linspace(0, 1, 5).double()[:, None]
        >>> draw = condition(draw_prior(RBFKernel(), 1, 3), X, X.sin(), 1e-6)
        >>> bool((draw(X) - X.sin()).abs().max() < 0.01)
        True
    """
    if not isinstance(prior_draw, PriorDraw):
        raise TypeError(
            f"prior_draw must be a PriorDraw, but is {type(prior_draw).__name__}. Try "
            "draw_prior(kernel, num_inputs, num_samples)."
        )
    check_tensor(Y=Y)
    check_inputs(X, "X")
    check_points(X, prior_draw.num_inputs)
    m = prior_draw.num_outputs
    targets = Y[:, None] if Y.dim() == 1 else Y
    if X.dim() != 2 or targets.shape != (len(X), m):
        raise ShapeError(
            f"Y must be ``n x {m}`` for X ``n x d`` and a prior draw with {m} outputs, "
            f"but Y has shape {tuple(Y.shape)} and X {tuple(X.shape)}."
        )
    check_finite(Y=Y)
    generator = fresh(generator)
    # The system is solved, and the functions are evaluated, in float64.
    prior = copy.deepcopy(prior_draw).double().requires_grad_(False)
    if mean is not None:
        mean = copy.deepcopy(mean).double().requires_grad_(False)
    Z, targets = X.detach().double(), targets.detach().double()
    variance = torch.as_tensor(noise, dtype=torch.float64, device=Z.device).detach()
    if variance.numel() not in (1, len(Z)):
        raise ShapeError(
            f"noise must be one variance or ``n`` = {len(Z)} of them, one per row of "
            f"X, but has shape {tuple(variance.shape)}."
        )
    variance = variance.reshape(-1).expand(len(Z))
    with torch.no_grad():
        # From a seed: a generator in the state in which it made the prior draw must not
        # give its numbers again as noise.
        device = generator.device
        seed = int(torch.randint(2**31, (), generator=generator, device=device))
        epsilon = row_normals(len(Z), prior.num_samples * m, seed).to(Z)
        epsilon = epsilon.unflatten(-1, (prior.num_samples, m))
        epsilon = variance.sqrt()[:, None, None] * epsilon
        wanted = targets - mean_values(mean, Z, m)
        rhs = wanted[:, None] - prior(Z).movedim(0, 1) - epsilon  # n x s x m
        solution = solve_columns(prior.kernel, Z, variance, rhs, solver, initial)
    return PosteriorDraw(prior, Z, solution.value, mean, solution=solution)


def solve_columns(
    kernel: Kernel,
    X: Tensor,
    noise: Tensor,
    rhs: Tensor,
    solver: Solver | None = None,
    initial: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Solution:
    r"""Solve with :math:`H = k(X, X) + \Sigma` for right-hand sides ``n x ...``.

    Args:
        kernel: The kernel, of the dtype of the inputs.
        X: Inputs ``n x d``.
        noise: Noise variances ``n``.
        rhs: Right-hand sides, ``n`` first.
        solver: As for :func:`condition`.
        initial: A first guess, shaped as ``rhs``.
        compute_dtype: As in :func:`~gpbridge.kernel_operator.solving_operator`.

    Returns:
        The solution, shaped as ``rhs``.
    """
    if not len(X):
        return Solution(rhs.clone(), 0.0, 0, True)
    if initial is not None:
        initial = initial.to(rhs).reshape(len(X), -1)
    operator = solving_operator(kernel, X, noise, compute_dtype)
    solver = choose_solver(operator) if solver is None else solver
    with torch.no_grad():
        solution = solver(operator, rhs.reshape(len(X), -1), initial)
    return solution._replace(value=solution.value.reshape(rhs.shape))


def kernel_products(kernel: Kernel, X_new: Tensor, X: Tensor, V: Tensor) -> Tensor:
    """Product of a cross-covariance with columns, differentiable in the new inputs.

    Args:
        kernel: The kernel.
        X_new: Points ``... x t x d``.
        X: Points ``n x d``.
        V: Columns ``n x k``.

    Returns:
        ``... x t x k``; memory is that and one tile, without gradients.
    """
    rows = X_new.reshape(-1, X_new.shape[-1])
    shape = (*X_new.shape[:-1], V.shape[-1])
    if not len(X) or not len(rows):
        return V.new_zeros(shape)
    # By size and not by mode for the rest: a value must not depend on gradients.
    step = max(1, TILE_BYTES // (8 * len(X)))
    if len(rows) > step and not (torch.is_grad_enabled() and rows.requires_grad):
        return cross_products(kernel, rows, X, V).reshape(shape)
    parts = [dense(kernel, tile, X) @ V for tile in rows.split(step)]
    return torch.cat(parts).reshape(shape)


def dense(kernel: Kernel, X_new: Tensor, X: Tensor) -> Tensor:
    """The cross-covariance as a matrix, of a kernel that is not being learnt."""
    if torch.is_grad_enabled() and (X_new.requires_grad or X.requires_grad):
        return kernel(X_new, X).to_dense()
    # Upstream's kernels round differently if inputs carry gradients: always as if.
    with torch.no_grad():
        return kernel(X_new.detach().clone().requires_grad_(), X).to_dense()


def mean_values(mean: Mean | None, X: Tensor, num_outputs: int) -> Tensor:
    """A mean function as botorch calls it, ``... x n x d`` to ``... x n x m``."""
    if mean is None:
        return X.new_zeros(*X.shape[:-1], num_outputs)
    if num_outputs == 1:
        return mean(X)[..., None]
    return mean(X.unsqueeze(-3)).mT.expand(*X.shape[:-1], num_outputs)


class MeanColumns(Mean):
    """Some of the outputs of a mean function, as botorch calls it."""

    def __init__(self, mean: Mean, num_outputs: int, columns: Sequence[int]) -> None:
        super().__init__()
        self.mean, self.num_outputs, self.columns = mean, num_outputs, list(columns)

    def forward(self, x: Tensor) -> Tensor:
        """Values, ``... x n`` for one output, else ``... x m x n``."""
        if len(self.columns) > 1:
            x = x.squeeze(-3)
        values = mean_values(self.mean, x, self.num_outputs)[..., self.columns]
        return values.squeeze(-1) if len(self.columns) == 1 else values.mT
